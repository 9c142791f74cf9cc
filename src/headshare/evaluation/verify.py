"""Verify a shared checkpoint by opening it again: its digests, its plan, every stored number, and its logits."""

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from headshare.architecture.config import text_config
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.fingerprint import ANY_BASE, check_origin
from headshare.checkpoint.int4 import A_WORD, PACKED, PARTS, guards, part_of
from headshare.checkpoint.opening import open_checkpoint
from headshare.errors import CheckpointError, HeadshareError, OutputError
from headshare.files.failures import in_one_line
from headshare.files.scratch import scratch_folder
from headshare.integrations.transformers.loading import load_model, running
from headshare.plan.tensors import TensorPlan, bias_name
from headshare.plan.units import READOUTS
from headshare.progress import track
from headshare.sharing.expand import expand_files, write_overwritten
from headshare.sharing.expanded import rotated_otherwise
from headshare.sharing.fits import SharedFiles, fit_plan, open_shared
from headshare.sharing.manifest import check_manifest
from headshare.sharing.rounded.nearest import is_nearest
from headshare.sharing.size import parameter_bytes, parameter_infos
from headshare.sharing.writer import same_numbers, same_tensors
from headshare.short import short
from headshare.storage.registry import TRAINABLE
from headshare.text.windows import longest_window

PROBE_TOKENS = 48
# memory that comparing logits needs, in multiples of the model's bytes
MODEL_OVERHEAD = 1.6
# largest difference of logits by rounding, as a share of the largest logit
ROUNDING = 1e-3


@dataclass
class Verification:
    """The outcome of a verification.

    `ok` is true only if every check that was made passed. `notes` names the checks that were not made.
    """

    ok: bool = True
    max_logit_diff: float | None = None
    files_checked: int = 0
    tensors_checked: int = 0
    parameter_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        found = [f"{self.files_checked} files", f"{self.parameter_bytes:,} parameter bytes", *self.problems]
        return short(self, "ok" if self.ok else "NOT ok", *found)

    def to_dict(self) -> dict[str, Any]:
        """The outcome under the names that `--json` prints."""
        return asdict(self)

    def fail(self, problem: str) -> None:
        """Record a check that did not pass."""
        self.ok = False
        self.problems.append(problem)


def verify(
    shared: Checkpoint, against: Checkpoint | None = None, *, logits: bool = True, any_base: bool = False
) -> Verification:
    """Verify a shared checkpoint.

    Files are checked against their digests, tensors against the plan, and, with `against`, every number against the
    dense model's. That must be the model that the checkpoint came from, unless `any_base` takes any.

    Then the model's logits (hidden states, for a bare encoder) are compared with those of a stock model whose recipient
    rows were overwritten with donor rows. The stock model is made from `against`, or from the shared checkpoint itself.
    Logits must be equal. Where units are removed or low-rank, sums have other terms. Both models are then computed in
    float32 at least, and may differ by a rounding.

    A problem is reported, not raised.

    Raises:
        CheckpointError: if the checkpoint is not a shared one, or cannot be opened at all.
    """
    result = Verification()
    if shared.sharing is None:
        raise CheckpointError(f"{shared.name} is not a shared checkpoint; there is nothing to verify.")
    try:
        listing = check_manifest(shared)
        result.files_checked = listing.checked
        result.notes += listing.notes
        for problem in listing.problems:
            result.fail(problem)
        files = open_shared(shared)
        dense: SharedFiles | None = None
        if against is not None:
            against.require_dense("verify against")
            _check_origin(shared, against, any_base, result)
            against = against.named_as(shared)
            dense = fit_plan(files.plan, against)
            _check_numbers(files, dense, result)
        result.parameter_bytes = parameter_bytes(shared)
        if logits and result.ok:
            _check_logits(files, dense, result)
        shared.check_unchanged()  # all checks were of one checkpoint
    except HeadshareError as error:
        result.fail(str(error))
    return result


def _check_origin(shared: Checkpoint, dense: Checkpoint, any_base: bool, result: Verification) -> None:
    """Check that the dense model is the one that the checkpoint came from: numbers that went are compared nowhere."""
    try:
        note = check_origin(shared, dense, None if any_base else ANY_BASE)
    except CheckpointError as error:
        result.fail(str(error))
    else:
        result.notes += [note] if note else []


