"""The paths of one layer: what each half would give up, step by step, the cheapest for its bytes first."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headshare.calibration.costs.curves import Form, Path, Step
from headshare.calibration.costs.donors import Candidate, Donors, find_donors
from headshare.calibration.costs.least_squares import Columns, Fit, Inputs, Lost, Remainder
from headshare.calibration.costs.sublayer import Half
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.plan.layout import Layout
from headshare.plan.tensors import bias_name
from headshare.plan.units import READOUTS, HeadUnit, Kind, Part

CHUNKS = 64
RANKS = (1, 2, 4, 8)
MOST_NEURONS = 0.75
OWN_COLUMNS = (Form.QK, Form.QKV, Form.GATEUP)


def saved_bytes(checkpoint: Checkpoint, layout: Layout, layer: int, form: Form) -> int:
    """What one unit of this layer saves in this form, as `accounting.estimate_plan` counts it.

    A removed unit takes the entries of its biases along; a scaled tie brings one number for each channel of o. Of a
    factored unit this is what it would save with a product of rank 0.
    """
    removes = form is Form.REMOVE
    whole = removes or form is Form.FACTORED
    places = [place for part, place in layout.parts.items() if whole or part in form.parts]
    saved = sum(place.numel * _item(checkpoint, place.name(layer)) for place in places)
    if removes:
        makers = (place for part, place in layout.parts.items() if part not in READOUTS)
        biases = ((bias_name(place.name(layer)), place.rows) for place in makers)
        saved += sum(rows * _item(checkpoint, name) for name, rows in biases if name in checkpoint.tensors)
    if form is Form.QKVO:
        readout = layout.parts[Part.O]
        saved -= readout.rows * _item(checkpoint, readout.name(layer))
    return saved


def _item(checkpoint: Checkpoint, name: str) -> int:
    return checkpoint.tensors[name].torch_dtype.itemsize


def unit_path(half: Half, forms: Sequence[Form], *, donors: int) -> Path:
    """The order in which units are given up, in any of these forms. With a tie among them layer 0 gives nothing up:
    its units are the donors that are always left. Removal leaves one unit at least.

    Greedy and lazy (Minoux, "Accelerated greedy algorithms", 1978): of all units and forms, only the one that is the
    cheapest for its bytes is priced again after a step, until it stays the cheapest. That finds what pricing all of
    them would find where prices only grow as more is given up, as they nearly always do; prices are exact in any case.
    """
    number = half.dense.number
    if number == 0 and set(forms) != {Form.REMOVE}:
        return Path(half.layout.kind, number, ())
    return Path(half.layout.kind, number, tuple(_Descent(half, forms, donors).steps()))


def paths_beside(half: Half, removal: Path, forms: Sequence[Form], *, donors: int) -> Iterator[Path]:
    """The units that a path removes, in its order, each tied to a donor instead in one of these forms: a path for each
    form, and of factored units one for each of `RANKS`. So what a tie makes up for can be told from what giving the
    unit up does."""
    first = _Descent(half, forms, donors)
    order = [group for step in removal.steps for group in step.groups]
    for form in forms:
        ranks = first.ranks if form is Form.FACTORED else (0,)
        for rank in ranks:
            if first.saved.get(form, 0) > rank * first.bytes_of_rank:
                steps = tuple(first.of_rank(rank).follow(order, form))
                yield Path(half.layout.kind, half.dense.number, steps)


@dataclass(frozen=True)
class _Offer:
    """What one unit would cost now in one form, the donors it could have then, and the best of them with features."""

    price: float
    donors: tuple[tuple[HeadUnit, float], ...] = ()
    best: Candidate | None = None
    product: Float[Tensor, "hidden features"] | None = None
    rank: int = 0


class _HeldOut:
    """A half's held-out tokens, as they are after each step: what fits on the others are judged by."""

    def __init__(self, half: Half) -> None:
        self.inputs, self.scaled = half.inputs[half.fitted :].double(), half.inputs[half.fitted :, :0].double()
        self.target = self.inputs @ half.weight.double().T
        self.tokens, self.share = half.fitted, len(self.inputs) / len(half.inputs)

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

    def __init__(self, half: Half, forms: Sequence[Form], donors: int) -> None:
        self.half = half
        fit = Fit.of(half.inputs[: half.fitted], half.weight)
        self.left, self.held = Remainder.of(fit), _HeldOut(half)
        self.most_rank = min(len(half.columns[0]), len(half.weight)) - 1
        self.ranks = tuple(rank for rank in RANKS if rank <= self.most_rank)
        forms = [form for form in forms if form is not Form.FACTORED or self.most_rank]
        self.missed = self.held.error(self.left)
        self.whole = fit.lost(half.columns).costs.tolist()  # what each unit's removal costs while all others are there
        ties = [form for form in forms if form is not Form.REMOVE]
        self.donors = find_donors(half, fit, ties, donors) if ties else [{} for _ in self.whole]
        readout = half.layout.parts[half.readout]
        self.bytes_of_rank = (len(half.columns[0]) + len(half.weight)) * _item(
            half.dense.checkpoint, readout.name(half.dense.number)
        )
        self.saved = {form: saved_bytes(half.dense.checkpoint, half.layout, half.dense.number, form) for form in forms}
        self.given: set[int] = set()
        self.lost: dict[int, Lost] = {}
        self.may_remove = half.layout.groups - 1 if Form.REMOVE in forms else 0

    def of_rank(self, rank: int) -> "_Descent":
        """Another descent from here, with products of this rank alone."""
        other = copy.copy(self)
        other.ranks, other.held, other.given, other.lost = (rank,), copy.copy(self.held), set(self.given), {}
        return other

    def follow(self, order: Sequence[int], form: Form) -> Iterator[Step]:
        """Tie these units in this form, one after the other."""
        for group in order:
            yield self.take(group, form, self.offer(group, form))

    def steps(self) -> Iterator[Step]:
        """All steps, the cheapest for its bytes first."""
        offers = {(group, form): self.offer(group, form) for group in range(len(self.whole)) for form in self.saved}
        queue = [(self.rate(offer, form), 0, group, form) for (group, form), offer in offers.items()]
        heapify(queue)
        while queue:
            _, turn, group, form = heappop(queue)
            if group in self.given or (form is Form.REMOVE and not self.may_remove):
                continue
            if turn == len(self.given):
                yield self.take(group, form, offers[group, form])
            else:
                offers[group, form] = offer = self.offer(group, form)
                heappush(queue, (self.rate(offer, form), len(self.given), group, form))

    def rate(self, offer: _Offer, form: Form) -> float:
        """Price per byte. What columns of their own gain on the tokens they are fitted to is less on others: by 2 p / T
        of the error, p the inputs that are added and T the tokens (Mallows, "Some comments on Cp", 1973)."""
        added = len(self.half.columns[0]) if form in OWN_COLUMNS else offer.rank
        optimism = 2 * added / self.half.fitted * (self.left.error + offer.price)
        return (offer.price + optimism) / self.saved_in(offer, form)

    def take(self, group: int, form: Form, offer: _Offer) -> Step:
        """Give the unit up."""
        columns, before = self.half.columns[group], self.missed
        self.left = self.after(offer, columns)
        self.held.taken(columns, offer)
        self.given.add(group)
        self.lost.clear()
        self.may_remove -= form is Form.REMOVE
        self.missed = self.held.error(self.left)
        price, fitted = self.missed - before, 1 - self.held.share
        donors = tuple((unit, price / fitted) for unit, price in offer.donors)  # as if all tokens were fitted ones
        return Step(form, (group,), price, self.saved_in(offer, form), donors, offer.rank)

    def after(self, offer: _Offer, columns: Columns) -> Remainder:
        """What is left once this is taken."""
        if offer.best is None:
            return self.left.without(columns)
        features = self.features(offer.best)
        if offer.product is not None:
            return self.left.with_fixed(columns, features, offer.product)
        return self.left.without(columns, features, offer.best.readout)

    def features(self, candidate: Candidate) -> Inputs:
        """The donor's features of the tokens that are fitted."""
        return candidate.features[: self.half.fitted]

    def saved_in(self, offer: _Offer, form: Form) -> int:
        """The bytes that this offer saves: a product of higher rank saves less."""
        return self.saved[form] - offer.rank * self.bytes_of_rank

    def offer(self, group: int, form: Form) -> _Offer:
        """Price this unit in this form as things stand."""
        if group not in self.lost:
            self.lost[group] = self.left.fit.lost(self.half.columns[group, None])
        lost = self.lost[group]
        removal = self.left.price(lost)
        if form is Form.REMOVE:
            return _Offer(removal)
        donors = self.donors[group][form]
        if form is Form.FACTORED:
            return self.factored(group, self.half.columns[group], donors, removal)
        prices = [
            self.left.price(lost, self.features(one), one.readout) if self.given else self.whole[group] - one.gain
            for one in donors.best
        ]
        ranked = sorted(zip(prices, donors.best, strict=True), key=lambda pair: pair[0])
        listed = [(one.unit, price) for price, one in ranked]
        return _Offer(ranked[0][0], (*listed, *self.estimates(group, donors, removal, ranked[-1][0])), ranked[0][1])

    def factored(self, group: int, columns: Columns, donors: Donors, removal: float) -> _Offer:
        """The donor and the rank that cost least for their bytes."""
        found = []
        for one in donors.best:
            products = self.left.fit.products(columns, self.features(one))
            for rank in self.ranks:
                gain = float(products.gains[rank - 1])
                rate = (removal - gain) / (self.saved[Form.FACTORED] - rank * self.bytes_of_rank)
                found.append((rate, removal - gain, one, rank, products))
        _, price, best, rank, products = min(found, key=lambda offer: offer[0])
        listed = sorted(((one.unit, p) for _, p, one, r, _ in found if r == rank), key=lambda pair: pair[1])
        others = self.estimates(group, donors, removal, listed[-1][1])
        return _Offer(price, (*listed, *others), best, products.product(rank), rank)

    def estimates(self, group: int, donors: Donors, removal: float, least: float) -> Iterator[tuple[HeadUnit, float]]:
        """The donors that are not priced again: each makes up for the same part of the removal's price as at first."""
        for unit, gain in donors.others:
            lasting = 1 - gain / self.whole[group] if self.whole[group] > 0 else 1.0
            yield unit, max(removal * lasting, least)


