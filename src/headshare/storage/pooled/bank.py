"""Banks: the one copy of all shared weights, and its guards against copies.

Knows tensors by name and what a plan makes of them. Knows no model, no module and no library of models: how a weight
is multiplied with is for those who read it here, which need not be `storage.pooled.frozen`.
"""

import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headshare.plan.tensors import GappedTensor
from headshare.storage.pooled.product import Slots

LOGGER = logging.getLogger("headshare")


class Held(NamedTuple):
    """A tensor in a bank: its stored rows in the stock module's orientation, and what the product reads.

    That is the whole weight, in the same orientation, or the slots of its rows.
    """

    stored: Tensor
    whole: Tensor | Slots


class Bank(ABC):
    """The one copy of every unit that some projections read. Filled tensor by tensor, then sealed."""

    def __init__(self, tensors: Mapping[str, GappedTensor]) -> None:
        self.tensors = tensors
        self._will_not_train_was_said = False
        self._held: dict[str, Held] = {}
        self._converted: weakref.WeakValueDictionary[torch.dtype, Bank] = weakref.WeakValueDictionary()

    @abstractmethod
    def put(self, name: str, stored: Tensor) -> Tensor:
        """Take a tensor's stored rows in. Returns the view of them that its module shows."""

    @abstractmethod
    def seal(self) -> dict[str, Held]:
        """Make what is in it read-only, and say where everything is."""

    @classmethod
    def on(cls, tensors: Mapping[str, GappedTensor], devices: Mapping[str, torch.device]) -> "Bank":  # noqa: ARG003
        """An empty bank for tensors that are on these devices; a bank that knows but one place needs no more."""
        return cls(tensors)

    def held(self, name: str) -> Held:
        """Where a tensor is, in a bank that is filled; the first to ask seals it."""
        if not self._held:
            self._held = self.seal()
        return self._held[name]

    def say_once_that_it_will_not_train(self) -> None:
        """One warning, however many modules read this bank."""
        if not self._will_not_train_was_said:
            self._will_not_train_was_said = True
            LOGGER.warning("the shared weights of this model are read-only and will not train. %s", HOW_TO_TRAIN)

    def converted(self, dtype: torch.dtype) -> "Bank":
        """The same weights in another type of number: one bank, however many modules ask for it."""
        found = self._converted.get(dtype)
        if found is None:
            stored = {name: held.stored.to(dtype) for name, held in self._held.items()}
            found = self._converted[dtype] = rebuilt(type(self), self.tensors, stored)
        return found

    def __init_subclass__(cls) -> None:
        ForkingPickler.register(cls, _reduced_for_a_process)

    def __reduce__(self) -> tuple[Any, ...]:
        stored = {name: held.stored.clone(memory_format=torch.contiguous_format) for name, held in self._held.items()}
        empty = {name: rows.dtype for name, rows in stored.items() if not rows.numel()}  # which processes cannot share
        return _unpickled, (type(self), self.tensors, {n: r for n, r in stored.items() if n not in empty}, empty)


def _reduced_for_a_process(bank: Bank) -> tuple[Any, ...]:
    """The same for another process, as bytes: tensors would be handed over by descriptors that must be kept alive."""
    _, (kind, tensors, stored, empty) = bank.__reduce__()
    sent = {
        name: (rows.cpu().flatten().view(torch.uint8).numpy(), rows.dtype, rows.device) for name, rows in stored.items()
    }
    return _received, (kind, tensors, sent, empty)


def _received(
    kind: type[Bank],
    tensors: Mapping[str, GappedTensor],
    sent: Mapping[str, tuple[np.ndarray, torch.dtype, torch.device]],
    empty: Mapping[str, torch.dtype],
) -> Bank:
    stored = {
        name: torch.from_numpy(raw).view(dtype).view(tensors[name].stored_shape).to(device)
        for name, (raw, dtype, device) in sent.items()
    }
    return _unpickled(kind, tensors, stored, empty)


def rebuilt(kind: type[Bank], tensors: Mapping[str, GappedTensor], stored: Mapping[str, Tensor]) -> Bank:
    """A bank of these stored rows, on the devices that they are on."""
    bank = kind.on(tensors, {name: rows.device for name, rows in stored.items()})
    for name, rows in stored.items():
        bank.put(name, rows)
    return bank


def _unpickled(
    kind: type[Bank],
    tensors: Mapping[str, GappedTensor],
    stored: Mapping[str, Tensor],
    empty: Mapping[str, torch.dtype],
) -> Bank:
    device = next((rows.device for rows in stored.values()), torch.device("cpu"))
    none = {n: torch.empty(tensors[n].stored_shape, dtype=dtype, device=device) for n, dtype in empty.items()}
    return rebuilt(kind, tensors, {**stored, **none})


HOW_TO_TRAIN = 'To train them, load the model by headshare.load(..., storage="owner").'
