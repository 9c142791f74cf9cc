"""Storage `owner`: each module keeps the rows it owns, and a recipient calls its donors' modules for the rest.

Calling the donor, rather than holding its parameter, is what lets hooks do their work: offload loads the donor's
weight for the call, FSDP gathers it, and autograd sums the gradients of all its users in the one copy.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from headshare.errors import PlanError
from headshare.gaps import GappedTensor

Spans = tuple[tuple[int, int], ...]


class Slot(NamedTuple):
    """The next rows of a whole weight: taken from a donor (or -1 for the module itself), its n-th span."""

    donor: int
    nth: int


class SharedProjection(nn.Module):
    """A projection that stores the rows (or columns) it owns, and borrows the others from donors when it runs.

    Drop-in for nn.Linear, Falcon's linear and Conv1D: same parameter names, same arithmetic, same result bit for bit
    as the dense module with the borrowed rows written in. `tie_scale` multiplies the input channels of scaled ties.
    """

    def __init__(self, dense: nn.Module, tensor: GappedTensor) -> None:
        super().__init__()
        self.style = _style_of(dense, tensor)
        self.axis = tensor.axis
        self.out_features, self.in_features = tensor.shape if self.style != "conv1d" else tensor.shape[::-1]
        self.weight = nn.Parameter(_parameter(dense, "weight").new_empty(tensor.stored_shape))
        has_bias = getattr(dense, "bias", None) is not None
        self.bias = nn.Parameter(torch.empty_like(_parameter(dense, "bias"))) if has_bias else None
        self.scaled = tensor.scaled
        scaled_channels = sum(stop - start for start, stop in tensor.scaled)
        self.tie_scale = nn.Parameter(self.weight.new_ones(scaled_channels)) if scaled_channels else None
        self._donors: tuple[SharedProjection, ...] = ()
        self._spans: tuple[Spans, ...] = ()
        self._own: Spans = ()
        self._slots: tuple[Slot, ...] = ()

    def link(self, tensor: GappedTensor, tensors: Mapping[str, GappedTensor], modules: Mapping[str, nn.Module]) -> None:
        """Say whose rows this module borrows, and in which order they stand. Donors do not become submodules."""
        if not tensor.gaps:
            return
        names = list(dict.fromkeys(gap.donor for gap in tensor.gaps))
        spans: dict[str, list[tuple[int, int]]] = {name: [] for name in (tensor.name, *names)}
        slots = []
        for source, start, stop in tensor.whole():
            first = tensors[source].stored_index(start)
            slots.append(Slot(-1 if source == tensor.name else names.index(source), len(spans[source])))
            spans[source].append((first, first + stop - start))
        self._donors = tuple(_shared(modules[name]) for name in names)
        self._spans = tuple(tuple(spans[name]) for name in names)
        self._own = tuple(spans[tensor.name])
        self._slots = tuple(slots)

    def forward(self, x: Tensor | None = None, *, lend: Spans | None = None) -> Tensor | tuple[Tensor, ...]:
        """The projection of x; or, for a recipient that calls, copies of these spans of the stored weight."""
        if lend is not None:
            return tuple(self.weight.narrow(self.axis, start, stop - start).clone() for start, stop in lend)
        assert x is not None
        weight = self.whole_weight()
        if self.tie_scale is not None:
            x = x * self._channel_scale(self.tie_scale)
        match self.style:
            case "linear":
                return functional.linear(x, weight, self.bias)
            case "falcon":
                product = x @ weight.T
                return product if self.bias is None else product + self.bias
            case _:
                assert self.bias is not None
                flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), weight)
                return flat.view(*x.shape[:-1], self.out_features)

    def whole_weight(self) -> Float[Tensor, "rows columns"]:
        """The dense weight: the stored parameter itself where nothing is borrowed, else put together anew."""
        if not self._slots:
            return self.weight
        lent = [
            [rows.to(self.weight.device) for rows in donor(lend=spans)]
            for donor, spans in zip(self._donors, self._spans, strict=True)
        ]
        own = [self.weight.narrow(self.axis, start, stop - start) for start, stop in self._own]
        return torch.cat([own[nth] if donor < 0 else lent[donor][nth] for donor, nth in self._slots], dim=self.axis)

    def _channel_scale(self, tie_scale: Float[Tensor, " scaled"]) -> Float[Tensor, " channels"]:
        pieces, used, at = [], 0, 0
        for start, stop in self.scaled:
            pieces += [tie_scale.new_ones(start - at), tie_scale[used : used + stop - start]]
            used, at = used + stop - start, stop
        return torch.cat([*pieces, tie_scale.new_ones(self.in_features - at)])

    def extra_repr(self) -> str:
        """What prints show beside the class's name."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"stored={tuple(self.weight.shape)}, donors={len(self._donors)}"
        )


class OwnerStorage:
    """Install `SharedProjection` wherever a plan gives or takes."""

    def install(self, model: nn.Module, tensors: Mapping[str, GappedTensor], modules: Mapping[str, str]) -> None:
        """Replace first, link afterwards: a donor must be in place before its recipients name it."""
        shared: dict[str, nn.Module] = {}
        for name, tensor in tensors.items():
            parent, _, leaf = modules[name].rpartition(".")
            shared[name] = SharedProjection(model.get_submodule(modules[name]), tensor)
            setattr(model.get_submodule(parent), leaf, shared[name])
        for name, tensor in tensors.items():
            _shared(shared[name]).link(tensor, tensors, shared)


def dense_module(shared: SharedProjection, like: nn.Module) -> nn.Module:
    """Fill a stock module with the shared one's whole weight, scale folded in, and bias. Returns `like`."""
    with torch.no_grad():
        weight = shared.whole_weight().clone()
        if shared.tie_scale is not None:
            scale = shared._channel_scale(shared.tie_scale)
            weight.mul_(scale[:, None] if shared.style == "conv1d" else scale)
        like.weight = nn.Parameter(weight, requires_grad=shared.weight.requires_grad)
        if shared.bias is not None:
            like.bias = nn.Parameter(shared.bias.clone(), requires_grad=shared.bias.requires_grad)
    return like


def shared_projections(model: nn.Module) -> Sequence[tuple[str, SharedProjection]]:
    """Every shared projection of a model, with its path."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SharedProjection)]


def _shared(module: nn.Module) -> SharedProjection:
    assert isinstance(module, SharedProjection)
    return module


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter = getattr(module, name)
    assert isinstance(parameter, Tensor)
    return parameter


def _style_of(dense: nn.Module, tensor: GappedTensor) -> str:
    name = type(dense).__name__
    weight = getattr(dense, "weight", None)
    if weight is None or tuple(weight.shape) != tensor.shape:
        found = "none" if weight is None else tuple(weight.shape)
        raise PlanError(f"the model's {tensor.name} has shape {found}; the plan says {tensor.shape}.")
    if name == "FalconLinear":
        return "falcon"
    if name == "Conv1D":
        return "conv1d"
    if isinstance(dense, nn.Linear) and type(dense).forward is nn.Linear.forward:
        return "linear"
    raise PlanError(f"the model computes {tensor.name} with a {name}, which headshare does not know how to share.")
