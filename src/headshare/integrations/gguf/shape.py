"""The shape of a model in a GGUF file: its architecture, and for each layer the units and neurons that it keeps.

Where llama.cpp cannot go without something that a plan removed, zeros stand in its place.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from headshare.architecture.llama_cpp import ALIKE, ENGINE, VARIED, FileArchitecture, runs_as
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import ArchitectureError
from headshare.integrations.gguf.number_types import BLOCK
from headshare.plan.layout import Layout
from headshare.plan.plan import SharePlan
from headshare.plan.tensors import bias_name
from headshare.plan.units import Part, Sublayer

# llama.cpp takes the size of a head from the file only if the first layer has heads
FIRST_NEEDS_UNITS = True


@dataclass(frozen=True)
class Kept:
    """What a layer keeps of a sublayer: indices of its groups, and so many groups of zeros behind them."""

    groups: tuple[int, ...]
    zeros: int = 0

    @property
    def count(self) -> int:
        """The count of groups in the file."""
        return len(self.groups) + self.zeros


@dataclass(frozen=True)
class FileLayer:
    """A layer of the file, the layer of the model that it is, and what it keeps of attention and feed-forward."""

    layer: int
    units: Kept
    neurons: Kept

    @property
    def counts(self) -> tuple[int, int]:
        """The counts of units and of neurons in the file."""
        return self.units.count, self.neurons.count


@dataclass(frozen=True)
class FileShape:
    """The shape of a model in the file: its architecture, its grids of units and of neurons, and the file's layers."""

    architecture: FileArchitecture
    attention: Layout
    neurons: Layout
    layers: tuple[FileLayer, ...]

    @property
    def head_dim(self) -> int:
        """The numbers of a key, a value or a query of one head."""
        return self.attention.parts[Part.K].rows

    @property
    def queries(self) -> int:
        """The count of query heads in a unit."""
        return self.attention.parts[Part.Q].rows // self.head_dim

    @property
    def hidden(self) -> int:
        """The numbers of a hidden state."""
        return self.attention.parts[Part.Q].shape[1]


def shape_of(checkpoint: Checkpoint, *, block: int) -> FileShape:
    """The shape of a checkpoint in a file whose rows are cut in blocks of so many numbers.

    Raises:
        ArchitectureError: if llama.cpp cannot run such a model, with the reason.
    """
    alike = check_family(checkpoint)
    layouts = checkpoint.layouts
    attention, neurons = layouts.attention, layouts.neurons
    if neurons is None or Part.GATE not in neurons.parts:
        raise ArchitectureError(
            f"the feed-forward of {checkpoint.name} is not one of gate, up and down, as {ENGINE}'s {alike.name} has."
        )
    if attention.parts[Part.K].rows % 2:
        raise ArchitectureError(f"heads of {attention.parts[Part.K].rows} numbers cannot be rotated in pairs.")
    layers = _layers(checkpoint, attention, neurons, block)
    architecture = alike if _fits(alike, attention, layers) else VARIED
    _check_biases(checkpoint, architecture, (attention, neurons))
    return FileShape(architecture, attention, neurons, layers)


def check_family(checkpoint: Checkpoint) -> FileArchitecture:
    """The architecture of a model of this type where its layers are all alike.

    Raises:
        ArchitectureError: if llama.cpp is not known to run such a model as it is.
    """
    model_type = str(checkpoint.config.get("model_type"))
    found = runs_as(model_type)
    if found is None:
        raise ArchitectureError(
            f"{checkpoint.name} is a '{model_type}' model. headshare writes GGUF for {', '.join(ALIKE)} alone; for "
            f"others give the folder that headshare expand writes to {ENGINE}'s own converter."
        )
    if not checkpoint.predicts_next:
        raise ArchitectureError(
            f"{checkpoint.name} is a {checkpoint.model_class or 'bare model'}, which predicts no next token. Give a "
            "model that does."
        )
    config = checkpoint.layouts.config
    if config.get("hidden_act") not in ("silu", "swish"):
        raise ArchitectureError(
            f"neurons of {checkpoint.name} use {config.get('hidden_act')!r:.40}; {ENGINE}'s {found.name} has silu."
        )
    return found


def _fits(architecture: FileArchitecture, attention: Layout, layers: Sequence[FileLayer]) -> bool:
    """True if all layers are as this architecture has them."""
    place = attention.parts[Part.Q]
    width = layers[0].units.count * place.rows
    alike = len({each.counts for each in layers}) == 1
    return alike and not (architecture.square and width != place.shape[1])


def _layers(checkpoint: Checkpoint, attention: Layout, neurons: Layout, block: int) -> tuple[FileLayer, ...]:
    plan = checkpoint.plan or SharePlan()
    layers: list[FileLayer] = []
    for layer in range(attention.layers):
        units = Kept(_left(plan, Sublayer.ATTENTION, layer, attention.groups))
        cells = Kept(_left(plan, Sublayer.FFN, layer, neurons.groups))
        # what is left of a sublayer without units is its bias, which only a sublayer has a place for
        left = [_has_bias(checkpoint, attention, Part.O, layer), _has_bias(checkpoint, neurons, Part.DOWN, layer)]
        if not (units.groups or cells.groups or any(left)):
            continue
        if not units.groups and (left[0] or (FIRST_NEEDS_UNITS and not layers)):
            units = Kept((), zeros=1)
        # without neurons llama.cpp passes over the layer's attention too
        least = 0 if cells.groups else BLOCK
        cells = Kept(cells.groups, zeros=max(least, -len(cells.groups) % block))
        layers.append(FileLayer(layer, units, cells))
    return tuple(layers)


def _left(plan: SharePlan, kind: Sublayer, layer: int, groups: int) -> tuple[int, ...]:
    """The groups of a layer that no removal takes."""
    removed = set(chain.from_iterable(each.indices(layer) for each in plan.removals if each.layout.kind is kind))
    return tuple(group for group in range(groups) if group not in removed)


def _has_bias(checkpoint: Checkpoint, layout: Layout, part: Part, layer: int) -> bool:
    return bias_name(layout.parts[part].name(layer)) in checkpoint.tensors


def _check_biases(checkpoint: Checkpoint, architecture: FileArchitecture, layouts: Iterable[Layout]) -> None:
    """Refuse biases that the architecture has no place for.

    Raises:
        ArchitectureError: naming the first.
    """
    for layout in layouts:
        for part in layout.parts:
            if part not in architecture.biases and _has_bias(checkpoint, layout, part, 0):
                raise ArchitectureError(
                    f"{bias_name(layout.parts[part].name(0))} is a bias that {ENGINE}'s {architecture.name} has no "
                    "place for."
                )
