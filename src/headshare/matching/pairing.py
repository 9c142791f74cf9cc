"""The pairing of units: a plan from scores, by one of the modes.

Never sees a weight.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

from headshare.errors import OptionError, PlanError
from headshare.matching.modes import MODES, Request, ScoreMatrix, pairs_of
from headshare.matching.scores import Scores, ScoreTable
from headshare.plan.layout import Layout
from headshare.plan.plan import SharePlan
from headshare.plan.section import Choice
from headshare.plan.ties import Selection
from headshare.plan.units import Part, Parts, Sublayer


def units_at(ratio: float, units: int) -> int:
    """The number of recipients at a ratio: int(ratio x units), with the ratio taken as the decimal that was written."""
    return int(Fraction(str(ratio)) * units)


def ratio_of(kind: Sublayer, ratio: float, ffn_ratio: float | None) -> float:
    """The ratio for this sublayer: `ffn_ratio` for the feed-forward where it is given, else `ratio`."""
    return ffn_ratio if kind is Sublayer.FFN and ffn_ratio is not None else ratio


def make_plan(
    scores: Scores,
    ratio: float = 0.3,
    *,
    parts: str | Parts = "qkv",
    mode: str = "star",
    ffn_ratio: float | None = None,
    protect: Collection[int] = (),
    ranks: int = 1,
) -> SharePlan:
    """Choose int(ratio x units) recipients in each grid and tie each to a donor of a strictly earlier layer.

    `ffn_ratio` is the feed-forward's own ratio where it differs. Layers in `protect` give nothing up. Donors are on
    their recipients' rank when an engine divides each layer's units evenly among so many `ranks`.

    Raises:
        OptionError: if there is no such mode, or no such part, or ranks do not divide the units.
        PlanError: if the ratio cannot be met (it says the maximum), or the scores lack what the parts need.
    """
    wanted = Parts.parse(parts)
    if mode not in MODES:
        raise OptionError(f"there is no mode '{mode}'. There are: {', '.join(MODES)}.")
    digest = scores.digest
    selections = []
    for kind in Sublayer:
        tied = wanted.of(kind)
        share = ratio_of(kind, ratio, ffn_ratio)
        # Tables of one sublayer are paired apart: where parts are matched separately, each finds donors of its own.
        for table in _tables_for(scores, kind, tied):
            shared = tuple(part for part in tied if part in table.parts)
            recipients = checked_recipients(table.layout, share, protect)
            if ranks < 1 or table.layout.groups % ranks:
                raise OptionError(f"{ranks} ranks cannot share {table.layout.groups} {kind} units of a layer evenly.")
            request = Request(table.layout, table.scores, recipients, frozenset(protect), ranks)
            choice = Choice(match=table.match, mode=mode, ratio=share, scores_digest=digest)
            ties = tuple(sorted(MODES[mode](request)))
            selections.append(Selection(layout=table.layout.only(shared), ties=ties, chosen=choice))
    return SharePlan(model_type=scores.model_type, selections=tuple(selections))


def _tables_for(scores: Scores, kind: Sublayer, tied: tuple[Part, ...]) -> list[ScoreTable]:
    tables = [table for table in scores.tables if table.layout.kind is kind]
    if tied and not tables:
        raise PlanError(f"the scores hold no {kind} units. Score the model again with parts {'+'.join(tied)}.")
    if tied:
        check_covered(tied, [table.parts for table in tables], tables[0].layout)
    return [table for table in tables if set(tied) & set(table.parts)]


def check_covered(tied: tuple[Part, ...], tables: Sequence[tuple[Part, ...]], layout: Layout) -> None:
    """Refuse parts whose ties no table chooses. A feed-forward without a gate needs no table for it.

    Raises:
        PlanError: naming the parts that are left.
    """
    covered = {part for parts in tables for part in parts}
    absent = {Part.GATE} if layout.kind is Sublayer.FFN and len(tied) > 1 and Part.GATE not in layout.parts else set()
    missing = [part for part in tied if part not in covered | absent]
    if missing:
        raise PlanError(
            f"no ties are chosen for part {', '.join(missing)} of the {layout.kind} layers, only for "
            f"{', '.join(sorted(covered))}. Choose among those, or a match function that covers it."
        )


def checked_recipients(layout: Layout, ratio: float, protected: Collection[int] = ()) -> int:
    """The number of recipients at a ratio in this grid.

    Raises:
        PlanError: if the ratio is not a number from 0 to what layers that may give up units allow, or a protected
            layer does not exist.
    """
    absent = [layer for layer in sorted(protected) if not 0 <= layer < layout.layers]
    if absent:
        raise PlanError(f"there is no layer {absent[0]} to protect: the model has layers 0 to {layout.layers - 1}.")
    open_layers = sum(layer not in protected for layer in range(1, layout.layers))
    most = open_layers * layout.groups
    if not 0 <= ratio <= 1 or units_at(ratio, layout.units) > most:
        raise PlanError(
            f"a ratio of {ratio} of {layout.units} {layout.kind} units cannot be met. Layer 0 and protected layers "
            f"give nothing up, so the ratio is from 0 to {_ratio_for(most, layout.units)} ({most} units)."
        )
    return units_at(ratio, layout.units)


def _ratio_for(recipients: int, units: int) -> str:
    """The shortest decimal, of four digits or more, that is a ratio of so many recipients."""
    for digits in range(4, 12):
        ratio = Fraction(-(-recipients * 10**digits // units), 10**digits)
        if int(ratio * units) == recipients:
            return f"{float(ratio):.{digits}f}"
    return str(recipients / units)


@dataclass(frozen=True)
class PublishedCount:
    """Counts of the authors' release: pairs chosen, heads whose weights change, heads' worth of storage saved."""

    pairs: int
    changed: int
    saved: int


def published_count(pairs: Sequence[tuple[int, int]]) -> PublishedCount:
    """The counts of the authors' release for these (recipient, donor) pairs.

    It stores a copy for each pair, and every unit that is in no pair once. So the saving is the number of units that
    are in some pair, less the number of pairs.
    """
    recipients = {r for r, _ in pairs}
    donors = {d for _, d in pairs}
    return PublishedCount(
        pairs=len(pairs), changed=len(recipients - donors), saved=len(recipients | donors) - len(pairs)
    )


def best_pairs(layout: Layout, scores: ScoreMatrix, recipients: int, protected: Collection[int] = ()) -> dict[int, int]:
    """The pairs of Algorithm 1: each unit's best donor in strictly earlier layers, and the best `recipients` of these.

    Equal scores go to the lowest layer, then the lowest unit, for donors and for recipients alike.
    """
    return pairs_of(Request(layout, scores, recipients, frozenset(protected)))
