"""Calibrated work from start to end: price and plan under a budget, refit, record, measure. Stopped anywhere, it goes
on from there when it is given a workspace.
"""

import hashlib
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from headshare.calibration.allocate import Budgeted, plan_for_bytes, plan_for_units
from headshare.calibration.costs.curves import Form, Prices
from headshare.calibration.costs.local import price_units
from headshare.calibration.costs.measured import check_windows, predicts, probe_prices
from headshare.calibration.refit.refitter import Refitter, Step
from headshare.checkpoint.checkpoint import Checkpoint, open_checkpoint
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import CalibrationError, HeadshareError, PlanError
from headshare.evaluation.perplexity import WINDOW, Windows, finite_or_null, is_causal, longest_window, perplexity
from headshare.files.resume import SavedPaths, Workspace, damaged, fingerprint, settle, workspace, workspace_of
from headshare.integrations.transformers.loading import load_model
from headshare.matching.pairing import checked_recipients
from headshare.matching.similarity import layouts_of
from headshare.plan.plan import SharePlan
from headshare.plan.units import Kind, Parts
from headshare.progress import track
from headshare.sharing.safetensors_writer import check_output
from headshare.sharing.share import (
    SharedCheckpoint,
    check_fits,
    check_shared,
    check_written_again,
    share,
    write_refitted,
)
from headshare.sharing.size import estimate, parameter_infos
from headshare.text.tokens import TOKENS, Calibration, calibration_from

AUTO = "auto"
REMOVE = "remove"
_FORMS: dict[str, tuple[Form, ...]] = {
    "qk": (Form.QK,),
    "qkv": (Form.QKV,),
    "qkvo": (Form.QKVO,),
    "gateup": (Form.GATEUP,),
    "factored": (Form.FACTORED,),
    AUTO: (Form.QKVO, Form.FACTORED),
}


