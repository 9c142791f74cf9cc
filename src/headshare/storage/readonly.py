"""Tensors that refuse to be written: what users see of weights that several layers read at once.

The guard stands on the parameter, never in the product: modules multiply with a plain tensor on the same memory.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn

from headshare.errors import StorageError

HARMLESS = frozenset({"requires_grad_", "share_memory_", "detach_"})
SETTABLE = frozenset({"grad", "_backward_hooks", "_post_accumulate_grad_hooks", "requires_grad"})
OPERATORS = "setitem iadd isub imul itruediv ifloordiv imod ipow idiv iand ior ixor ilshift irshift imatmul"
WRITING_OPERATORS = frozenset(f"__{name}__" for name in OPERATORS.split())


class ReadOnlyTensor(Tensor):
    """A tensor, or a view of one, whose memory several layers share. Reading is free; writing raises StorageError."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        _refuse_writes(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func in (Tensor.share_memory_, Tensor.detach_):
                return args[0]
            if func in (Tensor.__dlpack__,):
                return func(args[0].clone(), *args[1:], **kwargs)
            result = func(*args, **kwargs)
        return _guarded(result, [tensor for tensor in _tensors((*args, *kwargs.values())) if _is_guarded(tensor)])

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickled as the plain tensor of its numbers."""
        return _plain_copy(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A copy is plain, writable memory of its own."""
        copied: Tensor = memo.setdefault(id(self), _plain_copy(self))
        return copied


class ReadOnlyParameter(ReadOnlyTensor, nn.Parameter):
    """A parameter that no optimizer and no initialiser can change."""

    def __new__(cls, data: Tensor) -> "ReadOnlyParameter":
        """Stand on the memory of `data`; nothing is copied."""
        return Tensor._make_subclass(cls, data, False)

    def __repr__(self) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"Read-only parameter, shared:\n{self.as_subclass(Tensor)!r}"

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickled as the plain parameter of its numbers."""
        return nn.Parameter(_plain_copy(self), requires_grad=False).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A copy is plain, writable memory of its own."""
        copied: Tensor = memo.setdefault(id(self), nn.Parameter(_plain_copy(self), requires_grad=False))
        return copied


def _plain_copy(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor).detach().clone(memory_format=torch.contiguous_format)


def _refuse_writes(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    if name == "__set__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute not in SETTABLE or (attribute == "requires_grad" and args[1]):
            raise _refusal(f"setting {attribute}")
        return
    if name == "requires_grad_" and (args[1] if len(args) > 1 else kwargs.get("requires_grad", True)):
        raise _refusal("training it")
    in_place = name in WRITING_OPERATORS or (name.endswith("_") and not name.endswith("__") and name not in HARMLESS)
    written = [kwargs.get("out"), *([*args[:1], kwargs.get("tensor"), kwargs.get("input")] if in_place else [])]
    if any(_is_guarded(tensor) for tensor in _tensors(written)):
        raise _refusal(name)


def _refusal(what: str) -> StorageError:
    return StorageError(
        f"this weight is read-only, since several layers read the one copy of it: {what} was refused. "
        'To train or change it, use headshare.load(..., storage="owner"); to change a copy, clone() it first.'
    )


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


def _is_guarded(tensor: Tensor) -> bool:
    return isinstance(tensor, ReadOnlyTensor)


def _guarded(result: Any, sources: list[Tensor]) -> Any:
    """The same result; tensors and arrays that stand on guarded memory are read-only too."""
    if isinstance(result, np.ndarray):
        result.flags.writeable = False
        return result
    if type(result) in (tuple, list):
        return type(result)(_guarded(item, sources) for item in result)
    if isinstance(result, Tensor) and not isinstance(result, ReadOnlyTensor) and _shares_memory(result, sources):
        return result.as_subclass(ReadOnlyTensor)
    return result


def _shares_memory(result: Tensor, sources: list[Tensor]) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        if result.layout is not torch.strided:
            return False
        ours = result.untyped_storage()._cdata
        return any(source.untyped_storage()._cdata == ours for source in sources)
