"""Whole layers removed: those of least block influence (ShortGPT), or a run of them with a linear map (ReplaceMe)."""

import torch
from jaxtyping import Float
from torch import Tensor

from headshare.calibration.layerwise.observed import Batch, Seen
from headshare.calibration.refit.residuals import Residual, residual_of, watched
from headshare.errors import ArchitectureError, PlanError
from headshare.experiments.peers.matrices import Remade
from headshare.experiments.peers.peer import Bench, Peer, Stage
from headshare.plan.units import Part, Sublayer
from headshare.precision import full_float32
from headshare.progress import track

CHUNK = 4096  # tokens


def shortgpt(bench: Bench, asked: int) -> Peer:
    """The layers of least block influence removed (Men et al., "ShortGPT: layers in large language models are more
    redundant than you expect", 2024).

    Raises:
        ArchitectureError: if a layer without its sublayers would still change its hidden states.
    """
    _check(bench)
    influences = bench.statistics.influences()
    order = sorted(range(len(influences)), key=influences.__getitem__)
    gone: list[int] = []
    while sum(map(bench.sizes.layer, gone)) < asked:
        if len(gone) + 1 >= len(order):
            raise PlanError("a model without layers is none. Ask for less.")
        gone.append(order[len(gone)])
    return _without(bench, sorted(gone))


def _without(bench: Bench, gone: list[int]) -> Peer:
    def make(stage: Stage) -> Remade:
        return Remade({}, gone=stage.layer in gone)

    return Peer(make, sum(map(bench.sizes.layer, gone)), f"without layers {', '.join(map(str, gone))}")


def _check(bench: Bench) -> None:
    if bench.layers.post_norm:
        raise ArchitectureError(
            "a layer that ends in a norm cannot be left out by its output projections alone; this method is for "
            "models whose layers add to what enters them."
        )


def replaceme(bench: Bench, asked: int) -> Peer:
    """A run of layers removed, and a linear map for them merged into W_down of the layer before (Shopkhoev et al.,
    "ReplaceMe: network simplification via depth pruning and transformer block linearization", 2025, least squares).

    The run is the one whose ends are the most alike: the least mean of 1 - cos over tokens (here over a sample).

    Raises:
        ArchitectureError: as `shortgpt` does.
    """
    _check(bench)
    count = bench.layers.count
    length = next((n for n in range(1, count - 1) if n * bench.sizes.layer(0) >= asked), None)
    if length is None:
        raise PlanError("a model without layers is none. Ask for less.")
    ends = [bench.statistics.of(layer).entering for layer in range(count)]
    # entering layer s is what enters the run, leaving layer s + length - 1 is what leaves it; one layer stands before
    starts = range(1, count - length)
    first = min(starts, key=lambda start: float((1 - (ends[start] * ends[start + length]).sum(dim=-1)).mean()))
    run = range(first, first + length)
    mapped = _mapped(bench, run)

    def make(stage: Stage) -> Remade:
        if stage.layer == first - 1 and stage.kind is Sublayer.FFN:
            return mapped
        return Remade({}, gone=stage.layer in run)

    saved = sum(map(bench.sizes.layer, run))
    note = f"layers {run.start} to {run.stop - 1} become a linear map in W_down of layer {first - 1}"
    return Peer(make, bench.sizes.check(saved, asked, "ReplaceMe"), note)


@torch.no_grad()
def _mapped(bench: Bench, run: range) -> Remade:
    """W_down of the layer before the run, times the map T that minimises |M T + Y - X| over the tokens.

    M is that W_down's output, Y what it is added to, and X what leaves the run.
    """
    layers = bench.layers
    stream = layers.start(bench.calibration.tokens)
    before = run.start - 1
    outputs, carried = torch.empty_like(stream), torch.empty_like(stream)
    factor = 1.0
    for layer in track(range(run.stop), "layers before the map", run.stop):
        module = layers.build(layer)
        for at in layers.batches(range(len(stream)), stream.shape[1]):
            entered = stream[at].to(layers.device)
            left, seen = layers.run(module, layer, entered, watched(layers) if layer == before else ())
            if layer == before:
                residual = residual_of(layers, entered, left, seen)
                outputs[at] = seen.outputs[layers.path(Part.DOWN)].cpu()
                carried[at] = _carried(residual, entered, seen).cpu()
                factor = residual.factor
            stream[at] = left.cpu()
    transform = linear_map(outputs.flatten(0, 1), (stream - carried).flatten(0, 1) / factor).T.float()
    weight = bench.matrices.read(Part.DOWN, before)
    bias = bench.matrices.bias(Part.DOWN, before)
    return Remade({Part.DOWN: transform @ weight}, {} if bias is None else {Part.DOWN: transform @ bias})


def _carried(residual: Residual, entered: Batch, seen: Seen) -> Batch:
    carried = residual.carried(entered, seen)
    if carried is None:
        raise ArchitectureError("a linear map cannot be merged into W_down where a norm follows it.")
    return carried


def linear_map(
    inputs: Float[Tensor, "tokens hidden"], outputs: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "hidden hidden"]:
    """The map T that minimises |inputs T - outputs|, by the normal equations in float64; tokens in chunks."""
    size = inputs.shape[1]
    gram, cross = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    for rows, wanted in zip(torch.split(inputs, CHUNK), torch.split(outputs, CHUNK), strict=True):
        with full_float32():
            gram += rows.T @ rows
            cross += rows.T @ wanted
    solution: Tensor = torch.linalg.lstsq(gram, cross, driver="gelsd").solution
    return solution
