"""Projections that read their weights in a bank, which several modules read at once and none may write.

Many operations would silently give such a module a copy of its weight. They are done rightly here, or refused:
conversion rebuilds the bank, copies refer to the same bank, and pickles carry each unit once. Writes and training are
refused.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headshare.architecture.modules import ModuleMap
from headshare.errors import StorageError
from headshare.storage.pooled.bank import HOW_TO_TRAIN, BlockPool
from headshare.storage.pooled.product import BlockTable
from headshare.storage.pooled.readonly import ReadOnlyParameter, read_only
from headshare.storage.projection import SharedProjection, is_loaded


class FrozenProjection(SharedProjection):
    """A projection that reads a bank. `weight` shows its stored rows, read-only. Biases and scales are its own.

    Abstract: a storage implements `forward`, the product with the whole weight in the bank.
    """

    _whole: Tensor | BlockTable
    _shown: ReadOnlyParameter

    def __init__(self, dense: nn.Module, name: str, bank: BlockPool) -> None:
        super().__init__(dense, bank.tensors[name])
        self.name = name
        self.bank = bank

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. A `weight` that loading sets goes to the bank, and a read-only view of it stands here."""
        if name == "weight" and "_shown" in self.__dict__:
            raise StorageError(f"this weight is read-only, and cannot be replaced either. {HOW_TO_TRAIN}")
        if name == "weight" and "bank" in self.__dict__ and isinstance(value, Tensor) and not value.is_meta:
            self._parameters["weight"] = shown = ReadOnlyParameter(self.bank.put(self.name, value.detach()))
            # transformers marks what it loaded, and asks
            shown._is_hf_initialized = is_loaded(value)  # type: ignore[attr-defined]
        else:
            super().__setattr__(name, value)

    def read_bank(self) -> None:
        """Look this module's weight up in the bank, which is filled by now."""
        held = self.bank.held(self.name)
        self.__dict__["_whole"] = held.whole
        self._parameters["weight"] = self.__dict__["_shown"] = ReadOnlyParameter(held.stored)
        _keep_still(held.whole)

    def check_weight(self) -> None:
        """Refuse to run with a replaced weight, which the product would not read, or with inductor's freezing.

        Freezing would give every layer a copy of its weight.

        Raises:
            StorageError: saying which of the two it is.
        """
        if torch.compiler.is_compiling():
            if torch._inductor.config.freezing:
                raise StorageError(
                    "inductor's freezing copies every layer's weights, which undoes sharing. Switch it off."
                )
        elif self._parameters.get("weight") is not self._shown:
            raise StorageError(
                "the weight of a projection that reads a shared bank was replaced; its product does not read what was "
                f"put there. {HOW_TO_TRAIN}"
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        if prefix + "weight" in state_dict:
            raise StorageError(f"{prefix}weight is read-only: no other weights can be loaded into it. {HOW_TO_TRAIN}")
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.get(prefix + "weight")
        if isinstance(weight, Tensor) and not keep_vars and not weight.is_contiguous():
            destination[prefix + "weight"] = weight.contiguous()  # savers take nothing else

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenProjection":
        """Convert to another type of number, by a bank rebuilt once. Other devices and other numbers are refused."""
        # The effect of fn is learnt from a few numbers. The weight itself is kept from fn, which would copy it.
        weight = self._parameters["weight"]
        assert weight is not None
        dtype = weight.dtype if weight.is_meta else _converts_to(fn, weight)
        del self._parameters["weight"]
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters = {"weight": weight, **self._parameters}
        if dtype != weight.dtype:
            self.bank = self.bank.converted(dtype)
            self.read_bank()
        return self

    def train(self, mode: bool = True) -> "FrozenProjection":
        """Switch dropout and the like on or off. Shared weights do not train, and one warning says so."""
        if mode and not self.training:
            self.bank.say_once_that_it_will_not_train()
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenProjection":
        """A copy with biases of its own that reads the same bank."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        held = {key: self.__dict__.get(key) for key in ("bank", "_whole", "_shown") if key in self.__dict__}
        weight = self._parameters["weight"]
        memo[id(weight)] = weight  # nobody can write it, so both may show it
        twin.__dict__ = {
            key: held[key] if key in held else copy.deepcopy(value, memo) for key, value in self.__dict__.items()
        }
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """The state without the weight: a pickled model carries its bank, which carries each unit once."""
        state = self.__dict__.copy()
        for key in ("_whole", "_shown"):
            state.pop(key, None)
        weight = self._parameters["weight"]
        if weight is not None and not weight.is_meta:
            state["_parameters"] = {key: None if key == "weight" else p for key, p in self._parameters.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, and look the weight up in the bank that came along."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._parameters["weight"] is None:
            self.read_bank()


# Numbers that every floating-point type holds exactly, to learn what a function does to a weight.
PROBE = (1.0, -2.0, 0.5, 0.0)


class MappedProjection(FrozenProjection):
    """A projection whose whole weight is an ordinary tensor over the bank's memory, for the stock product."""

    _whole: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """The projection of x."""
        self.check_weight()
        return self.multiply(x, self._whole)

    def whole_weight(self) -> Tensor:
        """The dense weight, a read-only view of the bank."""
        return read_only(self._whole)


def _converts_to(fn: Callable[[Tensor], Tensor], weight: Tensor) -> torch.dtype:
    """The type of number that fn converts this weight to, learnt from a few numbers.

    Raises:
        StorageError: if fn moves the numbers to another device, or changes them.
    """
    numbers = torch.tensor(PROBE, dtype=weight.dtype, device=weight.device)
    converted = fn(numbers.clone())
    if converted.device != weight.device:
        raise StorageError(
            f"this model's shared weights are held on {weight.device} and cannot be moved to {converted.device}: "
            "each module would get a copy of its own. Load the model for that device (device_map=), or "
            'with storage="owner".'
        )
    if converted.shape != numbers.shape or not torch.equal(converted, numbers.to(converted.dtype)):
        raise StorageError(f"this function would change shared weights, which are read-only. {HOW_TO_TRAIN}")
    return converted.dtype


def install_frozen(
    model: nn.Module, bank: BlockPool, modules: ModuleMap, kind: type[FrozenProjection] = MappedProjection
) -> None:
    """Replace every module that holds one of the bank's tensors.

    Raises:
        StorageError: if a module holds several of them.
    """
    for name in bank.tensors:
        modules.replace(model, name, kind(modules.module(model, name), name, bank))


def read_banks(model: nn.Module) -> bool:
    """Seal the banks and let every module find its weight, once all are loaded. False if no module reads a bank."""
    frozen = [module for module in model.modules() if isinstance(module, FrozenProjection)]
    for module in frozen:
        module.read_bank()
    return bool(frozen)


def _keep_still(whole: Tensor | BlockTable) -> None:
    """Tell torch.compile that these tensors never move, so that graphs read them in place instead of a copy."""
    for tensor in whole if isinstance(whole, BlockTable) else (whole,):
        if tensor.is_cuda:
            torch._dynamo.mark_static_address(tensor)
