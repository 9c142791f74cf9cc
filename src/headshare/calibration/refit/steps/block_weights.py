"""The weights of a built layer that a refinement may change, in the shapes in which they cost least.

Knows the plan through `PlannedColumns`. Takes no step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.refit.columns import PlannedColumns
from headshare.plan.units import FFN_PARTS


@dataclass(frozen=True)
class BlockWeight:
    """One weight of a built layer: its place in the module, and the indices along an axis that are not removed.

    `present` is None where nothing is left out.
    """

    holder: nn.Module
    leaf: str
    axis: int = 0
    present: Int[Tensor, " present"] | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the module holds it now."""
        parameter = getattr(self.holder, self.leaf)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def narrowed(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor that is not removed."""
        return whole if self.present is None else whole.index_select(self.axis, self.present).contiguous()

    def widened(self, narrow: Tensor, like: Tensor) -> Tensor:
        """The whole tensor with these numbers; what is removed is zero."""
        if self.present is None:
            return narrow
        return torch.zeros_like(like, dtype=narrow.dtype).index_copy_(self.axis, self.present, narrow)


@dataclass(frozen=True)
class BlockWeights:
    """The weights of a built layer by name: matrices of its parts, norms and biases."""

    weights: Mapping[str, BlockWeight]
    columns: PlannedColumns

    @classmethod
    def of(
        cls, layers: Layers, layer: int, module: nn.Module, columns: PlannedColumns, *, ffn: bool = True
    ) -> "BlockWeights":
        """The weights of this layer; without `ffn`, none of the feed-forward's own."""
        matrices = layers.tensors_of(layer, ffn=ffn)
        places = {name: f"{path}.weight" for name, path in matrices.items()}
        others = set() if ffn else set(layers.tensors_of(layer).values()) - set(matrices.values())
        vectors = layers.vectors_of(layer)
        places |= {name: path for name, path in vectors.items() if path.rpartition(".")[0] not in others}
        narrow = _narrow(layers, module) if ffn else frozenset()
        weights = {}
        for name, path in places.items():
            holder, _, leaf = path.rpartition(".")
            axis, present = columns.present(name) if holder in narrow else (0, None)
            weights[name] = BlockWeight(module.get_submodule(holder), leaf, axis, present)
        return cls(weights, columns)

    @contextmanager
    def narrowed(self) -> Iterator[tuple[dict[str, nn.Parameter], dict[str, Bool[Tensor, "..."]]]]:
        """A block within which the layer goes without its removed neurons. Gives its parameters, and masks of those of
        their numbers that no other layer uses. The layer has its first parameters again when the block ends."""
        whole = {name: weight.parameter for name, weight in self.weights.items()}
        own = {name: weight.narrowed(self.columns.owned(name, whole[name])) for name, weight in self.weights.items()}
        try:
            for name, weight in self.weights.items():
                if weight.present is not None:
                    narrow = nn.Parameter(weight.narrowed(whole[name].detach()), requires_grad=False)
                    setattr(weight.holder, weight.leaf, narrow)
            yield {name: weight.parameter for name, weight in self.weights.items()}, own
        finally:
            for name, weight in self.weights.items():
                setattr(weight.holder, weight.leaf, whole[name])

    def put(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put narrowed weights into the layer as they will be stored. Returns them whole and in their stored types."""
        stored = {}
        for name, narrow in found.items():
            weight = self.weights[name]
            whole = weight.parameter
            stored[name] = weight.widened(narrow, whole).to(self.columns.dtype(name))
            own = self.columns.owned(name, whole)
            with torch.no_grad():
                whole.copy_(torch.where(own, stored[name].to(whole), whole))
        return {name: tensor.cpu() for name, tensor in stored.items()}


def _narrow(layers: Layers, module: nn.Module) -> frozenset[str]:
    """Paths of the feed-forward's modules, if each is a stock linear one that holds one part.

    Those multiply with weights of any shape. Others keep zeros in the place of removed neurons.
    """
    if layers.ffn is None:
        return frozenset()
    paths = [layers.path(part) for part in FFN_PARTS if part in layers.ffn.parts]
    plain = all(type(module.get_submodule(path)) is nn.Linear for path in paths)
    return frozenset(paths) if plain and len(set(paths)) == len(paths) else frozenset()
