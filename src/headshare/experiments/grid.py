"""The grid of a comparison: every method at every ratio. Each finished cell is kept, so that a stopped grid goes on."""

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.fingerprint import fingerprint
from headshare.errors import CalibrationError, EvaluationError
from headshare.evaluation.harness import Chosen, chosen_tasks
from headshare.evaluation.translation import Parallel
from headshare.experiments.about import ABOUT, About
from headshare.experiments.case import METHODS, base_of, reads_text
from headshare.experiments.cell_runner import MADE, MADE_ROUNDED, WORK, CellRunner
from headshare.experiments.cells import CELLS, DENSE, Asked, Compared, kept_cells
from headshare.experiments.recipe import Grid
from headshare.experiments.report.tables import as_csv, in_words
from headshare.files.atomic import write_whole
from headshare.files.kept_rows import KeptRows
from headshare.files.resume import ResumableRun
from headshare.progress import say, track
from headshare.text.tokens import Calibration

WRITTEN = ("table.md", "cells.csv", ABOUT)


def compare(
    dense: Checkpoint,
    grid: Grid,
    out: Path,
    *,
    calibration: Calibration | None = None,
    device: str = "cpu",
    restart: bool = False,
    title: str = "",
) -> list[Compared]:
    """Measure every cell, the dense model first, and write the results into the folder `out`.

    The results are `table.md`, `cells.csv`, `cells.json` and `about.json` (model, text and versions).

    Cells of the same model, text, questions and settings that are already there are not measured again. A method that
    fails on this model or at this ratio becomes a row that says why. It is tried again the next time, because what it
    lacked may be there then. `restart` throws away the cost curves and the training run of a stopped grid, but not its
    cells.

    Raises:
        EvaluationError: if a task, a text or the folder's cells cannot be used, or a method looks at a text and there
            is none.
        CheckpointError: if the model cannot be loaded.
    """
    dense.require_dense("compare with it")
    if calibration is None and (reading := [name for name in grid.methods if reads_text(name)]):
        raise EvaluationError(f"{reading[0]} looks at a text: name one with --calibration FILE, or self.")
    grid = replace(grid, text=None if grid.text is None else grid.text.sized_for(dense))
    chosen: list[Chosen | Parallel] = [*chosen_tasks(grid.tasks, grid.data)]
    chosen += [] if grid.parallel is None else [grid.parallel]
    with kept_cells(out) as kept:
        cells = _cells(dense, grid, chosen, kept, out, calibration, device, restart)
    write_whole(out / "table.md", f"{in_words(cells)}\n".encode())
    write_whole(out / "cells.csv", as_csv(cells).encode())
    about = About.of(dense, grid, calibration, title, cells)
    write_whole(out / ABOUT, json.dumps(asdict(about), indent=1).encode())
    return cells


def _cells(
    dense: Checkpoint,
    grid: Grid,
    chosen: Sequence[Chosen | Parallel],
    kept: KeptRows[Compared],
    out: Path,
    calibration: Calibration | None,
    device: str,
    restart: bool,
) -> list[Compared]:
    """The cells of the grid, in its order. Cells that are not kept yet are measured and kept one by one."""
    if not kept.rows and (foreign := [name for name in WRITTEN if (out / name).exists()]):
        raise EvaluationError(
            f"{out} has a {foreign[0]} and no {CELLS}: it is not of a comparison, which would write over it. Move it, "
            "or write elsewhere."
        )
    identity = _run_identity(dense, calibration, device)
    with ExitStack() as stack:
        run = ResumableRun(out / WORK, identity, refused=CalibrationError, restart=restart, kept=True)
        work = stack.enter_context(run).workspace
        for folder in (out / MADE, out / MADE_ROUNDED):
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        runner = CellRunner(dense, grid, chosen, calibration, work, out / MADE, device, restart)
        # methods that save the same whatever the ratio come once, the others at every ratio
        cells = [(DENSE, Asked()), *((name, Asked()) for name in grid.methods if METHODS[base_of(name)].fixed)]
        cells += [(name, asked) for asked in grid.asked for name in grid.methods if not METHODS[base_of(name)].fixed]
        keys = {runner.key(name, asked): (name, asked) for name, asked in cells}
        # failed cells are measured again
        done = {row.key for row in kept.rows if not row.failed}
        missing = [key for key in keys if key not in done]
        for key in track(missing, "cells", len(missing)):
            cell = runner.cell(*keys[key], key)
            kept.add(cell)
            say(f"{cell.title}: {cell.failed or f'{cell.saved_fraction:.2%} saved, {cell.seconds:.0f} s'}")
        by_key = {row.key: row for row in kept.rows}
        return [by_key[key] for key in keys]


def _run_identity(dense: Checkpoint, calibration: Calibration | None, device: str) -> dict[str, str]:
    """Identity of the cost curves that all cells have in common: the grid's methods and ratios may change."""
    return {
        "headshare": version("headshare"),
        "model": fingerprint(dense),
        "text": "" if calibration is None else f"{calibration.digest} {calibration.seed}",
        "device": device,
    }
