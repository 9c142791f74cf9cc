"""Block pools, or banks: the only copy of all shared weights, and its guards against copies.

Knows tensors by name, and their tensor plans. Knows no model, no module and no library of models. Modules that read a
bank, such as those of `storage.pooled.frozen`, do the multiplication.
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

from headshare.plan.tensors import TensorPlan
from headshare.storage.pooled.product import BlockTable

LOGGER = logging.getLogger("headshare")


class PooledTensor(NamedTuple):
    """A tensor in a bank: its stored rows in the stock module's orientation, and the whole weight for the product.

    The whole weight is a tensor in the same orientation, or the table of the slots that hold its rows.
    """

    stored: Tensor
    whole: Tensor | BlockTable


class BlockPool(ABC):
    """The only copy of every unit that some projections read. It is filled tensor by tensor, then sealed."""

    def __init__(self, tensors: Mapping[str, TensorPlan]) -> None:
        self.tensors = tensors
        self._will_not_train_was_said = False
        self._held: dict[str, PooledTensor] = {}
        self._converted: weakref.WeakValueDictionary[torch.dtype, BlockPool] = weakref.WeakValueDictionary()

    @abstractmethod
    def put(self, name: str, stored: Tensor) -> Tensor:
        """Take in a tensor's stored rows. Returns the view of them that its module shows."""

    @abstractmethod
    def seal(self) -> dict[str, PooledTensor]:
        """Make the bank read-only. Returns the place of each of its tensors."""

    @classmethod
    def on(cls, tensors: Mapping[str, TensorPlan], devices: Mapping[str, torch.device]) -> "BlockPool":  # noqa: ARG003
        """An empty bank for tensors on these devices. A bank in CPU memory need not override this."""
        return cls(tensors)

    def held(self, name: str) -> PooledTensor:
        """The place of a tensor in a bank that is filled. The first call seals the bank."""
        if not self._held:
            self._held = self.seal()
        return self._held[name]

    def say_once_that_it_will_not_train(self) -> None:
        """Warn that the weights will not train, once for all modules that read this bank."""
        if not self._will_not_train_was_said:
            self._will_not_train_was_said = True
            LOGGER.warning("the shared weights of this model are read-only and will not train. %s", HOW_TO_TRAIN)

    def converted(self, dtype: torch.dtype) -> "BlockPool":
        """The bank of these weights in another type of number, the same for all modules that ask for it."""
        bank = self._converted.get(dtype)
        if bank is None:
            stored = {name: held.stored.to(dtype) for name, held in self._held.items()}
            bank = self._converted[dtype] = rebuilt(type(self), self.tensors, stored)
        return bank

    def __init_subclass__(cls) -> None:
        ForkingPickler.register(cls, _reduced_for_a_process)

    def __reduce__(self) -> tuple[Any, ...]:
        stored = {name: held.stored.clone(memory_format=torch.contiguous_format) for name, held in self._held.items()}
        empty = {name: rows.dtype for name, rows in stored.items() if not rows.numel()}  # which processes cannot share
        return _unpickled, (type(self), self.tensors, {n: r for n, r in stored.items() if n not in empty}, empty)


def _reduced_for_a_process(bank: BlockPool) -> tuple[Any, ...]:
    """The pickle of a bank for another process, with tensors as bytes.

    Tensors as such would be handed over by descriptors, which the sender must keep alive.
    """
    _, (kind, tensors, stored, empty) = bank.__reduce__()
    sent = {
        name: (rows.cpu().flatten().view(torch.uint8).numpy(), rows.dtype, rows.device) for name, rows in stored.items()
    }
    return _received, (kind, tensors, sent, empty)


def _received(
    kind: type[BlockPool],
    tensors: Mapping[str, TensorPlan],
    sent: Mapping[str, tuple[np.ndarray, torch.dtype, torch.device]],
    empty: Mapping[str, torch.dtype],
) -> BlockPool:
    stored = {
        name: torch.from_numpy(raw).view(dtype).view(tensors[name].stored_shape).to(device)
        for name, (raw, dtype, device) in sent.items()
    }
    return _unpickled(kind, tensors, stored, empty)


def rebuilt(kind: type[BlockPool], tensors: Mapping[str, TensorPlan], stored: Mapping[str, Tensor]) -> BlockPool:
    """A bank of this kind that holds these stored rows, on their devices."""
    bank = kind.on(tensors, {name: rows.device for name, rows in stored.items()})
    for name, rows in stored.items():
        bank.put(name, rows)
    return bank


def _unpickled(
    kind: type[BlockPool],
    tensors: Mapping[str, TensorPlan],
    stored: Mapping[str, Tensor],
    empty: Mapping[str, torch.dtype],
) -> BlockPool:
    device = next((rows.device for rows in stored.values()), torch.device("cpu"))
    none = {n: torch.empty(tensors[n].stored_shape, dtype=dtype, device=device) for n, dtype in empty.items()}
    return rebuilt(kind, tensors, {**stored, **none})


HOW_TO_TRAIN = 'To train them, load the model by headshare.load(..., storage="owner").'
