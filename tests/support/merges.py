"""Self-merges as others make them: stock models whose layers were copied in transformers."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support import tiny

# where transformers keeps the layers of a model, for the families of tests
LAYERS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "bert.encoder.layer",
          "roberta.encoder.layer", "encoder.layer")  # fmt: skip


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of a model's layers."""
    path = next(path for path in LAYERS if module_exists(model, path))
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return layers


def module_exists(model: nn.Module, path: str) -> bool:
    return path in {name for name, _ in model.named_modules()}


def merged(model: Any, order: Sequence[int]) -> Any:
    """A stock model of deep copies of another's layers in this order, each of which has its own place in the cache."""
    config = copy.deepcopy(model.config)
    for key, value in vars(model.config).items():
        if "layer" in key and isinstance(value, list) and len(value) == model.config.num_hidden_layers:
            setattr(config, key, [value[layer] for layer in order])
    config.num_hidden_layers = len(order)
    merge = type(model)(config).to(model.dtype)
    states = [layer.state_dict() for layer in layers_of(model)]
    rest = {name: value for name, value in model.state_dict().items() if not _in_layers(model, name)}
    merge.load_state_dict(rest, strict=False)
    for layer, source in zip(layers_of(merge), order, strict=True):
        layer.load_state_dict(copy.deepcopy(states[source]))
    return merge.eval()


def make_merge(
    folder: Path, name: str = "llama-gqa", order: Sequence[int] = (0, 1, 2, 1, 2, 3), **save: object
) -> Path:
    """The folder of a self-merge of a tiny model of this family, with copied layers, as mergekit writes one."""
    stock = tiny.FAMILIES[name][0].from_pretrained(tiny.make(name, folder.parent / f"{folder.name}-before"))
    merged(stock, order).save_pretrained(folder, **save)
    return folder


def same_outputs(one: Any, other: Any, ids: torch.Tensor | None = None) -> bool:
    """True if two models give the same numbers, bit for bit."""
    ids = tiny.tokens() if ids is None else ids
    with torch.inference_mode():
        return torch.equal(one(input_ids=ids)[0], other(input_ids=ids)[0])


def _in_layers(model: nn.Module, name: str) -> bool:
    path = next(path for path in LAYERS if module_exists(model, path))
    return name.startswith(f"{path}.")
