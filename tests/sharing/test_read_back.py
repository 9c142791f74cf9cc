"""What is written is read back before it counts: a bit that is not held, and a flush that fails."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.checkpoint.header import DTYPES
from headshare.errors import CheckpointError, OutputError
from headshare.sharing import assembly, safetensors_writer
from headshare.sharing.safetensors_writer import same_bytes
from headshare.sharing.writer import all_finite
from support import tiny
from support.folders import MANIFEST, WEIGHTS, contents, left_behind, nothing_changes
from support.shares import share

FLOATS = ("F64", "F32", "F16", "BF16")


def cut_slices(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Let slices have so many bytes, so that a tiny model has many, and what is read back at once be another size."""
    monkeypatch.setattr(assembly, "SLICE_BYTES", nbytes)
    monkeypatch.setattr(safetensors_writer, "SLICE_BYTES", 136)
    monkeypatch.setattr(safetensors_writer, "FLUSH_BYTES", 3000)


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_slices(monkeypatch, 1000)


@pytest.mark.parametrize("nbytes", [24, 4099])
def test_a_file_of_many_slices_is_the_file_of_one_and_has_its_digest(
    nbytes: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = share(llama, tmp_path / "one")
    cut_slices(monkeypatch, nbytes)
    many = share(llama, tmp_path / "many")
    assert contents(one)[WEIGHTS] == contents(many)[WEIGHTS]
    listed = json.loads((many / MANIFEST).read_text())["files"][WEIGHTS]
    assert listed["blake3"] == blake3((many / WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize("at", [0, 5000, -1])
def test_a_bit_that_a_file_does_not_hold_is_found_and_nothing_is_left(
    at: int, small_slices: None, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the header, in the middle, and in the last byte of all."""
    with hs.open_checkpoint(share(llama, tmp_path / "whole")) as whole:
        size = (whole.path / WEIGHTS).stat().st_size
    place = at % size
    read = safetensors_writer.read_at

    def flipped(descriptor: int, buffer: memoryview, offset: int) -> bool:
        done = read(descriptor, buffer, offset)
        if offset <= place < offset + len(buffer):
            buffer[place - offset] ^= 1
        return done

    monkeypatch.setattr(safetensors_writer, "read_at", flipped)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not hold what was written to it from byte"):
        share(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert left_behind(tmp_path) == []


def test_a_file_that_is_cut_while_it_is_written_is_found(
    small_slices: None, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = safetensors_writer.read_at
    monkeypatch.setattr(safetensors_writer, "read_at", lambda *asked: read(*asked) and False)  # the bytes are there
    with nothing_changes(tmp_path), pytest.raises(CheckpointError, match="does not hold what was written"):
        share(llama, tmp_path / "out")


def test_a_flush_that_fails_while_the_file_grows_is_one_error(
    small_slices: None, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.fsync
    calls = []

    def fail(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if name == WEIGHTS:
            calls.append(name)
            raise OSError(5, "Input/output error")
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with nothing_changes(tmp_path), pytest.raises(OutputError, match="Input/output error"):
        share(llama, tmp_path / "out")
    assert len(calls) == 1


@pytest.mark.parametrize("code", FLOATS)
def test_finite_is_what_torch_calls_finite(code: str) -> None:
    """Each special number alone among the largest that are finite, of either sign, in each place of a small tensor."""
    dtype = DTYPES[code]
    largest = torch.finfo(dtype).max
    quiet = torch.tensor([math.nan], dtype=dtype)
    bits: Any = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    signed = (quiet.view(bits) | torch.iinfo(bits).min).view(dtype)  # NaN with a sign
    loud = (torch.tensor([math.inf], dtype=dtype).view(bits) + 1).view(dtype)  # the first bits that are none
    special = [0.0, -0.0, largest, -largest, torch.finfo(dtype).tiny, math.inf, -math.inf]
    for number in [*(torch.tensor([each], dtype=dtype) for each in special), quiet, signed, loud, -loud]:
        for around in (largest, -largest, 0.0):
            for place in range(5):
                numbers = torch.full((5,), around, dtype=dtype)
                numbers[place] = number[0]
                numbers = numbers.view(bits).clone().view(dtype)
                assert all_finite(numbers) == bool(torch.isfinite(numbers).all()), (number, around)
    assert all_finite(torch.empty(0, 3, dtype=dtype))
    strided = torch.full((3, 4), math.inf, dtype=dtype)
    strided[:, 1] = 1
    assert all_finite(strided[:, 1])
    assert all_finite(torch.tensor(1.0, dtype=dtype))


def test_a_number_that_is_not_finite_is_refused_in_every_type(tmp_path: Path) -> None:
    for code in ("F32", "F16", "BF16"):
        dense = tiny.make_llama(tmp_path / code)
        tensors = {name: tensor.to(DTYPES[code]) for name, tensor in load_file(dense / WEIGHTS).items()}
        tensors["model.norm.weight"][-1] = -math.inf
        save_file(tensors, dense / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* holds NaN or infinite"):
            share(dense, tmp_path / f"{code} out")


def test_bytes_are_the_same_up_to_the_last_one_wherever_they_lie() -> None:
    whole = torch.arange(100, dtype=torch.uint8)
    for start in (0, 1, 8):
        for length in (0, 1, 7, 8, 9, 60):
            one = whole[start : start + length]
            assert same_bytes(one, one.clone())
            for place in range(length):
                other = one.clone()
                other[place] += 1
                assert not same_bytes(one, other)
