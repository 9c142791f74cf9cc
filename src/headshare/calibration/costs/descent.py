"""The paths of one half of a layer: the units that it would give up, step by step, the cheapest for its bytes first."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headshare.calibration.costs.actions import Action, Output
from headshare.calibration.costs.curves import Path, Step
from headshare.calibration.costs.donors import Candidate, Donors, find_donors
from headshare.calibration.costs.least_squares import Columns, Fit, Inputs, Lost, Remainder
from headshare.calibration.costs.sublayer import Half
from headshare.plan.units import HeadUnit

CHUNKS = 64
RANKS = (1, 2, 4, 8)
MOST_NEURONS = 0.75


def unit_path(half: Half, actions: Sequence[Action], *, donors: int) -> Path:
    """The order in which units are given up, by any of these actions. With a tie among them layer 0 gives nothing up:
    its units are the donors that are always left. Removal leaves one unit at least.

    Greedy and lazy (Minoux, "Accelerated greedy algorithms", 1978): of all units and actions, only the one that is the
    cheapest for its bytes is priced again after a step, until it stays the cheapest. That finds what pricing all of
    them would find where prices only grow as more is given up, as they nearly always do; prices are exact in any case.
    """
    number = half.dense.number
    if number == 0 and any(action.shares for action in actions):
        return Path(half.layout.kind, number, ())
    return Path(half.layout.kind, number, tuple(_Descent(half, actions, donors).steps()))


def paths_beside(half: Half, removal: Path, actions: Sequence[Action], *, donors: int) -> Iterator[Path]:
    """The units that a path removes, in its order, each tied to a donor instead by one of these actions: a path for
    each action, and of products one for each of `RANKS` that saves bytes. So the effect of a tie can be told from that
    of giving the unit up."""
    first = _Descent(half, actions, donors)
    order = [group for step in removal.steps for group in step.groups]
    for action in actions:
        ranks = first.ranks if action.output is Output.LOW_RANK else (0,)
        for rank in ranks:
            if action.saved_bytes(half.sizes, rank) > 0:
                steps = tuple(first.of_rank(rank).follow(order, action))
                yield Path(half.layout.kind, half.dense.number, steps)


def own_path(half: Half, action: Action) -> Path:
    """The path that an action with costs of its own makes of this half."""
    assert action.costs is not None
    steps = tuple(Step(action, *given) for given in action.costs(half))
    return Path(half.layout.kind, half.dense.number, steps)


@dataclass(frozen=True)
class _Offer:
    """One unit by one action as things stand: the price, the donors it could have then, and the best of them with its
    features. `product`, of this rank, reads these out where no columns do."""

    price: float
    donors: tuple[tuple[HeadUnit, float], ...] = ()
    best: Candidate | None = None
    product: Float[Tensor, "hidden features"] | None = None
    rank: int = 0


class _HeldOut:
    """A half's held-out tokens, as they are after each step: fits on the others are judged by these."""

    def __init__(self, half: Half) -> None:
        self.inputs = half.inputs[half.fitted :].double()
        self.scaled = half.inputs[half.fitted :, :0].double()
        self.target = self.inputs @ half.weight.double().T
        self.tokens = half.fitted
        self.share = len(self.inputs) / len(half.inputs)

    def taken(self, columns: Columns, offer: _Offer) -> None:
        """Do to these tokens what a step does."""
        if offer.best is None:
            return
        features = offer.best.features[self.tokens :].double()
        if offer.product is not None:
            self.target = self.target - features @ offer.product.T
        elif offer.best.readout is not None:
            self.scaled = torch.cat([self.scaled, features], dim=1)
        else:
            self.inputs = self.inputs.index_copy(1, columns, features)

    def error(self, left: Remainder) -> float:
        """The squared error on these tokens, as if all tokens were such."""
        if not self.share:
            return left.error
        return float((self.target - left.predicted(self.inputs, self.scaled)).square().sum()) / self.share