@dataclass(frozen=True)
class Budget:
    """What is to be given up: units in one form, or bytes in whichever of several forms cost least."""

    forms: tuple[Form, ...]
    units: int | None = None
    saved_bytes: int | None = None
    ffn_groups: int = 1
    protect: tuple[int, ...] = ()


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

    Without it, `ratio` of the units are shared in `parts`; where there is a choice of forms (several parts, as with
    auto, or removal allowed) or of ranks (parts factored), as many bytes as sharing q, k and v at this ratio would
    save.

    Raises:
        PlanError: if a word is not known, or the budget cannot be met by any plan.
    """
    dense.require_dense("plan for it")
    unknown = [word for word in allow if word != REMOVE]
    if unknown:
        raise PlanError(f"'{unknown[0]}' is not something that can be allowed besides sharing. There is: {REMOVE}.")
    forms = _forms_of(parts) + ((Form.REMOVE,) if allow else ())
    words = "gateup" if forms[0] is Form.GATEUP else "qk"
    layout = next(iter(layouts_of(dense, Parts.parse(words), ffn_groups)))
    units = checked_recipients(layout, 0.0 if save is not None else ratio, protect)
    saved: int | None = None
    if save is not None:
        saved = _bytes_of(dense, save)
    elif len(forms) > 1 or forms[0] is Form.FACTORED:
        saved = estimate(dense, ratio, parts="qkv").saved_bytes
    return Budget(forms, units if saved is None else None, saved, ffn_groups, tuple(sorted(set(protect))))


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
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*(%?)", save.strip())
    if found is None:
        raise PlanError(f"{save!r:.40} is no amount to save. Give a share such as 10%, or a number of bytes.")
    wanted = Fraction(found[1]) * (Fraction(whole, 100) if found[2] else 1)
    if not 1 <= wanted < whole:
        raise PlanError(f"{save} of a model of {whole:,} bytes cannot be saved; ask for more than 0 and less than all.")
    return int(wanted)


def plan_on(
    dense: Checkpoint,
    calibration: Calibration,
    budget: Budget,
    *,
    probe: bool = True,
    device: str = "cpu",
    workspace: Workspace | None = None,
) -> Budgeted:
    """The plan that gives up least, by what every unit does to its layer's output on the calibration text and, with
    `probe`, by what that does to the predictions of a model that makes any.

    Raises:
        PlanError: if the budget cannot be met.
        CalibrationError: if the text is too short to probe with.
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
    """
    prices = prices_on(
        dense,
        calibration,
        budget.forms,
        ffn_groups=budget.ffn_groups,
        protect=budget.protect,
        probe=probe,
        device=device,
        workspace=workspace,
    ).only(budget.forms)
    if budget.units is not None:
        return plan_for_units(prices, budget.units)
    assert budget.saved_bytes is not None
    return plan_for_bytes(prices, budget.saved_bytes)


def prices_on(
    dense: Checkpoint,
    calibration: Calibration,
    forms: tuple[Form, ...],
    *,
    ffn_groups: int = 1,
    protect: tuple[int, ...] = (),
    kinds: Collection[Kind] = tuple(Kind),
    probe: bool = True,
    device: str = "cpu",
    workspace: Workspace | None = None,
) -> Prices:
    """What these halves of all layers could give up in these forms, and what that costs: `price_units`, and with
    `probe` `probe_prices`, where the model predicts anything.

    Raises:
        PlanError: if the model can have none of the forms.
        CalibrationError: if the text is too short to probe with.
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
    """
    dense.require_dense("plan")
    probe = probe and predicts(dense)
    if probe:
        check_windows(calibration)  # before hours of work
    what = forms, ffn_groups, protect
    done = _saved_paths(workspace, *what)
    prices = price_units(dense, calibration, forms, ffn_groups=ffn_groups, protect=protect, device=device, done=done)
    prices = replace(prices, paths=tuple(path for path in prices.paths if path.kind in kinds))
    if probe:
        known = _saved_paths(workspace, "probed", sorted(kinds), *what)
        prices = probe_prices(dense, calibration, prices, device=device, done=known)
    return prices


def refit_on(
    shared: SharedCheckpoint,
    calibration: Calibration,
    *,
    ffn: bool = True,
    steps: int = 0,
    device: str = "cpu",
    workspace: Workspace | None = None,
) -> SharedCheckpoint:
    """The same with its readouts refitted to the calibration text: W_o, and with `ffn` W_down, from the first layer on
    that gives something up; and with `steps` the other matrices of those layers, by so many gradient steps each.

    Raises:
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
    """
    refitter = Refitter(shared.dense, shared.plan, calibration, ffn=ffn, steps=steps, device=device)
    run_refit(refitter, workspace, _digest(shared.plan.digest, ffn, steps))
    tensors = refitter.result.tensors
    return shared.with_refit(record_of(calibration, tensors, steps=steps), tensors)


def device_named(name: str) -> str:
    """A device that is there, by its name; `auto` is the GPU, where there is one.

    Raises:
        CalibrationError: if there is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    found = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", name)
    if found is None or (name != "cpu" and int(found[1] or 0) >= torch.cuda.device_count()):
        raise CalibrationError(f"there is no device {name!r:.40} here to calibrate on. Use cpu, cuda, or auto.")
    return name


def run_refit(refitter: Refitter, workspace: Workspace | None, key: str) -> None:
    """Run a refit to its end, from where an earlier run of the same key in this workspace was stopped.

    A layer counts as done when its number is written, which is after its tensors and the streams that leave it.
    """
    first = 0 if workspace is None else _take_up(refitter, workspace, key)
    for layer in track(refitter.advance(), "refitting", refitter.layers.count - first):
        if workspace is not None:
            workspace.write_tensors(_streams_after(key, layer), refitter.state())
            steps = [asdict(step) for step in refitter.result.steps]
            workspace.write_json(f"refit-{key}.json", {"layer": layer, "steps": steps})
            workspace.delete(_streams_after(key, layer - 1))


