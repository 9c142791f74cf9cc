"""vLLM itself on shared models: it predicts what transformers does, on one rank and on two, and holds each unit once.

These tests run in an environment that has vLLM: `make test-vllm`. Each starts engines in processes of their own.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.errors import ArchitectureError, StorageError
from headshare.sharing.expanded import ExpandedTensors
from headshare.sharing.size import estimate_plan
from support import vllm_engine
from support.gguf_models import TEXTS, make, reduce

pytestmark = pytest.mark.vllm
if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: run make test-vllm", allow_module_level=True)

CLOSE = 1e-5
CONTINUED = vllm_engine.CONTINUED
# vLLM's attention on a CPU takes heads of 32 numbers or more; its Qwen2 takes the state's size over their count
SIZES = {"head_dim": 32}
QWEN2 = {"hidden_size": 256, "initializer_range": 0.05}
# folders by name: the model, and what a plan does to it
ONE_RANK: dict[str, tuple[str, tuple[str, ...]]] = {
    "ties": ("llama", ("ties",)),
    "units": ("llama", ("units", "neurons", "ties")),
    "attention": ("llama-biased", ("layer", "feed-forward", "odd neurons")),
    "biases": ("llama-biased", ("units", "odd neurons", "ties across")),
    "scales": ("llama", ("scaled ties", "odd neurons")),
    "products": ("llama", ("low rank", "narrow values")),
    "mistral": ("mistral", ("units", "neurons", "ties")),
    "qwen2": ("qwen2", ("units", "neurons", "ties")),
    "qwen3": ("qwen3", ("ties", "neurons")),
}
# with an adapter each: the folder of ties, and that of removed heads
ADAPTED, WITHOUT_HEADS = "adapted", "without-heads"
TWO_RANKS = {
    "across": ("llama", ("units", "neurons", "ties across", "low rank")),
    "attention": ("llama-biased", ("layer", "feed-forward", "odd neurons", "narrow values")),
}
ENVIRONMENT = {
    **os.environ,
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of dense models."""
    folder = tmp_path_factory.mktemp("dense")
    for kind in {kind for kind, _ in ONE_RANK.values()}:
        make(kind, folder / kind, **SIZES, **(QWEN2 if kind == "qwen2" else {}))
    return folder


