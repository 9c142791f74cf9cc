"""Cost curves of all layers on calibration text, by the error of each sublayer's output.

One layer is looked at at a time, on the dense model's hidden states. Each step of a cost curve is measured with the
earlier ones taken. Costs are squared errors of the output of W_o or W_down relative to the hidden state,
|error|^2 / |h|^2, averaged over tokens, after the best refit of that output projection. So the costs of all layers and
of both sublayers can be compared and added up. Where an output passes a norm before it is added, as in Gemma 2, they
are relative to |h|^2 all the same. Chooses nothing across layers.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from headshare.architecture.removable import attention_kinds, narrow_values_refusal, removal_refusal
from headshare.calibration import processes
from headshare.calibration.costs.actions import REMOVE, SUBLAYERS, Action, Order, Output, registered
from headshare.calibration.costs.curves import CostCurve, CostCurves
from headshare.calibration.costs.descent import neuron_path, own_path, paths_beside, unit_path
from headshare.calibration.costs.sensitivity import Metric, Metrics, sensitivities
from headshare.calibration.costs.sublayer import DenseLayer, SublayerData, Weighted
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Stream
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import OptionError, PlanError
from headshare.plan.layout import Layout
from headshare.plan.units import Sublayer
from headshare.progress import track
from headshare.text.tokens import Calibration

# The tokens that cost curves are made on, and the share of these that is held out from the fits.
PRICED_TOKENS = 16_384
HELD_OUT = 0.25

# The donors of a unit whose costs are measured again after each step.
DONORS = 4


def price_units(
    dense: Checkpoint,
    calibration: Calibration,
    actions: Sequence[Action],
    *,
    tokens: int = PRICED_TOKENS,
    held_out: float = HELD_OUT,
    donors: int = DONORS,
    ffn_groups: int = 1,
    protect: Sequence[int] = (),
    multiple: int = 1,
    device: str = "cpu",
    done: MutableMapping[int, list[CostCurve]] | None = None,
    sensitive: bool = False,
) -> CostCurves:
    """The cost curves of all layers, by those of the actions that this model supports.

    `tokens` is the number of calibration tokens that are looked at, in whole windows drawn by the calibration's seed.
    The share `held_out` of these windows is not fitted to, and costs are errors on it. `donors` is the number of a
    unit's donors whose costs are measured again after each step. `ffn_groups` is the number of groups into which
    `gateup` cuts a layer's neurons. Neurons are removed in multiples of `multiple`, which divides a layer's neurons.
    Layers in `protect` give nothing up, and may lend. Layers that are in `done` are
    not looked at again; every other layer is put into it.

    A sublayer has up to three kinds of curve: of ties that leave a unit columns of its own; of removals; and, where
    units can be removed, one for each action and rank in the order of removal (`qkvo`, `low_rank`), along with which
    removals are always measured. An action with costs of its own has a curve of its own.
    Layer 0 ties nothing, and its attention is never removed whole. So there is always a donor, unless its values become
    narrow, which are not lent: then a plan ties nothing.
    The feed-forward either removes single neurons or ties groups of them, as a plan cannot mix the two. Where both are
    allowed it removes neurons, which did less harm for the same bytes wherever we measured it.

    Raises:
        OptionError: if `donors` is below 1, or `held_out` is no share.
        PlanError: if the model supports none of the actions, or not together, an action is not registered, or `done` is
            of another model.
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
    """
    dense.require_dense("price it")
    if donors < 1:
        raise OptionError(f"{donors} donors of a unit cannot be priced again after each step; price at least 1.")
    if not 0 <= held_out < 1:
        raise OptionError(f"the share held out is {held_out}; it must be 0 or lie between 0 and 1, such as 0.25.")
    wanted = _wanted(dense, actions, ffn_groups)
    curves = {} if done is None else done

    # CostCurves checks its curves, so those of another model are refused before any work is done.
    wanted.prices(dense, curves, protect)
    pending = set(range(wanted.layouts[Sublayer.ATTENTION].layers)) - set(protect) - set(curves)
    if pending:
        layers = Layers(dense, device=device, head=sensitive)
        metrics: Metrics = {}
        if sensitive:
            metrics = sensitivities(layers, calibration.mixed(), tuple(wanted.actions))

        # The walk goes through every layer up to the last that is pending, as each gives the next its hidden states.
        windows = calibration.mixed().tokens[: looked_at(calibration, tokens)]
        windows, fitted = processes.divided(windows, fitted_windows(calibration, tokens, held_out))
        walk = _walk(layers, dense, layers.start(windows), tuple(wanted.actions))
        for layer, seen in track(islice(walk, max(pending) + 1), "pricing", max(pending) + 1):
            if layer.number in pending:
                metric = metrics.get(layer.number, {})
                paths = _paths(layer, seen, wanted, donors, fitted * windows.shape[1], multiple, metric)
                curves[layer.number] = processes.agreed(paths)
    return replace(wanted.prices(dense, curves, protect), in_nats=sensitive)


def priced_before(
    dense: Checkpoint, actions: Sequence[Action], known: Sequence[CostCurve], *, ffn_groups: int = 1
) -> CostCurves:
    """Cost curves of this model that were made before, with its layouts.

    Raises:
        PlanError: if they are of another model, or the model supports none of the actions.
    """
    by_layer: dict[int, list[CostCurve]] = {}
    for curve in known:
        by_layer.setdefault(curve.layer, []).append(curve)
    return _wanted(dense, actions, ffn_groups).prices(dense, by_layer, ())


def looked_at(calibration: Calibration, tokens: int) -> int:
    """The number of windows that `price_units` looks at: those that this many tokens fill, but one at least."""
    windows, window = calibration.tokens.shape
    return min(windows, max(1, tokens // window))


def fitted_windows(calibration: Calibration, tokens: int, held_out: float) -> int:
    """The number of these windows that `price_units` fits to: the first ones, without about the share `held_out`.

    At least one window is fitted to. If the share is not 0 and there are two windows, at least one is held out.
    """
    windows = looked_at(calibration, tokens)
    return max(1, windows - max(int(windows * held_out), held_out > 0))


@dataclass(frozen=True)
class _SupportedActions:
    """The actions that each sublayer of a model supports, and the layouts of its units and of single neurons."""

    actions: Mapping[Sublayer, tuple[Action, ...]]
    layouts: Mapping[Sublayer, Layout]
    neurons: Layout | None
    kinds: Sequence[str]

    def of(self, kind: Sublayer, layer: int) -> tuple[Action, ...]:
        """The actions for this sublayer of this layer.

        The first attention of each kind is never removed whole, as the model counts tokens by it.
        """
        first = kind is Sublayer.ATTENTION and self.kinds.index(self.kinds[layer]) == layer
        return tuple(each for each in self.actions[kind] if not (first and each is SUBLAYERS))

    def prices(
        self, dense: Checkpoint, curves: Mapping[int, Sequence[CostCurve]], protect: Sequence[int]
    ) -> CostCurves:
        """The curves of all layers that are not protected, with the model's layouts."""
        paths = tuple(path for number in sorted(set(curves) - set(protect)) for path in curves[number])
        return CostCurves(str(dense.config.get("model_type", "unknown")), self.layouts, paths, self.neurons)

    def units(self, kind: Sublayer) -> Layout:
        """The layout of the units that this sublayer's actions are for: single neurons to remove, groups to tie."""
        if kind is Sublayer.FFN and any(action.removes for action in self.actions[kind]):
            assert self.neurons is not None
            return self.neurons
        return self.layouts[kind]


