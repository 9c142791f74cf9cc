"""A model's layers, one in memory at a time, so that calibration can walk models larger than memory.

A *stream* is the hidden states of all calibration windows as they enter one layer. Chooses nothing and solves nothing.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headshare.architecture.families import FAMILIES
from headshare.calibration.layerwise.observed import Batch, ReachedError, Seen, Stream, watching
from headshare.calibration.layerwise.shell import Shell, on_device
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import ArchitectureError, CheckpointError, EvaluationError
from headshare.integrations.transformers.loading import quiet, running
from headshare.plan.layout import Place
from headshare.plan.units import Part
from headshare.precision import full_float32
from headshare.sharing.expanded import ExpandedTensors

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class _Call:
    """The model's call of one layer: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Layers:
    """The layers of a checkpoint's model, dense or shared. Layers of a shared model are built expanded.

    `start` makes the stream that enters layer 0, `build` makes a layer, `run` runs it on some of the stream's windows.
    Arithmetic is float32, whatever the weights are stored as; the layers are called as the model calls them for
    windows that are all tokens, with no padding. A model that is not stored as it is built (a mixture of experts) is
    held whole in memory. With `head`, `logits` ends the walk.

    Attributes: `count` of layers; `attention` and `ffn`, their layouts (`ffn` None for experts); `post_norm`, true if
    each sublayer ends in a norm of its output plus its input; `device`; `shell`, the model around the layers.

    Raises:
        ArchitectureError: if the model's layout is not known.
        CheckpointError: if the model's code is remote, its weights are not all there, or it is shared and does not hold
            what its plan says.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str | torch.device = "cpu", head: bool = False) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        weights = ExpandedTensors.of(checkpoint)
        self.attention = checkpoint.layouts.attention
        self.ffn = checkpoint.layouts.ffn  # experts have no one W_down to refit
        self.count = self.attention.layers
        self.shell = Shell(checkpoint, weights, self.attention, self.device, head=head)
        o_path = self.path(Part.O)
        self.post_norm = any(family.post_norm and family.o == o_path for family in FAMILIES)
        self._calls: dict[tuple[int, int], list[_Call]] = {}
        self._tuples: bool | None = None

    # ---- names

    @property
    def in_out(self) -> bool:
        """True if weights are stored as (input, output), as GPT-2's Conv1D does."""
        return self.attention.parts[Part.O].axis == 0

    def path(self, part: Part) -> str:
        """The path, within a layer, of the module that holds this part.

        Raises:
            ArchitectureError: if the layer has no such module.
        """
        return self._place(part).name(0).removeprefix(self.shell.prefix(0)).removesuffix(".weight")

    def tensor(self, part: Part, layer: int) -> str:
        """The name in the checkpoint of the weight that holds this part in this layer.

        Raises:
            ArchitectureError: if the layer has no such part.
        """
        return self._place(part).name(layer)

    def _place(self, part: Part) -> Place:
        layout = self.attention if part in self.attention.parts else self.ffn
        if layout is None or part not in layout.parts:
            raise ArchitectureError(f"this model's layers have no part {part}.")
        return layout.parts[part]

    def tensors_of(self, layer: int, *, ffn: bool = True) -> dict[str, str]:
        """The paths of modules by the names of their weights: those of this layer's attention and of its feed-forward.

        The feed-forward is left out without `ffn`, and for experts. Fused parts have one entry.
        """
        layouts = [layout for layout in (self.attention, self.ffn if ffn else None) if layout is not None]
        return {self.tensor(part, layer): self.path(part) for layout in layouts for part in layout.parts}

    def vectors_of(self, layer: int) -> dict[str, str]:
        """The paths, within this layer, of its norms and biases by their names in the checkpoint."""
        prefix = self.shell.prefix(layer)
        named = self.checkpoint.layouts.vectors(layer)
        paths = (path for path, _ in self.shell.modules[layer].named_parameters())
        stored = {self.shell.stored_name(prefix + path): path for path in paths}
        return {name: path for name, path in stored.items() if name in named}

    def build(self, layer: int, replaced: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Build this layer with its weights, in float32 and memory of its own.

        `replaced` holds tensors that are used instead of the checkpoint's, by their names in the checkpoint.

        Raises:
            CheckpointError: if a tensor of the layer has another shape than the model needs, or cannot be read.
        """
        module = copy.deepcopy(self.shell.modules[layer])
        state = {}
        for name, parameter in module.state_dict(keep_vars=True).items():
            stored = self.shell.stored_name(self.shell.prefix(layer) + name)
            if replaced and stored in replaced:
                value = replaced[stored].clone()
            else:
                value = parameter.detach() if self.shell.held else self.shell.weights.read(stored)
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{stored} has shape {tuple(value.shape)}; the model needs {tuple(parameter.shape)}."
                )
            state[name] = on_device(self.device, value)
        module.load_state_dict(state, assign=True)
        return module.to(self.device).eval().requires_grad_(False)

    # ---- walking

    def batch(self, window: int, tokens: int | None = None) -> int:
        """The number of windows of this many tokens that are run at once: those that `tokens` fill, if it is given."""
        return max(1, (tokens or BATCH_TOKENS) // window)

    def batches(self, windows: range, window: int, tokens: int | None = None) -> Iterator[slice]:
        """Slices of these windows, of so many tokens each, that are run at once, as `batch` counts them."""
        size = self.batch(window, tokens)
        return (slice(at, min(at + size, windows.stop)) for at in windows[::size])

    @torch.no_grad()
    def start(self, tokens: Int[Tensor, "windows window"]) -> Stream:
        """The stream that enters layer 0, in float32 on the CPU; there may be no windows.

        Raises:
            CheckpointError: if a weight is missing that the model needs before its layers.
        """
        if not len(tokens):
            return self._enter(torch.ones(1, tokens.shape[1], dtype=torch.long))[:0].cpu()
        return torch.cat([self._enter(tokens[at]).cpu() for at in self.batches(range(len(tokens)), tokens.shape[1])])

    @torch.no_grad()
    def _enter(self, tokens: Int[Tensor, "batch window"]) -> Batch:
        """The hidden states that enter layer 0 for these tokens.

        The calls of all layers are kept, for batches of this shape.
        """
        with self._recorded() as (entered, calls), full_float32():  # what layers are called with serves all their runs
            try:
                with suppress(ReachedError), quiet(), running():
                    self.shell.model(input_ids=tokens.to(self.device))
            except EvaluationError as error:
                if not self.shell.lacking():
                    raise
                raise self.shell.lacks() from error
        if entered[0].is_meta:
            raise self.shell.lacks()
        self._calls[len(tokens), tokens.shape[1]] = calls
        return entered[0]

    def logits(self, leaving: Batch) -> Float[Tensor, "batch window vocabulary"]:
        """The logits, on `device`, that a model with its head computes from the last layer's hidden states.

        They have a gradient if the caller has those enabled.
        """
        hidden = leaving.to(self.device)
        if self._tuples is None:
            self._enter(torch.ones(hidden.shape[:2], dtype=torch.long))
        return self.shell.logits(hidden, tuples=bool(self._tuples))

    @contextmanager
    def _recorded(self) -> Iterator[tuple[list[Batch], list[_Call]]]:
        """A block within which the model's layers do nothing but note how they are called."""
        entered: list[Tensor] = []
        calls: list[_Call] = []
        hidden_name = list(inspect.signature(type(self.shell.modules[0]).forward).parameters)[1]

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop(hidden_name)
            calls.append(_Call(args[1:], kwargs))
            if len(calls) == 1:
                entered.append(hidden.clone())
            if len(calls) == self.count:
                raise ReachedError
            return (hidden,) if self._gives_tuples(hidden, calls[0]) else hidden

        with self.shell.layers_replaced(record):
            yield entered, calls

    def _gives_tuples(self, hidden: Batch, call: _Call) -> bool:
        """True if the model's layers give back tuples; found by running the first once."""
        if self._tuples is None:
            first = self.build(0)
            vars(first).pop("forward", None)  # a recorder, copied with the module
            self._tuples = isinstance(first(hidden, *call.args, **call.kwargs), tuple)
        return self._tuples

    def call(self, module: nn.Module, layer: int, hidden: Batch) -> Batch:
        """The batch, on `device`, as it leaves this built layer; with gradients, if the caller has them enabled."""
        shape = hidden.shape[0], hidden.shape[1]
        if shape not in self._calls:
            self._enter(torch.ones(shape, dtype=torch.long))  # calls do not depend on what the tokens are
        call = self._calls[shape][layer]
        with running():
            out = module(hidden.to(self.device), *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]  # a module gives what it likes

    @torch.no_grad()
    def run(self, module: nn.Module, layer: int, hidden: Batch, watch: tuple[str, ...] = ()) -> tuple[Batch, Seen]:
        """Run a batch through this built layer. Returns the batch as it leaves, and inputs and outputs of the modules
        at the watched paths, all on `device`."""
        seen = Seen()
        with watching(module, watch, seen):
            return self.call(module, layer, hidden), seen.in_windows(hidden)

    def run_over(self, module: nn.Module, layer: int, stream: Stream, batches: Iterable[slice] | None = None) -> Stream:
        """Run this built layer over the whole stream, in place."""
        for at in self.batches(range(len(stream)), stream.shape[1]) if batches is None else batches:
            stream[at] = self.run(module, layer, stream[at])[0].cpu()
        return stream

    @torch.no_grad()
    def run_to(self, module: nn.Module, layer: int, hidden: Batch, path: str, watch: tuple[str, ...] = ()) -> Seen:
        """Run a batch until the module at `path` is reached. The input of that module is among what was seen.

        Raises:
            ArchitectureError: if the module is never reached.
        """
        seen = Seen()
        stopping = module.get_submodule(path).register_forward_pre_hook(partial(seen.note_and_stop, path))
        with stopping, watching(module, watch, seen):
            try:
                self.call(module, layer, hidden)
            except ReachedError:
                return seen.in_windows(hidden)
        raise ArchitectureError(f"the layer never calls its {path}; headshare cannot calibrate this model.")
