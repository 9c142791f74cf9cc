"""Budgets: the number of bytes or of units that a plan is to save, and the actions that it may use."""

from collections.abc import Collection
from dataclasses import dataclass
from math import gcd

from headshare.calibration.amounts import Amount
from headshare.calibration.bits.joint import WIDTHS, ByteBudget, bytes_left
from headshare.calibration.costs.actions import (
    ACTIONS,
    AUTO,
    AUTO_ACTIONS,
    NARROW_VALUES,
    REMOVE,
    SUBLAYERS,
    Action,
    Output,
)
from headshare.calibration.targets import target_of
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.layouts import layouts_of
from headshare.errors import OptionError, PlanError
from headshare.matching.estimate import estimate
from headshare.matching.pairing import checked_recipients
from headshare.plan.units import Parts, Sublayer
from headshare.short import short

# The word for sharing nothing.
NOTHING = "none"

# What a budget of bytes may take besides sharing, where nothing else is said.
BY_DEFAULT = (REMOVE.name, SUBLAYERS.name, NARROW_VALUES.name)


@dataclass(frozen=True)
class Budget:
    """An amount that a plan is to give up: units by one action, or bytes by the cheapest of several actions.

    `ffn_groups` is the number of groups of neurons in a layer. Layers in `protect` give nothing up. A layer keeps a
    multiple of `multiple` neurons. With `rounded`, matrices are rounded too, and that says how many bytes may be left.
    """

    actions: tuple[Action, ...]
    units: int | None = None
    saved_bytes: int | None = None
    ffn_groups: int = 1
    protect: tuple[int, ...] = ()
    multiple: int = 1
    rounded: ByteBudget | None = None

    def __repr__(self) -> str:
        amount = f"{self.saved_bytes:,} bytes" if self.units is None else f"{self.units} units"
        return short(self, amount, "+".join(map(str, self.actions)))

    @classmethod
    def parse(
        cls,
        dense: Checkpoint,
        *,
        ratio: float = 0.3,
        save: str | None = None,
        to: str | None = None,
        bits: str = "16",
        dtype: str | None = None,
        parts: str | None = None,
        allow: Collection[str] | None = None,
        ffn_groups: int = 1,
        protect: Collection[int] = (),
        multiple: int = 1,
        target: str | None = None,
    ) -> "Budget":
        """The budget that these options describe.

        `save` is an `Amount` of the whole model's bytes, such as "10%" or "120MB", and `to` one that is to be left.
        Without either, `ratio` of the units are shared in `parts`. `bits` is a key of `WIDTHS`: below 16, matrices are
        rounded too, and bytes are counted of numbers stored as `dtype`, if that is given.

        Where there is a choice of actions (several parts, as with auto, or an action to
        `allow`), of ranks or of widths, the budget is the number of bytes that sharing q, k and v at this ratio would
        save. "none" shares nothing. With `save` and no parts, units and sublayers may be removed and values narrowed,
        unless `allow` says which actions there may be besides sharing, and nothing is shared unless `allow` is empty.
        Otherwise the parts are those of auto. A `target` is a format that keeps only some actions: those are allowed,
        nothing is shared, and neurons go in its blocks, unless `multiple` says another number.

        Raises:
            OptionError: if a word is not known, `save` is not an amount, `multiple` does not divide the neurons that
                may be removed from a layer, or the target does not keep what is asked for.
            PlanError: if the budget cannot be met by any plan.
            ArchitectureError: if the model cannot be written in the target's format.
        """
        dense.require_dense("plan for it")
        saved: int | None = None
        rounded: ByteBudget | None = None
        if save is not None or to is not None:
            saved, rounded = _asked(dense, save, to, bits, dtype)
        if bits != "16" and (rounded is None or target is not None):
            why = "no size is asked for: give --to or --save" if target is None else f"{target} has its own numbers"
            raise OptionError(f"--bits {bits} cannot be used: {why}.")
        # Beside removed units and narrow values, ties were worth nothing at any budget that we priced, and take four
        # times as long to price (docs/experiments.md). So a number of bytes to save has them only where they are asked
        # for, or nothing else is allowed.
        if target is not None:
            chosen = target_of(target, dense, allow=allow, shares=parts not in (None, NOTHING))
            parts, allow = NOTHING, allow or chosen.kept
            multiple = chosen.multiple(dense) if multiple == 1 else multiple
        if allow is None:
            allow = BY_DEFAULT if saved is not None and parts is None else ()
        if parts is None:
            parts = NOTHING if saved is not None and allow else AUTO
        actions = tuple(dict.fromkeys((*_actions_of(parts), *map(_allowed, allow))))
        if not actions:
            raise OptionError("nothing is shared and nothing else is allowed. Give parts to share, or allow something.")

        # The units are counted in any case, so that a ratio or protected layers that do not fit are refused.
        words = "gateup" if actions[0].sublayer is Sublayer.FFN else "qk"
        layout = next(iter(layouts_of(dense, Parts.parse(words), ffn_groups)))
        units = checked_recipients(layout, 0.0 if saved is not None else ratio, protect)

        if multiple != 1:
            _check_multiple(dense, actions, multiple)

        # Different actions save different numbers of bytes a unit, so only bytes compare them.
        if saved is None and (len(actions) > 1 or actions[0].output in (Output.LOW_RANK, Output.NARROW)):
            saved = estimate(dense, ratio, parts="qkv").saved_bytes
        left_alone = tuple(sorted(set(protect)))
        return cls(actions, units if saved is None else None, saved, ffn_groups, left_alone, multiple, rounded)