def _wanted(dense: Checkpoint, actions: Sequence[Action], ffn_groups: int) -> _SupportedActions:
    """The actions that the model supports, of these.

    Raises:
        PlanError: if it supports none of them.
    """
    layouts, neurons = _layouts(dense, ffn_groups)
    asked = {kind: _asked(kind, actions) for kind in layouts}
    too_wide = narrow_values_refusal(dense.layouts.config)

    # Families differ in the sublayers that can go without units.
    removing = [(kind, action) for kind, actions in asked.items() for action in actions if action.removes]
    refusals = {each: _removal_refusal(dense, layouts, *each) for each in removing}
    allowed = {
        kind: _allowed(kind, [action for action in actions if refusals.get((kind, action)) is None])
        for kind, actions in asked.items()
    }
    if too_wide is not None:
        allowed = {kind: tuple(each for each in mine if not each.narrows) for kind, mine in allowed.items()}

    # A sublayer may be left without actions, but not both.
    if not any(allowed.values()):
        words = ", ".join(map(str, actions)) or "none"
        reasons = "".join(f" Removal: {reason}." for reason in dict.fromkeys(refusals.values()) if reason)
        if too_wide is not None and any(action.narrows for action in actions):
            reasons += f" Narrow values: {too_wide}."
        raise PlanError(f"this model can have none of the forms asked for: {words}.{reasons}")
    kinds = attention_kinds(dense.layouts.config, layouts[Sublayer.ATTENTION].layers)
    return _SupportedActions({kind: mine for kind, mine in allowed.items() if mine}, layouts, neurons, kinds)


