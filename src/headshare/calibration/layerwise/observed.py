"""Observed inputs: hooks that note what modules of a running layer receive."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

Stream = Float[Tensor, "windows window hidden"]
Batch = Float[Tensor, "batch window hidden"]


class ReachedError(BaseException):
    """An exception that leaves a model or a layer early, once the inputs that were wanted are known."""


@dataclass
class Seen:
    """Inputs and outputs of some modules of a layer, by path, in one pass: copies, a row for each token."""

    inputs: dict[str, Float[Tensor, "..."]] = field(default_factory=dict)
    outputs: dict[str, Float[Tensor, "..."]] = field(default_factory=dict)

    def in_windows(self, hidden: Batch) -> "Seen":
        """The rows in the windows of the batch. Some layers (OPT's) lay all tokens in one row before they go on.

        Short numbers become float32 ones, since what is added to them must not be rounded as they are.
        """
        batch, window, _ = hidden.shape
        inputs, outputs = (
            {path: _full(value).reshape(batch, window, value.shape[-1]) for path, value in rows.items()}
            for rows in (self.inputs, self.outputs)
        )
        return Seen(inputs, outputs)

    def detached(self) -> "Seen":
        """The same numbers without their history."""
        inputs, outputs = ({path: rows.detach() for path, rows in side.items()} for side in (self.inputs, self.outputs))
        return Seen(inputs, outputs)

    def note(self, path: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Note the input and the output of the module at this path."""
        self.inputs[path] = args[0].clone()
        self.outputs[path] = output.clone()  # some layers add to it in place

    def note_and_stop(self, path: str, _: nn.Module, args: tuple[Any, ...]) -> NoReturn:
        """Note the input of the module at this path, and raise ReachedError."""
        self.inputs[path] = args[0]
        raise ReachedError


def _full(value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


@contextmanager
def watching(module: nn.Module, paths: tuple[str, ...], seen: Seen) -> Iterator[None]:
    """A block within which inputs and outputs of the modules at these paths are noted."""
    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(module.get_submodule(path).register_forward_hook(partial(seen.note, path)))
        yield
