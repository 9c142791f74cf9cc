"""The description of a comparison beside its cells: model, text and versions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.experiments.case import TRAINED
from headshare.experiments.cells import Compared
from headshare.experiments.recipe import Grid
from headshare.text.tokens import Calibration

ABOUT = "about.json"


@dataclass(frozen=True)
class About:
    """The description of a table of cells: names without folders, numbers of tokens, versions, and the cells' keys."""

    title: str
    model: str
    text: str
    calibration: str
    training: str
    limit: int | None
    versions: dict[str, str]
    keys: tuple[str, ...]
    dtype: str = ""
    few_shot: int | None = None
    device: str = ""
    mode: str = "star"

    @classmethod
    def of(
        cls, dense: Checkpoint, grid: Grid, calibration: Calibration | None, title: str, cells: Sequence[Compared]
    ) -> "About":
        """The description of a grid that was measured."""
        text = grid.text
        parallel = grid.parallel
        trained = grid.training if any(name in TRAINED for name in grid.methods) else None
        # cells may come from runs with several versions of one package: all of them are named
        by_name: dict[str, list[str]] = {}
        for name, number in (pair for cell in cells for pair in cell.versions.items()):
            by_name.setdefault(name, []).append(number)
        measured = (
            [] if text is None else [f"{text.path.name}, windows of {text.window}, {text.tokens or 'all'} tokens"]
        )
        measured += [] if parallel is None else [f"{parallel.source.name} to {parallel.reference.name}"]
        return cls(
            title,
            Path(dense.name).name,
            "; ".join(measured),
            "" if calibration is None else f"{Path(calibration.source).name}, {calibration.tokens.numel()} tokens",
            "" if trained is None else f"{Path(trained.text.data).name}{_shown(trained.learning.arguments)}",
            grid.settings.limit if grid.tasks or parallel else None,
            {name: " and ".join(dict.fromkeys(numbers)) for name, numbers in by_name.items()},
            tuple(cell.key for cell in cells),
            grid.settings.dtype,
            grid.settings.few_shot,
            grid.settings.device,
            grid.mode,
        )


def _shown(arguments: Mapping[str, Any]) -> str:
    """The Trainer's arguments for the length and the rate of learning, as words."""
    named = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "learning_rate")
    return "".join(f", {name} {arguments[name]}" for name in named if name in arguments)
