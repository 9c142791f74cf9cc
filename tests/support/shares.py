"""Plans and shared checkpoints of a dense folder."""

from pathlib import Path

from safetensors.torch import load_file, save_file

import headshare as hs
from support.folders import WEIGHTS


def a_plan(folder: Path, ratio: float = 0.5, parts: str = "qkv") -> hs.SharePlan:
    with hs.open_checkpoint(folder) as dense:
        return hs.make_plan(hs.score_units(dense, parts=parts), ratio, parts=parts)


def share(folder: Path, out: Path, ratio: float = 0.5, *, overwrite: bool = False, dtype: str | None = None) -> Path:
    return hs.share(hs.open_checkpoint(folder), a_plan(folder, ratio), dtype=dtype).save(out, overwrite=overwrite)


def spoil(folder: Path, name: str, value: float) -> None:
    """Put one number of this value into a tensor."""
    tensors = load_file(folder / WEIGHTS)
    tensors[name][1, 2] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
