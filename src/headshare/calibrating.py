"""Calibrated work from start to end: price and plan under a budget, refit, record. Stopped anywhere, it goes on from
there when it is given a workspace.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, MutableMapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import torch

from headshare import paths
from headshare.accounting import estimate, parameter_infos
from headshare.budget import Budgeted, plan_for_bytes, plan_for_units
from headshare.calibration import Calibration
from headshare.checkpoints import Checkpoint
from headshare.errors import PlanError
from headshare.layout import MAX_LAYERS
from headshare.paths import Form, paths_from_json, paths_to_json
from headshare.planning import checked_recipients
from headshare.pricing import price_units
from headshare.progress import track
from headshare.refits import MAX_TEXT, RefitRecord
from headshare.refitting import Refitter, Step
from headshare.sharing import SharedCheckpoint, check_fits, check_shared, write_refitted
from headshare.similarity import layouts_of
from headshare.units import Parts
from headshare.workspace import Workspace

AUTO = "auto"
REMOVE = "remove"
_FORMS: dict[str, tuple[Form, ...]] = {
    "qk": (Form.QK,),
    "qkv": (Form.QKV,),
    "qkvo": (Form.QKVO,),
    "gateup": (Form.GATEUP,),
    "factored": (Form.FACTORED,),
    AUTO: (Form.QK, Form.QKV, Form.FACTORED),
}


@dataclass(frozen=True)
class Budget:
    """What is to be given up: units in one form, or bytes in whichever of several forms cost least."""

    forms: tuple[Form, ...]
    units: int | None = None
    saved_bytes: int | None = None


def budget_of(
    dense: Checkpoint,
    *,
    ratio: float = 0.3,
    save: str | None = None,
    parts: str = AUTO,
    allow: Collection[str] = (),
    ffn_groups: int = 1,
    protect: Collection[int] = (),
) -> Budget:
    """Read what a person asks for. `save` is a share of the whole model's bytes, such as "10%", or a number of bytes.

    Without it, `ratio` of the units are shared in `parts`; where there is a choice of forms (parts auto, or removal
    allowed) or of ranks (parts factored), as many bytes as sharing q, k and v at this ratio would save.

    Raises:
        PlanError: if a word is not known, or the budget cannot be met by any plan.
    """
    unknown = [word for word in allow if word != REMOVE]
    if unknown:
        raise PlanError(f"'{unknown[0]}' is not something that can be allowed besides sharing. There is: {REMOVE}.")
    forms = _forms_of(parts) + ((Form.REMOVE,) if allow else ())
    if save is not None:
        return Budget(forms, saved_bytes=_bytes_of(dense, save))
    if len(forms) > 1 or forms[0] is Form.FACTORED:
        return Budget(forms, saved_bytes=estimate(dense, ratio, parts="qkv").saved_bytes)
    layout = next(iter(layouts_of(dense, Parts.parse(parts), ffn_groups)))
    return Budget(forms, units=checked_recipients(layout, ratio, protect))


def _forms_of(parts: str) -> tuple[Form, ...]:
    words = [word.strip() for word in parts.split("+")]
    unknown = [word for word in words if word not in _FORMS]
    if unknown:
        raise PlanError(
            f"units cannot be matched by output in parts '{unknown[0]}'. There are: {', '.join(_FORMS)}, "
            "or several joined by +."
        )
    return tuple(dict.fromkeys(form for word in words for form in _FORMS[word]))


def _bytes_of(dense: Checkpoint, save: str) -> int:
    whole = sum(info.nbytes for info in parameter_infos(dense).values())
    try:
        wanted = Fraction(save.removesuffix("%").strip()) * (Fraction(whole, 100) if save.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        raise PlanError(f"'{save}' is no amount to save. Give a share such as 10%, or a number of bytes.") from None
    if not 0 < wanted < whole:
        raise PlanError(f"saving {save} of a model of {whole:,} bytes is not possible; ask for more than 0 and less.")
    return int(wanted)


def plan_on(
    dense: Checkpoint,
    calibration: Calibration,
    budget: Budget,
    *,
    ffn_groups: int = 1,
    protect: Collection[int] = (),
    device: str = "cpu",
    workspace: Workspace | None = None,
) -> Budgeted:
    """The plan that gives up least, by what every unit does to its layer's output on the calibration text.

    Raises:
        PlanError: if the budget cannot be met.
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
    """
    dense.require_dense("plan")
    done = None if workspace is None else _SavedPaths(workspace, _digest(budget.forms, ffn_groups, sorted(protect)))
    prices = price_units(
        dense, calibration, budget.forms, ffn_groups=ffn_groups, protect=tuple(protect), device=device, done=done
    )
    if budget.units is not None:
        return plan_for_units(prices, budget.units)
    assert budget.saved_bytes is not None
    return plan_for_bytes(prices, budget.saved_bytes)


def refit_on(
    shared: SharedCheckpoint,
    calibration: Calibration,
    *,
    ffn: bool = True,
    device: str = "cpu",
    workspace: Workspace | None = None,
) -> SharedCheckpoint:
    """The same with its readouts refitted to the calibration text: W_o, and with `ffn` W_down, from the first layer on
    that gives something up.

    Raises:
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
    """
    refitter = Refitter(shared.dense, shared.plan, calibration, ffn=ffn, device=device)
    run_refit(refitter, workspace, _digest(shared.plan.digest, ffn))
    tensors = refitter.result.tensors
    return shared.with_refit(record_of(calibration, tensors), tensors)


def refit_checkpoint(
    shared: Checkpoint,
    dense: Checkpoint,
    calibration: Calibration,
    out: Path,
    *,
    ffn: bool = True,
    device: str = "cpu",
    workspace: Workspace | None = None,
) -> RefitRecord:
    """Refit a checkpoint that was shared before, whatever became of its other weights since, and write it to `out`,
    which may be its own folder: that is replaced when the new one is whole.

    Raises:
        PlanError: if the dense model is not the one that the plan is for.
        CheckpointError, ArchitectureError: if either cannot be used.
        OutputError: if it cannot be written.
    """
    plan = check_shared(shared)
    dense.require_dense("refit to")
    check_fits(plan, dense)
    refitter = Refitter(dense, plan, calibration, ffn=ffn, device=device, shared=shared)
    run_refit(refitter, workspace, _digest(plan.digest, ffn))
    record = record_of(calibration, refitter.result.tensors)
    write_refitted(shared, record, refitter.result.tensors, out)
    return record


def workspace_of(out: Path) -> Path:
    """Where the state of a calibrated run to this output is kept until it is done."""
    return out.absolute().parent / f".{out.absolute().name}.headshare-calibrating"


def device_named(name: str) -> str:
    """`auto` is the GPU, where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def run_refit(refitter: Refitter, workspace: Workspace | None, key: str) -> None:
    """Run a refit to its end, from where an earlier run of the same key in this workspace was stopped.

    A layer counts as done when its number is written, which is after its tensors and the streams that leave it.
    """
    first = 0 if workspace is None else _take_up(refitter, workspace, key)
    for layer in track(refitter.advance(), "refitting", refitter.layers.count - first):
        if workspace is not None:
            workspace.write_tensors(_streams_after(key, layer), refitter.state())
            done = {"layer": layer, "steps": [asdict(step) for step in refitter.result.steps]}
            workspace.write(f"refit-{key}.json", json.dumps(done).encode())
            workspace.delete(_streams_after(key, layer - 1))


