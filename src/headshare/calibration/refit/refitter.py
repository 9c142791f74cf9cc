"""The refit of a shared model, layer by layer, so that its hidden states follow the dense model's.

Two streams of hidden states are kept over the calibration tokens, the dense model's h_t and the shared model's h_s. At
each readout, with Z its inputs in the shared model, the target is Y = (h_t + out_t) - h_s: the output that would bring
the shared stream back to the dense one. Then both streams advance. Layers before the first tie stay as they are.

With a refinement, all weights of a layer then take gradient steps before the streams advance (`block_steps.py`); the
readouts are then fitted on the tokens that are not held out, so that those can say how many steps are best.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from headshare.calibration import processes
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Stream
from headshare.calibration.refit.columns import PlannedColumns
from headshare.calibration.refit.layer_fit import LayerFit, Streams
from headshare.calibration.refit.refinement import Refinement
from headshare.calibration.refit.result import Refit, RefitStep
from headshare.calibration.refit.rounded import round_layer
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CheckpointError, PlanError
from headshare.files.state_files import Workspace, key_of
from headshare.plan.plan import SharePlan
from headshare.precision import short_layers
from headshare.sharing.expanded import ExpandedTensors
from headshare.text.tokens import Calibration

HELD_OUT = 0.125


def text_written(
    dense: Checkpoint,
    calibration: Calibration,
    refinement: Refinement | None,
    device: str,
    workspace: Workspace | None = None,
) -> Calibration | None:
    """The text that the dense model writes for this refinement, going on from the calibration text.

    It is kept in the workspace. None if the refinement wants none, or the model predicts no next token.

    Raises:
        CalibrationError: if the model gives no finite numbers to write by.
    """
    if refinement is None or not refinement.written or not dense.predicts_next:
        return None
    windows = refinement.written * len(calibration.tokens)
    return processes.from_first(lambda: _kept_text(dense, calibration, windows, device, workspace))


def _kept_text(
    dense: Checkpoint, calibration: Calibration, windows: int, device: str, workspace: Workspace | None
) -> Calibration:
    """So many windows that the model writes, from the workspace if they are there."""
    name = f"written-{key_of(calibration.digest, calibration.seed, windows)}.safetensors"
    kept = None if workspace is None else workspace.read_tensors(name)
    if kept is not None and "tokens" in kept:
        return replace(calibration, tokens=kept["tokens"])
    written = calibration.continued(dense, windows, device=device)
    if workspace is not None:
        workspace.write_tensors(name, {"tokens": written.tokens})
    return written


class Refitter:
    """A refit in progress. Each turn of `advance` is one layer; `result` holds the new tensors so far.

    With `shared`, a checkpoint of this plan, the shared model is that one, trained or refitted as it may be, and its
    readouts are pulled to their values there. Without, it is the dense model shared by the plan. `written` is more
    text to fit to. `layers` are the dense checkpoint's, if they are there already.

    Raises:
        CheckpointError, ArchitectureError: if a model cannot be walked layer by layer.
        PlanError: if the plan is for another model, or not that of the shared checkpoint.
        CalibrationError: if the calibration has fewer than two windows.
    """

    def __init__(
        self,
        dense: Checkpoint,
        plan: SharePlan,
        calibration: Calibration,
        *,
        ffn: bool = True,
        refinement: Refinement | None = None,
        written: Calibration | None = None,
        device: str = "cpu",
        shared: Checkpoint | None = None,
        layers: Layers | None = None,
    ) -> None:
        dense.require_dense("refit it")
        if plan.copies:
            raise PlanError("the plan stores equal tensors once. That loses nothing, so nothing is refitted: leave it.")
        if shared is not None and shared.plan != plan:
            raise PlanError(f"{shared.name} was not shared by this plan. Give the plan in its config.json.")
        weights = ExpandedTensors.planned(dense, plan)  # which checks that the plan is for this model
        if shared is not None:
            weights = ExpandedTensors.of(shared)

        # Without a shared checkpoint both models are built from the dense one's layers.
        self.layers = layers or Layers(dense, device=device)
        self.shared_layers = self.layers if shared is None else Layers(shared, device=device)

        # The windows held out come last, so that the first `fitted` ones are those to fit to.
        # What the model has written is no measure of anything, so all of it is fitted to.
        fit, held = calibration.split(HELD_OUT)
        fitted_to = fit.tokens if written is None else torch.cat([fit.tokens, written.tokens])
        self.tokens, fitted = processes.divided(torch.cat([fitted_to, held.tokens]), len(fitted_to))

        # A plan that changes nothing has no first layer: then the walk ends without a fit.
        # Rounding to few bits changes all layers.
        first = 0 if plan.bits is not None and plan.bits.int4 else plan.first_layer()
        self.plan = plan
        self.first = self.layers.count if first is None else first
        self.next = 0
        self.result = Refit()
        self.columns = PlannedColumns(plan, weights, self.layers.device)
        self.layer_fit = LayerFit(
            self.layers,
            self.shared_layers,
            self.columns,
            self.result,
            fitted=fitted,
            ffn=ffn and self.layers.ffn is not None,
            refinement=refinement,
            seed=calibration.seed,
        )
        self._streams: Streams | None = None

    @torch.no_grad()
    def advance(self) -> Iterator[int]:
        """Walk the layers from the next on, and yield each as it is done."""
        for layer in range(self.next, self.layers.count):
            if self.first < self.layers.count:  # else there is nothing to make up for
                self._advance_over(layer, self._entering())
            self.next = layer + 1
            yield layer

    @torch.no_grad()
    def refitted(self, layer: int, entering: Stream) -> nn.Module:
        """The shared model's layer, refitted on the hidden states of `tokens` that enter it in the dense model.

        The stream is left as it is. Other layers that the plan changes do not count, and `advance` is not affected.
        """
        return self._fitted(layer, Streams(entering.clone(), entering.clone()))

    def state(self) -> dict[str, Stream]:
        """Copies of the streams that enter the next layer, `dense` and `shared`, for `resume`."""
        streams = self._entering()
        return {"dense": streams.dense.clone(), "shared": streams.shared.clone()}

    def resume(
        self, layer: int, streams: Mapping[str, Tensor], tensors: MutableMapping[str, Tensor], steps: list[RefitStep]
    ) -> None:
        """Go on at this layer in the place of a stopped refitter of the same arguments.

        `streams` is its `state`; `tensors` and `steps` are its result. `tensors` is taken over, and added to. The rest
        of the refit is the same bit for bit.

        Raises:
            CheckpointError: if the streams are not of this calibration.
        """
        for name in ("dense", "shared"):
            if name not in streams or streams[name].shape[:2] != self.tokens.shape:
                raise CheckpointError(
                    f"the refit to go on with has no stream '{name}' of these tokens. Start it again."
                )
        # Before the first layer that the plan changes a fresh share is the dense model: one stream serves both.
        same = self.shared_layers is self.layers and layer <= self.first
        dense = streams["dense"].clone()
        self._streams = Streams(dense, dense if same else streams["shared"].clone())
        self.next = layer
        self.result.tensors = tensors
        self.result.steps = list(steps)

    def _entering(self) -> Streams:
        """The streams that enter the next layer."""
        if self._streams is None:
            dense = self.layers.start(self.tokens)
            same = self.shared_layers is self.layers
            self._streams = Streams(dense, dense if same else self.shared_layers.start(self.tokens))
        return self._streams

    def _advance_over(self, layer: int, streams: Streams) -> None:
        """Fit a layer if the plan has something to make up for there, and take both streams over it."""
        # Layers before the first that the plan changes have nothing to make up for: they are run as they are, and once
        # where both models are the same there.
        if layer < self.first:
            self._run_over(self.layers, self.layers.build(layer), layer, streams.dense)
            if streams.shared is not streams.dense:
                self._run_over(self.shared_layers, self._built(layer), layer, streams.shared)
            return
        if streams.shared is streams.dense:
            streams.shared = streams.dense.clone()

        # The fit takes the dense stream over the layer. The shared one follows only when all of the layer is done,
        # so that the next layer is fitted to the output of the changed layers before it.
        module = self._fitted(layer, streams)
        if self.layer_fit.takes_steps:
            self.layer_fit.refine(layer, module, streams)
        round_layer(module, self.layers, layer, self.plan, readouts=True)
        self._run_over(self.shared_layers, module, layer, streams.shared)

    def _run_over(self, layers: Layers, module: nn.Module, layer: int, stream: Stream) -> None:
        with short_layers(layers.device):
            layers.run_over(module, layer, stream, self.layer_fit.batches(stream))

    def _fitted(self, layer: int, streams: Streams) -> nn.Module:
        """The shared model's layer with its readouts fitted. The dense stream advances over it, the shared does not."""
        shared = self._built(layer)
        self.layer_fit.fit(layer, self.layers.build(layer), shared, streams)
        return shared

    def _built(self, layer: int) -> nn.Module:
        """The shared model's layer, as it is before it is refitted."""
        if self.shared_layers is not self.layers:
            return self.shared_layers.build(layer)
        module = self.layers.build(layer, self.columns.changed(layer))
        round_layer(module, self.layers, layer, self.plan, readouts=False)
        return module