def _check_numbers(files: SharedFiles, original: SharedFiles, result: Verification) -> None:
    """Check every tensor of the shared model against the original dense one, bit for bit.

    What the plan gave up and what a refit changed is left out; what was rounded is to be the nearest.
    """
    shared = files.checkpoint
    dense = original.checkpoint
    tensors = original.tensors
    entry = files.entry
    # both checkpoints have the same tensors, but for those that the plan adds and the parts of packed ones
    packed = {part_of(name, part): name for name in dense.tensors for part in PARTS} if entry.packing else {}
    ours = {packed.get(name, name) for name in parameter_infos(shared)} - set(original.added)
    single = sorted(set(parameter_infos(dense)) ^ ours)
    if single and not _same_class(shared, dense):
        result.notes.append(f"saved as another class of model, so only one of the two has {', '.join(single[:3])}")
    else:
        for name in single:
            result.fail(f"{name} is in only one of the two checkpoints")
    common = sorted(set(dense.tensors) & set(shared.tensors) - guards(shared.tensors))
    # the record of a refit excuses differences, so it may name nothing that a refit cannot change
    converted = set()
    refitted = frozenset(entry.refit.tensors if entry.refit else ())
    may_be = _refittable(dense, stepped=bool(entry.refit and entry.refit.steps)) | files.plan.rewritten
    for name in sorted(refitted - may_be):
        result.fail(f"the record of the refit names {name}, which no refit changes")
    _check_lent(shared, dense, refitted, tensors, result)
    # all other tensors are compared number by number, in the type of the shared checkpoint
    rounded = {name for name, info in shared.tensors.items() if info.parts}
    common = [name for name in common if name not in refitted | files.plan.rewritten | rounded]
    for name in track(common, "numbers", len(common)):
        if dense.tensors[name].dtype != shared.tensors[name].dtype:
            converted.add(f"{dense.tensors[name].dtype} to {shared.tensors[name].dtype}")
        copy = same_tensors(dense, name, files.plan.copies.get(name, name))
        if not copy or not same_numbers(shared, dense, name, tensors.get(name)):
            result.fail(f"{name} differs from the dense model's beyond what the plan gave up")
        result.tensors_checked += 1
    for name in sorted(rounded - refitted - files.plan.rewritten - set(original.added)):
        if not is_nearest(shared, dense, name, tensors.get(name)):
            result.fail(f"{name} has a number that is not the nearest to the dense model's")
    for layer in () if (refitted | rounded) & files.plan.rewritten else rotated_otherwise(files, original):
        result.fail(f"the narrow values of layer {layer} are not as near to the dense model's as they can be")
    # what could not be compared is said
    if entry.refit:
        result.notes.append(f"not compared with the dense model: {entry.refit.in_words()}")
    for near in filter(None, (section.approximate for section in files.plan.sections)):
        result.notes.append(f"not compared with the dense model: {near}")
    if entry.packing:
        result.notes.append(f"not compared bit for bit with the dense model: {entry.packing.in_words()}")
    if converted:
        result.notes.append(f"weights were converted: {', '.join(sorted(converted))}")


def _same_class(shared: Checkpoint, dense: Checkpoint) -> bool:
    return bool(shared.config.get("architectures") == dense.config.get("architectures"))


def _refittable(dense: Checkpoint, *, stepped: bool) -> frozenset[str]:
    """Names of the tensors that a refit may change.

    They are the weights and biases of output projections (W_o and W_down), and with gradient steps the weights of all
    parts, and the layers' norms and biases.
    """
    allowed: set[str] = set()
    for layout in dense.layouts.all:
        for part, place in layout.parts.items():
            names = [place.name(layer) for layer in range(layout.layers)]
            if part in READOUTS:
                allowed.update(names, map(bias_name, names))
            elif stepped:
                allowed.update(names)
    if stepped:
        allowed.update(*(dense.layouts.vectors(layer) for layer in range(dense.layouts.attention.layers)))
    return frozenset(allowed)


def _check_lent(
    shared: Checkpoint,
    dense: Checkpoint,
    refitted: frozenset[str],
    tensors: Mapping[str, TensorPlan],
    result: Verification,
) -> None:
    """Check that the numbers of q, k, v, gate and up which other layers borrow are the dense model's.

    A refit may change the rest of those tensors.
    """
    readouts = _refittable(dense, stepped=False)
    lent: dict[str, set[tuple[int, int]]] = {}
    for gap in (gap for tensor in tensors.values() for gap in tensor.gaps):
        if gap.donor in refitted - readouts and gap.donor in shared.tensors and not shared.tensors[gap.donor].parts:
            lent.setdefault(gap.donor, set()).add((gap.donor_start, gap.stop - gap.start))
    for name, spans in lent.items():
        tensor = tensors[name]
        whole = dense.read(name)
        kept = shared.read(name)
        for start, size in spans:
            own = kept.narrow(tensor.axis, tensor.stored_index(start), size)
            if not torch.equal(own, whole.narrow(tensor.axis, start, size).to(own.dtype)):
                result.fail(f"{name} lends numbers that are not the dense model's, which no refit changes")
                break


