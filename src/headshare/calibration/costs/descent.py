"""Cost curves of one sublayer: the units that it gives up, step by step, the cheapest for its bytes first."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import torch
from jaxtyping import Float
from torch import Tensor

from headshare.calibration import processes
from headshare.calibration.costs.actions import Action, Output
from headshare.calibration.costs.curves import CostCurve, CurveStep
from headshare.calibration.costs.donors import Candidate, Donors, find_donors
from headshare.calibration.costs.least_squares import Columns, Fit, Inputs, Lost, Remainder
from headshare.calibration.costs.sublayer import SublayerData
from headshare.calibration.costs.surgery import Surgery
from headshare.plan.units import HeadUnit

# The ranks of low-rank products, each of which has a cost curve.
RANKS = (1, 2, 4, 8)

# The number of chunks of neurons in a layer, and the largest part of the neurons that is removed.
CHUNKS = 64
MOST_NEURONS = 0.75


def unit_path(half: SublayerData, actions: Sequence[Action], *, donors: int) -> CostCurve:
    """The cost curve on which units are given up by any of these actions, the cheapest for its bytes first.

    With a tie among the actions, layer 0 gives nothing up: its units are the donors that are always left. Removal
    leaves one unit at least.

    The descent is greedy and lazy (Minoux, "Accelerated greedy algorithms", 1978). After a step, only the unit and
    action that were the cheapest for their bytes are costed again, until the cheapest stays the cheapest. The order is
    that of costing all of them, as long as costs only grow as more is given up, as they nearly always do. Costs are
    exact in any case.
    """
    number = half.dense.number
    if number == 0 and any(action.shares for action in actions):
        return CostCurve(half.layout.kind, number, ())
    return CostCurve(half.layout.kind, number, tuple(_Descent(half, actions, donors).steps()))


def paths_beside(
    half: SublayerData, removal: CostCurve, actions: Sequence[Action], *, donors: int
) -> Iterator[CostCurve]:
    """Cost curves on which the units of a removal curve are tied to donors instead, in the same order.

    Each action has a curve; one with low-rank products has a curve for each of `RANKS` that saves bytes. So the effect
    of a tie can be told from that of giving the unit up.
    """
    first = _Descent(half, actions, donors)
    order = [group for step in removal.steps for group in step.groups]
    for action in actions:
        ranks = first.ranks if action.output is Output.LOW_RANK else (0,)
        for rank in ranks:
            if action.saved_bytes(half.sizes, rank) > 0:
                steps = tuple(first.of_rank(rank).follow(order, action))
                yield CostCurve(half.layout.kind, half.dense.number, steps)


def own_path(half: SublayerData, action: Action) -> CostCurve:
    """The cost curve that an action with costs of its own makes for this sublayer."""
    assert action.costs is not None
    steps = tuple(CurveStep(action, *given) for given in action.costs(half))
    return CostCurve(half.layout.kind, half.dense.number, steps)


@dataclass(frozen=True)
class _Offer:
    """The cost of giving up one unit by one action as things stand, with the donors that it could have.

    `best` is the best donor with its features. `product`, of this rank, reads these out where no columns do.
    """

    price: float
    donors: tuple[tuple[HeadUnit, float], ...] = ()
    best: Candidate | None = None
    product: Float[Tensor, "hidden features"] | None = None
    rank: int = 0


class _HeldOut:
    """Held-out tokens of a sublayer, as they are after each step. They judge the fits on the other tokens."""

    def __init__(self, half: SublayerData) -> None:
        self.inputs = half.inputs[half.fitted :].double()
        self.scaled = half.inputs[half.fitted :, :0].double()
        self.target = self.inputs @ half.weight.double().T
        self.tokens = half.fitted
        self.share = processes.total(len(self.inputs)) / half.all_tokens

    def taken(self, columns: Columns, offer: _Offer) -> None:
        """Apply a step to these tokens."""
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
        """The squared error on these tokens, scaled to the number of all tokens."""
        if not self.share:
            return left.error
        missed = self.target - left.predicted(self.inputs, self.scaled)
        return float(processes.summed(missed.square().sum())) / self.share


class _Descent:
    """A sublayer that gives units up: the fit that is left, and the units that are gone."""

    def __init__(self, half: SublayerData, actions: Sequence[Action], donors: int) -> None:
        self.half = half
        fit = Fit.of(half.inputs[: half.fitted], half.weight)
        self.left = Remainder.of(fit)
        self.held = _HeldOut(half)

        # A product of full rank would take more bytes than the columns; columns of one channel have no smaller rank.
        most_rank = min(len(half.columns[0]), len(half.weight)) - 1
        self.ranks = tuple(rank for rank in RANKS if rank <= most_rank)
        self.actions = [action for action in actions if action.output is not Output.LOW_RANK or most_rank]
        self.missed = self.held.error(self.left)

        # The cost of each unit's removal while all others are there. Gains of donors are parts of it.
        self.whole = fit.lost(half.columns).costs.tolist()
        ties = [action for action in self.actions if action.shares]
        self.donors = find_donors(half, fit, ties, donors) if ties else [{} for _ in self.whole]
        self.given: set[int] = set()
        self.lost: dict[int, Lost] = {}
        self.may_remove = half.layout.groups - 1

    def of_rank(self, rank: int) -> "_Descent":
        """A descent that goes on from here with products of this rank alone, and leaves this one as it is."""
        other = copy.copy(self)
        other.ranks = (rank,)
        other.held = copy.copy(self.held)
        other.given = set(self.given)
        other.lost = {}
        return other

    def follow(self, order: Sequence[int], action: Action) -> Iterator[CurveStep]:
        """Steps that tie these units by this action, in this order."""
        for group in order:
            yield self.take(group, action, self.offer(group, action))

    def steps(self) -> Iterator[CurveStep]:
        """Steps of the descent, the cheapest for its bytes first."""
        # At first each unit is costed by each action, while nothing is given up.
        units = range(len(self.whole))
        offers = {(group, action): self.offer(group, action) for group in units for action in self.actions}
        queue = [(self.rate(offer, action), 0, group, action) for (group, action), offer in offers.items()]
        heapify(queue)

        # Each entry has the number of units that were gone when it was costed.
        while queue:
            _, turn, group, action = heappop(queue)
            if group in self.given or (action.removes and not self.may_remove):
                continue
            if turn == len(self.given):
                # The cost is of this turn and still the lowest, so no other unit need be costed again.
                yield self.take(group, action, offers[group, action])
            else:
                # It was the cheapest before the last steps; costed again, it goes back to its new place.
                offers[group, action] = offer = self.offer(group, action)
                heappush(queue, (self.rate(offer, action), len(self.given), group, action))

    def rate(self, offer: _Offer, action: Action) -> float:
        """The cost per byte, corrected for columns that were fitted.

        The gain of fitted columns is less on other tokens, by 2 p / T of the error, with p the inputs that are added
        and T the tokens (Mallows, "Some comments on Cp", 1973).
        """
        added = len(self.half.columns[0]) if action.output is Output.OWN else offer.rank
        optimism = 2 * added / self.half.all_fitted * (self.left.error + offer.price)
        return processes.agreed((offer.price + optimism) / action.saved_bytes(self.half.sizes, offer.rank))

    def take(self, group: int, action: Action, offer: _Offer) -> CurveStep:
        """Give the unit up, and return the step."""
        # The fit goes on without the unit, and with what comes in its place.
        columns = self.half.columns[group]
        self.left = self.after(offer, columns)
        self.held.taken(columns, offer)
        self.given.add(group)
        self.lost.clear()
        self.may_remove -= action.removes

        # The cost of the step is the error that it adds on held-out tokens. Donors were compared on the fitted tokens,
        # which are fewer than all, so their costs are scaled to as many.
        before = self.missed
        self.missed = self.held.error(self.left)
        fitted = 1 - self.held.share
        donors = tuple((unit, price / fitted) for unit, price in offer.donors)
        saved = action.saved_bytes(self.half.sizes, offer.rank)
        return CurveStep(action, (group,), self.missed - before, saved, donors, offer.rank)

    def after(self, offer: _Offer, columns: Columns) -> Remainder:
        """The output projection that is left once this offer is taken."""
        if offer.best is None:
            return self.left.without(columns)
        features = self.features(offer.best)
        if offer.product is not None:
            return self.left.with_fixed(columns, features, offer.product)
        return self.left.without(columns, features, offer.best.readout)

    def features(self, candidate: Candidate) -> Inputs:
        """The donor's features on the tokens that are fitted."""
        return candidate.features[: self.half.fitted]

    def offer(self, group: int, action: Action) -> _Offer:
        """The cost of giving this unit up by this action as things stand."""
        # The worth of the unit's channels beside the others changes only when a unit is given up.
        if group not in self.lost:
            self.lost[group] = self.left.fit.lost(self.half.columns[group, None])
        removal = self.left.price(self.lost[group])
        match action.output:
            case Output.NONE | Output.NARROW:  # narrow values have costs of their own, and are never asked for here
                return _Offer(removal)
            case Output.LOW_RANK:
                return self.low_rank(group, action, removal)
            case Output.OWN | Output.SCALED:
                return self.tied(group, action, removal)

    def tied(self, group: int, action: Action, removal: float) -> _Offer:
        """The offer of the donor that costs least, read out by columns of its own or by the donor's scaled ones."""
        donors = self.donors[group][action]
        # While nothing is given up, a donor's gain is the one by which it was ranked.
        prices = [
            self.left.price(self.lost[group], self.features(donor), donor.readout)
            if self.given
            else self.whole[group] - donor.gain
            for donor in donors.best
        ]
        ranked = sorted(zip(processes.agreed(prices), donors.best, strict=True), key=lambda pair: pair[0])
        listed = [(donor.unit, price) for price, donor in ranked]
        others = self.estimates(group, donors, removal, ranked[-1][0])
        return _Offer(ranked[0][0], (*listed, *others), ranked[0][1])

    def low_rank(self, group: int, action: Action, removal: float) -> _Offer:
        """The offer of the donor and the rank that cost least for their bytes."""
        donors = self.donors[group][action]
        offers = []
        for donor in donors.best:
            # One factorisation has the best products of all ranks.
            products = self.left.fit.products(self.half.columns[group], self.features(donor))
            gains = processes.agreed(products.gains.tolist())
            for rank in self.ranks:
                price = removal - gains[rank - 1]
                rate = price / action.saved_bytes(self.half.sizes, rank)
                offers.append((rate, price, donor, rank, products))
        _, price, best, rank, products = min(offers, key=lambda offer: offer[0])

        # Other donors are listed with their costs at the rank that is taken.
        listed = sorted(((donor.unit, p) for _, p, donor, r, _ in offers if r == rank), key=lambda pair: pair[1])
        others = self.estimates(group, donors, removal, listed[-1][1])
        return _Offer(price, (*listed, *others), best, products.product(rank), rank)

    def estimates(self, group: int, donors: Donors, removal: float, least: float) -> Iterator[tuple[HeadUnit, float]]:
        """Estimated costs of the other donors: each makes up for the same part of the removal's cost as at first."""
        for unit, gain in donors.others:
            lasting = 1 - gain / self.whole[group] if self.whole[group] > 0 else 1.0
            yield unit, max(removal * lasting, least)


def neuron_path(half: SublayerData, removal: Action, multiple: int = 1) -> CostCurve:
    """The cost curve on which single neurons are removed, 1/64 of them in a step, up to three quarters.

    A step removes a multiple of `multiple` neurons, and one at least. Each step takes the neurons whose own removal
    costs least as things stand. Its cost is that of removing all of them.
    """
    # Held-out tokens only enter by their Gram matrix, scaled as if all tokens were such. Once both matrices are there,
    # the first process goes on alone.
    surgery = Surgery.on(half.inputs[: half.fitted], half.inputs[half.fitted :], half.weight)
    if not processes.is_first():
        return CostCurve(half.layout.kind, half.dense.number, ())

    # Removing neurons one by one would cost as many fits, so each step removes a chunk of them.
    neurons = half.layout.groups
    chunk = max(1, neurons // CHUNKS // multiple) * multiple
    saved = removal.saved_bytes(half.sizes) * chunk
    steps = []
    for _ in range(int(neurons * MOST_NEURONS) // chunk):
        gone = surgery.cheapest(chunk)
        steps.append(CurveStep(removal, tuple(gone.tolist()), surgery.remove(gone), saved))
    return CostCurve(half.layout.kind, half.dense.number, tuple(steps))
