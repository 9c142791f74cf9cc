"""Prices of all that each layer could give up, on calibration text: which unit, by which action, with which donor.

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
from headshare.calibration.costs.actions import REMOVE, Action, Order, Output, registered
from headshare.calibration.costs.curves import Path, Prices
from headshare.calibration.costs.descent import neuron_path, own_path, paths_beside, unit_path
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
    actions: Sequence[Action],
    *,
    tokens: int = PRICED_TOKENS,
    held_out: float = HELD_OUT,
    donors: int = DONORS,
    ffn_groups: int = 1,
    protect: Sequence[int] = (),
    device: str = "cpu",
    done: MutableMapping[int, list[Path]] | None = None,
) -> Prices:
    """The paths of all layers, by whichever of these actions this model can have.

    `tokens` are as many of the calibration's tokens, in whole windows drawn by its seed, as are looked at, of which the
    share `held_out` (whole windows too) is not fitted to: prices are errors on those. `donors` says how many of a
    unit's donors are priced again after each step; `ffn_groups` into how many groups `gateup` cuts a layer's neurons.
    Layers in `protect` give nothing up, and may lend. Layers that are in `done` are not priced again; each that is
    priced is put into it.

    Up to three kinds of path come of each half: of ties that leave a unit columns of its own; of removals; and, where
    units can be removed, one for each action and rank in the order of removal (`qkvo`, `factored`). So removals are
    priced along with those. An action with costs of its own has a path of its own.
    Layer 0 ties nothing, and no layer removes all: so there is always a donor.
    The feed-forward either loses single neurons or ties groups of them, as a plan cannot mix the two: where both are
    allowed it loses neurons, which did less harm for the same bytes wherever we measured it.

    Raises:
        OptionError: if there is no donor to be priced, or no token to be fitted to.
        PlanError: if none of the actions can be had of this model, or not together, one is not registered, or `done` is
            of another model.
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
    """
    dense.require_dense("price it")
    if donors < 1:
        raise OptionError(f"{donors} donors of a unit cannot be priced again after each step; price at least 1.")
    if not 0 <= held_out < 1:
        raise OptionError(f"the share held out is {held_out}; it must be 0 or lie between 0 and 1, such as 0.25.")
    wanted = _wanted(dense, actions, ffn_groups)
    found = {} if done is None else done
    # Prices check their paths: those of another model are refused before any work is done.
    wanted.prices(dense, found, protect)
    pending = set(range(wanted.layouts[Kind.ATTENTION].layers)) - set(protect) - set(found)
    if pending:
        # The walk goes through every layer up to the last that is pending, as each gives the next its stream.
        fitted = fitted_windows(calibration, tokens, held_out) * calibration.tokens.shape[1]
        walk = _walk(Layers(dense, device=device), dense, calibration.mixed(), tokens, tuple(wanted.actions))
        for layer, seen in track(islice(walk, max(pending) + 1), "pricing", max(pending) + 1):
            if layer.number in pending:
                found[layer.number] = _paths(layer, seen, wanted, donors, fitted)
    return wanted.prices(dense, found, protect)


def looked_at(calibration: Calibration, tokens: int) -> int:
    """The number of the calibration's windows that `price_units` looks at: as many whole ones as have this many tokens,
    or one."""
    windows, window = calibration.tokens.shape
    return min(windows, max(1, tokens // window))


def fitted_windows(calibration: Calibration, tokens: int, held_out: float) -> int:
    """The number of those that it fits to: the first ones, all but about this share, and but one at least if it is not
    0."""
    windows = looked_at(calibration, tokens)
    return max(1, windows - max(int(windows * held_out), held_out > 0))


@dataclass(frozen=True)
class _Wanted:
    """The actions that each half of this model's layers can have, and the layouts of its units and single neurons."""

    actions: Mapping[Kind, tuple[Action, ...]]
    layouts: Mapping[Kind, Layout]
    neurons: Layout | None

    def prices(self, dense: Checkpoint, found: Mapping[int, Sequence[Path]], protect: Sequence[int]) -> Prices:
        """The paths of all layers that are not protected."""
        paths = tuple(path for number in sorted(set(found) - set(protect)) for path in found[number])
        return Prices(str(dense.config.get("model_type", "unknown")), self.layouts, paths, self.neurons)

    def units(self, kind: Kind) -> Layout:
        """The units that this half's actions are for: neurons are removed one by one, and tied in groups."""
        if kind is Kind.FFN and any(action.removes for action in self.actions[kind]):
            assert self.neurons is not None
            return self.neurons
        return self.layouts[kind]


