"""How far the two ends of every tie lie apart, as a penalty that a loss can carry (equation 4 of the paper).

    penalty = 1/N sum_n sum_part |W_part[recipient of n] - W_part[donor of n]|

over N ties, with the Frobenius norm, not squared (Cao, Yang and Zhao, arXiv 2402.11819). Units are compared where they
stand in the model's weights, all ties in one call; the derivative goes straight into one gradient a weight. So a step
needs room for the differences of tied units and for nothing else, and no unit is ever copied by itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, distribute_tensor

from headshare.architecture.modules import ModuleMap
from headshare.errors import PlanError
from headshare.plan.layout import Place
from headshare.plan.plan import SharePlan
from headshare.plan.units import HeadUnit

SMALLEST = 1e-12


class Distance(StrEnum):
    """How the two ends of a tie are compared, part by part: the Frobenius norm of their difference (the paper's), its
    square, or one less the cosine of the flattened parts (what units are matched by)."""

    FROBENIUS = "frobenius"
    SQUARED = "squared"
    COSINE = "cosine"


@dataclass(frozen=True)
class _End:
    """Where one part of one unit stands: the weight's number, the axis, the first index along it and how many."""

    weight: int
    axis: int
    first: int
    count: int

    def of(self, weights: Sequence[Tensor]) -> Tensor:
        return self.of_one(weights[self.weight])

    def of_one(self, weight: Tensor) -> Tensor:
        return weight.narrow(self.axis, self.first, self.count)


@dataclass(frozen=True)
class _Ends:
    """One part of one tie: the recipient's and the donor's end, and the number of the tie."""

    recipient: _End
    donor: _End
    tie: int


class TiePenalty:
    """The penalty of a plan's ties in a stock model, dense, whose parameters it looks up by the checkpoint's names.

    Call it for a scalar that can be added to a loss; `distances` for what each tie contributes.

    Raises:
        PlanError: if the plan ties nothing, or the model has no such weights.
    """

    def __init__(self, model: nn.Module, plan: SharePlan, distance: Distance = Distance.FROBENIUS) -> None:
        self.distance = distance
        self.ties = sorted({(selection.layout.kind, tie) for selection in plan.selections for tie in selection.ties})
        if not self.ties:
            raise PlanError("this plan ties nothing, so there is nothing to pull together. Ask for a larger ratio.")
        self._names: dict[str, int] = {}
        self._ends = tuple(self._found(plan))
        self._rounds = _rounds(self._ends)
        modules = ModuleMap.of(model, self._names)
        self._modules = [modules.module(model, name) for name in self._names]

    def __call__(self) -> Float[Tensor, ""]:
        """The mean over ties of the sum over parts, in float32 or better."""
        mean: Tensor = _Mean.apply(self, *self._weights())  # type: ignore[no-untyped-call]
        return mean

    @torch.no_grad()
    def distances(self) -> Float[Tensor, " ties"]:
        """What each of `ties` contributes: the sum over its parts."""
        with gathered(self.parameters()):
            values = self._measured(self._weights())
        numbers = torch.tensor([one.tie for one in self._ends], device=values.device)
        found: Tensor = values.new_zeros(len(self.ties)).index_add_(0, numbers, values)
        return found

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Within, recipients hold their donors' numbers; after that, their own again."""
        parameters = self.parameters()
        taken = sorted({one.recipient.weight for one in self._ends})
        with torch.no_grad(), gathered(parameters, write=True):
            weights = self._weights()
            kept = {at: parameters[at].detach().clone() for at in taken}
            after = {at: weights[at].detach().clone() for at in taken}
            for one in self._ends:
                one.recipient.of_one(after[one.recipient.weight]).copy_(one.donor.of(weights))
            for at in taken:
                parameters[at].copy_(like(after[at], parameters[at]))
            del weights, after  # measuring takes long, and of FSDP these are whole matrices
        try:
            yield
        finally:
            with torch.no_grad(), gathered(parameters, write=True):
                for at in taken:
                    parameters[at].copy_(kept[at])

    @torch.no_grad()
    def derivatives(self) -> tuple[Float[Tensor, ""], list[Tensor]]:
        """The penalty, and its derivative by each of `parameters`, for an engine whose gradients autograd cannot add
        to."""
        with gathered(self.parameters()):
            weights = self._weights()
            values = self._measured(weights)
            scale = values.new_full((), 1 / len(self.ties))
            return values.sum() * scale, self._derivatives(weights, values, scale)

    def parameters(self) -> list[Tensor]:
        """The model's parameters that the ties are in, as they are now: training may have put others in their place."""
        return [module.get_parameter("weight") for module in self._modules]

    # ---- where units stand

    def _found(self, plan: SharePlan) -> Iterator[_Ends]:
        number = {tie: at for at, tie in enumerate(self.ties)}
        for selection in plan.selections:
            for place in selection.layout.parts.values():
                for tie in selection.ties:
                    recipient, donor = (self._end(place, unit) for unit in tie)
                    yield _Ends(recipient, donor, number[selection.layout.kind, tie])

    def _end(self, place: Place, unit: HeadUnit) -> _End:
        first, last = place.span(unit.group)
        weight = self._names.setdefault(place.name(unit.layer), len(self._names))
        return _End(weight, place.axis, first, last - first)

    def _weights(self) -> list[Tensor]:
        """The weights whole. Those that FSDP2 keeps in parts are put together; their derivatives go back in parts."""
        return [whole(parameter) for parameter in self.parameters()]

    # ---- values and derivatives

    def _sides(self, weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Views of all recipients' parts and of their donors'."""
        return [one.recipient.of(weights) for one in self._ends], [one.donor.of(weights) for one in self._ends]

    def _measured(self, weights: Sequence[Tensor]) -> Float[Tensor, " parts"]:
        """The distance of each part of each tie."""
        recipients, donors = self._sides(weights)
        if self.distance is Distance.COSINE:
            sizes, others = _norms(recipients), _norms(donors)
            return 1 - _products(recipients, donors) / (sizes * others).clamp(min=SMALLEST)
        norms = _norms(torch._foreach_sub(recipients, donors))
        return norms if self.distance is Distance.FROBENIUS else norms.square()

    def _derivatives(
        self, weights: Sequence[Tensor], values: Float[Tensor, " parts"], scale: Float[Tensor, ""]
    ) -> list[Tensor]:
        """What each weight's gradient is for these distances, times `scale`. At a distance of zero it is zero."""
        found = [torch.zeros_like(weight) for weight in weights]
        recipients, donors = self._sides(weights)
        into, taken = self._sides(found)
        if self.distance is Distance.COSINE:
            sizes, others = _norms(recipients), _norms(donors)
            both, cosines = (sizes * others).clamp(min=SMALLEST), 1 - values
            for own, other, size, targets in (
                (recipients, donors, sizes, into),
                (donors, recipients, others, taken),
            ):
                self._add(targets, other, -scale / both)
                self._add(targets, own, scale * cosines / size.square().clamp(min=SMALLEST))
            return found
        apart = torch._foreach_sub(recipients, donors)
        factors = 2 * scale.expand_as(values) if self.distance is Distance.SQUARED else scale / values
        factors = torch.where(values > 0, factors, 0.0)
        self._add(into, apart, factors)
        self._add(taken, apart, -factors)
        return found

    def _add(self, targets: Sequence[Tensor], terms: Sequence[Tensor], factors: Float[Tensor, " parts"]) -> None:
        """Add each term, times its factor, to its target. A donor's numbers are a target several times, each time in
        another round: what one call adds to may not overlap."""
        scaled = torch._foreach_mul(list(terms), factors.tolist())
        for some in self._rounds:
            torch._foreach_add_([targets[at] for at in some], [scaled[at] for at in some])


class _Mean(torch.autograd.Function):
    """The mean over ties of what their parts add up to."""

    @staticmethod
    def forward(ctx: Any, penalty: TiePenalty, *weights: Tensor) -> Tensor:
        values = penalty._measured(weights)
        ctx.penalty = penalty
        ctx.save_for_backward(values, *weights)
        return values.sum() / len(penalty.ties)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        values, *weights = ctx.saved_tensors
        return None, *ctx.penalty._derivatives(weights, values, gradient / len(ctx.penalty.ties))


@contextmanager
def gathered(parameters: Sequence[Tensor], *, write: bool = False) -> Iterator[None]:
    """Within, parameters that ZeRO-3 keeps in parts are whole on every process. With `write`, what is written stays."""
    if not any(in_zero_parts(parameter) for parameter in parameters):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(parameters), modifier_rank=0 if write else None):
        yield


def in_zero_parts(parameter: Tensor) -> bool:
    """Whether ZeRO-3 keeps this parameter."""
    return hasattr(parameter, "ds_id")


def whole(parameter: Tensor) -> Tensor:
    """A parameter with all its numbers, whichever process holds them."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor in the parts that the parameter has."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def _wide(parts: Sequence[Tensor]) -> torch.dtype:
    """What sums over these are kept in: float32 or better."""
    return torch.promote_types(parts[0].dtype, torch.float32)


def _norms(parts: Sequence[Tensor]) -> Float[Tensor, " parts"]:
    return torch.stack(torch._foreach_norm(list(parts), 2, _wide(parts)))


def _products(some: Sequence[Tensor], others: Sequence[Tensor]) -> Float[Tensor, " parts"]:
    """The inner product of each two."""
    products = torch._foreach_mul(list(some), list(others))
    return torch.stack([product.sum(dtype=_wide(some)) for product in products])


def _rounds(ends: Sequence[_Ends]) -> list[list[int]]:
    """The parts of ties, such that no two of a round have the same donor's numbers."""
    found: list[list[int]] = []
    times: dict[_End, int] = {}
    for at, one in enumerate(ends):
        nth = times.get(one.donor, 0)
        times[one.donor] = nth + 1
        if nth == len(found):
            found.append([])
        found[nth].append(at)
    return found