def _take_up(refitter: Refitter, workspace: Workspace, key: str) -> int:
    """Put a refit where a stopped one was. Returns the layer that is next."""
    name = f"refit-{key}.json"
    refitter.result.tensors = tensors = workspace.tensors(f"refit-{key}")
    done = workspace.read_json(name)
    if done is None:
        return 0
    _look_through(tensors)
    try:
        layer, steps = int(done["layer"]), [Step(**step) for step in done["steps"]]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(workspace.folder / name, f"it does not say how far it came ({error})") from None
    streams = workspace.read_tensors(_streams_after(key, layer))
    if streams is None:
        raise damaged(workspace.folder / _streams_after(key, layer), "it is not there")
    refitter.resume(layer + 1, streams, tensors, steps)
    return layer + 1


def _saved_paths(workspace: Workspace | None, *what: object) -> SavedPaths | None:
    """The paths that an earlier run priced under this key, all read once; None where nothing is kept."""
    if workspace is None:
        return None
    saved = workspace.paths(_digest(*what))
    _look_through(saved)
    return saved


def _look_through(saved: Mapping[Any, object]) -> None:
    """Read all that was saved once, so that damage is found before hours of work and not after."""
    for _ in saved.values():
        pass


def _streams_after(key: str, layer: int) -> str:
    return f"refit-{key}-{layer}.safetensors"


def record_of(
    calibration: Calibration, tensors: Collection[str], before: RefitRecord | None = None, *, steps: int = 0
) -> RefitRecord:
    """What a checkpoint says of its refit, and of what an earlier one changed."""
    fitted = {name for name in tensors if not name.endswith(("tie_scale", "factor_in", "factor_out"))}
    return RefitRecord.of(
        fitted | set(before.tensors if before else ()),
        calibration.source,
        calibration.digest,
        windows=tuple(calibration.tokens.shape),
        seed=calibration.seed,
        steps=max(steps, before.steps if before else 0),
    )


