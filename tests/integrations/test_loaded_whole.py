"""What a plan names is loaded, or loading is refused with the tensor's name: it is not left as memory happens to be."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import headshare as hs
from headshare.errors import CheckpointError, HeadshareError
from headshare.integrations.transformers.quantizer import HeadshareQuantizer
from headshare.integrations.transformers.sized import built
from support import tiny
from support.folders import MANIFEST, WEIGHTS
from support.shares import share

FORMAT = Path(__file__).parents[1] / "sharing" / "format"
LOADERS = {
    "hs.load": hs.load,
    "for causal models": AutoModelForCausalLM.from_pretrained,
    "bare": AutoModel.from_pretrained,
}


def changed(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy with other tensors in its first file, under the same metadata."""
    out.mkdir()
    for path in folder.iterdir():
        if path.name != MANIFEST:
            (out / path.name).write_bytes(path.read_bytes())
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata=metadata)
    index = out / "model.safetensors.index.json"
    index.unlink(missing_ok=True)
    return out


def named_by_plan(name: str) -> list[str]:
    """One tensor of each sort that this fixture's plan names."""
    endings = ("tie_scale", "factor_in", "factor_out", "weight_packed", "weight_scale", "weight_shape")
    tensors = sorted(hs.open_checkpoint(FORMAT / name).tensors)
    found = {end: next((each for each in tensors if each.endswith(end)), None) for end in (*endings, "q_proj.weight")}
    return [each for each in found.values() if each]


CASES = [(name, tensor) for name in ("scaled", "factored", "removed", "packed") for tensor in named_by_plan(name)]


@pytest.mark.parametrize(("name", "tensor"), CASES)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_folder_that_lacks_a_tensor_of_its_plan_is_refused_by_its_name(
    name: str, tensor: str, loader: str, tmp_path: Path
) -> None:
    folder = changed(FORMAT / name, tmp_path / "folder", lambda tensors: tensors.pop(tensor, None))
    with pytest.raises(CheckpointError) as error:
        LOADERS[loader](folder)
    assert tensor.rpartition(".")[0] in str(error.value)


@pytest.mark.parametrize("storage", ["owner", "alias"])
def test_tensors_under_a_name_that_the_model_does_not_have_are_not_loaded_and_that_is_noticed(
    storage: str, llama: Path, tmp_path: Path
) -> None:
    """All that the plan names is in the file, but transformers does not find it there."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers." in name]:
            tensors[f"elsewhere.{name}"] = tensors.pop(name)

    folder = changed(share(llama, tmp_path / "shared"), tmp_path / "folder", rename)
    for load in (lambda: hs.load(folder, storage=storage), lambda: AutoModelForCausalLM.from_pretrained(folder)):
        with pytest.raises(HeadshareError, match=r"nothing was loaded into model.layers.\d.self_attn"):
            load()


def test_weights_that_are_given_and_lack_a_tensor_of_the_plan_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = share(llama, tmp_path / "shared")
    given = load_file(folder / WEIGHTS)
    options = {"state_dict": given, "config": AutoConfig.from_pretrained(folder)}
    LlamaForCausalLM.from_pretrained(None, **options)
    del given["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(CheckpointError, match=r"nothing was loaded into model.layers.0.self_attn.k_proj.weight"):
        LlamaForCausalLM.from_pretrained(None, **options)


def test_a_model_without_its_head_is_loaded_bare_with_a_word(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = share(llama, tmp_path / "shared")
    with caplog.at_level(logging.WARNING, logger="headshare"):
        assert type(hs.load(shared)).__name__ == "LlamaForCausalLM"
        assert not caplog.records
        folder = changed(shared, tmp_path / "folder", lambda tensors: tensors.pop("lm_head.weight"))
        assert type(hs.load(folder)).__name__ == "LlamaModel"
    (record,) = caplog.records
    assert "has no weights for the head of LlamaForCausalLM: it is loaded without" in record.message


def test_a_model_of_zeros_instead_of_what_is_missing_is_never_given(tmp_path: Path) -> None:
    """Tied embeddings are not missing, though no file has the second."""
    dense = tiny.make_llama(tmp_path / "dense", tie_word_embeddings=True)
    model = hs.load(share(dense, tmp_path / "shared"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_shape_that_config_json_does_not_describe_is_refused_where_transformers_takes_any(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shorter(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]

    folder = changed(FORMAT / "scaled", tmp_path / "folder", shorter)
    # so do releases of transformers that let a quantizer load what it likes
    monkeypatch.setattr(HeadshareQuantizer, "param_needs_quantization", lambda *_: True)
    with pytest.raises(CheckpointError, match=r"holds model\.norm\.weight as \(\d+,\), and its config\.json makes"):
        AutoModelForCausalLM.from_pretrained(folder, device_map=device)


def test_a_model_that_is_built_for_its_shapes_is_tied_as_a_stock_one_and_draws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "tied")) as dense:
        stock = AutoModelForCausalLM.from_pretrained(dense.path)
        for name in ("normal_", "kaiming_uniform_"):  # torch's, by which modules fill their weights
            monkeypatch.setattr(torch.nn.init, name, lambda *_, **__: pytest.fail("a weight was drawn"))
        with torch.device("meta"):
            made = built(dense, LlamaForCausalLM)
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert [(name, one.shape) for name, one in made.named_parameters()] == [
        (name, one.shape) for name, one in stock.named_parameters()
    ]
