"""The walk over a model that a peer makes sublayer by sublayer, with the refit of what it leaves.

Two streams of hidden states are kept, as in the refit of a shared model: the dense model's, and that of the model made
so far. At each readout the refit brings the second back to the first, by ridge regression on the inputs that the peer
has left, towards the peer's own readout. Where the readout is stored at a rank, the fitted one is cut to that rank
again, in the metric of its inputs.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Batch, Stream
from headshare.calibration.refit.normal_equations import NormalEquations, token_weights
from headshare.calibration.refit.refitter import HELD_OUT
from headshare.calibration.refit.regression import fit_readout
from headshare.calibration.refit.residuals import Residual, residual_of, watched
from headshare.experiments.peers.matrices import Remade
from headshare.experiments.peers.peer import Bench, Look, Peer, Stage
from headshare.experiments.peers.slicing import sliced
from headshare.experiments.peers.svd import root_of, truncated
from headshare.plan.units import Part, Sublayer
from headshare.precision import full_float32, short_products
from headshare.progress import track

Made = tuple[int, Sublayer, Remade]


def made_by(bench: Bench, peer: Peer, *, refit: bool) -> Iterator[Made]:
    """The sublayers that a peer makes, in the order of the model, each with its readout fitted if asked for.

    Raises:
        CalibrationError: if the text has fewer than two windows, and a refit is asked for.
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
    """
    if refit or peer.follows:
        yield from Walk(bench, peer, refit=refit).over()
        return
    count = bench.layers.count
    for layer in track(range(count), "layers", count):
        for kind in Sublayer:
            yield layer, kind, peer.make(Stage(bench, layer, kind))


class Walk:
    """A walk in progress: both streams, and what is fitted to them. The windows held out come last."""

    def __init__(self, bench: Bench, peer: Peer, *, refit: bool) -> None:
        self.bench = bench
        self.peer = peer
        self.refit = refit
        self.layers: Layers = bench.layers
        fit, held = bench.calibration.split(HELD_OUT)
        self.fitted = len(fit.tokens)
        self.dense = self.layers.start(torch.cat([fit.tokens, held.tokens]))
        self.own = self.dense.clone() if peer.enter is None else peer.enter(self.dense.clone())

    @torch.no_grad()
    def over(self) -> Iterator[Made]:
        """Walk over all layers."""
        for layer in track(range(self.layers.count), "layers", self.layers.count):
            look = Look(
                self.layers,
                self.bench.matrices,
                layer,
                self.layers.build(layer),
                self.layers.build(layer),
                self.dense,
                self.own,
            )
            with self._products():
                yield from self._over_layer(look)

    def _over_layer(self, look: Look) -> Iterator[Made]:
        attention = self.peer.make(Stage(self.bench, look.layer, Sublayer.ATTENTION, look))
        look.put(Sublayer.ATTENTION, attention)
        with sliced(look, {Sublayer.ATTENTION: attention}):
            # the dense layer runs once: it shows how the layer adds, and what its readouts should bring about
            residual, leaving, target, attention = self._over_dense(look, attention)
        yield look.layer, Sublayer.ATTENTION, attention

        with sliced(look, {Sublayer.ATTENTION: attention}):
            ffn = self.peer.make(Stage(self.bench, look.layer, Sublayer.FFN, look))
        look.put(Sublayer.FFN, ffn)
        with sliced(look, {Sublayer.ATTENTION: attention, Sublayer.FFN: ffn}):
            if self._fits(ffn):
                ffn = self._fit_ffn(look, ffn, residual, leaving, target)
            yield look.layer, Sublayer.FFN, ffn
            self.layers.run_over(look.own, look.layer, self.own)
        self.dense = leaving

    def _fits(self, remade: Remade) -> bool:
        return self.refit and not remade.gone and (remade.kept is None or bool(remade.kept.any()))

    def _products(self) -> AbstractContextManager[None]:
        """Products as short as a model is stored: a model of bfloat16 numbers is run with bfloat16 products."""
        short = self.bench.matrices.dtype(Part.O) is torch.bfloat16
        return short_products() if short else full_float32()

    # ---- attention

    def _over_dense(self, look: Look, attention: Remade) -> tuple[Residual, Stream, Stream, Remade]:
        """Run the dense layer, and fit W_o if it is to be.

        Returns how the layer adds, the dense stream that leaves it, the target of the sum that its feed-forward ends,
        and the attention as it is then.
        """
        path = self.layers.path(Part.O)
        sums = self._sums(look.own, Part.O)
        fits = self._fits(attention)
        leaving, target = torch.empty_like(self.dense), torch.empty_like(self.dense)
        residual: Residual | None = None
        for at in self._batches():
            entered = self.dense[at].to(self.layers.device)
            own = self.own[at].to(self.layers.device)
            left, seen = self.layers.run(look.dense, look.layer, entered, watched(self.layers))
            residual = residual or residual_of(self.layers, entered, left, seen)
            if fits:
                inputs = self.layers.run_to(look.own, look.layer, own, path).inputs[path]
                carried = residual.carried(entered, seen)
                weights = token_weights(entered if carried is None else carried)
                wanted = residual.wanted_of_o(entered, own, seen)
                sums[at.start >= self.fitted].add(inputs, _within(wanted, own, attention, residual), weights)
            target[at] = residual.target(entered, seen).cpu()
            leaving[at] = left.cpu()
        assert residual is not None
        if fits:
            attention = self._solved(look, Sublayer.ATTENTION, attention, sums)
        return residual, leaving, target, attention

    # ---- feed-forward

    def _fit_ffn(self, look: Look, ffn: Remade, residual: Residual, leaving: Stream, target: Stream) -> Remade:
        """Fit W_down, once the attention is fitted."""
        path = self.layers.path(Part.DOWN)
        sums = self._sums(look.own, Part.DOWN)
        before = tuple(seen_path for seen_path in watched(self.layers) if seen_path != path)
        for at in self._batches():
            own = self.own[at].to(self.layers.device)
            seen = self.layers.run_to(look.own, look.layer, own, path, before)
            wanted = residual.wanted_of_down(target[at].to(self.layers.device), own, seen)
            carried = residual.carried(own, seen)
            weights = token_weights(leaving[at].to(self.layers.device))
            wanted = wanted if carried is None else _within(wanted, carried, ffn, residual)
            sums[at.start >= self.fitted].add(seen.inputs[path], wanted, weights)
        return self._solved(look, Sublayer.FFN, ffn, sums)

    # ---- both

    def _batches(self) -> Iterator[slice]:
        """Windows that are run together; none holds both fitted and held-out ones."""
        windows, window, _ = self.own.shape
        for part in (range(self.fitted), range(self.fitted, windows)):
            yield from self.layers.batches(part, window)

    def _sums(self, module: nn.Module, part: Part) -> tuple[NormalEquations, NormalEquations]:
        """Empty sums for this readout: of fitted and of held-out tokens."""
        outputs, inputs = len(self.bench.matrices.outputs(part)), self.bench.matrices.inputs(part)
        has_bias = getattr(module.get_submodule(self.layers.path(part)), "bias", None) is not None
        fit, held = (NormalEquations(inputs, outputs, has_bias, self.layers.device) for _ in range(2))
        return fit, held

    def _solved(
        self, look: Look, kind: Sublayer, remade: Remade, sums: tuple[NormalEquations, NormalEquations]
    ) -> Remade:
        """The sublayer with its readout fitted, which is put into the peer's layer."""
        part = self.bench.matrices.readout(kind)
        module = look.own.get_submodule(self.layers.path(part))
        start = _readout(module, in_out=self.layers.in_out).double()
        width = self.bench.matrices.inputs(part)
        kept = torch.ones(width, dtype=torch.bool) if remade.kept is None else remade.kept
        bias = start.shape[1] > width
        free = torch.cat([kept, torch.ones(int(bias), dtype=torch.bool)]).nonzero().flatten().to(start.device)
        fitted = fit_readout(*sums, start, free)
        if fitted.why_kept:
            return remade
        weight = fitted.weight[:, :width].float()
        if remade.rank is not None:
            gram = (sums[0] + sums[1]).gram[:width, :width]
            weight = truncated(weight, root_of(gram), remade.rank)
        done = replace(
            remade,
            weights={**remade.weights, part: weight.cpu()},
            biases={**remade.biases, part: fitted.weight[:, -1].float().cpu()} if bias else remade.biases,
        )
        look.put(kind, done)
        return done


def _readout(module: nn.Module, *, in_out: bool) -> Float[Tensor, "outputs inputs"]:
    """A built layer's readout as a matrix, its bias as the last column if it has one."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    whole = weight.T if in_out else weight
    return whole if bias is None else torch.cat([whole, bias[:, None]], dim=1)


def _within(wanted: Batch, carried: Batch, remade: Remade, residual: Residual) -> Batch:
    """The target of a readout whose sum with `carried` is projected: what is left to it there."""
    if remade.slicing is None:
        return wanted
    slicing = remade.slicing.to(wanted)
    return (wanted + carried / residual.factor) @ slicing - (carried @ slicing) / residual.factor
