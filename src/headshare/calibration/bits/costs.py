"""Costs of rounding: for each matrix of the layers, the divergence of predictions that its nearest numbers cause.

A matrix is rounded alone, in the dense model, and its sublayer is run again on calibration text. The change of what the
sublayer gives is an error e_t of its output, weighed as all errors are: in nats by the sublayer's metric
(`sensitivity`), else relative to the hidden state. Rounding errors of different matrices have nothing to do with each
other, so costs add up. To first order they do not depend on the units that a plan gives up either.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from headshare.calibration import processes
from headshare.calibration.costs.sensitivity import sensitivities
from headshare.calibration.costs.sublayer import DenseLayer, SublayerData
from headshare.calibration.layerwise.layers import Layers
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.header import DTYPES
from headshare.checkpoint.rounding.numbers import Rounded, to_nearest
from headshare.checkpoint.rounding.numbers import dense as unpacked
from headshare.checkpoint.rounding.tensors import scale_type
from headshare.errors import CheckpointError, PlanError
from headshare.files.untrusted import first_error
from headshare.plan.units import Part, Sublayer
from headshare.progress import track
from headshare.sharing.rounded.matrices import groups_fitting
from headshare.text.tokens import Calibration

# The tokens that rounded sublayers are run on, and the groups of inputs that 4 bits are tried with.
TOKENS = 2048
GROUPS = (64, 32, 16)


@dataclass(frozen=True)
class RoundingCost:
    """The cost of one matrix in so many bits, with a scale for every `group` inputs (0: one for each row)."""

    bits: int
    group: int
    price: float


@dataclass(frozen=True)
class MatrixCosts:
    """A matrix of a sublayer, the parts that it holds, and what it costs to round it, in several ways."""

    name: str
    kind: Sublayer
    layer: int
    parts: tuple[Part, ...]
    outputs: int
    inputs: int
    costs: tuple[RoundingCost, ...]

    def cost(self, bits: int, group: int | None) -> float:
        """The cost in so many bits, with a scale for so many inputs; none in the bits that the matrix has.

        Raises:
            PlanError: if it was not measured.
        """
        if bits > 8:
            return 0.0
        for each in self.costs:
            if (each.bits, each.group) == (bits, group or 0):
                return each.price
        raise PlanError(f"what {self.name} costs in {bits} bits was not measured. Price it again.")


_COSTS: TypeAdapter[list[MatrixCosts]] = TypeAdapter(list[MatrixCosts])


def costs_to_data(costs: Sequence[MatrixCosts]) -> list[Any]:
    """Costs of rounding as JSON data; the inverse of `checked_costs`."""
    data: list[Any] = _COSTS.dump_python(list(costs), mode="json")
    return data


def checked_costs(data: object) -> list[MatrixCosts]:
    """Costs of rounding made of values that were read from JSON.

    Raises:
        PlanError: if they are not such costs.
    """
    try:
        return _COSTS.validate_python(data)
    except ValidationError as error:
        raise PlanError(f"these costs of rounding are not valid: {': '.join(first_error(error))}.") from None


def rounding_costs(
    dense: Checkpoint, calibration: Calibration, *, sensitive: bool, device: str = "cpu", tokens: int = TOKENS
) -> list[MatrixCosts]:
    """What it costs to round each matrix of the layers to 8 bits, and to 4 in each of `GROUPS` that fits the model.

    They are measured on the first windows that hold so many tokens: in nats a token if `sensitive`, else as squared
    errors relative to the hidden state. Numbers are the nearest ones, in the type that the checkpoint has.

    Raises:
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer, or a matrix is not finite.
    """
    dense.require_dense("round it")
    layers = Layers(dense, device=device, head=sensitive)
    layouts = {layout.kind: layout for layout in dense.layouts.all}
    text = calibration.mixed()
    metrics = sensitivities(layers, text, tuple(layouts)) if sensitive else {}
    forms = [(8, None), *((4, group) for group in groups_fitting(dense, GROUPS))]
    count = min(len(text.tokens), max(processes.count(), tokens // text.tokens.shape[1]))
    stream = layers.start(processes.divided(text.tokens[:count], count)[0])
    costs: list[MatrixCosts] = []
    for number in track(range(layers.count), "rounding", layers.count):
        layer = DenseLayer(dense, layers, number, layers.build(number), stream)
        seen, stream = layer.look(tuple(layouts))
        for kind, layout in layouts.items():
            data = SublayerData(layer, layout, seen[kind], len(seen[kind].inputs), metrics.get(number, {}).get(kind))
            costs += _of_sublayer(data, forms)
    return processes.agreed(costs)


def _of_sublayer(data: SublayerData, forms: Sequence[tuple[int, int | None]]) -> Iterator[MatrixCosts]:
    """The costs of each matrix of a sublayer; one that holds several parts is rounded once."""
    number = data.dense.number
    names: dict[str, list[Part]] = {}
    for part, place in data.layout.parts.items():
        names.setdefault(place.name(number), []).append(part)
    for name, parts in names.items():
        place = data.layout.parts[parts[0]]
        in_out = (place.axis == 1) != (parts[0] is data.readout)
        own = data.dense.checkpoint.read(name)
        matrix = own.T if in_out else own
        costs = []
        for bits, group in forms:
            nearest = unpacked(*_rounded(data, name, matrix, bits, group), group, torch.float32)
            costs.append(RoundingCost(bits, group or 0, _price(data, parts[0], nearest.T if in_out else nearest)))
        outputs, inputs = matrix.shape
        yield MatrixCosts(name, data.layout.kind, number, tuple(parts), outputs, inputs, tuple(costs))


def _rounded(data: SublayerData, name: str, matrix: Tensor, bits: int, group: int | None) -> Rounded:
    dtype = DTYPES[scale_type(bits, data.dense.checkpoint.tensors[name].dtype)]
    try:
        return to_nearest(matrix, bits, group, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{name} cannot be rounded: {error}.") from None


def _price(data: SublayerData, part: Part, stored: Float[Tensor, "rows columns"]) -> float:
    """The error of the sublayer's output with these numbers, as they are stored, in the place of a part's matrix."""
    layers = data.dense.layers
    stored = stored.to(data.device)
    if part is data.readout:
        readout = stored.T if layers.in_out else stored
        changed = data.weight - (readout if data.metric is None else data.metric @ readout)
        lost = data.inputs @ changed.T
    else:
        with _replaced(data, part, stored):
            lost = (data.features(data.dense.number, ()) - data.inputs) @ data.weight.T
    return float(processes.summed(lost.double().square().sum()))


@contextmanager
def _replaced(data: SublayerData, part: Part, stored: Tensor) -> Iterator[None]:
    """A block within which a part's module has these numbers."""
    weight = data.dense.module.get_submodule(data.dense.layers.path(part)).weight
    assert isinstance(weight, Tensor)
    own = weight.data.clone()
    weight.data.copy_(stored)
    try:
        yield
    finally:
        weight.data.copy_(own)
