"""Plans and shared checkpoints of a dense folder."""

from pathlib import Path

import headshare as hs


def a_plan(folder: Path, ratio: float = 0.5, parts: str = "qkv") -> hs.SharePlan:
    with hs.open_checkpoint(folder) as dense:
        return hs.make_plan(hs.score_units(dense, parts=parts), ratio, parts=parts)


def share(folder: Path, out: Path, ratio: float = 0.5, *, overwrite: bool = False, dtype: str | None = None) -> Path:
    return hs.share(hs.open_checkpoint(folder), a_plan(folder, ratio), dtype=dtype).save(out, overwrite=overwrite)
