"""The fits of one layer: its output projections in closed form, then all its weights by gradient steps."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headshare.calibration import processes
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Batch, Stream
from headshare.calibration.refit.columns import PlannedColumns
from headshare.calibration.refit.normal_equations import NormalEquations, token_weights
from headshare.calibration.refit.refinement import Refinement
from headshare.calibration.refit.regression import Fitted, LowRankColumns, assembled, fit_readout
from headshare.calibration.refit.residuals import Residual, residual_of, watched
from headshare.calibration.refit.result import Refit, RefitStep
from headshare.calibration.refit.steps.block_steps import BlockTarget, refine_block
from headshare.calibration.refit.steps.block_weights import BlockWeights
from headshare.calibration.refit.values import bases_of, in_directions, narrowed
from headshare.plan.low_rank import factor_names
from headshare.plan.narrow_values import NarrowValues
from headshare.plan.tensors import bias_name
from headshare.plan.ties import scale_name
from headshare.plan.units import Part
from headshare.precision import short_layers
from headshare.sharing.factors import join_columns, split_columns


@dataclass
class Streams:
    """The hidden states that enter the next layer in each model.

    They are one tensor as long as the two models are the same.
    """

    dense: Stream
    shared: Stream


@dataclass
class LayerFit:
    """The fits of one layer after another. New weights are put into the built layer as they will be stored.

    All new tensors and steps are added to the `result` of the first process, which solves for all.
    `layers` are the dense model's. `shared_layers` are those of the shared checkpoint, or the same where there is none
    yet. The first `fitted` windows of the streams are fitted to, the others are held out. With `ffn`, W_down is
    fitted too. The fits are followed by the `refinement`, if there is one, on windows drawn by the `seed`.
    """

    layers: Layers
    shared_layers: Layers
    columns: PlannedColumns
    result: Refit
    fitted: int
    ffn: bool
    refinement: Refinement | None
    seed: int

    @property
    def takes_steps(self) -> bool:
        """True if gradient steps on each layer follow the closed form."""
        return self.refinement is not None and self.refinement.steps > 0

    def batches(self, stream: Stream) -> Iterator[slice]:
        """Windows that are run together; none holds both fitted and held-out ones."""
        windows, window, _ = stream.shape
        for part in (range(self.fitted), range(self.fitted, windows)):
            yield from self.layers.batches(part, window)

    def fit(self, layer: int, dense: nn.Module, shared: nn.Module, streams: Streams) -> None:
        """Fit the output projections of the shared model's built layer.

        The dense stream advances over the dense model's layer, the shared one does not.
        """
        residual, target = self._fit_attention(layer, dense, shared, streams)
        if target is not None and not self._is_absent(layer, Part.DOWN, shared):
            self._fit_feed_forward(layer, shared, streams, residual, target)

    def _is_absent(self, layer: int, part: Part, shared: nn.Module) -> bool:
        """True if nothing is left of this readout, which then gives zeros whatever enters the layer."""
        weight, bias = self._readout(shared, part)
        return self.columns.nothing_to_fit(self.layers.tensor(part, layer), weight.shape[1] + (bias is not None))

    def _fit_attention(
        self, layer: int, dense: nn.Module, shared: nn.Module, streams: Streams
    ) -> tuple[Residual, Stream | None]:
        """Fit W_o and advance the dense stream. Returns how the layer adds, and where W_down should bring the shared
        stream to, if it is fitted too."""
        path = self.layers.path(Part.O)
        sums = None if self._is_absent(layer, Part.O, shared) else self._sums(shared, Part.O)
        target = torch.empty_like(streams.dense) if self.ffn else None
        residual: Residual | None = None
        for at in self.batches(streams.dense):
            entered = streams.dense[at].to(self.layers.device)
            own = streams.shared[at].to(self.layers.device)

            # The dense layer runs once: it shows what W_o gave, and how the layer adds that to what entered.
            residual = residual or self._residual(layer, dense, entered)
            with short_layers(self.layers.device):
                left, seen = self.layers.run(dense, layer, entered, watched(self.layers))

            # The shared layer runs up to W_o, on its own stream: neither fit changes what enters there.
            if sums is not None:
                with short_layers(self.layers.device):
                    inputs = self.shared_layers.run_to(shared, layer, own, path).inputs[path]
                carried = residual.carried(entered, seen)
                weights = token_weights(entered if carried is None else carried)
                sums[at.start >= self.fitted].add(inputs, residual.wanted_of_o(entered, own, seen), weights)

            # All that W_down needs of the dense layer is noted now, so that the stream can go on in place.
            if target is not None:
                target[at] = residual.target(entered, seen).cpu()
            streams.dense[at] = left.cpu()  # what entered may be a view of it
        if sums is not None:
            sums = _everywhere(sums)
            values = self._fresh_values(layer)
            if processes.is_first():
                if values is not None:
                    sums = self._turn_values(layer, values, shared, sums)
                self._solve(layer, Part.O, shared, sums, turned=values is not None)
            self._follow_first(shared, Part.O, *([] if values is None else [Part.V]))
        assert residual is not None
        return residual, target

    def _residual(self, layer: int, dense: nn.Module, entered: Batch) -> Residual:
        """The way in which the dense layer adds its outputs, seen on one window in full precision."""
        first = entered[:1]
        left, seen = self.layers.run(dense, layer, first, watched(self.layers))
        return residual_of(self.layers, first, left, seen)

    def _fresh_values(self, layer: int) -> NarrowValues | None:
        """The plan's narrow values if this layer has some, and no shared checkpoint says yet what they are."""
        values = self.columns.plan.narrow_values
        fresh = self.shared_layers is self.layers
        return values if values is not None and fresh and layer in values.widths else None

    def _turn_values(
        self, layer: int, values: NarrowValues, shared: nn.Module, sums: tuple[NormalEquations, NormalEquations]
    ) -> tuple[NormalEquations, NormalEquations]:
        """Put the values of the built layer, which are the dense model's, into the directions that are kept.

        They are added to the result, and W_o reads them. Returns the sums for it.
        """
        fit, held = sums
        weight, _ = self._readout(shared, Part.O)
        bases = bases_of(fit, weight, values)
        weight.copy_(bases.of_readers(weight))
        made = shared.get_submodule(self.layers.path(Part.V))
        name = values.places(layer).v
        for key, numbers in ((name, made.weight), (bias_name(name), getattr(made, "bias", None))):
            if isinstance(numbers, Tensor):
                rounded = narrowed(numbers, bases, values.widths[layer]).to(self.columns.dtype(key))
                numbers.copy_(rounded)
                self.result.tensors[key] = rounded.cpu()
        return in_directions(fit, bases), in_directions(held, bases)

    def _fit_feed_forward(
        self, layer: int, shared: nn.Module, streams: Streams, residual: Residual, target: Stream
    ) -> None:
        """Fit W_down, once W_o is. The dense stream has advanced over the layer, the shared one has not."""
        path = self.layers.path(Part.DOWN)
        sums = self._sums(shared, Part.DOWN)
        before = tuple(seen_path for seen_path in watched(self.layers) if seen_path != path)
        for at in self.batches(streams.shared):
            own = streams.shared[at].to(self.layers.device)
            with short_layers(self.layers.device):
                seen = self.shared_layers.run_to(shared, layer, own, path, before)
            wanted = residual.wanted_of_down(target[at].to(self.layers.device), own, seen)
            weights = token_weights(streams.dense[at].to(self.layers.device))
            sums[at.start >= self.fitted].add(seen.inputs[path], wanted, weights)
        sums = _everywhere(sums)
        if processes.is_first():
            self._solve(layer, Part.DOWN, shared, sums)
        self._follow_first(shared, Part.DOWN)

    def _follow_first(self, shared: nn.Module, *parts: Part) -> None:
        """Put what the first process has solved for into the layer of every process."""
        for part in parts:
            processes.copied(*shared.get_submodule(self.layers.path(part)).parameters())

    def _sums(self, module: nn.Module, part: Part) -> tuple[NormalEquations, NormalEquations]:
        """Empty sums for this readout: of fitted and of held-out tokens."""
        weight, bias = self._readout(module, part)
        outputs, inputs = weight.shape
        fit, held = (NormalEquations(inputs, outputs, bias is not None, self.layers.device) for _ in range(2))
        return fit, held

    def _readout(
        self, module: nn.Module, part: Part
    ) -> tuple[Float[Tensor, "outputs inputs"], Float[Tensor, " outputs"] | None]:
        """The weight and the bias of a built layer's readout, to be looked at or copied to."""
        projection = module.get_submodule(self.layers.path(part))
        weight, bias = projection.weight, getattr(projection, "bias", None)
        assert isinstance(weight, Tensor)
        return (weight.T if self.layers.in_out else weight), bias

    def _solve(
        self,
        layer: int,
        part: Part,
        shared: nn.Module,
        sums: tuple[NormalEquations, NormalEquations],
        *,
        turned: bool = False,
    ) -> None:
        """Fit the readout, put it into the shared layer as it will be stored, and keep it.

        It is new though nothing is fitted if its inputs have `turned`.
        """
        name = self.layers.tensor(part, layer)
        weight, bias = self._readout(shared, part)
        start = weight.double() if bias is None else torch.cat([weight, bias[:, None]], dim=1).double()
        free = self.columns.free(name, start.shape[1])
        lent = self.columns.lent(name, self.result.tensors)
        narrow = self.columns.narrow(name)

        # Columns are pulled to what they were. Only where a fresh tie has just put another layer's features before
        # them they are pulled to zero: what they were was for other features.
        prior = start.clone()
        if self.shared_layers is self.layers:
            prior[:, self.columns.foreign(layer, part, weight.shape[1])] = 0
        dtype = self.columns.dtype(name)
        fitted = fit_readout(
            *sums,
            start,
            free,
            lent,
            narrow,
            prior=prior,
            largest=torch.finfo(dtype).max,
            all_tokens=self.refinement is None or not self.refinement.takes_steps,  # or some are there to choose by
        )

        # Lent columns may be new though no ridge did better: the donor may have been refitted. The layer goes on with
        # products of rounded numbers, since those are what a loaded model multiplies with.
        if lent or turned or not fitted.why_kept:
            scales = fitted.scales.to(dtype)
            exact = assembled(fitted.weight.to(dtype).double(), free, lent, scales.double())
            for unit, product in zip(narrow, self._kept_factors(name, fitted, narrow), strict=True):
                exact[:, unit.columns] = product
            self._keep(name, exact, scales, weight, bias)
        self.result.steps.append(_step(name, fitted, sum(equations.left_out for equations in sums)))

    def _kept_factors(
        self, name: str, fitted: Fitted, narrow: tuple[LowRankColumns, ...]
    ) -> list[Float[Tensor, "outputs inputs"]]:
        """Add the factors of a readout's low-rank units to the result. Returns their products as they are stored."""
        dtype = self.columns.dtype(name)
        split = [split_columns(fitted.weight[:, unit.columns], unit.rank) for unit in narrow]
        rounded = [(factor_in.to(dtype), factor_out.to(dtype)) for factor_in, factor_out in split]
        if narrow:
            inner, outer = factor_names(name)
            self.result.tensors[inner] = torch.cat([factor_in for factor_in, _ in rounded]).cpu()
            self.result.tensors[outer] = torch.cat([factor_out for _, factor_out in rounded], dim=1).cpu()
        return [join_columns(factor_in.double(), factor_out.double()) for factor_in, factor_out in rounded]

    def _keep(
        self,
        name: str,
        exact: Float[Tensor, "outputs inputs"],
        scales: Float[Tensor, " scaled"],
        weight: Float[Tensor, "outputs inner"],
        bias: Float[Tensor, " outputs"] | None,
    ) -> None:
        """Add a readout to the result, and copy it to the built layer's weight and bias.

        `exact` holds the numbers that are stored, times the scales, and the bias last. A layer computes with these
        products, a file rounds them.
        """
        whole = exact if bias is None else exact[:, :-1]
        weight.copy_(whole)
        oriented = whole.T if self.layers.in_out else whole
        stored = {name: oriented.to(self.columns.dtype(name)).contiguous()}
        if bias is not None:
            stored[bias_name(name)] = exact[:, -1].to(self.columns.dtype(bias_name(name)))
            bias.copy_(stored[bias_name(name)])
        if scales.numel():
            stored[scale_name(name)] = scales
        self.result.tensors.update({key: value.cpu() for key, value in stored.items()})

    # ---- gradient steps

    def refine(self, layer: int, module: nn.Module, streams: Streams) -> None:
        """Change all weights of the shared model's built layer by gradient steps, and keep them in the result.

        The layer has the weights as they will be stored. The dense stream has advanced over the layer, the shared one
        has not.
        """
        assert self.refinement is not None
        block = BlockWeights.of(self.shared_layers, layer, module, self.columns, ffn=self.ffn)
        target = BlockTarget(streams.shared, streams.dense, self.fitted)
        with block.narrowed() as (weights, own):
            best = refine_block(
                self.shared_layers, layer, module, target, weights, own, self.refinement, seed=self.seed
            )
        if best.step:
            put = block.put(best.weights)
            self.result.tensors.update(put if processes.is_first() else {})
        base = self.layers.tensor(Part.O, layer).removesuffix(f".{self.layers.path(Part.O)}.weight")
        note = f"{self.refinement.steps} gradient steps, {best.in_words()}"
        self.result.steps.append(RefitStep(base, None, best.error_before, best.error_after, note))


def _everywhere(sums: tuple[NormalEquations, NormalEquations]) -> tuple[NormalEquations, NormalEquations]:
    """The sums over the tokens of all processes."""
    fit, held = sums
    return fit.everywhere(), held.everywhere()


def _step(name: str, fitted: Fitted, left_out: int) -> RefitStep:
    """The record of the fit of one readout."""
    notes = [fitted.why_kept] if fitted.why_kept else []
    if left_out:
        notes.append(f"{left_out} tokens whose numbers are not finite were left out")
    ridge = None if fitted.why_kept else fitted.ridge
    return RefitStep(name, ridge, fitted.error_before, fitted.error_after, "; ".join(notes))
