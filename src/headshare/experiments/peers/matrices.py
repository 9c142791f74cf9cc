"""The weight matrices of a model's parts, read from the checkpoint and written into modules, whatever their layout.

A matrix is (outputs, inputs), in float32. Fused parts (q, k and v in one tensor) are matrices of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headshare.architecture.modules import linear_of, module_path
from headshare.calibration.layerwise.layers import Layers
from headshare.errors import ArchitectureError
from headshare.plan.layout import Layout
from headshare.plan.tensors import bias_name
from headshare.plan.units import READOUTS, Part, Sublayer

Matrix = Float[Tensor, "outputs inputs"]


@dataclass(frozen=True)
class Remade:
    """A sublayer as a peer leaves it, multiplied out to dense shapes.

    Attributes:
        weights: matrices of parts that changed.
        biases: biases of parts that changed, or that the peer brings to the readout (W_o or W_down).
        kept: the readout's inputs that are left; None if all are.
        rank: the rank of the stored readout, which a refit must not raise.
        gone: nothing is left of the sublayer: it adds nothing.
        slicing: a projection of the hidden states that leave the sublayer.
    """

    weights: Mapping[Part, Matrix]
    biases: Mapping[Part, Float[Tensor, " outputs"]] = field(default_factory=dict)
    kept: Bool[Tensor, " inputs"] | None = None
    rank: int | None = None
    gone: bool = False
    slicing: Float[Tensor, "hidden hidden"] | None = None


class Matrices:
    """The matrices of a model's layers by part.

    Raises:
        ArchitectureError: if the model's feed-forward is not one the peers can read, as that of experts.
    """

    def __init__(self, layers: Layers) -> None:
        if layers.ffn is None:
            raise ArchitectureError("methods of others are not rewritten for models of experts.")
        self.layers = layers
        self.layouts: dict[Sublayer, Layout] = {Sublayer.ATTENTION: layers.attention, Sublayer.FFN: layers.ffn}

    def parts(self, kind: Sublayer) -> tuple[Part, ...]:
        """The parts of this sublayer that this model has; the readout comes last."""
        return tuple(self.layouts[kind].parts)

    def inner(self, kind: Sublayer) -> tuple[Part, ...]:
        """The parts that read the hidden states: all but the readout."""
        return tuple(part for part in self.parts(kind) if part not in READOUTS)

    def readout(self, kind: Sublayer) -> Part:
        """The part that writes to the hidden states."""
        return next(part for part in self.parts(kind) if part in READOUTS)

    @cache  # noqa: B019 - lives as long as the comparison
    def outputs(self, part: Part) -> Int[Tensor, " outputs"]:
        """The indices of this part's outputs in its tensor."""
        layout = next(layout for layout in self.layouts.values() if part in layout.parts)
        place = layout.parts[part]
        if part in READOUTS:
            return torch.arange(place.shape[1 - place.axis])
        starts = torch.tensor([place.span(group)[0] for group in range(layout.groups)])
        return (starts[:, None] + torch.arange(place.rows)).flatten()

    def inputs(self, part: Part) -> int:
        """The number of this part's inputs."""
        layout = next(layout for layout in self.layouts.values() if part in layout.parts)
        place = layout.parts[part]
        return place.shape[place.axis] if part in READOUTS else place.shape[1 - place.axis]

    def unit_columns(self, kind: Sublayer) -> Int[Tensor, "groups columns"]:
        """The inputs of the readout that belong to each unit."""
        layout = self.layouts[kind]
        place = layout.parts[self.readout(kind)]
        starts = torch.tensor([place.span(group)[0] for group in range(layout.groups)])
        return starts[:, None] + torch.arange(place.rows)

    def read(self, part: Part, layer: int) -> Matrix:
        """The dense model's matrix."""
        stored = self.layers.shell.weights.read(self.layers.tensor(part, layer))
        whole = stored.T if self.layers.in_out else stored
        return whole[self.outputs(part)].float()

    def bias(self, part: Part, layer: int) -> Float[Tensor, " outputs"] | None:
        """The dense model's bias of this part; None where it has none."""
        name = bias_name(self.layers.tensor(part, layer))
        weights = self.layers.shell.weights
        return weights.read(name)[self.outputs(part)].float() if name in weights else None

    def dtype(self, part: Part) -> torch.dtype:
        """The type in which this part is stored."""
        return self.layers.checkpoint.tensors[self.layers.tensor(part, 0)].torch_dtype

    # ---- writing

    def put_into_layer(self, module: nn.Module, kind: Sublayer, remade: Remade) -> None:
        """Write a remade sublayer into a built layer, its numbers rounded as they are stored."""
        for part in self.parts(kind):
            self._put(module.get_submodule(self.layers.path(part)), part, remade)

    def put_into_model(self, model: nn.Module, layer: int, kind: Sublayer, remade: Remade) -> None:
        """Write a remade sublayer into a stock model."""
        for part in self.parts(kind):
            self._put(self.module(model, part, layer), part, remade)

    def module(self, model: nn.Module, part: Part, layer: int) -> nn.Module:
        """The stock model's module that holds this part."""
        return model.get_submodule(module_path(model, self.layers.tensor(part, layer)))

    @torch.no_grad()
    def _put(self, module: nn.Module, part: Part, remade: Remade) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        linear = linear_of(module)
        whole = weight.T if linear is not None and linear.in_out else weight
        if part in remade.weights:
            stored = remade.weights[part].to(self.dtype(part))
            whole[self.outputs(part).to(whole.device)] = stored.to(whole)
        if part in remade.biases and module.bias is None:
            module.bias = nn.Parameter(torch.zeros_like(whole[:, 0]), requires_grad=False)
        bias = module.bias
        assert isinstance(bias, Tensor | None)
        if part in remade.biases and bias is not None:
            rounded = remade.biases[part].to(self.dtype(part))
            bias[self.outputs(part).to(whole.device)] = rounded.to(whole)
        if remade.gone and part in READOUTS:
            whole.zero_()
            if bias is not None:
                bias.zero_()
