"""Output tensors from runs of stored indices, read in slices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import headshare as hs
from headshare.plan.tensors import NOTHING, Source
from headshare.sharing import assembly
from headshare.sharing.assembly import Assembly, stream
from support import tiny

ROWS, WIDTH = 40, 3
# room for eight rows of three bfloat16 numbers
SLICE = 8 * WIDTH * 2


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> hs.Checkpoint:
    """Two matrices of different numbers."""
    folder = tiny.make_llama(tmp_path_factory.mktemp("assembly") / "llama")
    numbers = torch.arange(ROWS * WIDTH, dtype=torch.bfloat16).view(ROWS, WIDTH)
    save_file({"a": numbers, "b": -numbers}, folder / "model.safetensors")
    return hs.open_checkpoint(folder)


@st.composite
def runs(draw: st.DrawFn) -> tuple[Source, ...]:
    """Runs in any order, from either matrix, or of zeros."""
    made = []
    for _ in range(draw(st.integers(1, 12))):
        start = draw(st.integers(0, ROWS - 1))
        stop = draw(st.integers(start + 1, min(ROWS, start + 12)))
        made.append(Source(draw(st.sampled_from(("a", "a", "a", "b", NOTHING))), start, stop))
    return tuple(sorted(made, key=lambda run: run.start) if draw(st.booleans()) else made)


@settings(max_examples=200, deadline=None)
@given(runs=runs())
def test_runs_give_the_rows_that_numpy_lays_end_to_end(runs: tuple[Source, ...], stored: hs.Checkpoint) -> None:
    numbers = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
    matrices = {"a": numbers, "b": -numbers, NOTHING: 0 * numbers}
    meant = np.concatenate([matrices[name][start:stop] for name, start, stop in runs])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "SLICE_BYTES", SLICE)
        pieces = list(stream(Assembly("out", "BF16", meant.shape, "f", 0, runs), stored))
    assert np.array_equal(torch.cat(pieces).float().numpy(), meant)
    assert all(piece.nbytes <= max(SLICE, 12 * WIDTH * 2) for piece in pieces)


def test_runs_that_lie_near_one_another_are_read_at_once(
    stored: hs.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = type(stored).read

    def counted(self: hs.Checkpoint, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        reads.append((name, start, stop))
        return read(self, name, start, stop)

    monkeypatch.setattr(type(stored), "read", counted)
    every_second = tuple(Source("a", row, row + 1) for row in range(0, ROWS, 2))
    out = torch.cat(list(stream(Assembly("out", "BF16", (ROWS // 2, WIDTH), "f", 0, every_second), stored)))
    assert out[:, 0].tolist() == [WIDTH * row for row in range(0, ROWS, 2)]
    assert reads == [("a", 0, ROWS - 1)]