def _wanted(dense: Checkpoint, actions: Sequence[Action], ffn_groups: int) -> _Wanted:
    """The part of these actions that the model can have.

    Raises:
        PlanError: if that is nothing.
    """
    layouts, neurons = _layouts(dense, ffn_groups)
    asked = {kind: _asked(kind, actions) for kind in layouts}
    # Families differ in the halves that can go without units.
    removing = [kind for kind, some in asked.items() if any(action.removes for action in some)]
    refusals = {kind: removal_refusal(dense.layouts.config, kind) for kind in removing}
    if Kind.ATTENTION in refusals and layouts[Kind.ATTENTION].groups == 1:
        refusals[Kind.ATTENTION] = "its layers have one attention unit each"
    removable = {kind for kind, refusal in refusals.items() if refusal is None}
    allowed = {kind: _allowed(kind, some, kind in removable) for kind, some in asked.items()}
    if not any(allowed.values()):
        words = ", ".join(map(str, actions)) or "none"
        reasons = "".join(f" Removal: {reason}." for reason in refusals.values() if reason)
        raise PlanError(f"this model can have none of the forms asked for: {words}.{reasons}")
    return _Wanted({kind: some for kind, some in allowed.items() if some}, layouts, neurons)


def _asked(kind: Kind, actions: Sequence[Action]) -> tuple[Action, ...]:
    """The actions for this half of the layers, with removal where another follows its order."""
    mine = [action for action in actions if action.sublayer in (None, kind)]
    if any(action.order is Order.REMOVAL for action in mine):
        mine.append(REMOVE)
    return registered(mine)


def _allowed(kind: Kind, asked: Sequence[Action], removable: bool) -> tuple[Action, ...]:
    """The actions that are left where units can be removed or not; of neurons, removal alone if it can be had."""
    removals = tuple(action for action in asked if action.removes)
    if not removable:
        return tuple(action for action in asked if action not in removals)
    return removals if kind is Kind.FFN else tuple(asked)


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
    """The paths of both halves of the layer."""
    paths: list[Path] = []
    for kind, actions in wanted.actions.items():
        half = Half(layer, wanted.units(kind), seen[kind], fitted)
        paths += _half_paths(half, actions, donors)
    return [path for path in paths if path.steps]


def _half_paths(half: Half, actions: Sequence[Action], donors: int) -> Iterator[Path]:
    """The paths of one half: of ties; of removals; of actions in the order of removal; and of those with own costs."""
    described = [action for action in actions if action.costs is None]
    beside = tuple(action for action in described if action.order is Order.REMOVAL and REMOVE in actions)
    alone = [action for action in described if action not in beside]
    # Columns that units keep or take from donors are fitted together: each unit has the cheapest of these actions.
    together = tuple(action for action in alone if action.output in (Output.OWN, Output.SCALED))
    if together:
        yield unit_path(half, together, donors=donors)
    # Products are not fitted again with scales, and removal is what all others are compared with: a path for each.
    for action in alone:
        if action.removes and half.layout.kind is Kind.FFN:
            yield neuron_path(half, action)
        elif action not in together:
            path = unit_path(half, (action,), donors=donors)
            yield path
            if action is REMOVE and beside and half.dense.number > 0:
                yield from paths_beside(half, path, beside, donors=donors)
    for action in actions:
        if action.costs is not None:
            yield own_path(half, action)
