"""Copies in a model that transformers loads: parameters of their own, and matrices that it stacks into larger ones.

transformers puts the experts of a layer into one parameter as it loads them. A copy among them takes its numbers from
the file of the tensor that it is. Two such parameters that were made of the same tensors are one, as repeated layers
have; experts that are equal within a layer stand there as often as the layer has them.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import StorageError
from headshare.storage.copies import Copies, ParameterPlace, place_of


class CopiedWeights:
    """The copies of a model that is being loaded from a checkpoint. Built while the model is empty.

    Raises:
        StorageError: if there is no checkpoint to read copies from that transformers stacks.
    """

    def __init__(self, model: nn.Module, copies: Mapping[str, str], checkpoint: Checkpoint | None) -> None:
        alone = {name: donor for name, donor in copies.items() if _stands_alone(model, name)}
        self._copies = Copies(model, alone)
        self._stacked = {name: donor for name, donor in copies.items() if name not in alone}
        self._checkpoint = checkpoint
        # the tensors that each stacked parameter was made of, a copy by the name of the tensor that it is
        self._made_of: dict[str, list[str]] = {}
        if self._stacked and checkpoint is None:
            raise StorageError("a model whose experts are copies is loaded from its files. Give their folder.")

    def empty(self, model: nn.Module) -> None:
        """Leave no rows of the parameters that are copies, as their files have none."""
        self._copies.empty(model)

    def converters(self, conversions: Iterable[Any]) -> list[Any]:
        """Conversions of weights that read copies from the tensors that they are."""
        conversions = list(conversions)
        if self._stacked:
            for conversion in (each for each in conversions if isinstance(each, WeightConverter)):
                conversion.__class__ = self._reading(type(conversion))
        return conversions

    def join(self, model: nn.Module) -> None:
        """Make each copy the parameter that it is, once all weights are loaded."""
        self._copies.join(model)
        if self._checkpoint is not None:
            self._checkpoint.close()
            self._checkpoint = None  # a model is copied and pickled without its files
        first: dict[tuple[str, ...], ParameterPlace] = {}
        for name, sources in self._made_of.items():
            path, _, leaf = name.rpartition(".")
            place = ParameterPlace(path, leaf)
            same = first.setdefault(tuple(sources), place)
            if same is not place and same.get(model).device == place.get(model).device:
                place.put(model, same.get(model))

    def part(self, model: nn.Module) -> None:
        """Give each copy memory of its own again, as a stock model has it."""
        self._copies.part(model)
        held: set[int] = set()
        for name in self._made_of:
            path, _, leaf = name.rpartition(".")
            place = ParameterPlace(path, leaf)
            shared = place.get(model)
            if id(shared) in held:
                place.put(model, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
            held.add(id(shared))

    def saved(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dictionary in which copies have no rows.

        Raises:
            StorageError: if experts are copies, which transformers would save as often as they are used.
        """
        self.check_kept("saved again")
        return self._copies.emptied(state)

    def check_kept(self, purpose: str) -> None:
        """Refuse what would give copies among stacked experts numbers of their own.

        Raises:
            StorageError: saying what to do.
        """
        if self._stacked:
            raise StorageError(
                f"experts of this model are copies, which transformers stacks, so that it cannot be {purpose}. Keep "
                "its folder, or do this to an ordinary one: headshare expand, or model.dequantize()."
            )

    def _reading(self, kind: type) -> type:
        """A class of conversions like this one, whose copies read the tensors that they are."""
        stacked = self._stacked
        made_of = self._made_of
        checkpoint = self._checkpoint

        class Reading(kind):  # type: ignore[misc]  # transformers is not typed
            __slots__ = ()

            def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
                made_of.setdefault(target_key, []).append(stacked.get(source_key, source_key))
                if source_key in stacked and checkpoint is not None:
                    future = _Read(checkpoint, stacked[source_key], future)
                super().add_tensor(target_key, source_key, source_pattern, future)

        Reading.__name__ = kind.__name__
        return Reading


class _Read(Future):  # type: ignore[type-arg]
    """A tensor that is read when it is asked for, on the device and in the type of an empty one that stands for it."""

    def __init__(self, checkpoint: Checkpoint, name: str, empty: Any) -> None:
        super().__init__()
        self._read = checkpoint, name, empty

    def result(self, timeout: float | None = None) -> Tensor:  # noqa: ARG002 - it waits for nobody
        """The tensor."""
        checkpoint, name, empty = self._read
        like: Tensor = empty.result() if isinstance(empty, Future) else empty()
        with torch.device("cpu"):
            return checkpoint.read(name).to(device=like.device, dtype=like.dtype)

    __call__ = result


def _stands_alone(model: nn.Module, name: str) -> bool:
    try:
        place_of(model, name)
    except StorageError:
        return False
    return True
