"""The stock model around the layers: its embeddings, norms and head, with the names that the checkpoint uses."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from jaxtyping import Float
from torch import Tensor, nn

from headshare.architecture.families import OLD_NAMES
from headshare.architecture.modules import module_path
from headshare.calibration.layerwise.observed import Batch
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.remote_code import check_model_code
from headshare.errors import CheckpointError
from headshare.files.untrusted import foreign
from headshare.integrations.transformers.loading import load_model, quiet
from headshare.integrations.transformers.sized import check_size, unfilled
from headshare.plan.layout import Layout
from headshare.plan.units import Part
from headshare.sharing.expanded import ExpandedTensors
from headshare.storage.registry import TRAINABLE

LOGGER = logging.getLogger("headshare")


class Shell:
    """A checkpoint's stock model, bare or with its head, in which the modules around the layers have their weights.

    The layers in `modules` are empty. Only a model that is not stored as it is built (a mixture of experts) is `held`
    whole in memory. `weights` are the checkpoint's tensors, `attention` is the layout that names its layers.

    Raises:
        CheckpointError: if the model's code is remote, or with a head, weights around its layers are not there.
    """

    def __init__(
        self, checkpoint: Checkpoint, weights: ExpandedTensors, attention: Layout, device: torch.device, *, head: bool
    ) -> None:
        self.checkpoint = checkpoint
        self.weights = weights
        self.device = device
        self._o = attention.parts[Part.O]
        self.model = empty_shell(checkpoint, head)
        o_in_layer = self._o.name(0).removeprefix(self.prefix(0)).removesuffix(".weight")
        self._first = module_path(self.model, self._o.name(0)).removesuffix(f".{o_in_layer}")
        self.held = not self._stored_as_built()
        if self.held:
            LOGGER.info("%s is not stored as it is built: the whole model is held in memory", checkpoint.name)
            self.model = whole_model(checkpoint, device, head)
        else:
            self._fill()
            if head and self.lacking():  # torch multiplies with weights that are not there, and gives numbers
                raise self.lacks()

    @property
    def modules(self) -> nn.ModuleList:
        """The model's layers."""
        layers = self.model.get_submodule(self._layers_path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def _layers_path(self) -> str:
        return self._first.rpartition(".")[0]

    # ---- names

    def prefix(self, layer: int) -> str:
        """The beginning of the names of one layer's tensors in the checkpoint, such as `model.layers.7.`"""
        return self._o.prefix(layer)

    def stored_name(self, name: str) -> str:
        """The tensor's name in the checkpoint, which for old BERTs and GPT-NeoX is not its name in the model."""
        for new, old in OLD_NAMES.items():
            if name.endswith(new) and name not in self.weights:
                return name.removesuffix(new) + old
        return name

    def _stored_as_built(self) -> bool:
        """True if every tensor of every layer is in the checkpoint under its own name. (Experts are often not.)"""
        return all(
            self.stored_name(self.prefix(layer) + name) in self.weights
            for layer, module in enumerate(self.modules)
            for name in module.state_dict()
        )

    # ---- weights around the layers

    def _around(self) -> dict[str, Tensor]:
        """The model's tensors less those of its layers, by their names in the model."""
        layers = f"{self._layers_path}."
        return {name: value for name, value in self.model.state_dict().items() if not name.startswith(layers)}

    def _fill(self) -> None:
        """Load the weights around the layers: embeddings, norms, tables of positions."""
        # The checkpoint may have been saved from a bare model and read into one with a head, or the other way round:
        # then all names differ in what comes first.
        inner, outer = different_prefixes(f"{self._first}.", self.prefix(0))
        state = {}
        for name in self._around():
            names = [outer + name.removeprefix(inner)] if name.startswith(inner) else []
            stored = next((known for known in map(self.stored_name, [*names, name]) if known in self.weights), None)
            if stored is not None:
                state[name] = on_device(self.device, self.weights.read(stored))
        with foreign(f"{self.checkpoint.name} does not hold the model that its config.json describes"):
            self.model.load_state_dict(state, assign=True, strict=False)
        with quiet():  # a head that is the embedding has no tensor of its own
            self.model.tie_weights(missing_keys=set(self.lacking()), recompute_mapping=False)

        # Buffers that no checkpoint stores, such as the frequencies of rotary positions, were computed on the CPU.
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    def lacking(self) -> list[str]:
        """The weights around the layers that the checkpoint has not."""
        return [name for name, value in self._around().items() if value.is_meta]

    def lacks(self) -> CheckpointError:
        """The error that names some of the lacking weights."""
        return CheckpointError(f"{self.checkpoint.name} lacks weights that its model needs: {self.lacking()[:3]}.")

    # ---- running

    @contextmanager
    def layers_replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """A block within which each of the model's layers runs this function instead of its own."""
        modules = self.modules
        for module in modules:
            module.forward = forward
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def logits(self, leaving: Batch, *, tuples: bool) -> Float[Tensor, "batch window vocabulary"]:
        """The logits that a model with its head computes from the last layer's hidden states.

        `tuples` is true if the model's layers return tuples.
        """
        given = (leaving,) if tuples else leaving
        with self.layers_replaced(lambda *_, **__: given):
            output = self.model(input_ids=torch.zeros(leaving.shape[:2], dtype=torch.long, device=self.device))
        return output.logits  # type: ignore[no-any-return]  # transformers gives back what it likes


def on_device(device: torch.device, value: Tensor) -> Tensor:
    """The tensor on this device, in float32 if it is a floating-point one."""
    return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)


def different_prefixes(first: str, second: str) -> tuple[str, str]:
    """Prefixes of two paths before the end that they share: ("", "model.") for `layers.0.` and `model.layers.0.`"""
    ours = first.split(".")
    theirs = second.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return "".join(f"{step}." for step in ours), "".join(f"{step}." for step in theirs)


def whole_model(checkpoint: Checkpoint, device: torch.device, head: bool) -> Any:
    """The stock model, bare or with its head, with all its weights, for checkpoints that transformers converts as it
    loads them."""
    if checkpoint.plan is None:
        model = load_model(checkpoint, dtype=torch.float32)
    else:
        model = load_model(checkpoint, storage=TRAINABLE, dtype=torch.float32).dequantize()
    _without_cache(model.config)
    return (model if head else model.base_model).to(device)


def empty_shell(checkpoint: Checkpoint, head: bool) -> Any:
    """The stock model, bare or with its head, with buffers and no weights.

    Raises:
        CheckpointError: if the model needs code of its own.
    """
    check_model_code(checkpoint)
    kind = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    with foreign(f"transformers cannot build {checkpoint.name}"), quiet():
        check_size(checkpoint, kind)
        with init_empty_weights(include_buffers=False):
            built = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
            _without_cache(built)
            return unfilled(built, kind).eval()


def _without_cache(config: Any) -> None:
    """Set a config so that layers are called without a cache of keys, which would grow with every run.

    Router losses are switched off too, as they are added up over layers that may not run, and outputs have names.
    """
    for part in (config, config.get_text_config()):
        part.use_cache = False
        part.output_router_logits = False
        part.return_dict = True
