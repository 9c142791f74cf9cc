"""Matching scores of all pairs of units, as a value and as a file. Knows nothing of how they were computed."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from headshare.defaults import MAX_NAME
from headshare.errors import PlanError
from headshare.files.atomic import write_whole
from headshare.files.untrusted import foreign, is_file, parse_json
from headshare.plan.layout import Layout
from headshare.plan.units import Part
from headshare.short import short


@dataclass(frozen=True)
class ScoreTable:
    """Matching scores of all pairs of units in one grid.

    Rows are recipients and columns are donors. Only pairs whose donor lies in an earlier layer have a score; all others
    are zero. `parts` are the parts whose ties this table chooses: all, unless each is matched separately.
    """

    layout: Layout
    match: str
    parts: tuple[Part, ...]
    scores: Float[Tensor, "units units"]

    def __repr__(self) -> str:
        return short(self, self.layout.kind, f"{self.layout.units} units", self.match)


@dataclass(frozen=True)
class Scores:
    """The result of `score_units`: one table for each grid of units, or one for each part when matched separately."""

    model_type: str
    tables: tuple[ScoreTable, ...]

    def __post_init__(self) -> None:
        for name in (self.model_type, *(table.match for table in self.tables)):
            if len(name) > MAX_NAME:
                raise PlanError(f"the name {name:.40}... has {len(name)} characters; a plan holds at most {MAX_NAME}.")

    def __repr__(self) -> str:
        return short(self, self.model_type, *self.tables)

    @property
    def digest(self) -> str:
        """The SHA-256 of layouts and scores, by which a plan names the scores that it was made from."""
        digest = hashlib.sha256(self._header().encode())
        for table in self.tables:
            digest.update(table.scores.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _header(self) -> str:
        tables = [
            {"match": table.match, "parts": list(table.parts), "layout": table.layout.model_dump(mode="json")}
            for table in self.tables
        ]
        return json.dumps({"format": 1, "model_type": self.model_type, "tables": tables}, sort_keys=True)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: a float64 matrix for each table, and everything else in its metadata.

        Raises:
            OutputError: if it cannot be written; nothing is left behind.
        """
        matrices = {str(index): table.scores.contiguous() for index, table in enumerate(self.tables)}
        write_whole(path, save(matrices, metadata={"headshare": self._header()}))

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read scores that `save` wrote.

        Raises:
            PlanError: if the file is missing or is not a scores file.
        """
        if not is_file(Path(path)):
            raise PlanError(f"there is no scores file at {path}. Make one with: headshare score MODEL -o {path}")
        what = f"{path} is not a scores file of headshare"
        with foreign(what, PlanError), safe_open(path, framework="pt") as file:
            header = parse_json((file.metadata() or {})["headshare"], f"{what}: its description", PlanError)
            tables = tuple(
                _read_table(entry, file.get_tensor(str(index))) for index, entry in enumerate(header["tables"])
            )
            return cls(model_type=str(header["model_type"]), tables=tables)


def _read_table(entry: dict[str, object], scores: Tensor) -> ScoreTable:
    layout = Layout.model_validate(entry["layout"])
    parts = tuple(Part(part) for part in entry["parts"])  # type: ignore[attr-defined]
    if scores.shape != (layout.units, layout.units) or scores.dtype != torch.float64:
        raise ValueError(f"{tuple(scores.shape)} {scores.dtype} scores for {layout.units} units")
    if not torch.isfinite(scores).all():
        raise ValueError("scores that are not finite")
    return ScoreTable(layout, str(entry["match"]), parts, scores)
