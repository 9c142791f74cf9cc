"""Price what every layer could give up, on calibration text: which unit, in which form, with which donor.

One layer is looked at at a time, in the dense model's stream. Its *path* is the order in which it would give units up,
each step priced with the earlier ones taken. Prices are squared errors of the output of W_o or W_down relative to the
hidden state, |error|^2 / |h|^2, averaged over tokens, after the best refit of that readout; so prices of all layers and
of both halves of a layer can be compared and added up. Where an output passes a norm before it is added, as in Gemma 2,
they are relative to |h|^2 all the same. Chooses nothing across layers.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import islice

from headshare.architecture.removable import removal_refusal
from headshare.calibration.costs.curves import Form, Path, Prices
from headshare.calibration.costs.descent import neuron_path, paths_beside, unit_path
from headshare.calibration.costs.sublayer import DenseLayer, Half, Weighted
from headshare.calibration.layerwise.layers import Layers
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import OptionError, PlanError
from headshare.plan.layout import Layout
from headshare.plan.units import Kind
from headshare.progress import track
from headshare.text.tokens import Calibration

PRICED_TOKENS = 16_384
HELD_OUT = 0.25
DONORS = 4


def price_units(
    dense: Checkpoint,
    calibration: Calibration,
    forms: Sequence[Form],
    *,
    tokens: int = PRICED_TOKENS,
    held_out: float = HELD_OUT,
    donors: int = DONORS,
    ffn_groups: int = 1,
    protect: Sequence[int] = (),
    device: str = "cpu",
    done: MutableMapping[int, list[Path]] | None = None,
) -> Prices:
    """The paths of all layers, in whichever of these forms this model can have.

    `tokens` are as many of the calibration's tokens, in whole windows drawn by its seed, as are looked at, of which the
    share `held_out` (whole windows too) is not fitted to: prices are errors on those. `donors` how many of a unit's
    donors are priced again after each step; `ffn_groups` into how many groups `gateup` cuts a layer's neurons. Layers
    in `protect` give nothing up, and may lend. Layers that are in `done` are not priced again; each that is priced is
    put into it.

    Ties that leave a unit its own columns of o, ties that do not (`qkvo`, `factored`), and removals are paths of their
    own. Units of `qkvo` and `factored` are those that would be removed, in that order, with a path for each form and
    rank: so removals are priced along with them, wherever the model can have any.
    Layer 0 ties nothing, and no layer removes all: so there is always a donor.
    The feed-forward either loses single neurons or ties groups of them, as a plan cannot mix the two: where both are
    allowed it loses neurons, which did less harm for the same bytes wherever we measured it.

    Raises:
        OptionError: if there is no donor to be priced, or no token to be fitted to.
        PlanError: if none of the forms can be had of this model, or not together, or `done` is of another.
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
    """
    dense.require_dense("price it")
    if donors < 1:
        raise OptionError(f"{donors} donors of a unit cannot be priced again after each step; price at least 1.")
    if not 0 <= held_out < 1:
        raise OptionError(f"the share held out is {held_out}; it must be 0 or lie between 0 and 1, such as 0.25.")
    wanted = _wanted(dense, forms, ffn_groups)
    found = {} if done is None else done
    wanted.prices(dense, found, protect)  # so that paths of another model are refused at once
    pending = set(range(wanted.layouts[Kind.ATTENTION].layers)) - set(protect) - set(found)
    if pending:
        fitted = fitted_windows(calibration, tokens, held_out) * calibration.tokens.shape[1]
        walk = _walk(Layers(dense, device=device), dense, calibration.mixed(), tokens, tuple(wanted.forms))
        for layer, seen in track(islice(walk, max(pending) + 1), "pricing", max(pending) + 1):
            if layer.number in pending:
                found[layer.number] = _paths(layer, seen, wanted, donors, fitted)
    return wanted.prices(dense, found, protect)


def looked_at(calibration: Calibration, tokens: int) -> int:
    """How many of the calibration's windows `price_units` looks at: as many whole ones as have this many tokens, or
    one."""
    windows, window = calibration.tokens.shape
    return min(windows, max(1, tokens // window))


def fitted_windows(calibration: Calibration, tokens: int, held_out: float) -> int:
    """How many of those it fits to: the first ones, all but about this share, and but one at least if it is not 0."""
    windows = looked_at(calibration, tokens)
    return max(1, windows - max(int(windows * held_out), held_out > 0))


@dataclass(frozen=True)
class _Wanted:
    """Which forms each half of this model's layers can have, and the layouts of its units and single neurons."""

    forms: Mapping[Kind, tuple[Form, ...]]
    layouts: Mapping[Kind, Layout]
    neurons: Layout | None

    def prices(self, dense: Checkpoint, found: Mapping[int, Sequence[Path]], protect: Sequence[int]) -> Prices:
        """The paths of all layers that are not protected."""
        paths = tuple(path for number in sorted(set(found) - set(protect)) for path in found[number])
        return Prices(str(dense.config.get("model_type", "unknown")), self.layouts, paths, self.neurons)