class _Descent:
    """One half on its way down: what is left of it, and what it has given up."""

    def __init__(self, half: Half, actions: Sequence[Action], donors: int) -> None:
        self.half = half
        fit = Fit.of(half.inputs[: half.fitted], half.weight)
        self.left = Remainder.of(fit)
        self.held = _HeldOut(half)
        # A product of full rank would take more bytes than the columns; columns of one channel have no smaller rank.
        most_rank = min(len(half.columns[0]), len(half.weight)) - 1
        self.ranks = tuple(rank for rank in RANKS if rank <= most_rank)
        self.actions = [action for action in actions if action.output is not Output.LOW_RANK or most_rank]
        self.missed = self.held.error(self.left)
        # The price of each unit's removal while all others are there: gains of donors are parts of it.
        self.whole = fit.lost(half.columns).costs.tolist()
        ties = [action for action in self.actions if action.shares]
        self.donors = find_donors(half, fit, ties, donors) if ties else [{} for _ in self.whole]
        self.given: set[int] = set()
        self.lost: dict[int, Lost] = {}
        self.may_remove = half.layout.groups - 1

    def of_rank(self, rank: int) -> "_Descent":
        """Another descent from here, with products of this rank alone."""
        other = copy.copy(self)
        other.ranks = (rank,)
        other.held = copy.copy(self.held)
        other.given = set(self.given)
        other.lost = {}
        return other

    def follow(self, order: Sequence[int], action: Action) -> Iterator[Step]:
        """Tie these units by this action, one after the other."""
        for group in order:
            yield self.take(group, action, self.offer(group, action))

    def steps(self) -> Iterator[Step]:
        """All steps, the cheapest for its bytes first."""
        # At first each unit is priced by each action, while nothing is given up.
        units = range(len(self.whole))
        offers = {(group, action): self.offer(group, action) for group in units for action in self.actions}
        queue = [(self.rate(offer, action), 0, group, action) for (group, action), offer in offers.items()]
        heapify(queue)
        while queue:
            _, turn, group, action = heappop(queue)
            if group in self.given or (action.removes and not self.may_remove):
                continue
            if turn == len(self.given):
                # The price is of this turn and still the lowest, so no other unit need be priced again.
                yield self.take(group, action, offers[group, action])
            else:
                # It was the cheapest before the last steps; priced again, it goes back to its new place.
                offers[group, action] = offer = self.offer(group, action)
                heappush(queue, (self.rate(offer, action), len(self.given), group, action))

    def rate(self, offer: _Offer, action: Action) -> float:
        """Price per byte. What columns of their own gain on the tokens they are fitted to is less on others: by 2 p / T
        of the error, p the inputs that are added and T the tokens (Mallows, "Some comments on Cp", 1973)."""
        added = len(self.half.columns[0]) if action.output is Output.OWN else offer.rank
        optimism = 2 * added / self.half.fitted * (self.left.error + offer.price)
        return (offer.price + optimism) / action.saved_bytes(self.half.sizes, offer.rank)

    def take(self, group: int, action: Action, offer: _Offer) -> Step:
        """Give the unit up."""
        # The fit goes on without the unit, and with what comes in its place.
        columns = self.half.columns[group]
        self.left = self.after(offer, columns)
        self.held.taken(columns, offer)
        self.given.add(group)
        self.lost.clear()
        self.may_remove -= action.removes
        # The step costs what held-out tokens lose by it. Donors were compared on the fitted tokens, which are fewer
        # than all: their prices are scaled to as many.
        before = self.missed
        self.missed = self.held.error(self.left)
        fitted = 1 - self.held.share
        donors = tuple((unit, price / fitted) for unit, price in offer.donors)
        saved = action.saved_bytes(self.half.sizes, offer.rank)
        return Step(action, (group,), self.missed - before, saved, donors, offer.rank)

    def after(self, offer: _Offer, columns: Columns) -> Remainder:
        """The readout that is left once this is taken."""
        if offer.best is None:
            return self.left.without(columns)
        features = self.features(offer.best)
        if offer.product is not None:
            return self.left.with_fixed(columns, features, offer.product)
        return self.left.without(columns, features, offer.best.readout)

    def features(self, candidate: Candidate) -> Inputs:
        """The donor's features of the tokens that are fitted."""
        return candidate.features[: self.half.fitted]

    def offer(self, group: int, action: Action) -> _Offer:
        """Price this unit by this action as things stand."""
        # What the unit's channels are worth beside the others changes only when a unit is given up.
        if group not in self.lost:
            self.lost[group] = self.left.fit.lost(self.half.columns[group, None])
        removal = self.left.price(self.lost[group])
        match action.output:
            case Output.NONE:
                return _Offer(removal)
            case Output.LOW_RANK:
                return self.low_rank(group, action, removal)
            case Output.OWN | Output.SCALED:
                return self.tied(group, action, removal)

    def tied(self, group: int, action: Action, removal: float) -> _Offer:
        """The donor that costs least, its features read out by columns of their own or by its scaled ones."""
        donors = self.donors[group][action]
        # While nothing is given up, a donor's gain is what was found when it was ranked.
        prices = [
            self.left.price(self.lost[group], self.features(one), one.readout)
            if self.given
            else self.whole[group] - one.gain
            for one in donors.best
        ]
        ranked = sorted(zip(prices, donors.best, strict=True), key=lambda pair: pair[0])
        listed = [(one.unit, price) for price, one in ranked]
        others = self.estimates(group, donors, removal, ranked[-1][0])
        return _Offer(ranked[0][0], (*listed, *others), ranked[0][1])

    def low_rank(self, group: int, action: Action, removal: float) -> _Offer:
        """The donor and the rank that cost least for their bytes."""
        donors = self.donors[group][action]
        found = []
        for one in donors.best:
            # One factorisation has the best products of all ranks.
            products = self.left.fit.products(self.half.columns[group], self.features(one))
            for rank in self.ranks:
                price = removal - float(products.gains[rank - 1])
                rate = price / action.saved_bytes(self.half.sizes, rank)
                found.append((rate, price, one, rank, products))
        _, price, best, rank, products = min(found, key=lambda offer: offer[0])
        # Other donors are listed with their prices at the rank that is taken.
        listed = sorted(((one.unit, p) for _, p, one, r, _ in found if r == rank), key=lambda pair: pair[1])
        others = self.estimates(group, donors, removal, listed[-1][1])
        return _Offer(price, (*listed, *others), best, products.product(rank), rank)

    def estimates(self, group: int, donors: Donors, removal: float, least: float) -> Iterator[tuple[HeadUnit, float]]:
        """The donors that are not priced again: each makes up for the same part of the removal's price as at first."""
        for unit, gain in donors.others:
            lasting = 1 - gain / self.whole[group] if self.whole[group] > 0 else 1.0
            yield unit, max(removal * lasting, least)


