"""The check, before a model takes memory, that what its configuration describes is what the checkpoint stores."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.justified import justified_numbers
from headshare.errors import CheckpointError


def check_size(checkpoint: Checkpoint, model_class: Any) -> None:
    """Refuse a model that would be far larger than its tensors. It is built without memory to be measured.

    A model that cannot be built is left to whoever loads it next, and says why.

    Raises:
        CheckpointError: with both counts of numbers.
    """
    model = torch.nn.Module()
    with suppress(Exception), torch.device("meta"):
        model = built(checkpoint, model_class)
    check_numbers(checkpoint, model)


def check_numbers(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Refuse a stock model, built without memory, that is far larger than a checkpoint's tensors.

    Raises:
        CheckpointError: with both counts of numbers.
    """
    numbers = _numbers_of(model)
    allowed = justified_numbers(checkpoint.tensors, checkpoint.plan)
    if numbers > allowed:
        raise CheckpointError(
            f"config.json of {checkpoint.name} describes a model of {numbers:,} numbers; its tensors are those of a "
            f"model of {allowed:,} at most. Correct it, or download the file again."
        )


def shape_mismatch(source: object, name: str, stored: Sequence[int], wanted: Sequence[int]) -> CheckpointError:
    """The error of a tensor that is stored in another shape than its place in the model has."""
    return CheckpointError(
        f"{source} holds {name} as {tuple(stored)}, and its config.json makes a model in which it is "
        f"{tuple(wanted)}. One of the two is of another model."
    )


def built(checkpoint: Checkpoint, model_class: Any) -> Any:
    """A stock model of this class as config.json describes it, with weights that nothing has filled."""
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return unfilled(transformers.AutoConfig.for_model(config.pop("model_type", ""), **config), model_class)


def unfilled(described: Any, model_class: Any) -> Any:
    """A stock model of this class, its weights tied where they are to be, and drawn from no distribution.

    Drawing takes longest of all, even where no weight has memory. Buffers are computed.
    """
    with no_init_weights():
        if issubclass(model_class, transformers.PreTrainedModel):
            model = model_class._from_config(described)
        else:
            model = model_class.from_config(described, trust_remote_code=False)
    model.tie_weights(recompute_mapping=False)
    return model


def _numbers_of(model: torch.nn.Module) -> int:
    """The count of all numbers of a model; a buffer, such as a mask of bytes, counts by its size in float32."""
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return sum(parameter.numel() for parameter in model.parameters()) + buffers // torch.float32.itemsize
