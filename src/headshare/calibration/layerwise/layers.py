"""A model's layers, one in memory at a time, over hidden states: how calibration walks models larger than memory.

A *stream* is the hidden states of all calibration windows as they enter one layer. Chooses nothing and solves nothing.
"""

import copy
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headshare.architecture.config import text_config
from headshare.architecture.families import FAMILIES
from headshare.architecture.modules import module_path
from headshare.architecture.recognition import attention_layout
from headshare.calibration.layerwise.observed import Batch, ReachedError, Seen, Stream, watching
from headshare.calibration.layerwise.shell import (
    OLD_NAMES,
    different_prefixes,
    empty_shell,
    ffn_or_none,
    on_device,
    whole_model,
)
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import ArchitectureError, CheckpointError
from headshare.integrations.transformers.loading import quiet
from headshare.plan.units import Part
from headshare.precision import full_float32
from headshare.sharing.expanded import WholeTensors

LOGGER = logging.getLogger("headshare")
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class _Call:
    """How the model calls one layer: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Layers:
    """The layers of a checkpoint's model, dense or shared; a shared one's are built whole, as the stock model's.

    `start` makes the stream that enters layer 0, `build` makes a layer, `run` runs it on some of the stream's windows.
    Arithmetic is float32, whatever the weights are stored as; the layers are called as the model calls them for
    windows that are all tokens, with no padding. A model that is not stored as it is built (a mixture of experts) is
    held whole in memory. With `head`, `logits` ends the walk.

    Attributes: `count` of layers; `attention` and `ffn`, their layouts (`ffn` None for experts); `post_norm`, whether
    each half of a layer ends in a norm of its output plus its input; `device`.

    Raises:
        ArchitectureError: if the model's layout is not known.
        CheckpointError: if the model's code is remote, its weights are not all there, or it is shared and does not hold
            what its plan says.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str | torch.device = "cpu", head: bool = False) -> None:
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self._weights = WholeTensors.of(checkpoint)
        config, shapes = text_config(checkpoint.config), self._weights.shapes
        self.attention, self.ffn = attention_layout(config, shapes), ffn_or_none(config, shapes)
        self.count = self.attention.layers
        o_path = self.path(Part.O)
        self.post_norm = any(family.post_norm and family.o == o_path for family in FAMILIES)
        self._model = empty_shell(checkpoint, head)
        self._first = module_path(self._model, self.attention.parts[Part.O].name(0)).removesuffix(f".{o_path}")
        self._held = not self._stored_as_built()
        if self._held:
            LOGGER.info("%s is not stored as it is built: the whole model is held in memory", checkpoint.name)
            self._model = whole_model(checkpoint, self.device, head)
        else:
            self._fill_rest()
            if head and self._lacking():  # torch multiplies with weights that are not there, and gives numbers
                raise self._lacks()
        self._calls: dict[tuple[int, int], list[_Call]] = {}
        self._tuples: bool | None = None

    # ---- names

    @property
    def in_out(self) -> bool:
        """Whether weights are stored (input, output), as GPT-2's Conv1D does."""
        return self.attention.parts[Part.O].axis == 0

    def path(self, part: Part) -> str:
        """The path, within a layer, of the module that holds this part.

        Raises:
            ArchitectureError: if the layer has no such module.
        """
        layout = self.attention if part in self.attention.parts else self.ffn
        if layout is None or part not in layout.parts:
            raise ArchitectureError(f"this model's layers have no part {part}.")
        return layout.parts[part].name(0).removeprefix(self._base(0)).removesuffix(".weight")

    def tensor(self, part: Part, layer: int) -> str:
        """The name in the checkpoint of the weight that holds this part in this layer.

        Raises:
            ArchitectureError: if the layer has no such part.
        """
        self.path(part)
        layout = self.attention if part in self.attention.parts else self.ffn
        assert layout is not None
        return layout.parts[part].name(layer)

    def tensors_of(self, layer: int, *, ffn: bool = True) -> dict[str, str]:
        """The weights of this layer's attention and, unless it has none or is left out, feed-forward: paths of modules
        by the tensors' names; fused parts are one."""
        layouts = [one for one in (self.attention, self.ffn if ffn else None) if one is not None]
        return {self.tensor(part, layer): self.path(part) for layout in layouts for part in layout.parts}

    def _base(self, layer: int) -> str:
        """What stands before the names of one layer's tensors in the checkpoint, such as `model.layers.7.`"""
        template = self.attention.parts[Part.O].tensor
        return template[: template.index("{layer}")] + f"{layer}."

    def _stored_name(self, name: str) -> str:
        """The tensor's name in the checkpoint, which for old BERTs and GPT-NeoX is not its name in the model."""
        for new, old in OLD_NAMES.items():
            if name.endswith(new) and name not in self._weights:
                return name.removesuffix(new) + old
        return name

    # ---- weights

    @property
    def _modules(self) -> nn.ModuleList:
        found = self._model.get_submodule(self._first.rpartition(".")[0])
        assert isinstance(found, nn.ModuleList)
        return found

    def build(self, layer: int, replaced: Mapping[str, Tensor] | None = None) -> nn.Module:
        """This layer with its weights, in float32 and memory of its own; `replaced` holds tensors, by their names in
        the checkpoint, that stand in for the checkpoint's.

        Raises:
            CheckpointError: if a tensor of the layer has another shape than the model needs, or cannot be read.
        """
        module, changed = copy.deepcopy(self._modules[layer]), replaced or {}
        state = {}
        for name, parameter in module.state_dict(keep_vars=True).items():
            stored = self._stored_name(self._base(layer) + name)
            if stored in changed:
                value = changed[stored].clone()
            else:
                value = parameter.detach() if self._held else self._weights.read(stored)
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{stored} has shape {tuple(value.shape)}; the model needs {tuple(parameter.shape)}."
                )
            state[name] = on_device(self.device, value)
        module.load_state_dict(state, assign=True)
        return module.to(self.device).eval().requires_grad_(False)

    def _stored_as_built(self) -> bool:
        """Whether every tensor of every layer is in the checkpoint under its own name. (Experts are often not.)"""
        return all(
            self._stored_name(self._base(layer) + name) in self._weights
            for layer, module in enumerate(self._modules)
            for name in module.state_dict()
        )

    def _fill_rest(self) -> None:
        """Give what stands around the layers its weights: embeddings, norms, tables of positions."""
        inner, outer = different_prefixes(f"{self._first}.", self._base(0))
        layers = f"{self._first.rpartition('.')[0]}."
        state = {}
        for name in self._model.state_dict():
            names = [outer + name.removeprefix(inner)] if name.startswith(inner) else []
            found = next((one for one in map(self._stored_name, [*names, name]) if one in self._weights), None)
            if found is not None and not name.startswith(layers):
                state[name] = on_device(self.device, self._weights.read(found))
        self._model.load_state_dict(state, assign=True, strict=False)
        with quiet():  # a head that is the embedding has no tensor of its own
            self._model.tie_weights(missing_keys=set(self._lacking()), recompute_mapping=False)
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    # ---- walking

    def batch(self, window: int) -> int:
        """How many windows of this many tokens are run at once."""
        return max(1, BATCH_TOKENS // window)

    def batches(self, windows: range, window: int) -> Iterator[slice]:
        """These windows of so many tokens, as slices that are run at once."""
        size = self.batch(window)
        return (slice(at, min(at + size, windows.stop)) for at in windows[::size])

    @torch.no_grad()
    def start(self, tokens: Int[Tensor, "windows window"]) -> Stream:
        """The stream that enters layer 0, in float32 on the CPU.

        Raises:
            CheckpointError: if a weight is missing that the model needs before its layers.
        """
        return torch.cat([self._enter(tokens[at]).cpu() for at in self.batches(range(len(tokens)), tokens.shape[1])])

    @torch.no_grad()
    def _enter(self, tokens: Int[Tensor, "batch window"]) -> Batch:
        """What enters layer 0 for these tokens. How each layer was called is kept for batches of this shape."""
        with self._recorded() as (entered, calls), full_float32():  # what layers are called with serves all their runs
            try:
                with suppress(ReachedError), quiet():
                    self._model(input_ids=tokens.to(self.device))
            except (NotImplementedError, RuntimeError) as error:
                if not self._lacking():
                    raise
                raise self._lacks() from error
        if entered[0].is_meta:
            raise self._lacks()
        self._calls[len(tokens), tokens.shape[1]] = calls
        return entered[0]

    def _lacking(self) -> list[str]:
        """The weights around the layers that the checkpoint has not."""
        layers = f"{self._first.rpartition('.')[0]}."
        return [
            name for name, value in self._model.state_dict().items() if value.is_meta and not name.startswith(layers)
        ]

    def _lacks(self) -> CheckpointError:
        return CheckpointError(f"{self.checkpoint.name} lacks weights that its model needs: {self._lacking()[:3]}.")

    @torch.no_grad()
    def logits(self, leaving: Batch) -> Float[Tensor, "batch window vocabulary"]:
        """What a model with its head makes of what leaves the last layer, on `device`; any tokens of it will do."""
        hidden = leaving.to(self.device)
        if self._tuples is None:
            self._enter(torch.ones(hidden.shape[:2], dtype=torch.long))
        given = (hidden,) if self._tuples else hidden
        for module in self._modules:
            module.forward = lambda *_, **__: given
        try:
            found = self._model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)).logits
        finally:
            for module in self._modules:
                del module.forward
        return found  # type: ignore[no-any-return]  # transformers gives back what it likes

    @contextmanager
    def _recorded(self) -> Iterator[tuple[list[Batch], list[_Call]]]:
        """Within this block the model's layers do nothing but note how they are called."""
        entered: list[Tensor] = []
        calls: list[_Call] = []
        modules = self._modules
        hidden_name = list(inspect.signature(type(modules[0]).forward).parameters)[1]

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop(hidden_name)
            calls.append(_Call(args[1:], kwargs))
            if len(calls) == 1:
                entered.append(hidden.clone())
            if len(calls) == self.count:
                raise ReachedError
            return (hidden,) if self._gives_tuples(hidden, calls[0]) else hidden

        for module in modules:
            module.forward = record
        try:
            yield entered, calls
        finally:
            for module in modules:
                del module.forward

    def _gives_tuples(self, hidden: Batch, call: _Call) -> bool:
        """Whether the model's layers give back tuples; found by running the first once."""
        if self._tuples is None:
            first = self.build(0)
            vars(first).pop("forward", None)  # a recorder, copied with the module
            self._tuples = isinstance(first(hidden, *call.args, **call.kwargs), tuple)
        return self._tuples

    def call(self, module: nn.Module, layer: int, hidden: Batch) -> Batch:
        """What this built layer makes of a batch, on `device`; with gradients, where those are wanted."""
        shape = hidden.shape[0], hidden.shape[1]
        if shape not in self._calls:
            self._enter(torch.ones(shape, dtype=torch.long))  # calls do not depend on what the tokens are
        call = self._calls[shape][layer]
        out = module(hidden.to(self.device), *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]  # a module gives what it likes

    @torch.no_grad()
    def run(self, module: nn.Module, layer: int, hidden: Batch, watch: tuple[str, ...] = ()) -> tuple[Batch, Seen]:
        """What this built layer makes of a batch, and what passed through the modules at the watched paths; both on
        `device`."""
        seen = Seen()
        with watching(module, watch, seen):
            return self.call(module, layer, hidden), seen.in_windows(hidden)

    def run_over(self, module: nn.Module, layer: int, stream: Stream, batches: Iterable[slice] | None = None) -> Stream:
        """Turn what enters this built layer into what leaves it, in place."""
        for at in self.batches(range(len(stream)), stream.shape[1]) if batches is None else batches:
            stream[at] = self.run(module, layer, stream[at])[0].cpu()
        return stream

    @torch.no_grad()
    def run_to(self, module: nn.Module, layer: int, hidden: Batch, path: str, watch: tuple[str, ...] = ()) -> Seen:
        """The same, ended as soon as the module at `path` is reached; its input is in what was seen.

        Raises:
            ArchitectureError: if it is never reached.
        """
        seen = Seen()
        stopping = module.get_submodule(path).register_forward_pre_hook(partial(seen.note_and_stop, path))
        with stopping, watching(module, watch, seen):
            try:
                self.call(module, layer, hidden)
            except ReachedError:
                return seen.in_windows(hidden)
        raise ArchitectureError(f"the layer never calls its {path}; headshare cannot calibrate this model.")
