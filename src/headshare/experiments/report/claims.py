"""Claims of the paper that can be checked on any model, each against the cells of one grid."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from headshare.experiments.case import REFIT, ROUNDED, TRAINED, base_of
from headshare.experiments.cells import DENSE, Compared
from headshare.experiments.methods import MATCHES, SHARING
from headshare.experiments.report.scores import ACCURACY, at_chance, score, together

ERRORS = 2.0  # standard errors from which a difference counts as one
POINTS = 0.05  # what 4 bits cost at most, of an accuracy of 1
PAPERS = "directshare"
LAYERS = "layerwise"
HEADS = "headwise"  # DirectShare at the bytes of the former
RIVALS = tuple(f"match-{name}" for name in MATCHES)


class Says(StrEnum):
    """The verdict of the numbers on a claim."""

    HOLDS = "holds"
    LEVEL = "level"
    FAILS = "does not hold"
    OPEN = "cannot be told"


@dataclass(frozen=True)
class Checked:
    """A claim at one ratio or of one method, with the verdict, the numbers behind it, and what they rest on."""

    claim: str
    where: str
    says: Says
    evidence: str
    rests: str = ""


Check = Callable[[Sequence[Compared], Sequence[str]], Iterator[Checked]]


def checked(cells: Sequence[Compared]) -> list[Checked]:
    """All claims that can be checked on these cells.

    Losses on the same windows of the text decide, by two standard errors. Without a text the mean accuracy decides, on
    tasks where the dense model is above guessing, and without tasks BLEU. Smaller differences are level; with few
    windows, many are.
    """
    done = [cell for cell in cells if cell.losses or score(cell) is not None]
    made = [cell for cell in done if cell.method != DENSE]
    dense = next((cell for cell in done if cell.method == DENSE), None)
    left_out = at_chance(dense)
    claims = [claim for check in CHECKS for claim in check(made, left_out)]
    if dense is not None:
        claims += [*_four_bits(dense, made), *_points(made, left_out)]
    return claims + list(_layers(made))


def _says(more: float, error: float, *, if_more: Says, if_less: Says, if_level: Says) -> Says:
    if math.isnan(more) or math.isnan(error):
        return Says.OPEN
    return if_more if more > ERRORS * error else if_less if more < -ERRORS * error else if_level


def _by_ratio(cells: Iterable[Compared]) -> dict[float, dict[str, Compared]]:
    by_ratio: dict[float, dict[str, Compared]] = {}
    for cell in (cell for cell in cells if not cell.save):
        by_ratio.setdefault(cell.ratio, {})[cell.method] = cell
    return dict(sorted(by_ratio.items()))


def _best_match(cells: Sequence[Compared], left_out: Sequence[str]) -> Iterator[Checked]:
    for ratio, by_name in _by_ratio(cells).items():
        names = [name for name in RIVALS if name in by_name]
        if PAPERS not in by_name or not names:
            continue
        measured = together([by_name[name] for name in (PAPERS, *names)], left_out)
        if measured is None:
            continue
        best = min(range(1, len(names) + 1), key=lambda number: measured.worse[number])
        more = measured.sum([1.0, *(-1.0 if number == best else 0.0 for number in range(1, len(names) + 1))])
        says = _says(*more, if_more=Says.FAILS, if_less=Says.HOLDS, if_level=Says.LEVEL)
        words = f"{PAPERS} {measured.shown[0]}, {names[best - 1]} {measured.shown[best]}"
        yield Checked("q and k together are the best to match by", f"{ratio:g}", says, words, measured.rests)


def _pairs(first: str, second: str, claim: str, *, if_more: Says, if_less: Says, if_level: Says = Says.OPEN) -> Check:
    """A check of a claim that follows from how much worse the first method is than the second, refitted or not."""

    def check(cells: Sequence[Compared], left_out: Sequence[str]) -> Iterator[Checked]:
        for ratio, by_name in _by_ratio(cells).items():
            for step in ("", REFIT):
                pair = [by_name.get(name + step) for name in (first, second)]
                some = [cell for cell in pair if cell is not None]
                measured = together(some, left_out) if len(some) == 2 else None
                if measured is None:
                    continue
                says = _says(*measured.sum([1.0, -1.0]), if_more=if_more, if_less=if_less, if_level=if_level)
                words = ", ".join(f"{cell.method} {shown}" for cell, shown in zip(some, measured.shown, strict=True))
                yield Checked(claim, f"{ratio:g}{', refit' if step else ''}", says, words, measured.rests)

    return check


def _decay(cells: Sequence[Compared], left_out: Sequence[str]) -> Iterator[Checked]:
    """The slope of a straight line over the ratios; no step from one ratio to the next may be the other way."""
    sharing = (cell.method for cell in cells if base_of(cell.method) in (*SHARING, *TRAINED, "random-donors"))
    for name in dict.fromkeys(sharing):
        rising = sorted((cell for cell in cells if cell.method == name and not cell.save), key=lambda cell: cell.ratio)
        if len(rising) < 2 or len({cell.saved_bytes for cell in rising}) < 2:
            continue
        measured = together(rising, left_out)
        if measured is None:
            continue
        ratios = np.array([cell.ratio for cell in rising])
        slope = measured.sum((ratios - ratios.mean()).tolist())
        says = _says(*slope, if_more=Says.HOLDS, if_less=Says.FAILS, if_level=Says.OPEN)
        steps = (measured.sum(step) for step in np.diff(np.eye(len(rising)), axis=0).tolist())
        if any(more < -ERRORS * error for more, error in steps):
            says = Says.FAILS
        words = ", ".join(f"{shown} at {cell.ratio:g}" for cell, shown in zip(rising, measured.shown, strict=True))
        yield Checked("more sharing, less quality", name, says, words, measured.rests)


CHECKS: tuple[Check, ...] = (
    _best_match,
    _pairs(
        "match-separate",
        PAPERS,
        "matching q, k and v each by itself is worse",
        if_more=Says.HOLDS,
        if_less=Says.FAILS,
    ),
    _pairs(
        PAPERS,
        "llm-pruner",
        "DirectShare is on a par with LLM-Pruner",
        if_more=Says.FAILS,
        if_less=Says.HOLDS,
        if_level=Says.LEVEL,
    ),
    _pairs(PAPERS, "magnitude", "DirectShare is above magnitude pruning", if_more=Says.FAILS, if_less=Says.HOLDS),
    _pairs(LAYERS, HEADS, "sharing heads is better than sharing layers", if_more=Says.HOLDS, if_less=Says.FAILS),
    _pairs(PAPERS, "postshare", "PostShare is above DirectShare", if_more=Says.HOLDS, if_less=Says.FAILS),
    _pairs(
        "both",
        "postshare",
        "DirectShare that is trained is on a par with PostShare",
        if_more=Says.FAILS,
        if_less=Says.HOLDS,
        if_level=Says.LEVEL,
    ),
    _decay,
)


def _rounded(cells: Sequence[Compared]) -> Iterator[tuple[float, Compared, Compared]]:
    """Ratios, with a cell and the same in 4 bits."""
    for ratio, by_name in _by_ratio(cells).items():
        for name, rounded in by_name.items():
            plain = by_name.get(name.removesuffix(ROUNDED))
            if plain is not None and plain is not rounded:
                yield ratio, plain, rounded


def _four_bits(dense: Compared, cells: Sequence[Compared]) -> Iterator[Checked]:
    for ratio, plain, rounded in _rounded(cells):
        three = (dense, plain, rounded)
        measured = together(three) if all(cell.losses for cell in three) else None
        if measured is not None:
            # the loss that rounding adds, less the loss that sharing added
            says = _says(*measured.sum([1.0, -2.0, 1.0]), if_more=Says.FAILS, if_less=Says.HOLDS, if_level=Says.OPEN)
            words = ", ".join(f"{cell.method} {shown}" for cell, shown in zip(three, measured.shown, strict=True))
            claim = "4 bits on top lose less than sharing did (not the paper's words)"
            yield Checked(claim, f"{ratio:g}", says, words, measured.rests)


def _points(cells: Sequence[Compared], left_out: Sequence[str]) -> Iterator[Checked]:
    """Table 5: no task loses more than five points."""
    for ratio, plain, rounded in _rounded(cells):
        drops = []
        for row in plain.results:
            if row.task not in left_out and row.main[0] == ACCURACY:
                others = [task for cell in (plain, rounded) for each in cell.results if (task := each.task) != row.task]
                measured = together([_bare(plain), _bare(rounded)], [*left_out, *others])
                if measured is not None:
                    drops.append((row.task, *measured.sum([-1.0, 1.0]), measured.rests))
        if not drops:
            continue
        worst = max(drops, key=lambda drop: drop[1])
        each = [
            _says(drop - POINTS, error, if_more=Says.FAILS, if_less=Says.HOLDS, if_level=Says.OPEN)
            for _, drop, error, _ in drops
        ]
        says = Says.FAILS if Says.FAILS in each else Says.OPEN if Says.OPEN in each else Says.HOLDS
        words = f"{rounded.method}: at worst {100 * worst[1]:.1f} ± {100 * worst[2]:.1f} points, on {worst[0]}"
        rests = f"{len(drops)} task{'s' if len(drops) > 1 else ''} above guessing"
        yield Checked("4 bits on top cost no more than 5 points", f"{ratio:g}", says, words, rests)


def _bare(cell: Compared) -> Compared:
    """The cell's results on tasks alone."""
    return Compared(cell.key, cell.method, cell.ratio, results=cell.results)


