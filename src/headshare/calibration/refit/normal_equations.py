"""Normal equations of a readout: sums over tokens of inputs and targets."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headshare.calibration import processes
from headshare.precision import full_float32

CHUNK_TOKENS = 1024


@dataclass
class NormalEquations:
    """Weighted sums over tokens of products of a readout's inputs and targets; all that a fit needs of the tokens.

    With `bias`, a last input of ones is added, whose column is the bias. `target` is the targets' own weighted squared
    size; `left_out` counts tokens that were not added, as their numbers were not finite.
    """

    inputs: int
    outputs: int
    bias: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gram: Float[Tensor, "inputs inputs"] = field(init=False)
    cross: Float[Tensor, "inputs outputs"] = field(init=False)
    target: float = field(init=False, default=0.0)
    left_out: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        size = self.inputs + self.bias
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        self.cross = torch.zeros(size, self.outputs, dtype=torch.float64, device=self.device)

    def add(
        self,
        inputs: Float[Tensor, "*tokens inputs"],
        targets: Float[Tensor, "*tokens outputs"],
        weights: Float[Tensor, "*tokens"],
    ) -> None:
        """Add these tokens, each with its weight; those whose numbers are not all finite are left out and counted.

        Tokens are multiplied as they are given, in chunks: float32 ones in full float32, whatever precision the process
        allows its products, and in float64 where that overflows. Sums over chunks are float64. What rounding in a
        chunk does to a fit is far below what the least ridge does (tests/calibration/test_regression.py measures it).
        """
        flat = inputs.reshape(-1, self.inputs), targets.reshape(-1, self.outputs), weights.reshape(-1, 1)
        finite = _finite_rows(*flat)
        if not bool(finite.all()):
            self.left_out += int((~finite).sum())
            flat = flat[0][finite], flat[1][finite], flat[2][finite]
        for z, y, w in zip(*(torch.split(tensor, CHUNK_TOKENS) for tensor in flat), strict=True):
            self._add_chunk(z, y, w.sqrt())

    def _add_chunk(
        self,
        inputs: Float[Tensor, "tokens inputs"],
        targets: Float[Tensor, "tokens outputs"],
        root: Float[Tensor, "tokens 1"],
    ) -> None:
        """Add the tokens of one chunk, each times the root of its weight; in float64 if their products overflow."""
        rows = inputs * root
        wanted = targets * root
        if self.bias:
            rows = torch.cat([rows, root.to(rows.dtype)], dim=1)
        with full_float32():
            gram = rows.T @ rows
            cross = rows.T @ wanted
        if not bool(torch.isfinite(gram.sum() + cross.sum())) and rows.dtype != torch.float64:
            self._add_chunk(inputs.double(), targets.double(), root.double())
            return
        self.gram += gram
        self.cross += cross
        self.target += float(wanted.double().square().sum())

    def everywhere(self) -> "NormalEquations":
        """The sums over the tokens of all processes, in the place of this one's."""
        self.gram = processes.summed(self.gram)
        self.cross = processes.summed(self.cross)
        self.target = float(processes.summed(torch.tensor(self.target, dtype=torch.float64)))
        self.left_out = processes.total(self.left_out)
        return self

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        both = NormalEquations(self.inputs, self.outputs, self.bias, self.device)
        both.gram = self.gram + other.gram
        both.cross = self.cross + other.cross
        both.target = self.target + other.target
        both.left_out = self.left_out + other.left_out
        return both

    def lost(self, weight: Float[Tensor, "outputs inputs"]) -> float:
        """Weighted squared error of this readout, bias column included; not below zero, whatever rounding says."""
        return max(0.0, self.target + float((weight.T * (self.gram @ weight.T - 2 * self.cross)).sum()))

    def error(self, weight: Float[Tensor, "outputs inputs"]) -> float:
        """The squared error as a part of the targets' own size; where all targets are zero, as it is."""
        return self.lost(weight) / (self.target or 1.0)


def token_weights(hidden: Float[Tensor, "batch window hidden"]) -> Float[Tensor, "batch window"]:
    """The weight of each token: one over its squared size, and zero for a token of size zero.

    So the few tokens with enormous activations do not rule the fit.
    """
    square = hidden.square().sum(dim=-1)
    return torch.where(square > torch.finfo(square.dtype).tiny, 1 / square, 0.0)


def _finite_rows(*tensors: Float[Tensor, "tokens _"]) -> Bool[Tensor, " tokens"]:
    rows = [torch.isfinite(tensor).all(dim=1) for tensor in tensors]
    return torch.stack(rows).all(dim=0)
