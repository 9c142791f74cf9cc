"""Statistics of a dense model's layers on the calibration text, gathered once and read by all peers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Batch, Seen
from headshare.experiments.peers.matrices import Matrices
from headshare.files.state_files import Workspace, key_of
from headshare.plan.units import Part, Sublayer
from headshare.precision import full_float32
from headshare.progress import track
from headshare.text.tokens import Calibration

SAMPLE = 2048  # tokens of which hidden states between layers are kept


@dataclass(frozen=True)
class LayerStatistics:
    """Means over tokens of what enters the matrices of one layer.

    Attributes:
        grams: by part, the mean of x x^T over the inputs x of its matrix; parts that read the same have one.
        means: by part, the mean of its inputs.
        influence: the layer's block influence, 1 - cos(entering, leaving), mean over tokens.
        entering: hidden states that enter the layer, of a sample of tokens, each scaled to size 1.
    """

    grams: Mapping[Part, Float[Tensor, "inputs inputs"]]
    means: Mapping[Part, Float[Tensor, " inputs"]]
    influence: float
    entering: Float[Tensor, "sample hidden"]


class Statistics:
    """The statistics of all layers, kept in the workspace: one file a layer."""

    def __init__(self, layers: Layers, calibration: Calibration, work: Workspace) -> None:
        self.layers = layers
        self.matrices = Matrices(layers)
        self.calibration = calibration
        self.work = work
        # the model and the text are the workspace's; the rest of what they depend on is here
        self.key = key_of("peers", SAMPLE, str(layers.device))[:16]

    def of(self, layer: int) -> LayerStatistics:
        """The statistics of one layer, gathered if they are not there yet.

        Raises:
            CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
        """
        stored = self.work.read_tensors(self._file(layer))
        if stored is None:
            self._gather()
            stored = self.work.read_tensors(self._file(layer))
        assert stored is not None
        read_by = {part: str(first) for kind in Sublayer for part, first in self._readers(kind).items()}
        return LayerStatistics(
            {part: stored[f"gram.{first}"] for part, first in read_by.items()},
            {part: stored[f"mean.{first}"] for part, first in read_by.items()},
            float(stored["influence"]),
            stored["entering"],
        )

    def influences(self) -> list[float]:
        """The block influence of every layer (Men et al., "ShortGPT", 2024)."""
        return [self.of(layer).influence for layer in range(self.layers.count)]

    def _file(self, layer: int) -> str:
        return f"peers-{self.key}-{layer}.safetensors"

    def _readers(self, kind: Sublayer) -> dict[Part, Part]:
        """The first part of those that read the same, by part."""
        inner = self.matrices.inner(kind)
        readout = self.matrices.readout(kind)
        return {**dict.fromkeys(inner, inner[0]), readout: readout}

    @torch.no_grad()
    def _gather(self) -> None:
        """Walk the dense model once, and write a file for each layer."""
        tokens = self.calibration.tokens
        stream = self.layers.start(tokens)
        sample = torch.arange(0, tokens.numel(), max(1, tokens.numel() // SAMPLE))
        watched = dict.fromkeys(part for kind in Sublayer for part in self._readers(kind).values())
        for layer in track(range(self.layers.count), "statistics", self.layers.count):
            sums = _Sums({part: self.matrices.inputs(part) for part in watched}, self.layers.device)
            entering = stream.flatten(0, 1)[sample].clone()
            module = self.layers.build(layer)
            for at in self.layers.batches(range(len(stream)), stream.shape[1]):
                entered = stream[at].to(self.layers.device)
                left, seen = self.layers.run(module, layer, entered, tuple(map(self.layers.path, watched)))
                sums.add(self.layers, entered, left, seen)
                stream[at] = left.cpu()
            self.work.write_tensors(self._file(layer), sums.means() | {"entering": _unit(entering)})


class _Sums:
    """Sums over the tokens of one layer, in float64."""

    def __init__(self, inputs: Mapping[Part, int], device: torch.device) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.grams: dict[Part, Tensor] = {part: zeros(size, size) for part, size in inputs.items()}
        self.sums: dict[Part, Tensor] = {part: zeros(size) for part, size in inputs.items()}
        self.influence = 0.0
        self.tokens = 0

    def add(self, layers: Layers, entered: Batch, left: Batch, seen: Seen) -> None:
        """Add the tokens of a batch whose numbers are all finite."""
        finite = torch.isfinite(left).all(dim=-1).flatten()
        for part, gram in self.grams.items():
            rows = seen.inputs[layers.path(part)].flatten(0, 1)[finite]
            with full_float32():
                gram += rows.T @ rows
            self.sums[part] += rows.sum(dim=0)
        cosine = torch.cosine_similarity(entered, left, dim=-1).flatten()[finite]
        self.influence += float((1 - cosine).sum())
        self.tokens += int(finite.sum())

    def means(self) -> dict[str, Tensor]:
        """The means, by the names that a file has for them."""
        count = max(1, self.tokens)
        grams = {f"gram.{part}": (gram / count).float().cpu() for part, gram in self.grams.items()}
        means = {f"mean.{part}": (total / count).float().cpu() for part, total in self.sums.items()}
        return grams | means | {"influence": torch.tensor(self.influence / count)}


def _unit(rows: Float[Tensor, "sample hidden"]) -> Float[Tensor, "sample hidden"]:
    return torch.nn.functional.normalize(rows.float(), dim=-1)