def _layers(cells: Sequence[Compared]) -> Iterator[Checked]:
    """Figure 6: layers give up alike shares whatever the ratio, and more evenly than where whole layers are shared.

    Layer 0, which has no earlier layer, is left out.
    """
    rising = sorted((cell for cell in cells if cell.method == PAPERS and cell.by_layer), key=lambda cell: cell.ratio)
    shares = {cell.ratio: np.array(cell.by_layer[1:]) for cell in rising}
    pairs = [pair for pair in itertools.pairwise(shares) if all(shares[ratio].std() > 0 for ratio in pair)]
    if pairs and len(rising[0].by_layer) > 4:
        alike = [float(np.corrcoef(shares[first], shares[second])[0, 1]) for first, second in pairs]
        # Fisher's z: two standard errors above none
        enough = math.tanh(ERRORS / math.sqrt(len(rising[0].by_layer) - 4))
        says = Says.HOLDS if min(alike) > enough else Says.OPEN
        each = zip(pairs, alike, strict=True)
        words = ", ".join(f"correlation {r:.2f} from {first:g} to {second:g}" for (first, second), r in each)
        claim = "layers give up alike shares of their heads at all ratios"
        yield Checked(claim, PAPERS, says, words, f"{len(rising[0].by_layer) - 1} layers")
    for ratio, by_name in _by_ratio(cells).items():
        some = [by_name[name] for name in (HEADS, LAYERS) if name in by_name and by_name[name].by_layer]
        if len(some) == 2:
            heads, layers = (float(np.std(cell.by_layer[1:])) for cell in some)
            says = Says.HOLDS if heads < layers else Says.FAILS
            words = f"spread {heads:.2f} over layers, where whole layers are shared {layers:.2f}"
            yield Checked("heads are given up evenly over layers", f"{ratio:g}", says, words, "the plans")
