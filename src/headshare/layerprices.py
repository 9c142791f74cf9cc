"""The paths of one layer: what each half would give up, step by step, the cheapest for its bytes first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import torch
from jaxtyping import Int
from torch import Tensor

from headshare.checkpoints import Checkpoint
from headshare.costs import Columns, Fit, Inputs, Lost, Readout, Remainder
from headshare.donors import Candidate, Donors, find_donors
from headshare.gaps import READOUTS, bias_name
from headshare.halves import Half
from headshare.layout import Layout
from headshare.paths import Form, Path, Step
from headshare.units import HeadUnit, Kind, Part

CHUNKS = 64
MOST_NEURONS = 0.75


def saved_bytes(checkpoint: Checkpoint, layout: Layout, layer: int, form: Form) -> int:
    """What one unit of this layer saves in this form, as `accounting.estimate_plan` counts it.

    A removed unit takes the entries of its biases along; a scaled tie brings one number for each channel of o.
    """
    removes = form is Form.REMOVE
    places = [place for part, place in layout.parts.items() if removes or part in form.parts]
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


@dataclass(frozen=True)
class _Offer:
    """What one unit would cost now in one form, the donors it could have then, and the best of them with features."""

    price: float
    donors: tuple[tuple[HeadUnit, float], ...] = ()
    best: Candidate | None = None

    def taken(self, left: Remainder, columns: Columns) -> Remainder:
        """What is left once this is taken."""
        return left.without(columns) if self.best is None else left.without(columns, *_arguments(self.best))


def _arguments(candidate: Candidate) -> tuple[Inputs, Readout | None]:
    return candidate.features, candidate.readout


class _Descent:
    """One half on its way down: what is left of it, and what it has given up."""

    def __init__(self, half: Half, forms: Sequence[Form], donors: int) -> None:
        self.half = half
        fit = Fit.of(half.inputs, half.weight)
        self.left = Remainder.of(fit)
        self.whole = fit.lost(half.columns).costs.tolist()  # what each unit's removal costs while all others are there
        ties = [form for form in forms if form is not Form.REMOVE]
        self.donors = find_donors(half, fit, ties, donors) if ties else [{} for _ in self.whole]
        self.saved = {form: saved_bytes(half.dense.checkpoint, half.layout, half.dense.number, form) for form in forms}
        self.given: set[int] = set()
        self.lost: dict[int, Lost] = {}
        self.may_remove = half.layout.groups - 1 if Form.REMOVE in forms else 0

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
        """Price per byte."""
        return offer.price / self.saved[form]

    def take(self, group: int, form: Form, offer: _Offer) -> Step:
        """Give the unit up."""
        before = self.left.error
        self.left = offer.taken(self.left, self.half.columns[group])
        self.given.add(group)
        self.lost.clear()
        self.may_remove -= form is Form.REMOVE
        return Step(form, (group,), self.left.error - before, self.saved[form], offer.donors)

    def offer(self, group: int, form: Form) -> _Offer:
        """Price this unit in this form as things stand."""
        if group not in self.lost:
            self.lost[group] = self.left.fit.lost(self.half.columns[group, None])
        lost = self.lost[group]
        removal = self.left.price(lost)
        if form is Form.REMOVE:
            return _Offer(removal)
        donors = self.donors[group][form]
        prices = [
            self.whole[group] - one.gain if not self.given else self.left.price(lost, *_arguments(one))
            for one in donors.best
        ]
        ranked = sorted(zip(prices, donors.best, strict=True), key=lambda pair: pair[0])
        listed = [(one.unit, price) for price, one in ranked]
        return _Offer(ranked[0][0], (*listed, *self.estimates(group, donors, removal, ranked[-1][0])), ranked[0][1])

    def estimates(self, group: int, donors: Donors, removal: float, least: float) -> Iterator[tuple[HeadUnit, float]]:
        """The donors that are not priced again: each makes up for the same part of the removal's price as at first."""
        for unit, gain in donors.others:
            lasting = 1 - gain / self.whole[group] if self.whole[group] > 0 else 1.0
            yield unit, max(removal * lasting, least)


def neuron_path(half: Half, neurons: Layout) -> Path:
    """The order in which single neurons are removed, 1/64 of them in a step, up to three quarters.

    Each step takes the neurons whose own removal costs least as things stand, and is priced as one.
    """
    fit = Fit.of(half.inputs, half.weight)
    chunk = max(1, neurons.groups // CHUNKS)
    each = saved_bytes(half.dense.checkpoint, neurons, half.dense.number, Form.REMOVE)
    steps = []
    for _ in range(int(neurons.groups * MOST_NEURONS) // chunk):
        gone = _cheapest(fit, chunk)
        left = fit.without(gone)
        steps.append(Step(Form.REMOVE, tuple(gone.tolist()), left.error - fit.error, each * chunk))
        fit = left
    return Path(Kind.FFN, half.dense.number, tuple(steps))


def _cheapest(fit: Fit, count: int) -> Int[Tensor, " count"]:
    """The channels whose removal, each alone, costs least: |W_n|^2 / Q_nn, of those that are left."""
    inverse = fit.inverse.diagonal()
    costs = fit.weight.square().sum(dim=0) / inverse
    costs[inverse == 0] = torch.inf
    return costs.topk(count, largest=False).indices.sort().values
