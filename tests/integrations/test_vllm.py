"""vLLM itself on shared models: it predicts what transformers does, on one rank and on two, and holds each unit once.

These tests run in an environment that has vLLM: `make test-vllm`. Each starts engines in processes of their own.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import headshare as hs
from headshare.sharing.size import estimate_plan
from support import vllm_engine
from support.gguf_models import TEXTS, make, reduce

pytestmark = pytest.mark.vllm
if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: run make test-vllm", allow_module_level=True)

CLOSE = 1e-5
# what vLLM's attention takes on a CPU: heads of 32 numbers or more
SIZES = {"head_dim": 32}
# folders by name: the model, and what a plan does to it
ONE_RANK: dict[str, tuple[str, tuple[str, ...]]] = {
    "ties": ("llama", ("ties",)),
    "units": ("llama", ("units", "neurons", "ties")),
    "attention": ("llama-biased", ("layer", "feed-forward", "odd neurons")),
    "scales": ("llama", ("scaled ties", "odd neurons")),
    "products": ("llama", ("low rank", "narrow values")),
    "mistral": ("mistral", ("units", "neurons", "ties")),
    "qwen2": ("qwen2", ("units", "neurons", "ties")),
    "qwen3": ("qwen3", ("ties", "neurons")),
}
TWO_RANKS = ("ties", "units", "attention", "scales", "products", "qwen2")
ENVIRONMENT = {
    **os.environ,
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all shared models, and the prompts, as numbers."""
    folder = tmp_path_factory.mktemp("models")
    dense = tmp_path_factory.mktemp("dense")
    for name, (kind, words) in ONE_RANK.items():
        if not (dense / kind).exists():
            make(kind, dense / kind, **({"hidden_size": 256} if kind == "qwen2" else SIZES))
        reduce(dense / kind, folder / name, *words)
    tokenizer = tf.AutoTokenizer.from_pretrained(dense / "llama")
    (folder / "prompts.json").write_text(json.dumps([tokenizer(text)["input_ids"][:60] for text in TEXTS]))
    return folder


def asked(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    """The answers of vLLM, by model."""
    command = [sys.executable, vllm_engine.__file__, str(folder), json.dumps({"enforce_eager": True, **options})]
    environment = {**ENVIRONMENT, **({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if "uni" in options.values() else {})}
    ran = subprocess.run([*command, str(out)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    answers: dict[str, Any] = json.loads(out.read_text())
    return answers


def check(folder: Path, answer: dict[str, Any]) -> None:
    """Hold an answer against what transformers computes."""
    model = hs.load(folder, dtype=torch.float32)
    prompts = json.loads((folder.parent / "prompts.json").read_text())
    for prompt, logprobs, greedy in zip(prompts, answer["logprobs"], answer["greedy"], strict=True):
        with torch.no_grad():
            predicted = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
        wanted = predicted[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        assert (wanted - torch.tensor(logprobs, dtype=torch.float64)).abs().max() < CLOSE, folder.name
        settings = {"max_new_tokens": len(greedy), "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
        follows = model.generate(torch.tensor([prompt]), **settings)[0][len(prompt) :]
        assert follows.tolist() == greedy


def test_one_rank_predicts_what_transformers_does_and_holds_each_unit_once(models: Path, tmp_path: Path) -> None:
    answers = asked(models, tmp_path / "answers.json", distributed_executor_backend="uni")
    for name in ONE_RANK:
        check(models / name, answers[name])
    (rank,) = answers["ties"]["held"]
    with hs.open_checkpoint(models.parent / "dense0" / "llama") as dense, hs.open_checkpoint(models / "ties") as shared:
        assert shared.plan is not None
        assert rank["dense"] - rank["stored"] == estimate_plan(dense, shared.plan).saved_bytes
    assert 0 < rank["memory"] <= rank["stored"] + 2 * 2**21


def test_two_ranks_predict_what_transformers_does(models: Path, tmp_path: Path) -> None:
    some = tmp_path / "models"
    some.mkdir()
    for name in (*TWO_RANKS, "prompts.json"):
        (some / name).symlink_to(models / name)
    answers = asked(some, tmp_path / "answers.json", tensor_parallel_size=2)
    for name in TWO_RANKS:
        check(models / name, answers[name])
        assert len(answers[name]["held"]) == 2


def test_the_server_answers_without_a_flag(models: Path, tmp_path: Path) -> None:
    port = 8765
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(models / "ties")]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"],
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
        )
    prompt = json.loads((models / "prompts.json").read_text())[0]
    body = {"model": str(models / "ties"), "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions",
        json.dumps({**body, "return_token_ids": True}).encode(),
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
    model = hs.load(models / "ties", dtype=torch.float32)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    follows = model.generate(torch.tensor([prompt]), **settings)[0][len(prompt) :]
    assert answer["choices"][0]["token_ids"] == follows.tolist()
