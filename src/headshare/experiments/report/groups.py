"""Groups of methods that stand in one panel of a figure, at most eight each."""

from collections.abc import Iterable, Sequence

from headshare.experiments.case import METHODS, REFIT, ROUNDED, TRAINED, base_of
from headshare.experiments.methods import DELETING, MATCHED, SHARING
from headshare.experiments.peers.registry import PEERS
from headshare.experiments.report.claims import PAPERS
from headshare.pages.lines import MOST

REFITTED = ", refitted"
ROUNDING = "Rounded"
# groups without the paper's method
OTHERS = ("Match functions", "Deleting", "Controls")


def groups(methods: Iterable[str]) -> dict[str, list[str]]:
    """The methods by the group that they belong to, with a title for each.

    What rounds saves many times as much as the others, and is apart. The others are one group where they are few; it
    has no title where there is no other.
    """
    names = list(dict.fromkeys(methods))
    rounding = [name for name in names if rounds(name)]
    others = [name for name in names if name not in rounding]
    found: dict[str, list[str]] = {}
    if len(others) <= MOST:
        found["" if not rounding else "Not rounded"] = others
    else:
        for name in others:
            found.setdefault(group_of(name), []).append(name)
    found[ROUNDING if others else ""] = rounding
    return {title: part for group, many in found.items() if many for title, part in _parts(group, many)}


def rounds(method: str) -> bool:
    """Whether the method stores its numbers in fewer bits."""
    return method.endswith(ROUNDED) or is_fixed(method)


def is_fixed(method: str) -> bool:
    """Whether the method saves the same whatever is asked."""
    return method in METHODS and METHODS[method].fixed


def group_of(method: str) -> str:
    """The group of a method, in words that can head a panel."""
    if rounds(method):
        return ROUNDING
    base = base_of(method)
    kinds = {
        "Match functions": MATCHED,
        "Deleting": DELETING,
        "Methods of others": PEERS,
        "Sharing": (*SHARING, *TRAINED),
    }
    kind = next((name for name, methods in kinds.items() if base in methods), "Controls")
    return f"{kind}{REFITTED}" if method.endswith(REFIT) else kind


def in_panel(method: str, group: str) -> str:
    """The name of a method in a panel, without what the panel's title says."""
    return method.removesuffix(REFIT) if REFITTED in group else method


def compared_with(group: str, names: Sequence[str]) -> str | None:
    """The paper's method, where a panel of other methods has room to be compared with it."""
    refit = REFIT if REFITTED in group else ""
    alone = all(group_of(name) in (f"{kind}{REFITTED * bool(refit)}" for kind in OTHERS) for name in names)
    return PAPERS + refit if alone and len(names) < MOST else None


def _parts(group: str, names: Sequence[str]) -> Iterable[tuple[str, list[str]]]:
    """The group in as few parts of like size as have at most eight methods."""
    count = -(-len(names) // MOST)
    size = -(-len(names) // count)
    for number in range(count):
        part = list(names[number * size : (number + 1) * size])
        yield (group if count == 1 else f"{group}, {number + 1} of {count}"), part
