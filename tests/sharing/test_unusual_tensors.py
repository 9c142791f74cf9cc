"""Tensors that stand beside weights: of every type that the format has, masks, and names that wrappers leave."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.errors import CheckpointError
from support import tiny
from support.command_line import Run
from support.stored_types import STORED, is_written

BESIDE = "model.layers.0.beside"
FILE = "model.safetensors"


def with_tensor(folder: Path, tensor: torch.Tensor) -> Path:
    save_file({**load_file(folder / FILE), BESIDE: tensor}, folder / FILE, metadata={"format": "pt"})
    tf.AutoModelForCausalLM.from_pretrained(folder)  # transformers ignores what it does not need
    return folder


def raw(folder: Path) -> bytes:
    with safe_open(folder / FILE, framework="pt") as file:
        return bytes(file.get_tensor(BESIDE).contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("code", sorted(STORED))
def test_a_tensor_of_any_type_goes_along_bit_for_bit(code: str, llama: Path, tmp_path: Path, run: Run) -> None:
    bits = torch.tensor([0, 1, 0, 0, 0, 0, 1, 0] * 4, dtype=torch.uint8)
    tensor = bits.bool() if STORED[code] is torch.bool else bits.view(STORED[code])
    folder = with_tensor(llama, tensor)
    assert hs.open_checkpoint(folder).tensors[BESIDE].dtype == code
    assert run("share", str(folder), "out").status == 0
    assert run("verify", "out", "--against", str(folder)).out.startswith("ok")
    assert run("expand", "out", "dense").status == 0
    assert raw(tmp_path / "out") == raw(tmp_path / "dense") == raw(folder)


def test_a_type_that_is_not_read_is_named_and_not_called_damage(llama: Path) -> None:
    half_byte = getattr(torch, "float4_e2m1fn_x2", None)
    if half_byte is None or not is_written(half_byte):
        pytest.skip("torch or safetensors has no type of half a byte yet")
    with_tensor(llama, torch.arange(4, dtype=torch.uint8).view(half_byte))
    with pytest.raises(CheckpointError, match=rf"stores {BESIDE} as F4, a type that headshare does not read") as said:
        hs.open_checkpoint(llama)
    assert "damaged" not in str(said.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_minus_infinity_goes_along(dtype: torch.dtype, llama: Path, tmp_path: Path, run: Run) -> None:
    folder = with_tensor(llama, torch.full((8, 8), -torch.inf, dtype=dtype).triu(1))
    assert run("share", str(folder), "out").status == 0
    assert run("verify", "out", "--against", str(folder)).out.startswith("ok")
    assert raw(tmp_path / "out") == raw(folder)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_numbers_that_are_no_mask_and_not_finite_are_damage(value: float, llama: Path, tmp_path: Path) -> None:
    folder = with_tensor(llama, torch.tensor([1.0, value]))
    dense = hs.open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=rf"{BESIDE} .*NaN or infinite"):
        hs.share(dense, hs.make_plan(hs.score_units(dense), 0.3)).save(tmp_path / "out")


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("_orig_mod.", r"as torch\.compile does.*model\._orig_mod\.save_pretrained"),
        ("base_model.model.", r"as PEFT does.*merge_and_unload\(\)\.save_pretrained"),
        ("module.", r"as DistributedDataParallel does.*model\.module\.save_pretrained"),
        ("model._fsdp_wrapped_module.", r"as FSDP does"),
    ],
)
def test_names_that_a_wrapper_left_are_refused_by_the_wrappers_name(before: str, said: str, llama: Path) -> None:
    tensors = load_file(llama / FILE)
    save_file({before + name: tensor for name, tensor in tensors.items()}, llama / FILE, metadata={"format": "pt"})
    _, report = tf.AutoModelForCausalLM.from_pretrained(llama, output_loading_info=True)
    assert report["missing_keys"]  # transformers alone would make numbers up
    with pytest.raises(CheckpointError, match=said):
        hs.open_checkpoint(llama)


def test_families_have_no_names_that_wrappers_leave(tmp_path: Path) -> None:
    for name in tiny.FAMILIES:
        hs.open_checkpoint(tiny.make(name, tmp_path / name))