def _wanted(dense: Checkpoint, forms: Sequence[Form], ffn_groups: int) -> _Wanted:
    """What of these forms the model can have.

    Raises:
        PlanError: if that is nothing.
    """
    layouts, neurons = _layouts(dense, ffn_groups)
    refusals = {kind: removal_refusal(dense.layouts.config, kind) for kind in layouts if _removes(kind, forms)}
    if refusals and layouts[Kind.ATTENTION].groups == 1:
        refusals[Kind.ATTENTION] = "its layers have one attention unit each"
    removable = {kind for kind, refusal in refusals.items() if refusal is None}
    allowed = {kind: _allowed(kind, forms, kind in removable) for kind in layouts}
    if not any(allowed.values()):
        reasons = "".join(f" Removal: {reason}." for reason in refusals.values() if reason)
        raise PlanError(f"this model can have none of the forms asked for: {', '.join(forms) or 'none'}.{reasons}")
    return _Wanted({kind: some for kind, some in allowed.items() if some}, layouts, neurons)


def _removes(kind: Kind, forms: Sequence[Form]) -> bool:
    """Whether removals are to be priced: where they are asked for, and with ties that follow them."""
    return Form.REMOVE in forms or (kind is Kind.ATTENTION and any(form.follows_removals for form in forms))


def _allowed(kind: Kind, forms: Sequence[Form], removable: bool) -> tuple[Form, ...]:
    """The forms for this half of the layers, ties before removal; of neurons, removal alone if it can be had."""
    if removable and kind is Kind.FFN:
        return (Form.REMOVE,)
    ties = tuple(form for form in Form if form in forms and form.kind is kind)
    return (*ties, Form.REMOVE) if removable else ties


def _layouts(dense: Checkpoint, ffn_groups: int) -> tuple[dict[Kind, Layout], Layout | None]:
    """The units of both halves, and single neurons; nothing of the feed-forward where that is a mixture of experts."""
    layouts = {Kind.ATTENTION: dense.layouts.attention}
    if dense.layouts.ffn is not None:
        layouts[Kind.FFN] = dense.layouts.ffn_in(ffn_groups)
    return layouts, dense.layouts.neurons


def _walk(
    layers: Layers, dense: Checkpoint, calibration: Calibration, tokens: int, kinds: Sequence[Kind]
) -> Iterator[tuple[DenseLayer, Mapping[Kind, Weighted]]]:
    """Each layer of the dense model with the stream that enters it, and what enters its readouts."""
    stream = layers.start(calibration.tokens[: looked_at(calibration, tokens)])
    for number in range(layers.count):
        layer = DenseLayer(dense, layers, number, layers.build(number), stream)
        seen, stream = layer.look(kinds)
        yield layer, seen


def _paths(layer: DenseLayer, seen: Mapping[Kind, Weighted], wanted: _Wanted, donors: int, fitted: int) -> list[Path]:
    """What each half of the layer would give up. Ties and removals of units are paths of their own."""
    paths = []
    for kind, forms in wanted.forms.items():
        half = Half(layer, wanted.layouts[kind], seen[kind], fitted)
        if kind is Kind.FFN and forms == (Form.REMOVE,):
            assert wanted.neurons is not None
            paths.append(neuron_path(half, wanted.neurons))
        else:
            paths += _unit_paths(half, forms, donors)
    return [path for path in paths if path.steps]


def _unit_paths(half: Half, forms: Sequence[Form], donors: int) -> Iterator[Path]:
    """The paths of ties; of removals; and of ties that leave a unit no columns of its own, which follow the removals
    where there are some."""
    removes = Form.REMOVE in forms
    beside = tuple(form for form in forms if form.follows_removals)
    alone = {Form.REMOVE, Form.FACTORED, *(beside if removes else ())}
    ties = tuple(form for form in forms if form not in alone)
    if ties:
        yield unit_path(half, ties, donors=donors)
    if removes:
        removal = unit_path(half, (Form.REMOVE,), donors=donors)
        yield removal
        if beside and half.dense.number > 0:
            yield from paths_beside(half, removal, beside, donors=donors)
    elif Form.FACTORED in forms:
        yield unit_path(half, (Form.FACTORED,), donors=donors)