def _actions_of(parts: str) -> list[Action]:
    """The actions that share these parts, which are words joined by +."""
    known = {name: (action,) for name, action in ACTIONS.items() if action.shares} | {AUTO: AUTO_ACTIONS}
    words = [word.strip() for word in parts.split("+") if parts != NOTHING]
    unknown = [word for word in words if word not in known]
    if unknown:
        raise OptionError(
            f"units cannot be matched by output in parts '{unknown[0]}'. There are: {', '.join(known)}, "
            f"several joined by +, or {NOTHING}."
        )
    return [action for word in words for action in known[word]]


def _allowed(word: str) -> Action:
    """The action of this name, which shares nothing."""
    known = {name: action for name, action in ACTIONS.items() if not action.shares}
    if word not in known:
        raise OptionError(
            f"'{word}' is not something that can be allowed besides sharing. There are: {', '.join(known)}."
        )
    return known[word]


def _check_multiple(dense: Checkpoint, actions: Collection[Action], multiple: int) -> None:
    """Refuse a multiple in which no neurons can be removed."""
    neurons = dense.layouts.neurons
    if neurons is None or not any(action.removes and action.sublayer is not Sublayer.ATTENTION for action in actions):
        raise OptionError(f"no neurons are removed, in multiples of {multiple} or else. Allow it by --allow remove.")
    if multiple < 1 or neurons.groups % multiple:
        raise OptionError(
            f"a layer has {neurons.groups} neurons, which are no multiple of {multiple}. Remove them in multiples of "
            f"a divisor, such as {gcd(neurons.groups, multiple)}."
        )


def _asked(
    dense: Checkpoint, save: str | None, to: str | None, bits: str, dtype: str | None
) -> tuple[int, ByteBudget | None]:
    """The number of bytes that `save` or `to` asks to save, which is less than all, and the budget of rounding."""
    if bits not in WIDTHS:
        raise OptionError(f"there is no rounding to '{bits}' bits. There are: {', '.join(WIDTHS)}.")
    if save is not None and to is not None:
        raise OptionError("both of --save and --to are given. Give one: what is to go, or what is to be left.")
    whole = bytes_left(dense, dtype if bits != "16" else None)
    if save is not None:
        wanted = Amount.parse(save, "to save").of(whole)
    else:
        wanted = whole - Amount.parse(to or "", "to shrink to").of(whole)
    if not 1 <= wanted < whole:
        asked = f"{save} of" if save is not None else f"all but {to} of"
        raise PlanError(f"{asked} a model of {whole:,} bytes cannot be saved; ask for more than 0 and less than all.")
    saved = int(wanted)
    return saved, None if bits == "16" else ByteBudget(whole - saved, WIDTHS[bits], dtype)