def _asked(kind: Sublayer, actions: Sequence[Action]) -> tuple[Action, ...]:
    """The actions for this sublayer, with removal where another action follows its order."""
    mine = [action for action in actions if action.sublayer in (None, kind)]
    if any(action.order is Order.REMOVAL for action in mine):
        mine.append(REMOVE)
    return registered(mine)


def _removal_refusal(
    dense: Checkpoint, layouts: Mapping[Sublayer, Layout], kind: Sublayer, action: Action
) -> str | None:
    """The reason why this action cannot remove anything of the model's sublayers of this kind, or None."""
    whole = action is SUBLAYERS
    if kind is Sublayer.ATTENTION and layouts[kind].groups == 1 and not whole:
        return "its layers have one attention unit each"
    return removal_refusal(dense.layouts.config, kind, whole=whole)


def _allowed(kind: Sublayer, possible: Sequence[Action]) -> tuple[Action, ...]:
    """The actions that a sublayer may have together: where neurons are removed, nothing else is done with them."""
    removals = tuple(action for action in possible if action.removes)
    return removals if kind is Sublayer.FFN and removals else tuple(possible)


def _layouts(dense: Checkpoint, ffn_groups: int) -> tuple[dict[Sublayer, Layout], Layout | None]:
    """The layouts of both sublayers' units and of single neurons. Experts have none for the feed-forward."""
    layouts = {Sublayer.ATTENTION: dense.layouts.attention}
    if dense.layouts.ffn is not None:
        layouts[Sublayer.FFN] = dense.layouts.ffn_in(ffn_groups)
    return layouts, dense.layouts.neurons


def _walk(
    layers: Layers, dense: Checkpoint, stream: Stream, kinds: Sequence[Sublayer]
) -> Iterator[tuple[DenseLayer, Mapping[Sublayer, Weighted]]]:
    """Each layer of the dense model with the hidden states that enter it, and the inputs of its output projections."""
    for number in range(layers.count):
        layer = DenseLayer(dense, layers, number, layers.build(number), stream)
        seen, stream = layer.look(kinds)
        yield layer, seen


def _paths(
    layer: DenseLayer,
    seen: Mapping[Sublayer, Weighted],
    wanted: _SupportedActions,
    donors: int,
    fitted: int,
    multiple: int,
    metrics: Mapping[Sublayer, Metric],
) -> list[CostCurve]:
    """The cost curves of both sublayers of a layer, without empty ones."""
    paths: list[CostCurve] = []
    for kind in wanted.actions:
        data = SublayerData(layer, wanted.units(kind), seen[kind], fitted, metrics.get(kind))
        paths += _curves_of(data, wanted.of(kind, layer.number), donors, multiple)
    return [path for path in paths if path.steps]


def _curves_of(data: SublayerData, actions: Sequence[Action], donors: int, multiple: int) -> Iterator[CostCurve]:
    """The cost curves of a sublayer: of ties, removals, actions in the order of removal, and those with own costs."""
    described = [action for action in actions if action.costs is None]
    beside = tuple(action for action in described if action.order is Order.REMOVAL and REMOVE in actions)
    alone = [action for action in described if action not in beside]

    # Columns that units keep or take from donors are fitted together: each unit has the cheapest of these actions.
    together = tuple(action for action in alone if action.output in (Output.OWN, Output.SCALED))
    if together:
        yield unit_path(data, together, donors=donors)

    # Products are not fitted again with scales, and all others are compared with removal, so each has its own curve.
    for action in alone:
        if action.removes and data.layout.kind is Sublayer.FFN:
            yield neuron_path(data, action, multiple)
        elif action not in together:
            path = unit_path(data, (action,), donors=donors)
            yield path
            if action is REMOVE and beside and data.dense.number > 0:
                yield from paths_beside(data, path, beside, donors=donors)

    # An action that its traits do not describe makes its curve itself.
    for action in actions:
        if action.costs is not None:
            yield own_path(data, action)
