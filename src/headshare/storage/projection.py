"""Projections that hold their weights in another way than stock modules, and multiply exactly as those do."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from headshare.architecture.families import Linear
from headshare.architecture.modules import linear_of
from headshare.errors import PlanError, StorageError
from headshare.plan.tensors import TensorPlan
from headshare.storage.matrix import Weight


class SharedProjection(nn.Module):
    """A drop-in for the linear modules of every family, with the same parameter names and the same arithmetic.

    `weight` holds the rows that this module stores, and `whole_weight()` gives the dense weight. `tie_scale` multiplies
    the input channels of scaled ties. Abstract: a storage implements `forward` and `whole_weight`, which
    bring the borrowed rows in.
    """

    def __init__(self, dense: nn.Module, tensor: TensorPlan) -> None:
        super().__init__()
        linear = _linear_with(dense, tensor)
        self.in_out = linear.in_out
        self.bias_after = linear.bias_after
        self.axis = tensor.axis
        self.out_features, self.in_features = tensor.shape[::-1] if self.in_out else tensor.shape
        self.weight = nn.Parameter(_parameter(dense, "weight").new_empty(tensor.stored_shape))
        has_bias = getattr(dense, "bias", None) is not None
        self.bias = nn.Parameter(torch.empty_like(_parameter(dense, "bias"))) if has_bias else None
        self.scaled = tensor.scaled
        scaled_channels = sum(stop - start for start, stop in tensor.scaled)
        self.tie_scale = nn.Parameter(self.weight.new_ones(scaled_channels)) if scaled_channels else None

    def whole_weight(self) -> Weight:
        """The dense weight, in the stock module's orientation."""
        raise NotImplementedError

    def multiply(self, x: Tensor, weight: Weight) -> Tensor:
        """The stock module's product of x and this whole weight. Channels of scaled ties are scaled first."""
        if self.tie_scale is not None:
            x = x * self.channel_scale(self.tie_scale)
        if self.in_out:
            assert self.bias is not None
            flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), weight)
            return flat.view(*x.shape[:-1], self.out_features)
        if self.bias_after:
            product = x @ weight.T
            return product if self.bias is None else product + self.bias
        return functional.linear(x, weight, self.bias)

    def channel_scale(self, tie_scale: Float[Tensor, " scaled"]) -> Float[Tensor, " channels"]:
        """Factors of all input channels: the tie's where it is scaled, else 1."""
        pieces: list[Tensor] = []
        used = 0
        at = 0
        for start, stop in self.scaled:
            pieces += [tie_scale.new_ones(start - at), tie_scale[used : used + stop - start]]
            used += stop - start
            at = stop
        return torch.cat([*pieces, tie_scale.new_ones(self.in_features - at)])

    def extra_repr(self) -> str:
        """The text that prints show beside the class's name."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"stored={tuple(self.weight.shape)}"
        )


def dense_module(shared: SharedProjection, like: nn.Module) -> nn.Module:
    """Fill the stock module `like` with a shared one's bias and whole weight, scale folded in. Returns `like`."""
    with torch.no_grad():
        weight = shared.whole_weight().clone(memory_format=torch.contiguous_format)
        if shared.tie_scale is not None:
            scale = shared.channel_scale(shared.tie_scale)
            weight.mul_(scale[:, None] if shared.in_out else scale)
        like.weight = nn.Parameter(weight)
        if shared.bias is not None:
            like.bias = nn.Parameter(shared.bias.clone(), requires_grad=shared.bias.requires_grad)
    return like


def shared_projections(model: nn.Module) -> Sequence[tuple[str, SharedProjection]]:
    """All shared projections of a model, with their paths."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SharedProjection)]


def is_loaded(tensor: Tensor) -> bool:
    """True if transformers loaded this tensor from a checkpoint, and does not fill it in some other way."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def stored_dtypes(modules: Iterable[nn.Module]) -> set[torch.dtype]:
    """The types of number of these modules' weights."""
    return {_parameter(module, "weight").dtype for module in modules}


def _linear_with(dense: nn.Module, tensor: TensorPlan) -> Linear:
    """The kind of linear module that holds this tensor: it says how the module multiplies.

    Raises:
        PlanError: if its weight has another shape than the plan says, or headshare does not know its kind.
    """
    weight = getattr(dense, "weight", None)
    if weight is None or tuple(weight.shape) != tensor.shape:
        shape = "none" if weight is None else tuple(weight.shape)
        raise PlanError(f"the model's {tensor.name} has shape {shape}; the plan says {tensor.shape}.")
    linear = linear_of(dense)
    if linear is None:
        raise StorageError(
            f"the model computes {tensor.name} with a {type(dense).__name__}, which headshare does not know how to "
            "share."
        )
    return linear


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter = getattr(module, name)
    assert isinstance(parameter, Tensor)
    return parameter
