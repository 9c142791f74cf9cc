"""A model's layers, one in memory at a time, over hidden states: how calibration walks models larger than memory.

A *stream* is the hidden states of all calibration windows as they enter one layer. Knows no plan and solves nothing.
"""

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from jaxtyping import Float, Int
from torch import Tensor, nn

from headshare.checkpoints import Checkpoint
from headshare.configuration import text_config
from headshare.errors import ArchitectureError, CheckpointError
from headshare.families import family_of
from headshare.integrations.transformers import module_path
from headshare.layout import Layout
from headshare.models import load_model, quiet
from headshare.recognition import attention_layout, ffn_layout
from headshare.units import Part

LOGGER = logging.getLogger("headshare")
BATCH_TOKENS = 4096
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

Stream = Float[Tensor, "windows window hidden"]
Batch = Float[Tensor, "batch window hidden"]


class _ReachedError(Exception):
    """Thrown to leave a layer once what was wanted from it is known."""


@dataclass
class Seen:
    """What went into and came out of some modules of a layer, by path, in one pass. Inputs and outputs are copies."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def in_windows(self, hidden: Batch) -> "Seen":
        """The same in the batch's own windows: some layers (OPT's) lay all tokens in one row before they go on."""
        for found in (self.inputs, self.outputs):
            for path, value in found.items():
                found[path] = value.reshape(*hidden.shape[:2], -1)
        return self


@dataclass(frozen=True)
class _Call:
    """How the model calls one layer: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Layers:
    """The layers of a checkpoint's model. `build` makes one, `run` runs it on a batch of hidden states.

    Arithmetic is float32, whatever the weights are stored as.

    Raises:
        ArchitectureError: if the model's layout is not known.
        CheckpointError: if the model's code is remote, or its layers' tensors are not all there under their names.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str | torch.device = "cpu") -> None:
        config, shapes = text_config(checkpoint.config), checkpoint.shapes
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.attention = attention_layout(config, shapes)
        self.ffn = _ffn_or_none(config, shapes)
        self.count = self.attention.layers
        family = family_of(str(config.get("model_type")))
        self.post_norm = family is not None and family.post_norm
        self._model = _empty_model(checkpoint)
        self._template = self._base_of(self.attention)
        path = module_path(self._model, self.attention.parts[Part.O].name(0))
        tail = self.attention.parts[Part.O].name(0)[len(self._template.replace("{layer}", "0")) :]
        first = path.removesuffix(tail.removesuffix(".weight")).removesuffix(".")
        self._modules = self._model.get_submodule(first.rpartition(".")[0])
        self._whole = False
        if self._stored_as_built():
            self._fill_rest(first)
        else:
            LOGGER.info("%s is not stored as it is built: the whole model is held in memory", checkpoint.name)
            self._model = _whole_model(checkpoint, self.device)
            self._modules = self._model.get_submodule(first.rpartition(".")[0])
            self._whole = True
        self._calls: dict[int, list[_Call]] = {}
        self._tuples = False

    @staticmethod
    def _base_of(layout: Layout) -> str:
        """What stands before the names of one layer's tensors, such as `model.layers.{layer}.`"""
        template = layout.parts[Part.O].tensor
        return template[: template.index("{layer}") + len("{layer}.")]

    def relative(self, tensor: str, layer: int) -> str:
        """A tensor's name within its layer."""
        return tensor.removeprefix(self._template.replace("{layer}", str(layer)))

    def path(self, part: Part) -> str:
        """The path, within a layer, of the module that holds this part.

        Raises:
            ArchitectureError: if the layer has no such module.
        """
        layout = self.attention if part in self.attention.parts else self.ffn
        if layout is None:
            raise ArchitectureError(f"this model's layers have no part {part}.")
        return self.relative(layout.parts[part].name(0), 0).removesuffix(".weight")

    def tensor(self, part: Part, layer: int) -> str:
        """The name in the checkpoint of the weight that reads this part out."""
        layout = self.attention if part is Part.O else self.ffn
        assert layout is not None
        return layout.parts[part].name(layer)

    @property
    def in_out(self) -> bool:
        """Whether weights are stored (input, output), as GPT-2's Conv1D does."""
        return self.attention.parts[Part.O].axis == 0

    def build(self, layer: int, replaced: Mapping[str, Tensor] | None = None) -> nn.Module:
        """This layer with its weights, in float32; `replaced` names tensors of the checkpoint that differ in it.

        Raises:
            CheckpointError: if a tensor of the layer is missing or has another shape.
        """
        module = copy.deepcopy(self._modules[layer])  # type: ignore[index]  # a ModuleList
        base, changed = self._template.replace("{layer}", str(layer)), replaced or {}
        state = {}
        for name, parameter in module.state_dict(keep_vars=True).items():
            stored = base + name if self._whole else self._stored_name(base + name)
            value = changed[stored] if stored in changed else self._value(stored, parameter)
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{stored} has shape {tuple(value.shape)}; the model needs {tuple(parameter.shape)}."
                )
            state[name] = value.to(self.device, torch.float32)
        module.load_state_dict(state, assign=True)
        return module.to(self.device).eval().requires_grad_(False)

    def _value(self, stored: str, parameter: Tensor) -> Tensor:
        return parameter.detach() if self._whole else self.checkpoint.read(stored)

    def _stored_as_built(self) -> bool:
        """Whether every tensor of every layer is in the checkpoint under its own name. (Experts are often not.)"""
        names = self._modules[0].state_dict()  # type: ignore[index]  # a ModuleList
        bases = [self._template.replace("{layer}", str(layer)) for layer in range(self.count)]
        return all(self._stored_name(base + name) in self.checkpoint.tensors for base in bases for name in names)

    def _stored_name(self, name: str) -> str:
        """The tensor's name in the checkpoint, which for old BERTs is not its name in the model."""
        for new, old in _OLD_NAMES.items():
            if name.endswith(new) and name not in self.checkpoint.tensors:
                return name.removesuffix(new) + old
        return name

    def _fill_rest(self, first_layer: str) -> None:
        """Give everything that stands before the layers its weights: embeddings, norms, tables of positions."""
        stored_first = self._template.replace("{layer}", "0")
        outer = stored_first.removesuffix(f"{first_layer}.") if stored_first.endswith(f"{first_layer}.") else ""
        layers = f"{first_layer.rpartition('.')[0]}."
        state = {}
        for name in self._model.state_dict():
            found = next((one for one in (outer + name, name) if one in self.checkpoint.tensors), None)
            if found is not None and not name.startswith(layers):
                state[name] = self.checkpoint.read(found).to(self.device, torch.float32)
        self._model.load_state_dict(state, assign=True, strict=False)
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    @torch.no_grad()
    def start(self, tokens: Int[Tensor, "windows window"]) -> Stream:
        """The stream that enters layer 0."""
        with self._recorded() as (entered, calls):
            hidden = []
            for batch in tokens.split(self.batch(tokens.shape[1])):
                with suppress(_ReachedError):
                    self._model(input_ids=batch.to(self.device))
                hidden.append(entered.pop().cpu())
                self._calls.setdefault(len(batch), list(calls))
                calls.clear()
        return torch.cat(hidden)

    def batch(self, window: int) -> int:
        """How many windows are run at once."""
        return max(1, BATCH_TOKENS // window)

    @contextmanager
    def _recorded(self) -> Iterator[tuple[list[Tensor], list[_Call]]]:
        """Within this block the model's layers do nothing but note how they are called."""
        entered: list[Tensor] = []
        calls: list[_Call] = []
        first = self.build(0)

        def recorder(layer: int) -> Callable[..., Any]:
            names = list(inspect.signature(type(first).forward).parameters)

            def record(*args: Any, **kwargs: Any) -> Any:
                given = dict(kwargs)
                hidden = args[0] if args else given.pop(names[1])
                calls.append(_Call(args[1:], given))
                if layer == 0:
                    entered.append(hidden.clone())
                    self._tuples = isinstance(first(hidden, *args[1:], **given), tuple)
                if layer == self.count - 1:
                    raise _ReachedError
                return (hidden,) if self._tuples else hidden

            return record

        for layer, module in enumerate(self._modules):  # type: ignore[arg-type]
            module.forward = recorder(layer)
        try:
            yield entered, calls
        finally:
            for module in self._modules:  # type: ignore[union-attr]
                del module.forward

    def _call(self, module: nn.Module, layer: int, hidden: Batch) -> Tensor:
        call = self._calls[len(hidden)][layer]
        out = module(hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    @torch.no_grad()
    def run(self, module: nn.Module, layer: int, hidden: Batch, watch: tuple[str, ...] = ()) -> tuple[Batch, Seen]:
        """What this built layer makes of a batch, and what passed through the modules at the watched paths."""
        seen = Seen()
        with _watching(module, watch, seen):
            return self._call(module, layer, hidden.to(self.device)), seen.in_windows(hidden)

    @torch.no_grad()
    def run_to(self, module: nn.Module, layer: int, hidden: Batch, path: str, watch: tuple[str, ...] = ()) -> Seen:
        """The same, ended as soon as the module at `path` is reached; its input is in what was seen."""
        seen = Seen()
        with _watching(module, watch, seen), _stopping(module, path, seen):
            try:
                self._call(module, layer, hidden.to(self.device))
            except _ReachedError:
                return seen.in_windows(hidden)
        raise ArchitectureError(f"the layer never calls its {path}; headshare cannot calibrate this model.")


@contextmanager
def _watching(module: nn.Module, paths: tuple[str, ...], seen: Seen) -> Iterator[None]:
    def watch(path: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen.inputs[path] = args[0].clone()
            seen.outputs[path] = output.clone()  # some layers add to it in place

        return note

    handles = [module.get_submodule(path).register_forward_hook(watch(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _stopping(module: nn.Module, path: str, seen: Seen) -> Iterator[None]:
    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.inputs[path] = args[0]
        raise _ReachedError

    handle = module.get_submodule(path).register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _whole_model(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The bare model with all its weights, for checkpoints that transformers converts as it loads them."""
    model = load_model(checkpoint, dtype=torch.float32)
    return model.base_model.to(device)


def _ffn_or_none(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Layout | None:
    try:
        return ffn_layout(config, shapes)
    except ArchitectureError:  # a mixture of experts has no one W_down to refit
        return None


def _empty_model(checkpoint: Checkpoint) -> Any:
    """The bare model with buffers and no weights."""
    if "auto_map" in checkpoint.config:
        raise CheckpointError(
            f"{checkpoint.name} needs model code of its own, which headshare does not run; it cannot be calibrated."
        )
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    with quiet(), init_empty_weights(include_buffers=False):
        built = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
        built.use_cache = False
        return transformers.AutoModel.from_config(built).eval()