def _check_logits(files: SharedFiles, original: SharedFiles | None, result: Verification) -> None:
    shared = files.checkpoint
    plan = files.plan
    if "auto_map" in shared.config:
        result.notes.append("logits not compared: this model needs code of its own, which headshare does not run")
        return
    if plan.no_stock_equivalent is not None:
        result.notes.append(f"logits not compared with a stock model, as there is none: {plan.no_stock_equivalent}")
        return
    # where sums have other terms than in the stock model, a wide type keeps the difference small
    reason = _why_rounding_differs(files)
    stored = next(iter(shared.tensors.values())).torch_dtype
    dtype = torch.promote_types(stored, torch.float32) if reason and stored.is_floating_point else stored
    # memory for one model, in that type and unpacked; the two models are loaded one after the other
    widened = dtype.itemsize / stored.itemsize
    unpacked = [math.prod(info.shape) * A_WORD for name, info in shared.tensors.items() if name.endswith(PACKED)]
    unpacked += [math.prod(info.shape) for info in shared.tensors.values() if info.parts]
    whole = sum(info.nbytes for info in shared.tensors.values()) + sum(unpacked) * torch.float32.itemsize
    needed = int(MODEL_OVERHEAD * widened * whole)
    free = psutil.virtual_memory().available
    if needed > free:
        result.notes.append(f"logits not compared: that needs about {needed:,} bytes of memory, {free:,} are free")
        return
    # each model computes by itself, on the same tokens
    try:
        with _stock_folder(files, original) as stock:
            probe = _probe(shared)
            ours = _outputs(shared, probe, dtype)
            theirs = _outputs(stock, probe, dtype)
    except (OSError, OutputError) as error:
        why = in_one_line(error) if isinstance(error, OSError) else str(error)
        result.notes.append(f"logits not compared: {why} Point TMPDIR at a folder with room to write a copy in.")
        return
    if not torch.isfinite(ours).all():
        result.fail("the shared model's logits are NaN or infinite")
        return
    difference = (ours - theirs).abs().max().item()
    result.max_logit_diff = difference
    allowed = ROUNDING * theirs.abs().max().item() if reason else 0.0
    if difference > allowed:
        result.fail(
            f"logits differ by up to {difference} from the stock model with overwritten rows; they should be equal"
            + (f" to {allowed:.1e}" if reason else "")
        )
    elif reason:
        result.notes.append(f"logits compared to {allowed:.1e}: {reason}")


def _why_rounding_differs(files: SharedFiles) -> str | None:
    """The reason why a shared model rounds in another way than the stock one; None where it does not."""
    reasons = [section.rounding for section in reversed(files.plan.sections)]
    reasons += ["sums of whole numbers are scaled once"] * (files.entry.rounding is not None)
    return next((reason for reason in reasons if reason), None)


@contextmanager
def _stock_folder(files: SharedFiles, original: SharedFiles | None) -> Iterator[Checkpoint]:
    """A stock checkpoint with donors' rows in the place of recipients', in a temporary folder that is then removed."""
    dense = {} if original is None else original.checkpoint.tensors
    alike = original is not None and _same_class(files.checkpoint, original.checkpoint)
    stored = files.checkpoint.tensors
    same_dtype = all(dense[name].dtype == info.dtype for name, info in stored.items() if name in dense)
    with scratch_folder(Path(tempfile.gettempdir()), mode=0o700) as scratch:
        if original is not None and alike and same_dtype and not _has_own_numbers(files):
            folder = write_overwritten(original, scratch / "stock")
        else:
            folder = expand_files(files, scratch / "stock", rounded=False, unpacked=True)
        with open_checkpoint(folder) as stock:
            yield stock


def _has_own_numbers(files: SharedFiles) -> bool:
    """True if some stored numbers are not the dense model's."""
    entry = files.entry
    return bool(files.added or files.plan.rewritten or entry.refit or entry.packing)


def _probe(checkpoint: Checkpoint) -> Tensor:
    """Fixed pseudo-random token ids that every model of this vocabulary has. Shape: 2 x tokens."""
    vocabulary = text_config(checkpoint.config).get("vocab_size") or 1000
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(10, vocabulary - 1), vocabulary, (2, PROBE_TOKENS), generator=generator)


@torch.inference_mode()
def _outputs(checkpoint: Checkpoint, probe: Tensor, dtype: torch.dtype) -> Tensor:
    model: Any = load_model(checkpoint, storage=TRAINABLE, dtype="auto" if not dtype.is_floating_point else dtype)
    with running():
        out = model(input_ids=probe[:, : longest_window(checkpoint.config) or PROBE_TOKENS])
    value: Tensor = out.logits if getattr(out, "logits", None) is not None else out[0]
    return value.float()
