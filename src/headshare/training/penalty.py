"""The mean distance between the two ends of a plan's ties, as a penalty in a loss (equation 4 of the paper).

    penalty = 1/N sum_n sum_part |W_part[recipient of n] - W_part[donor of n]|

over N ties, with the Frobenius norm, not squared (Cao, Yang and Zhao, arXiv 2402.11819). Units are compared where they
stand in the model's weights, all ties in one call. The derivative goes straight into one gradient per weight. So a step
needs memory for the differences of tied units and for nothing else, and no unit is ever copied by itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from headshare.training.choices import Distance

# keeps a cosine of zeros finite
SMALLEST = 1e-12


@dataclass(frozen=True)
class _End:
    """The place of a unit's part: the weight's number, the axis, and the first index along it with their count."""

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
    """The two ends of a tie in one part, the recipient's and the donor's, with the number of the tie."""

    recipient: _End
    donor: _End
    tie: int


class TiePenalty:
    """The penalty of a plan's ties in a dense stock model, whose parameters it looks up by the checkpoint's names.

    Calling it gives a scalar that can be added to a loss. `distances` gives the contribution of each tie.

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
        """The contribution of each of `ties`: the sum over its parts."""
        with gathered(self.parameters()):
            values = self._measured(self._weights())
        numbers = torch.tensor([ends.tie for ends in self._ends], device=values.device)
        sums: Tensor = values.new_zeros(len(self.ties)).index_add_(0, numbers, values)
        return sums

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Give recipients their donors' numbers within this block, and their own again after it."""
        parameters = self.parameters()
        taken = sorted({ends.recipient.weight for ends in self._ends})
        with torch.no_grad(), gathered(parameters, write=True):
            weights = self._weights()
            kept = {at: parameters[at].detach().clone() for at in taken}
            after = {at: weights[at].detach().clone() for at in taken}
            for ends in self._ends:
                ends.recipient.of_one(after[ends.recipient.weight]).copy_(ends.donor.of(weights))
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
        """The penalty and its derivative by each of `parameters`.

        They are for an engine to whose gradients autograd cannot add.
        """
        with gathered(self.parameters()):
            weights = self._weights()
            values = self._measured(weights)
            scale = values.new_full((), 1 / len(self.ties))
            return values.sum() * scale, self._derivatives(weights, values, scale)

    def parameters(self) -> list[Tensor]:
        """Parameters of the model that have tied units, looked up anew: training may have replaced them."""
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
        """The whole weights; autograd takes the derivatives of those that FSDP2 shards back to their shards."""
        return [whole(parameter) for parameter in self.parameters()]

    # ---- values and derivatives

    def _sides(self, weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Views of all recipients' parts, and of their donors' parts."""
        return [ends.recipient.of(weights) for ends in self._ends], [ends.donor.of(weights) for ends in self._ends]

    def _measured(self, weights: Sequence[Tensor]) -> Float[Tensor, " parts"]:
        """The distance of each part of each tie."""
        recipients, donors = self._sides(weights)
        if self.distance is Distance.COSINE:
            sizes = _norms(recipients)
            others = _norms(donors)
            return 1 - _products(recipients, donors) / (sizes * others).clamp(min=SMALLEST)
        norms = _norms(torch._foreach_sub(recipients, donors))
        return norms if self.distance is Distance.FROBENIUS else norms.square()

    def _derivatives(
        self, weights: Sequence[Tensor], values: Float[Tensor, " parts"], scale: Float[Tensor, ""]
    ) -> list[Tensor]:
        """The gradient of each weight for these distances, times `scale`; it is zero at a distance of zero."""
        # views of the gradients, at the places of the parts: what is added to a view is added to the gradient
        gradients = [torch.zeros_like(weight) for weight in weights]
        recipients, donors = self._sides(weights)
        into, taken = self._sides(gradients)
        if self.distance is Distance.COSINE:
            # d(1 - cos(a, b)) / da = cos(a, b) a / |a|^2 - b / (|a| |b|), and likewise for b
            sizes = _norms(recipients)
            others = _norms(donors)
            both = (sizes * others).clamp(min=SMALLEST)
            cosines = 1 - values
            for own, other, size, targets in (
                (recipients, donors, sizes, into),
                (donors, recipients, others, taken),
            ):
                self._add(targets, other, -scale / both)
                self._add(targets, own, scale * cosines / size.square().clamp(min=SMALLEST))
            return gradients
        # the ends of a difference have opposite derivatives: (a - b) / |a - b|, or 2 (a - b) for the square
        apart = torch._foreach_sub(recipients, donors)
        factors = 2 * scale.expand_as(values) if self.distance is Distance.SQUARED else scale / values
        factors = torch.where(values > 0, factors, 0.0)
        self._add(into, apart, factors)
        self._add(taken, apart, -factors)
        return gradients

    def _add(self, targets: Sequence[Tensor], terms: Sequence[Tensor], factors: Float[Tensor, " parts"]) -> None:
        """Add each term, times its factor, to its target.

        The targets of one call may not overlap, and a donor's numbers are a target once for each of its recipients. So
        terms are added in rounds.
        """
        scaled = torch._foreach_mul(list(terms), factors.tolist())
        for some in self._rounds:
            torch._foreach_add_([targets[at] for at in some], [scaled[at] for at in some])


class _Mean(torch.autograd.Function):
    """The mean over ties of the sum over their parts, with its derivative."""

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
    """Gather parameters that ZeRO-3 shards, on every process, within this block. With `write`, changes to them stay."""
    if not any(in_zero_parts(parameter) for parameter in parameters):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(parameters), modifier_rank=0 if write else None):
        yield


def in_zero_parts(parameter: Tensor) -> bool:
    """Whether ZeRO-3 shards this parameter."""
    return hasattr(parameter, "ds_id")


def whole(parameter: Tensor) -> Tensor:
    """The whole parameter, whichever processes hold its shards."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded as the parameter is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def _wide(parts: Sequence[Tensor]) -> torch.dtype:
    """The type that sums over these parts are kept in: float32 or better."""
    return torch.promote_types(parts[0].dtype, torch.float32)


def _norms(parts: Sequence[Tensor]) -> Float[Tensor, " parts"]:
    return torch.stack(torch._foreach_norm(list(parts), 2, _wide(parts)))


def _products(some: Sequence[Tensor], others: Sequence[Tensor]) -> Float[Tensor, " parts"]:
    """Inner products of the parts, pair by pair."""
    products = torch._foreach_mul(list(some), list(others))
    return torch.stack([product.sum(dtype=_wide(some)) for product in products])


def _rounds(ends: Sequence[_Ends]) -> list[list[int]]:
    """Rounds of ends, by their indices, none of which has the same donor's numbers twice."""
    rounds: list[list[int]] = []
    times: dict[_End, int] = {}
    for at, pair in enumerate(ends):
        nth = times.get(pair.donor, 0)
        times[pair.donor] = nth + 1
        if nth == len(rounds):
            rounds.append([])
        rounds[nth].append(at)
    return rounds
