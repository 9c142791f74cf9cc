"""SliceGPT: hidden states cut to the principal directions of the text, between any two sublayers.

Ashkboos et al., "SliceGPT: compress large language models by deleting rows and columns", 2024. The projections are
found in the order of the model, each on hidden states that the ones before it have cut, as its code does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headshare.calibration.layerwise.observed import Batch, Stream
from headshare.calibration.refit.residuals import Adding, residual_of, watched
from headshare.errors import ArchitectureError, PlanError
from headshare.experiments.peers.matrices import Remade
from headshare.experiments.peers.peer import Bench, Peer, Stage
from headshare.plan.units import Part, Sublayer
from headshare.precision import full_float32
from headshare.sharing.size import parameter_infos

Square = Float[Tensor, "hidden hidden"]


@dataclass(frozen=True)
class SlicedWidth:
    """The sizes of a sliced model: bytes = quadratic x width^2 + linear x width + constant.

    Every matrix loses rows or columns, norms go into the matrices, and each sublayer gains a square matrix on the way
    past it. A tied embedding stays tied, behind one more square matrix before the head: kinder than the original, which
    stores it twice.
    """

    hidden: int
    quadratic: int
    linear: int
    constant: int

    @classmethod
    def of(cls, bench: Bench) -> "SlicedWidth":
        """The sizes of this model."""
        hidden = len(bench.matrices.outputs(Part.O))
        item = bench.sizes.item(Part.O)
        tied = bool(bench.dense.config.get("tie_word_embeddings"))
        linear = constant = 0
        for name, info in parameter_infos(bench.dense).items():
            if hidden not in info.shape:
                constant += info.nbytes
            elif len(info.shape) > 1 or name.endswith(".bias"):
                linear += info.nbytes // hidden
        return cls(hidden, item * (2 * bench.layers.count + tied), linear, constant)

    def bytes_at(self, width: int) -> int:
        """The bytes of a model of this width."""
        return self.quadratic * width * width + self.linear * width + self.constant

    def widest(self, within: int) -> int:
        """The largest width whose model takes no more bytes than these.

        Raises:
            PlanError: if there is none.
        """
        a, b, c = self.quadratic, self.linear, self.constant - within
        width = min(self.hidden, (-b + isqrt(max(0, b * b - 4 * a * c))) // (2 * a))
        while width > 0 and self.bytes_at(width) > within:
            width -= 1
        if width < 1:
            raise PlanError("a sliced model cannot save so many bytes. Ask for less.")
        return width


def slicegpt(bench: Bench, asked: int) -> Peer:
    """SliceGPT at this number of bytes: one width for all hidden states.

    Raises:
        ArchitectureError: if sublayers do not simply add to what they read, one after the other.
    """
    _check(bench)
    sizes = SlicedWidth.of(bench)
    width = sizes.widest(bench.sizes.whole - asked)
    saved = bench.sizes.whole - sizes.bytes_at(width)
    cut = Slicing(bench, width)
    note = f"hidden states {width} wide, two square matrices a layer added"
    saved = bench.sizes.check(saved, asked, "SliceGPT")
    return Peer(cut.make, saved, note, follows=True, enter=cut.enter, around=cut.around)


class Slicing:
    """The projections of a model, each found when the sublayer before it is made. `first` is that of the embedding."""

    def __init__(self, bench: Bench, width: int) -> None:
        self.bench = bench
        self.width = width
        self.first: Square | None = None

    @torch.no_grad()
    def enter(self, stream: Stream) -> Stream:
        """The hidden states that enter the first layer, cut."""
        size = self.bench.layers.batch(stream.shape[1])
        self.first = projection(iter(torch.split(stream, size)), self.width, centred=self._centred)
        for batch in torch.split(stream, size):
            batch.copy_(batch @ self.first)
        return stream

    @torch.no_grad()
    def make(self, stage: Stage) -> Remade:
        """A sublayer whose sum with what it is added to is cut."""
        assert stage.look is not None
        matrices = self.bench.matrices
        part = matrices.readout(stage.kind)
        slicing = projection(self._sums(stage), self.width, centred=self._centred)
        bias = matrices.bias(part, stage.layer)
        weight = slicing @ matrices.read(part, stage.layer)
        return Remade({part: weight}, {} if bias is None else {part: slicing @ bias}, slicing=slicing)

    def _sums(self, stage: Stage) -> Iterator[Batch]:
        """The hidden states behind a sublayer, before they are cut."""
        look = stage.look
        assert look is not None
        attention = look.layers.path(Part.O)
        for at in look.batches():
            entering = look.entering_own[at].to(look.layers.device)
            leaving, seen = look.layers.run(look.own, stage.layer, entering, (attention,))
            yield entering + seen.outputs[attention] if stage.kind is Sublayer.ATTENTION else leaving

    @property
    def _centred(self) -> bool:
        """Whether the model's norms subtract means: then the mean of a hidden state is none of its directions."""
        return any(type(module) is nn.LayerNorm for module in self.bench.layers.shell.modules[0].modules())

    def around(self, model: Any, first_layer: nn.Module) -> None:
        """Cut what enters the first layer of a stock model; its head reads through the same, if it is the embedding."""
        first = self.first
        assert first is not None

        def cut(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return ((args[0].float() @ first.to(args[0].device)).to(args[0]), *args[1:])

        # before the hook that notes what enters the layer
        first_layer.register_forward_pre_hook(cut, prepend=True)
        if self.bench.dense.config.get("tie_word_embeddings"):
            model.get_output_embeddings().register_forward_pre_hook(cut)


def projection(batches: Iterator[Batch], width: int, *, centred: bool = False) -> Square:
    """The projection to this many principal directions of hidden states; of a centred model, of their deviations."""
    gram: Tensor | None = None
    for batch in batches:
        rows = batch.flatten(0, -2).float()
        rows = rows[rows.isfinite().all(dim=1)]
        rows = rows - rows.mean(dim=1, keepdim=True) if centred else rows
        with full_float32():
            product = rows.T @ rows
        gram = product.double() if gram is None else gram + product
    assert gram is not None
    directions: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -width:]
    return (directions @ directions.T).float().cpu()


def _check(bench: Bench) -> None:
    """Refuse models whose layers do not add their attention before their feed-forward reads."""
    layers = bench.layers
    entered = layers.start(bench.calibration.tokens[:1]).to(layers.device)
    module = layers.build(0)
    left, seen = layers.run(module, 0, entered, watched(layers))
    residual = residual_of(layers, entered, left, seen)
    before = seen.inputs[layers.path(Part.UP)].clone()
    bench.matrices.put_into_layer(module, Sublayer.ATTENTION, Remade({}, gone=True))
    _, after = layers.run(module, 0, entered, watched(layers))
    parallel = bool((after.inputs[layers.path(Part.UP)] == before).all())
    if residual.adding is not Adding.PLAIN or residual.factor != 1 or parallel:
        raise ArchitectureError(
            "SliceGPT is rewritten for layers that add attention, then the feed-forward, as they are."
        )