def _take_up(refitter: Refitter, workspace: Workspace, key: str) -> int:
    """Put a refit where a stopped one was. Returns the layer that is next."""
    refitter.result.tensors = tensors = workspace.tensors(f"refit-{key}")
    saved = workspace.read(f"refit-{key}.json")
    if saved is None:
        return 0
    done = json.loads(saved)
    streams = workspace.read_tensors(_streams_after(key, done["layer"]))
    assert streams is not None
    refitter.resume(done["layer"] + 1, streams, tensors, [Step(**step) for step in done["steps"]])
    return int(done["layer"]) + 1


def _streams_after(key: str, layer: int) -> str:
    return f"refit-{key}-{layer}.safetensors"


def record_of(calibration: Calibration, tensors: Collection[str]) -> RefitRecord:
    """What a checkpoint says of its refit."""
    return RefitRecord(
        tensors=tuple(sorted(name for name in tensors if not name.endswith(("tie_scale", "factor_in", "factor_out")))),
        text=calibration.source[:MAX_TEXT],
        text_digest=calibration.digest,
        tokens=calibration.tokens.numel(),
        window=calibration.tokens.shape[1],
        seed=calibration.seed,
    )


class _SavedPaths(MutableMapping[int, list[paths.Path]]):
    """The paths of the layers priced so far, a file each."""

    def __init__(self, workspace: Workspace, key: str) -> None:
        self._workspace, self._key = workspace, key

    def _file(self, layer: int) -> str:
        return f"prices-{self._key}-{layer}.json"

    def __getitem__(self, layer: int) -> list[paths.Path]:
        saved = self._workspace.read(self._file(layer))
        if saved is None:
            raise KeyError(layer)
        return paths_from_json(saved)

    def __setitem__(self, layer: int, given: list[paths.Path]) -> None:
        self._workspace.write(self._file(layer), paths_to_json(given).encode())

    def __delitem__(self, layer: int) -> None:
        self._workspace.delete(self._file(layer))

    def __iter__(self) -> Iterator[int]:
        return (layer for layer in range(MAX_LAYERS) if self._workspace.read(self._file(layer)) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _digest(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]
