"""A shared model as a whole, after its refit, with the weights that steps may change in the shapes that cost least.

The model is built from transformers' own class in float32, so that a loss on its predictions has gradients in all
layers. Takes no step.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import psutil
import torch
from jaxtyping import Bool, Int, Num
from torch import Tensor, nn

from headshare.architecture.modules import module_path
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.refit.columns import PlannedColumns
from headshare.calibration.refit.refinement import Refinement
from headshare.calibration.refit.steps.block_weights import BlockWeights
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CalibrationError
from headshare.integrations.transformers.loading import load_model
from headshare.plan.units import Part
from headshare.precision import short_layers, short_type

# Weights, gradients, two moments and the best weights so far are float32; the dense model may be in 16 bits.
BYTES_PER_NUMBER = 22


@dataclass(frozen=True)
class WholeModel:
    """A stock model with the weights of a shared one, and those weights of each layer that steps may change."""

    model: nn.Module
    blocks: tuple[BlockWeights, ...]
    device: torch.device

    @classmethod
    def of(
        cls, layers: Layers, columns: PlannedColumns, found: Mapping[str, Tensor], *, ffn: bool = True
    ) -> "WholeModel":
        """The shared model of these `layers` and columns, with the tensors that a refit has `found`.

        Raises:
            CheckpointError: if transformers cannot load the model.
        """
        model = load_model(layers.checkpoint, dtype=torch.float32, device_map=str(layers.device))
        model.requires_grad_(requires_grad=False)
        blocks = []
        for layer in range(layers.count):
            module = model.get_submodule(_place(model, layers, layer))
            _fill(module, layers, layer, columns, found)
            blocks.append(BlockWeights.of(layers, layer, module, columns, ffn=ffn))
        return cls(model, tuple(blocks), layers.device)

    @contextmanager
    def narrowed(self) -> Iterator[tuple[dict[str, nn.Parameter], dict[str, Bool[Tensor, "..."]]]]:
        """A block within which the layers go without their removed neurons. Gives parameters and masks by name, as
        those of one layer do."""
        weights: dict[str, nn.Parameter] = {}
        own: dict[str, Tensor] = {}
        with ExitStack() as held:
            for block in self.blocks:
                some, masks = held.enter_context(block.narrowed())
                weights |= some
                own |= masks
            yield weights, own

    def put(self, found: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The narrowed weights as they will be stored, whole, a layer at a time."""
        for block in self.blocks:
            yield block.put({name: found[name] for name in block.weights})

    def logits(self, tokens: Int[Tensor, "batch window"]) -> Num[Tensor, "batch window vocabulary"]:
        """The logits of the next tokens, with gradients if the caller has them enabled."""
        with short_layers(self.device):
            logits: Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return logits


def dense_model(dense: Checkpoint, device: torch.device) -> WholeModel:
    """The dense model, to compare predictions with: nothing of it changes."""
    number = short_type(str(device)) or torch.float32
    model = load_model(dense, dtype=number, device_map=str(device)).requires_grad_(requires_grad=False)
    return WholeModel(model, (), device)


def _place(model: nn.Module, layers: Layers, layer: int) -> str:
    """The path of a layer in the whole model."""
    return module_path(model, layers.tensor(Part.O, layer)).removesuffix(f".{layers.path(Part.O)}")


@torch.no_grad()
def _fill(module: nn.Module, layers: Layers, layer: int, columns: PlannedColumns, found: Mapping[str, Tensor]) -> None:
    """Give a layer the weights of the shared model: those that a refit has found, and the others as they are shared."""
    places = {name: f"{path}.weight" for name, path in layers.tensors_of(layer).items()} | layers.vectors_of(layer)
    for name, path in places.items():
        weight = module.get_parameter(path)
        weight.copy_(found[name] if name in found else columns.weights.read(name))


def takes_whole_steps(dense: Checkpoint, refinement: Refinement | None) -> bool:
    """True if the refinement has steps on the whole model, and the model has predictions to follow."""
    # the model is asked last, as that imports transformers
    return refinement is not None and refinement.whole > 0 and dense.predicts_next


def check_room(dense: Checkpoint, refinement: Refinement | None, device: str) -> None:
    """Refuse steps on a whole model that the device's free memory cannot hold.

    Raises:
        CalibrationError: with what is needed and what is there.
    """
    if not takes_whole_steps(dense, refinement):
        return
    place = torch.device(device)
    needed = BYTES_PER_NUMBER * sum(math.prod(info.shape) for info in dense.tensors.values())
    free = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise CalibrationError(
            f"gradient steps on all of {dense.name} take about {needed / 2**30:.1f} GiB of memory, and "
            f"{free / 2**30:.1f} GiB are free on {device}. Use --refine fast, which has one layer in memory at a time."
        )
