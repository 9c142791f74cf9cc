"""FLAP: inputs of readouts that fluctuate least are removed, and their mean goes into a bias.

An et al., "Fluctuation-based adaptive structured pruning for large language models", 2024: the weighted input feature
variance, standardised within each layer and sublayer and ranked over the whole model (its "AL-AM").
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headshare.experiments.peers.matrices import Remade
from headshare.experiments.peers.peer import Bench, Peer, Stage
from headshare.plan.tensors import bias_name
from headshare.plan.units import Sublayer

Kept = dict[Sublayer, Bool[Tensor, "layers units"]]


def flap(bench: Bench, asked: int) -> Peer:
    """FLAP at this number of bytes. Attention goes by units of key/value heads, the feed-forward by neurons.

    The two biases that a layer gains are counted.
    """
    scores = {kind: _scores(bench, kind) for kind in Sublayer}
    kept, saved = _kept(bench, scores, asked)

    def make(stage: Stage) -> Remade:
        return _compensated(bench, stage, kept[stage.kind][stage.layer])

    removed = {kind: int((~mask).sum()) for kind, mask in kept.items()}
    words = f"{removed[Sublayer.ATTENTION]:,} attention units and {removed[Sublayer.FFN]:,} neurons removed"
    return Peer(make, bench.sizes.check(saved, asked, "FLAP"), f"{words}, two biases a layer added")


def fluctuation(
    gram: Float[Tensor, "inputs inputs"], mean: Float[Tensor, " inputs"], weight: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, " inputs"]:
    """The weighted input feature variance: var(x_i) |W_i|^2 for each input i of a readout (equation 5)."""
    variance = gram.diagonal().double() - mean.double().square()
    return variance.clamp(min=0) * weight.double().square().sum(dim=0)


def _scores(bench: Bench, kind: Sublayer) -> Float[Tensor, "layers units"]:
    """The standardised fluctuation of all units of a sublayer; that of attention is squared first, as published."""
    readout = bench.matrices.readout(kind)
    rows = []
    for layer in range(bench.layers.count):
        statistics = bench.statistics.of(layer)
        weight = bench.matrices.read(readout, layer)
        found = fluctuation(statistics.grams[readout], statistics.means[readout], weight)
        rows.append(found.square() if kind is Sublayer.ATTENTION else found)
    scores = torch.stack(rows)
    scores = (scores - scores.mean(dim=1, keepdim=True)) / scores.std(dim=1, keepdim=True)
    return scores if kind is Sublayer.FFN else scores[:, bench.matrices.unit_columns(kind)].mean(dim=2)


@dataclass(frozen=True)
class _Unit:
    score: float
    kind: Sublayer
    index: int


def _kept(bench: Bench, scores: dict[Sublayer, Tensor], asked: int) -> tuple[Kept, int]:
    """What stays, if the least of all units go until the bytes are saved; and the bytes saved."""
    sizes = {kind: bench.sizes.unit(kind) if kind is Sublayer.ATTENTION else _neuron(bench) for kind in Sublayer}
    units = [
        _Unit(score, kind, index)
        for kind, table in scores.items()
        for index, score in enumerate(table.flatten().tolist())
    ]
    kept = {kind: torch.ones_like(table, dtype=torch.bool) for kind, table in scores.items()}
    saved = -bench.layers.count * sum(_bias_bytes(bench, kind) for kind in Sublayer)
    for unit in sorted(units, key=lambda unit: unit.score):
        if saved >= asked:
            break
        kept[unit.kind].view(-1)[unit.index] = False
        saved += sizes[unit.kind]
    return kept, saved


def _neuron(bench: Bench) -> int:
    """Bytes of one neuron."""
    return bench.sizes.unit(Sublayer.FFN) // bench.matrices.inputs(bench.matrices.readout(Sublayer.FFN))


def _bias_bytes(bench: Bench, kind: Sublayer) -> int:
    """Bytes of a bias that this sublayer's readout gains; none where it has one."""
    readout = bench.matrices.readout(kind)
    has_one = bias_name(bench.layers.tensor(readout, 0)) in bench.dense.tensors
    return 0 if has_one else len(bench.matrices.outputs(readout)) * bench.sizes.item(readout)


def _compensated(bench: Bench, stage: Stage, units: Bool[Tensor, " units"]) -> Remade:
    """A sublayer without the units that go: what they give on average is added by the readout's bias (equation 6)."""
    readout = bench.matrices.readout(stage.kind)
    weight = bench.matrices.read(readout, stage.layer)
    kept = units
    if stage.kind is Sublayer.ATTENTION:
        kept = torch.zeros(weight.shape[1], dtype=torch.bool)
        kept[bench.matrices.unit_columns(stage.kind)[units].flatten()] = True
    bias = weight @ (stage.statistics.means[readout] * ~kept)
    own = bench.matrices.bias(readout, stage.layer)
    return Remade({readout: weight * kept}, {readout: bias if own is None else bias + own}, kept)
