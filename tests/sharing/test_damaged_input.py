"""Damaged input is one clear error, and is not shared."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import headshare as hs
import headshare.sharing.writer
from headshare.errors import CheckpointError
from support.folders import WEIGHTS, nothing_changes
from support.shares import a_plan, share, spoil


def test_a_file_cut_off_while_it_is_shared_is_an_error_and_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, pieces = a_plan(llama), headshare.sharing.writer.stream

    def stream(*arguments: Any) -> Iterator[torch.Tensor]:
        os.truncate(llama / WEIGHTS, 20_000)
        return pieces(*arguments)

    monkeypatch.setattr(headshare.sharing.writer, "stream", stream)
    with pytest.raises(CheckpointError, match="replaced or changed while it was in use"):
        hs.share(hs.open_checkpoint(llama), plan).save(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_an_input_that_cannot_be_read_is_blamed_on_the_input(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An OSError while the output is open need not come from the output.
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    plan = a_plan(llama)
    monkeypatch.setattr(os, "preadv", fail)
    with nothing_changes(tmp_path), pytest.raises(CheckpointError, match=r"model\.safetensors"):
        hs.share(hs.open_checkpoint(llama), plan).save(tmp_path / "out")


Q2, V2, O2 = (f"model.layers.2.self_attn.{part}_proj.weight" for part in "qvo")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("exact", [True, False], ids=["in float64", "in float32"])
def test_weights_that_are_not_finite_are_named_and_not_shared(
    value: float, exact: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact:
        monkeypatch.setattr("headshare.matching.products.EXACT_PRODUCTS", 0)
    spoil(llama, Q2, value)
    with pytest.raises(CheckpointError, match=rf"{Q2} .*NaN or infinite .*layer 2, group 0"):
        share(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [V2, O2])
def test_weights_that_are_not_finite_are_not_shared_even_where_they_are_not_matched(
    name: str, llama: Path, tmp_path: Path
) -> None:
    # The match function qk reads neither v nor o.
    spoil(llama, name, float("nan"))
    with pytest.raises(CheckpointError, match="NaN"):
        hs.share(hs.open_checkpoint(llama), a_plan(llama, parts="qkvo")).save(tmp_path / "out")


def test_a_shared_checkpoint_is_not_shared_again(llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    for refused in (
        lambda: hs.score_units(hs.open_checkpoint(shared)),
        lambda: hs.estimate(hs.open_checkpoint(shared)),
        lambda: hs.share(hs.open_checkpoint(shared), a_plan(llama)),
    ):
        with pytest.raises(CheckpointError, match=r"is already shared.*headshare expand"):
            refused()
    with pytest.raises(CheckpointError, match="is not a shared checkpoint"):
        hs.expand(hs.open_checkpoint(llama), tmp_path / "expanded")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_a_quantised_checkpoint_is_not_shared(method: str, llama: Path) -> None:
    plan = a_plan(llama)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    for refused in (
        lambda: hs.score_units(hs.open_checkpoint(llama)),
        lambda: hs.estimate(hs.open_checkpoint(llama)),
        lambda: hs.share(hs.open_checkpoint(llama), plan),
    ):
        with pytest.raises(CheckpointError, match=rf"quantised \({method}\)"):
            refused()
