"""Claims of the paper that can be checked on any model, each against the cells of one grid."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from headshare.experiments.case import ROUNDED, TRAINED, base_of
from headshare.experiments.cells import DENSE, Compared
from headshare.experiments.methods import MATCHES, SHARING

ERRORS = 2.0  # standard errors from which a difference counts as one
PAPERS = "directshare"
ACCURACY = "acc"
BLEU = "bleu"
RIVALS = tuple(f"match-{name}" for name in MATCHES)


class Says(StrEnum):
    """The verdict of the numbers on a claim."""

    HOLDS = "holds"
    LEVEL = "level"
    FAILS = "does not hold"
    OPEN = "cannot be told"


@dataclass(frozen=True)
class Checked:
    """A claim at one ratio or of one method, with the verdict and the numbers behind it."""

    claim: str
    where: str
    says: Says
    evidence: str


def checked(cells: Sequence[Compared]) -> list[Checked]:
    """All claims that can be checked on these cells.

    Losses on the same windows of the text decide, by two standard errors. Without a text the mean accuracy decides, and
    without tasks BLEU. Smaller differences are level; with few windows, many are.
    """
    done = [cell for cell in cells if cell.losses or score(cell) is not None]
    made = [cell for cell in done if cell.method != DENSE]
    claims = [claim for check in (_best_match, _separate, _postshare, _decay) for claim in check(made)]
    dense = next((cell for cell in done if cell.method == DENSE and cell.losses), None)
    return claims + ([] if dense is None else list(_four_bits(dense, made)))


def _more_loss(cell: Compared, other: Compared) -> tuple[float, float, str]:
    """The extra loss of the first cell over the other, its standard error, and both results in words."""
    if cell.losses and other.losses:
        more, error = cell.loses_more_than(other)
        return more, error, f"{cell.method} {cell.perplexity:,.4g}, {other.method} {other.perplexity:,.4g}"
    first = score(cell)
    second = score(other)
    if first is None or second is None:
        return math.nan, math.nan, ""
    words = f"{cell.method} {first.shown}, {other.method} {second.shown}"
    return second.value - first.value, math.hypot(first.error, second.error), words


@dataclass(frozen=True)
class Score:
    """A model's score on its tasks (more is better), its standard error, and the score as a table shows it."""

    value: float
    error: float
    shown: str


def score(cell: Compared) -> Score | None:
    """The mean accuracy over tasks, or the mean BLEU; None where neither was measured."""
    for name in (ACCURACY, BLEU):
        metrics = [row.metrics[name] for row in cell.results if name in row.metrics]
        known = [(metric.value, metric.error) for metric in metrics if metric.value is not None]
        if known:
            errors = [math.nan if error is None else error for _, error in known]
            value = statistics.mean(value for value, _ in known)
            shown = f"{100 * value:.1f} %" if name == ACCURACY else f"BLEU {value:.1f}"
            return Score(value, math.hypot(*errors) / len(known), shown)
    return None


def _says(more: float, error: float, *, if_more: Says, if_less: Says, if_level: Says) -> Says:
    if math.isnan(more) or math.isnan(error):
        return Says.OPEN
    return if_more if more > ERRORS * error else if_less if more < -ERRORS * error else if_level


def _by_ratio(cells: Iterable[Compared]) -> dict[float, dict[str, Compared]]:
    by_ratio: dict[float, dict[str, Compared]] = {}
    for cell in (cell for cell in cells if not cell.save):
        by_ratio.setdefault(cell.ratio, {})[cell.method] = cell
    return dict(sorted(by_ratio.items()))


def _best_match(cells: Sequence[Compared]) -> Iterator[Checked]:
    for ratio, by_name in _by_ratio(cells).items():
        others = [by_name[name] for name in RIVALS if name in by_name]
        if PAPERS not in by_name or not others:
            continue
        best = min(others, key=lambda cell: _more_loss(cell, others[0])[0])
        more, error, words = _more_loss(by_name[PAPERS], best)
        says = _says(more, error, if_more=Says.FAILS, if_less=Says.HOLDS, if_level=Says.LEVEL)
        yield Checked("q and k together are the best to match by", f"{ratio:g}", says, words)


def _pairs(first: str, second: str, claim: str) -> Callable[[Sequence[Compared]], Iterator[Checked]]:
    """A check of the claim that the first method is worse than the second."""

    def check(cells: Sequence[Compared]) -> Iterator[Checked]:
        for ratio, by_name in _by_ratio(cells).items():
            if first in by_name and second in by_name:
                more, error, words = _more_loss(by_name[first], by_name[second])
                says = _says(more, error, if_more=Says.HOLDS, if_less=Says.FAILS, if_level=Says.OPEN)
                yield Checked(claim, f"{ratio:g}", says, words)

    return check


_separate = _pairs("match-separate", PAPERS, "matching q, k and v each by itself is worse")
_postshare = _pairs(PAPERS, "postshare", "PostShare is above DirectShare")


def _decay(cells: Sequence[Compared]) -> Iterator[Checked]:
    sharing = (cell.method for cell in cells if base_of(cell.method) in (*SHARING, *TRAINED, "random-donors"))
    for name in dict.fromkeys(sharing):
        rising = sorted((cell for cell in cells if cell.method == name and not cell.save), key=lambda cell: cell.ratio)
        if len(rising) < 2 or len({cell.saved_bytes for cell in rising}) < 2:
            continue
        steps = [_more_loss(later, before) for before, later in itertools.pairwise(rising)]
        each = [_says(m, e, if_more=Says.HOLDS, if_less=Says.FAILS, if_level=Says.OPEN) for m, e, _ in steps]
        says = Says.FAILS if Says.FAILS in each else Says.OPEN if Says.OPEN in each else Says.HOLDS
        yield Checked("more sharing, less quality", name, says, ", ".join(_figure(cell) for cell in rising))


def _figure(cell: Compared) -> str:
    tasks = score(cell)
    value = f"{cell.perplexity:,.4g}" if cell.losses else "" if tasks is None else tasks.shown
    return f"{value} at {cell.ratio:g}"


def _four_bits(dense: Compared, cells: Sequence[Compared]) -> Iterator[Checked]:
    for ratio, by_name in _by_ratio(cells).items():
        for name, rounded in by_name.items():
            plain = by_name.get(name.removesuffix(ROUNDED))
            if plain is None or plain is rounded or not (plain.losses and rounded.losses):
                continue
            # loss that rounding adds, less the loss that sharing added, window by window
            each = zip(dense.losses, plain.losses, rounded.losses, strict=True)
            more = [(last - shared) - (shared - first) for first, shared, last in each]
            error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else math.nan
            says = _says(statistics.mean(more), error, if_more=Says.FAILS, if_less=Says.HOLDS, if_level=Says.OPEN)
            words = ", ".join(f"{cell.method} {cell.perplexity:,.4g}" for cell in (dense, plain, rounded))
            yield Checked("4 bits on top lose less than sharing did", f"{ratio:g}", says, words)
