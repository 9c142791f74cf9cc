"""The modes: ways to choose recipients, and the donors that they are tied to, from the scores of all pairs.

Never sees a weight. torch and numpy are imported by what needs them: the command line gets its choices here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headshare.plan.units import HeadUnit, Tie

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from headshare.plan.layout import Layout

    ScoreMatrix = Float[Tensor, "units units"]
else:
    Layout = Tensor = ScoreMatrix = Any  # the command line takes its choices from here, and has no time to import torch


@dataclass(frozen=True)
class Request:
    """The request to a mode: so many recipients, none of them in a protected layer.

    Donors are among the units that are on the recipient's own rank, where `ranks` divide each layer's units evenly.
    """

    layout: Layout
    scores: ScoreMatrix
    recipients: int
    protected: frozenset[int]
    ranks: int = 1

    def rank(self, unit: int) -> int:
        """The rank that has this unit."""
        return unit % self.layout.groups * self.ranks // self.layout.groups

    def candidates(self) -> list[int]:
        """Units that may become recipients, in order: all outside layer 0 and protected layers."""
        layers = [layer for layer in range(1, self.layout.layers) if layer not in self.protected]
        return [self.layout.index(HeadUnit(layer, group)) for layer in layers for group in range(self.layout.groups)]


Mode = Callable[[Request], list[Tie]]
MODES: dict[str, Mode] = {}


def mode(function: Mode) -> Mode:
    """Register a way to choose ties under the function's name."""
    MODES[function.__name__] = function
    return function


@mode
def star(request: Request) -> list[Tie]:
    """Take pairs from the best score down, with donors only among kept units. Saves exactly N units.

    No donor borrows itself, so that every tie is direct. A pair is passed over if its recipient already lends, if its
    donor is already given up, or if it would keep one unit more than N recipients leave room for. So the last
    recipient can always be tied to layer 0.
    """
    layout = request.layout
    # `spare` counts the candidates that may still become donors, and so be kept, before too few are left to give up.
    candidates = request.candidates()
    spare = len(candidates) - request.recipients
    donor_of: dict[int, int] = {}
    kept: set[int] = set(range(layout.units)) - set(candidates)
    for recipient, donor in _pairs_by_score(request.scores, layout, candidates):
        if len(donor_of) == request.recipients:
            break
        elsewhere = request.rank(recipient) != request.rank(donor)
        if recipient in donor_of or recipient in kept or donor in donor_of or elsewhere:
            continue  # already tied, already lending, given up, or on another rank
        if donor not in kept:
            if spare == 0:
                continue
            spare -= 1
            kept.add(donor)
        donor_of[recipient] = donor
    return _ties(layout, donor_of)


@mode
def root(request: Request) -> list[Tie]:
    """Take the paper's pairs (each recipient's best donor, the best N of them), and follow chains to their root.

    Saves exactly N units.
    """
    donor_of = pairs_of(request)

    def follow(unit: int) -> int:
        while unit in donor_of:
            unit = donor_of[unit]
        return unit

    return _ties(request.layout, {recipient: follow(donor) for recipient, donor in donor_of.items()})


@mode
def published(request: Request) -> list[Tie]:
    """Tie the paper's pairs as the authors' release does, for comparison.

    There, tying a recipient to a donor gives the donor its own weights back, even if it was a recipient itself. So only
    those recipients change that no other pair uses as a donor: fewer than N.
    """
    donor_of = pairs_of(request)
    donors = set(donor_of.values())
    return _ties(request.layout, {r: d for r, d in donor_of.items() if r not in donors})


def pairs_of(request: Request) -> dict[int, int]:
    """The pairs of Algorithm 1 for this request: each candidate's best donor, and the best of these pairs.

    Equal scores go to the lowest layer, then the lowest unit, for donors and for recipients alike.
    """
    import numpy as np

    groups = request.layout.groups
    scores = request.scores.numpy()
    best: list[tuple[float, int, int]] = []
    for recipient in request.candidates():
        row = scores[recipient, : recipient // groups * groups]
        if request.ranks > 1:
            elsewhere = [donor for donor in range(len(row)) if request.rank(donor) != request.rank(recipient)]
            row = row.copy()
            row[elsewhere] = -np.inf
        donor = int(np.argmax(row))
        best.append((-float(row[donor]), recipient, donor))
    return {recipient: donor for _, recipient, donor in sorted(best)[: request.recipients]}


def _pairs_by_score(scores: ScoreMatrix, layout: Layout, candidates: list[int]) -> "zip[tuple[int, int]]":
    """All (recipient, donor) pairs from the best score down; equal scores in order of recipient, then donor."""
    import torch

    counts = [unit // layout.groups * layout.groups for unit in candidates]
    empty = torch.zeros(0, dtype=torch.long)
    recipients = torch.cat([empty, *(torch.full((n,), unit) for unit, n in zip(candidates, counts, strict=True))])
    donors = torch.cat([empty, *(torch.arange(n) for n in counts)])
    order = _descending(scores[recipients, donors])
    return zip(recipients[order].tolist(), donors[order].tolist(), strict=True)


def _descending(values: Tensor) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.argsort(-values.numpy(), kind="stable"))


def _ties(layout: Layout, donor_of: dict[int, int]) -> list[Tie]:
    return [Tie(layout.unit(recipient), layout.unit(donor)) for recipient, donor in sorted(donor_of.items())]