def neuron_path(half: Half, removal: Action) -> Path:
    """The order in which single neurons, the half's units, are removed, 1/64 of them in a step, up to three quarters.

    Each step takes the neurons whose own removal costs least as things stand, and is priced as one.
    """
    fit = Fit.of(half.inputs[: half.fitted], half.weight)
    # Held-out tokens only enter by their Gram matrix, scaled as if all tokens were such.
    held = half.inputs[half.fitted :].double()
    gram = held.T @ held * (len(half.inputs) / max(1, len(held)))
    neurons = half.layout.groups
    chunk = max(1, neurons // CHUNKS)
    saved = removal.saved_bytes(half.sizes) * chunk
    steps = []
    before = 0.0
    for _ in range(int(neurons * MOST_NEURONS) // chunk):
        gone = _cheapest(fit, chunk)
        fit = fit.without(gone)
        changed = fit.weight - half.weight.double()
        error = float(((changed @ gram) * changed).sum()) if len(held) else fit.error
        steps.append(Step(removal, tuple(gone.tolist()), error - before, saved))
        before = error
    return Path(half.layout.kind, half.dense.number, tuple(steps))


def _cheapest(fit: Fit, count: int) -> Int[Tensor, " count"]:
    """The channels whose removal, each alone, costs least: |W_n|^2 / Q_nn, of those that are left."""
    inverse = fit.inverse.diagonal()
    costs = fit.weight.square().sum(dim=0) / inverse
    costs[inverse == 0] = torch.inf
    return costs.topk(count, largest=False).indices.sort().values