def _digest(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


# ---- from a request to files


@dataclass(frozen=True)
class Setting:
    """The calibration text that a person asks for, where to compute, whether a stopped run's state is to go, and
    whether plans are priced by measured predictions."""

    source: str
    tokens: int = TOKENS
    window: int = WINDOW
    seed: int = 0
    device: str = "auto"
    restart: bool = False
    probe: bool = True


@dataclass(frozen=True)
class Run:
    """A calibrated run on its way: the tokens, the device, and the state that it leaves if it is stopped."""

    dense: Checkpoint
    calibration: Calibration
    device: str
    work: Workspace
    probe: bool

    def plan(self, budget: Budget) -> Budgeted:
        """`plan_on` this run's tokens."""
        return plan_on(self.dense, self.calibration, budget, probe=self.probe, device=self.device, workspace=self.work)

    def refit(self, shared: SharedCheckpoint, *, ffn: bool = True, steps: int = 0) -> SharedCheckpoint:
        """`refit_on` this run's tokens."""
        return refit_on(shared, self.calibration, ffn=ffn, steps=steps, device=self.device, workspace=self.work)

    def measure(self, shared: Path) -> "Measured":
        """Perplexity of the dense model and of the shared one in this folder, on the windows held out of the fits."""
        return measure(self.dense, shared, self.calibration.split()[1], device=self.device)


@contextmanager
def calibrated_run(dense: Checkpoint, out: Path, setting: Setting, **what: str) -> Iterator[Run]:
    """A run to this output. Its state goes when the block ends, and stays for the next run when the block fails; the
    next run must have the same model, text and setting, and whatever else `what` names.

    Raises:
        CalibrationError: if the text cannot be had or split, there is no such device, or the state is of another run.
        CheckpointError: if the model is not dense.
        OutputError: if the state cannot be kept, or another run has this output.
    """
    dense.require_dense("calibrate it")
    device, longest = device_named(setting.device), longest_window(dense.config)
    if longest is not None and setting.window > longest:
        raise CalibrationError(
            f"windows of {setting.window} tokens are longer than the model's {longest}. "
            f"Use --calibration-window {longest}."
        )
    text = calibration_from(
        setting.source, dense, tokens=setting.tokens, window=setting.window, seed=setting.seed, device=device
    )
    text.split()  # before anything is kept
    with workspace(workspace_of(out), _what(dense, text, device, what), restart=setting.restart) as work:
        yield Run(dense, text, device, work, setting.probe)


def _what(dense: Checkpoint, text: Calibration, device: str, more: dict[str, str]) -> dict[str, str]:
    """What a state belongs to. The seed is named by itself: it chooses the held-out windows too."""
    return {
        "headshare": version("headshare"),
        "model": fingerprint(dense),
        "text": text.digest,
        "seed": str(text.seed),
        "device": device,
        **more,
    }


@dataclass(frozen=True)
class Measured:
    """Perplexity of the dense and of the shared model on held-out calibration windows; None, with a note that says why,
    where a model has none."""

    dense: float | None
    shared: float | None
    tokens: int
    window: int
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The same under the names that `--json` prints; a perplexity past any float is null."""
        return finite_or_null(asdict(self))

    def in_words(self) -> str:
        """One line for the person at the keyboard."""
        if self.dense is None or self.shared is None:
            return f"perplexity not measured: {self.note}"
        where = f"{self.tokens} held-out calibration tokens in windows of {self.window}"
        return f"perplexity measured: {self.shared:,.3f}, dense {self.dense:,.3f}, over {where}"


def measure(dense: Checkpoint, shared: Path, held_out: Calibration, *, device: str = "cpu") -> Measured:
    """Perplexity of both models. What hinders measuring is noted, not raised: the work before it is done."""
    windows = Windows(held_out.tokens, held_out.bos)
    window = windows.length
    options = {} if device == "cpu" else {"device_map": device}
    try:
        model = load_model(dense, **options)
        if not is_causal(model):
            return Measured(None, None, 0, window, f"{type(model).__name__} is an encoder, which has no perplexity.")
        before = perplexity(model, windows)
        del model
        with open_checkpoint(shared) as opened:
            after = perplexity(load_model(opened, **options), windows)
    except HeadshareError as error:
        return Measured(None, None, 0, window, str(error))
    return Measured(before.perplexity, after.perplexity, before.tokens, window)


@dataclass(frozen=True)
class Planned:
    """A plan with what it saves and what was predicted for it, and what was measured of it, if that was asked for."""

    chosen: Budgeted
    measured: Measured | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same under the names that `--json` prints, without the plan."""
        measured = None if self.measured is None else self.measured.to_dict()
        return {"saved_bytes": self.chosen.saved_bytes, **_predicted(self.chosen), "measured": measured}

    def in_words(self) -> str:
        """Predicted beside measured."""
        lines = [f"{self.chosen.saved_bytes:,} bytes saved; {self.chosen.in_words()}"]
        return "\n".join(lines + ([self.measured.in_words()] if self.measured else []))


def _predicted(chosen: Budgeted | None) -> dict[str, Any]:
    """The names under which `--json` prints what was predicted; null where nothing was."""
    unit = None if chosen is None else "nats" if chosen.in_nats else "relative error"
    return {"price": None if chosen is None else chosen.price, "price_unit": unit}


def plan_calibrated(
    dense: Checkpoint, budget: Budget, setting: Setting, out: Path, *, measured: bool = True
) -> Planned:
    """Choose a plan by output and save it as a file. With `measured`, refit it and measure the model that it gives,
    which is written beside the plan for that time.

    Raises:
        HeadshareError: if a step fails; the state stays.
    """
    with calibrated_run(dense, out, setting) as run:
        chosen = run.plan(budget)
        found = _measured_for_a_time(run, chosen.plan) if measured else None
        run.work.note_writing(out)
        chosen.plan.save(out)
    return Planned(chosen, found)


def _measured_for_a_time(run: Run, plan: SharePlan) -> Measured:
    """What a plan's refitted model measures. The model stands among the state only so long."""
    folder = run.work.folder / "measured"
    shutil.rmtree(folder, ignore_errors=True)
    run.refit(share(run.dense, plan)).save(folder)
    try:
        return run.measure(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Outcome:
    """A shared checkpoint as it was written, its plan with what was predicted for it if it was chosen by output, and
    what was measured if that was asked for."""

    shared: SharedCheckpoint
    chosen: Budgeted | None = None
    measured: Measured | None = None

    def to_dict(self) -> dict[str, Any]:
        """What `share --json` prints beside the bytes."""
        return {
            "plan_digest": self.shared.plan.digest,
            **_predicted(self.chosen),
            "refitted_tensors": len(self.shared.refit.tensors) if self.shared.refit else 0,
            "measured": None if self.measured is None else self.measured.to_dict(),
        }

    def in_words(self) -> list[str]:
        """A line for each thing that was done."""
        lines = [] if self.chosen is None else [self.chosen.in_words()]
        lines += [self.shared.refit.in_words()] if self.shared.refit else []
        return lines + ([self.measured.in_words()] if self.measured else [])


@dataclass(frozen=True)
class Wanted:
    """What is to be done with calibration: a plan, or a budget to choose one under; a refit of it, with gradient
    `steps` a layer after it; a measurement."""

    plan: SharePlan | Budget
    refit: bool = True
    ffn: bool = True
    steps: int = 0
    measure: bool = False
    dtype: str | None = None


def share_calibrated(
    dense: Checkpoint, wanted: Wanted, setting: Setting, out: Path, *, overwrite: bool = False
) -> Outcome:
    """Plan, unless there is a plan, share, refit and write.

    Raises:
        HeadshareError: if a step fails; the state stays, so that the same call goes on from there.
    """
    if isinstance(wanted.plan, SharePlan):
        share(dense, wanted.plan)  # a plan of another model is refused before anything is kept
    with calibrated_run(dense, out, setting) as run:
        chosen = run.plan(wanted.plan) if isinstance(wanted.plan, Budget) else None
        plan = wanted.plan if isinstance(wanted.plan, SharePlan) else chosen.plan  # type: ignore[union-attr]
        shared = share(dense, plan, dtype=wanted.dtype)
        if wanted.refit:
            shared = run.refit(shared, ffn=wanted.ffn, steps=wanted.steps)
        run.work.note_writing(out)
        shared.save(out, overwrite=overwrite)
    return Outcome(shared, chosen, run.measure(out) if wanted.measure else None)


def refit_checkpoint(
    shared: Checkpoint,
    dense: Checkpoint,
    setting: Setting,
    out: Path,
    *,
    ffn: bool = True,
    steps: int = 0,
    overwrite: bool = False,
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
    check_written_again(shared, out, overwrite=overwrite)
    check_output(out, dense.path, overwrite=True)
    finished = settle(out)
    what = {"shared model": fingerprint(shared), "--refit-ffn": str(ffn), "--reconstruct": str(steps)}
    with calibrated_run(dense, out, setting, **what) as run:
        if finished and shared.refit and _is_same(finished, _what(dense, run.calibration, run.device, what)):
            return shared.refit  # a run that was stopped had replaced the folder already
        refitter = Refitter(dense, plan, run.calibration, ffn=ffn, steps=steps, device=run.device, shared=shared)
        run_refit(refitter, run.work, _digest(plan.digest, ffn, steps))
        record = record_of(run.calibration, refitter.result.tensors, shared.refit, steps=steps)
        run.work.note_writing(out)
        base = shared.base_model or dense.name
        write_refitted(shared, record, refitter.result.tensors, out, base_model=base, overwrite=overwrite)
    return record


def _is_same(finished: dict[str, Any], what: dict[str, str]) -> bool:
    """Whether a state belonged to this, but for the shared model, which its run replaced."""
    return all(finished.get(name) == value for name, value in what.items() if name != "shared model")