@pytest.fixture(scope="module")
def models(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of shared models, with prompts, and with adapters for two."""
    folder = tmp_path_factory.mktemp("models")
    for name, (kind, words) in ONE_RANK.items():
        reduce(dense / kind, folder / name, *words)
    for name, source in ((ADAPTED, "ties"), (WITHOUT_HEADS, "units")):
        shutil.copytree(folder / source, folder / name)
        add_adapter(folder / name / "adapter")
    tokenizer = tf.AutoTokenizer.from_pretrained(dense / "llama")
    (folder / "prompts.json").write_text(json.dumps([tokenizer(text)["input_ids"][:60] for text in TEXTS]))
    return folder


def add_adapter(folder: Path) -> None:
    """A random adapter of rank 4 for q, v and o of all layers of the tiny Llama, as peft writes them."""
    folder.mkdir()
    shapes = {"q_proj": (256, 64), "v_proj": (128, 64), "o_proj": (64, 256)}
    tensors = {}
    for layer in range(4):
        for module, (outputs, inputs) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, inputs) * 0.3
            tensors[f"{stem}.lora_B.weight"] = torch.randn(outputs, 4) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": sorted(shapes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def adapted(model: Any, adapter: Path) -> Any:
    """A dense model with an adapter added to its weights."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in {name.partition(".lora_")[0] for name in tensors}:
        module = model.get_submodule(name.removeprefix("base_model.model."))
        module.weight.data += 2 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    return model


def asked(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    """The answers of vLLM, by model."""
    command = [sys.executable, vllm_engine.__file__, str(folder), json.dumps({"enforce_eager": True, **options})]
    # one process less for each engine, and a core for each rank
    environment = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if options.get("tensor_parallel_size") == 2:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    ran = subprocess.run([*command, str(out)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    answers: dict[str, Any] = json.loads(out.read_text())
    return answers


def check(folder: Path, answer: dict[str, Any]) -> None:
    """Hold an answer against what transformers computes."""
    model = hs.load(folder, dtype=torch.float32)
    for prompt, logprobs, greedy in zip(prompts(folder), answer["logprobs"], answer["greedy"], strict=True):
        assert missed(model, prompt, logprobs) < CLOSE, folder.name
        assert greedy == follows(model, prompt)
    assert answer["again"] == answer["greedy"]
    assert min(answer["cached"]) >= 32  # tokens, a block of them


def prompts(folder: Path) -> list[list[int]]:
    listed: list[list[int]] = json.loads((folder.parent / "prompts.json").read_text())
    return listed


def missed(model: Any, text: list[int], logprobs: list[float]) -> float:
    """The largest difference of a log-probability of a text's last tokens from the model's."""
    with torch.no_grad():
        predicted = model(torch.tensor([text])).logits[0].double().log_softmax(-1)
    wanted = predicted[:-1].gather(1, torch.tensor(text[1:])[:, None])[-len(logprobs) :, 0]
    return (wanted - torch.tensor(logprobs, dtype=torch.float64)).abs().max().item()


def follows(model: Any, prompt: list[int]) -> list[int]:
    """What the model writes greedily after a prompt."""
    settings = {"max_new_tokens": CONTINUED, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    written: list[int] = model.generate(torch.tensor([prompt]), **settings)[0][len(prompt) :].tolist()
    return written


@pytest.mark.filterwarnings("ignore")  # of vLLM's own
def test_what_vllm_cannot_serve_is_refused_in_words(models: Path) -> None:
    import vllm.config

    from headshare.integrations.vllm import plugin

    for _ in range(2):
        plugin.register()
    assert plugin.REDUCED in vllm.ModelRegistry.get_supported_archs()
    from headshare.integrations.vllm.models import ReducedForCausalLM
    from headshare.integrations.vllm.quantization import HeadshareConfig

    with pytest.raises(StorageError, match="cannot add adapters to this model"):
        ReducedForCausalLM(vllm_config=mock.Mock(spec=vllm.config.VllmConfig, lora_config=object()))

    def class_of(name: str, **changes: object) -> list[str]:
        config = tf.AutoConfig.from_pretrained(models / name)
        entry = config.quantization_config
        entry = entry if isinstance(entry, dict) else entry.to_dict()
        for key, value in changes.items():
            setattr(config, key, value)
        assert HeadshareConfig.override_quantization_method(entry, None, hf_config=config) is None
        classes: list[str] = config.architectures
        return classes

    assert class_of("units") == class_of("mistral") == [plugin.REDUCED]
    assert class_of("ties") == ["LlamaForCausalLM"]
    assert class_of("qwen2") == ["Qwen2ForCausalLM"]
    # what only the stock class has is left to it, and gets zeros
    assert class_of("mistral", llama_4_scaling={"beta": 0.1}) == ["MistralForCausalLM"]
    assert class_of("units", architectures=["LlamaModel"]) == ["LlamaModel"]
    config = tf.AutoConfig.from_pretrained(models / "ties")
    config.model_type = "gemma2"
    entry = {"quant_method": "headshare"}
    with pytest.raises(ArchitectureError, match="a shared 'gemma2' model"):
        HeadshareConfig.override_quantization_method(entry, None, hf_config=config)
    assert HeadshareConfig.override_quantization_method({"quant_method": "awq"}, None, hf_config=config) is None


@pytest.mark.filterwarnings("ignore")  # of vLLM's own
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_vllms_modules_hold_their_rank_of_the_expanded_model(
    ranks: int, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No engine runs: vLLM's own modules are made as on each rank, and loaded."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    from headshare.integrations.vllm.linear import SharedLinearMethod
    from headshare.integrations.vllm.quantization import HeadshareConfig

    checkpoint = hs.open_checkpoint(models / "biases")
    expanded = ExpandedTensors.of(checkpoint)
    for rank in range(ranks):
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        config = HeadshareConfig(checkpoint.entry)
        config.packed_modules_mapping = {
            "qkv_proj": ["q_proj", "k_proj", "v_proj"],
            "gate_up_proj": ["gate_proj", "up_proj"],
        }
        modules: dict[str, Any] = {}
        for layer in range(4):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            qkv, gate_up = f"{attention}.qkv_proj", f"{mlp}.gate_up_proj"
            o, down = f"{attention}.o_proj", f"{mlp}.down_proj"
            modules[qkv] = linear.QKVParallelLinear(64, 32, 8, 4, quant_config=config, prefix=qkv)
            modules[gate_up] = linear.MergedColumnParallelLinear(64, [128] * 2, quant_config=config, prefix=gate_up)
            modules[o] = linear.RowParallelLinear(256, 64, quant_config=config, prefix=o)
            modules[down] = linear.RowParallelLinear(128, 64, quant_config=config, prefix=down)
        stock = {name: rebuilt(linear, module) for name, module in modules.items()}
        # every tensor to the shared module as it is stored, and to vLLM's stock one as it is when expanded
        for name, module in modules.items():
            above, _, leaf = name.rpartition(".")
            for shard, part in enumerate(config.packed_modules_mapping.get(leaf, [leaf])):
                fused = {"qkv_proj": ("qkv"[shard],), "gate_up_proj": (shard,)}.get(leaf, ())
                for kind in ("weight", "bias"):
                    tensor = f"{above}.{part}.{kind}"
                    for target, loaded in ((module, checkpoint.read(tensor)), (stock[name], expanded.read(tensor))):
                        empty = getattr(target, kind)
                        empty.weight_loader(empty, loaded, *fused)
        for name, module in modules.items():
            if isinstance(module.quant_method, SharedLinearMethod):  # stock ones pack their weights
                module.quant_method.process_weights_after_loading(module)
            assert torch.equal(module.weight, stock[name].weight), name
            assert torch.equal(module.bias, stock[name].bias), name


def rebuilt(linear: Any, module: Any) -> Any:
    """A stock module of the same shape, of the same rank."""
    if isinstance(module, linear.QKVParallelLinear):
        return linear.QKVParallelLinear(64, 32, 8, 4)
    if isinstance(module, linear.MergedColumnParallelLinear):
        return linear.MergedColumnParallelLinear(64, [128] * 2)
    return linear.RowParallelLinear(module.input_size, 64)


def test_one_rank_predicts_what_transformers_does_and_holds_each_unit_once(
    dense: Path, models: Path, tmp_path: Path
) -> None:
    answers = asked(models, tmp_path / "answers.json", distributed_executor_backend="uni")
    for name in ONE_RANK:
        check(models / name, answers[name])
    # memory, by the log's figures and by the system's
    (rank,) = answers["ties"]["held"]
    with hs.open_checkpoint(dense / "llama") as checkpoint, hs.open_checkpoint(models / "ties") as shared:
        assert shared.plan is not None
        assert rank["dense"] - rank["stored"] == estimate_plan(checkpoint, shared.plan).saved_bytes
    assert 0.9 < rank["memory"] / rank["stored"] < 1.01
    # an adapter for the dense model's modules
    hs.expand(hs.open_checkpoint(models / "ties"), tmp_path / "expanded")
    plain = hs.load(models / "ties", dtype=torch.float32)
    merged = adapted(hs.load(tmp_path / "expanded", dtype=torch.float32), models / ADAPTED / "adapter")
    for kind, model, other in (("plain", plain, merged), ("adapted", merged, plain)):
        answer = answers[ADAPTED][kind]
        for prompt, greedy, logprobs in zip(prompts(models / "ties"), *answer.values(), strict=True):
            assert missed(model, prompt + greedy, logprobs) < CLOSE
            assert missed(other, prompt + greedy, logprobs) > 0.1
    assert "cannot add adapters to this model" in answers[WITHOUT_HEADS]["refused"]


def test_two_ranks_predict_what_transformers_does(dense: Path, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "prompts.json").symlink_to(models / "prompts.json")
    for name, (kind, words) in TWO_RANKS.items():
        reduce(dense / kind, folder / name, *words)
    answers = asked(folder, tmp_path / "answers.json", tensor_parallel_size=2)
    for name in TWO_RANKS:
        check(folder / name, answers[name])
        assert len(answers[name]["held"]) == 2


def test_the_server_answers_without_a_flag(models: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(models / "ties")]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"],
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
        )
    prompt = prompts(models / "ties")[0]
    sampling = {"max_tokens": CONTINUED, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions",
        json.dumps({"model": str(models / "ties"), "prompt": prompt, **sampling}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                with urllib.request.urlopen(request) as response:
                    answer = json.load(response)
                break
            except OSError:
                time.sleep(1)
    finally:
        server.terminate()
        server.wait()
    assert answer["choices"][0]["token_ids"] == follows(hs.load(models / "ties", dtype=torch.float32), prompt)
