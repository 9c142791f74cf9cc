"""Inner products of the attention maps of all heads on a text, a few windows at a time.

The layers are built one after the other, as calibration does, with the attention that gives its maps. The maps of all
heads are kept for as many windows as MAP_BYTES hold, multiplied, and let go. Where not even one window fits, the maps
of every so many tokens stand for those of all.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Stream
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import ArchitectureError, CheckpointError
from headshare.plan.units import Part
from headshare.precision import full_float32
from headshare.progress import track

MAP_BYTES = 2**30
# the implementation of attention that gives its maps
EAGER = "eager"
ASKED = "output_attentions"


@dataclass(frozen=True)
class MapProducts:
    """Inner products of the maps of all pairs of heads, over all tokens of a text that were looked at.

    Heads stand in the order of layers. `all` are the products of whole maps, and `rest` those without the first token
    of each window, to which many heads attend when they have nothing else to do. `tokens` were looked at, of which the
    maps of `rows` were compared.
    """

    layers: int
    all: Float[Tensor, "heads heads"]
    rest: Float[Tensor, "heads heads"]
    tokens: int
    rows: int

    @property
    def heads(self) -> int:
        """Heads of one layer."""
        return len(self.all) // self.layers

    def by_head(self, *, first: bool = True) -> Float[Tensor, "heads heads"]:
        """Cosines of the maps of all pairs of heads; without the first token of each window unless `first`."""
        return _cosines(self.all if first else self.rest)

    def by_layer(self, *, first: bool = True) -> Float[Tensor, "layers layers"]:
        """Cosines of the layers' maps, each the mean of those of its heads."""
        products = self.all if first else self.rest
        return _cosines(products.view(self.layers, self.heads, self.layers, self.heads).sum((1, 3)))


def _cosines(products: Float[Tensor, "some some"]) -> Float[Tensor, "some some"]:
    norms = products.diagonal().clamp(min=0).sqrt()
    scale = norms[:, None] * norms[None, :]
    return torch.where(scale > 0, products / scale, torch.zeros_like(products))


@torch.no_grad()
def map_products(
    checkpoint: Checkpoint, tokens: Int[Tensor, "windows window"], *, device: str = "cpu", memory: int = MAP_BYTES
) -> MapProducts:
    """The inner products of the maps of all heads of a model, dense or shared, on these windows.

    About `memory` bytes of maps are kept at a time, of all layers, and those of one window in one layer besides.

    Raises:
        ArchitectureError: if the model's layout is not known, or its attention does not give its maps.
        CheckpointError: if weights are missing, or the maps are not finite.
    """
    layers = Layers(checkpoint, device=device)
    config = layers.shell.model.config
    for part in (config, config.get_text_config()):  # some models refuse to be asked for it once they are built
        part._attn_implementation = EAGER
    windows, window = tokens.shape
    heads = layers.attention.parts[Part.Q].rows // layers.attention.parts[Part.K].rows * layers.attention.groups
    # as many windows as fit, or some rows of a single one
    row_bytes = layers.count * heads * window * torch.float32.itemsize
    together = max(1, memory // (row_bytes * window))
    rows = torch.arange(window)[:: max(1, -(-row_bytes * window // memory))]
    total, first = (torch.zeros((layers.count * heads,) * 2, dtype=torch.float64) for _ in range(2))
    for start in track(range(0, windows, together), "attention maps", -(-windows // together)):
        stream = layers.start(tokens[start : start + together])
        maps = torch.empty(layers.count, heads, len(stream), len(rows), window)
        for layer in range(layers.count):
            _fill(maps[layer], layers, layer, stream, rows)
        flat = maps.flatten(2).flatten(0, 1)
        with full_float32():
            total += flat @ flat.T
            onto_first = maps[..., 0].flatten(2).flatten(0, 1)
            first += onto_first @ onto_first.T
    return MapProducts(layers.count, total, total - first, windows * window, windows * len(rows))


def _fill(
    maps: Float[Tensor, "heads windows rows window"],
    layers: Layers,
    layer: int,
    stream: Stream,
    rows: Int[Tensor, " rows"],
) -> None:
    """Run a layer over these windows, in place, one at a time, and note the maps of its heads."""
    module = layers.build(layer)
    # queries are made by the module whose maps are looked at, or by one right inside it
    path = layers.path(Part.Q).rpartition(".")[0]
    with _looking(module.get_submodule(path)) as seen:
        for at in range(len(stream)):
            stream[at : at + 1] = layers.call(module, layer, stream[at : at + 1]).cpu()
            found = seen.pop() if seen else None
            if found is None or found.shape[:2] != (1, len(maps)) or found.shape[2:] != (stream.shape[1],) * 2:
                raise ArchitectureError(
                    f"the attention of {layers.checkpoint.name} does not give its maps ({path} of layer {layer}); "
                    "headshare can compare those of models whose attention transformers can run as eager."
                )
            maps[:, at] = found[0, :, rows.to(found.device)].float().cpu()
            if not torch.isfinite(maps[:, at]).all():
                raise CheckpointError(
                    f"layer {layer} of {layers.checkpoint.name} gives no finite attention maps on this text: its "
                    "weights are too large, or damaged. Download it again."
                )


@contextmanager
def _looking(attention: nn.Module) -> Iterator[list[Tensor]]:
    """A block within which the maps of this attention module are noted, the last one last."""
    seen: list[Tensor] = []

    def ask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, ASKED: True}

    def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        given = output if isinstance(output, tuple) else ()
        seen.extend(each for each in given[1:] if isinstance(each, Tensor) and each.ndim == 4)

    hooks = [attention.register_forward_hook(note)]
    if ASKED in inspect.signature(attention.forward).parameters:
        hooks.append(attention.register_forward_pre_hook(ask, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
