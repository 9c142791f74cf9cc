"""Exact sizes of a shared checkpoint, from a ratio and a match function alone, before any plan is made."""

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.layouts import layouts_of
from headshare.matching.exact.plan import EXACT, exact_plan
from headshare.matching.pairing import check_covered, checked_recipients, ratio_of
from headshare.matching.similarity import match_for, tied_together
from headshare.plan.layout import Layout
from headshare.plan.plan import SharePlan
from headshare.plan.section import Choice
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Parts, Tie
from headshare.sharing.rounded.matrices import estimate_planned, estimate_rounded
from headshare.sharing.size import Estimate


def estimate(
    checkpoint: Checkpoint,
    wish: float | SharePlan = 0.3,
    *,
    parts: str | Parts = "qkv",
    match: str = "qk",
    ffn_groups: int = 1,
    ffn_ratio: float | None = None,
    dtype: str | None = None,
    bits: int | None = None,
    group: int | None = None,
) -> Estimate:
    """The bytes that `share` will leave of a checkpoint under a plan, or at a ratio of units.

    With `bits`, all matrices are rounded then, a scale for every `group` inputs of a row (None: for the row).

    Reads names and shapes only, unless `match` is "exact": then weights are read, and what stands several times bit for
    bit is counted once, whatever the ratio and the parts. A ratio stands for the plan that `make_plan` makes in mode
    star or root, by the `match` function and in the `parts` that are named. A plan says all of this itself.

    Raises:
        ArchitectureError, CheckpointError, OptionError, PlanError: as `share` would.
    """
    if isinstance(wish, SharePlan):
        return _estimate(checkpoint, wish, dtype, bits, group)
    checkpoint.require_dense("estimate the saving of")
    if match == EXACT:
        return _estimate(checkpoint, exact_plan(checkpoint), dtype, bits, group)
    # Bytes depend on how many units are shared and in which parts, never on which units they are. So any ties do, and
    # no weight is read.
    wanted = Parts.parse(parts)
    selections: list[Selection] = []
    for layout in layouts_of(checkpoint, wanted, ffn_groups):
        share = ratio_of(layout.kind, wish, ffn_ratio)
        function = match_for(layout, match)
        # refuse what `share` would refuse: parts that no table covers, and ratios that cannot be met
        tables = tied_together(function, layout)
        asked = wanted.of(layout.kind)
        check_covered(asked, tables, layout)
        ties = _any_ties(layout, checked_recipients(layout, share))
        # one selection for each set of parts that is tied together, as in the real plan
        choice = Choice(match=function.name, ratio=share)
        for table in tables:
            tied = tuple(part for part in asked if part in table)
            if tied:
                selections.append(Selection(layout=layout.only(tied), ties=ties, chosen=choice))
    return _estimate(checkpoint, SharePlan(selections=tuple(selections)), dtype, bits, group)


def _estimate(
    checkpoint: Checkpoint, plan: SharePlan, dtype: str | None, bits: int | None, group: int | None
) -> Estimate:
    if bits is None:
        return estimate_planned(checkpoint, plan, dtype=dtype)
    return estimate_rounded(checkpoint, plan, bits=bits, group=group, dtype=dtype)


def _any_ties(layout: Layout, count: int) -> tuple[Tie, ...]:
    """Ties that suffice to count bytes: all to layer 0, whose units never give anything up."""
    first = HeadUnit(0, 0)
    return tuple(Tie(layout.unit(layout.groups + index), first) for index in range(count))