def neuron_path(half: Half, neurons: Layout) -> Path:
    """The order in which single neurons are removed, 1/64 of them in a step, up to three quarters.

    Each step takes the neurons whose own removal costs least as things stand, and is priced as one.
    """
    fit, before = Fit.of(half.inputs[: half.fitted], half.weight), 0.0
    held = half.inputs[half.fitted :].double()
    gram = held.T @ held * (len(half.inputs) / max(1, len(held)))
    chunk = max(1, neurons.groups // CHUNKS)
    each = saved_bytes(half.dense.checkpoint, neurons, half.dense.number, Form.REMOVE)
    steps = []
    for _ in range(int(neurons.groups * MOST_NEURONS) // chunk):
        gone = _cheapest(fit, chunk)
        fit = fit.without(gone)
        changed = fit.weight - half.weight.double()
        error = float(((changed @ gram) * changed).sum()) if len(held) else fit.error
        steps.append(Step(Form.REMOVE, tuple(gone.tolist()), error - before, each * chunk))
        before = error
    return Path(Kind.FFN, half.dense.number, tuple(steps))


def _cheapest(fit: Fit, count: int) -> Int[Tensor, " count"]:
    """The channels whose removal, each alone, costs least: |W_n|^2 / Q_nn, of those that are left."""
    inverse = fit.inverse.diagonal()
    costs = fit.weight.square().sum(dim=0) / inverse
    costs[inverse == 0] = torch.inf
    return costs.topk(count, largest=False).indices.sort().values
