"""Tensors that refuse to be written: the view that users get of weights that several layers read at once.

The guard stands on the parameter, never in the product: modules multiply with a plain tensor on the same memory.
Operators say in their schemas which arguments they write, and are stopped where one of these is guarded. Actions that
never become an operator (assigning attributes, handing memory to other libraries) are stopped by name.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn

from headshare.errors import StorageError

# Methods that end in _ and yet write no numbers.
HARMLESS = ("requires_grad_", "share_memory_", "detach_", "retain_grad")
# Attributes that may be set.
SETTABLE = ("grad", "_backward_hooks", "_post_accumulate_grad_hooks", "requires_grad")
# Operators that write (running statistics) and do not say so in their schemas.
UNMARKED = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")


class ReadOnlyTensor(Tensor):
    """A tensor, or a view of one, whose memory several layers share. It can be read; writing raises StorageError."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        _refuse_by_name(func, args, kwargs)
        # Memory that leaves torch cannot be guarded: other libraries get a copy, or an array marked as read-only.
        with torch._C.DisableTorchFunctionSubclass():
            if func in (Tensor.share_memory_, Tensor.detach_):
                return args[0]
            if func is Tensor.__dlpack__:
                return _plain_copy(args[0]).__dlpack__(*args[1:], **kwargs)
            if func in (Tensor.numpy, Tensor.__array__, Tensor.tolist):
                return _not_writeable(func(_plain(args[0]), *args[1:], **kwargs))
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own signature lacks func
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        # every argument that the operator writes, by its schema
        written = [
            kwargs.get(argument.name, args[n] if n < len(args) else None)
            for n, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if func._schema.name.removeprefix("aten::") in UNMARKED:
            written += args[3:5]
        if _guarded_in(written):
            raise _refusal(func._schema.name.removeprefix("aten::"))
        with torch._C._DisableTorchDispatch():
            result = func(*args, **kwargs)
        return _guarded(result, _guarded_in([*args, *kwargs.values()]))

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """The pickle of a plain tensor with the same numbers."""
        return _plain_copy(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A plain copy, with writable memory of its own."""
        copied: Tensor = memo.setdefault(id(self), _plain_copy(self))
        return copied

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Read-only, shared: {_plain_copy(self)!r}"


class ReadOnlyParameter(ReadOnlyTensor, nn.Parameter):
    """A parameter that no optimizer and no initialiser can change."""

    def __new__(cls, data: Tensor, requires_grad: bool | None = None) -> "ReadOnlyParameter":
        """A parameter on the memory of `data`, which is not copied.

        A caller that passes `requires_grad` wants to replace one parameter by another, which is refused.

        Raises:
            StorageError: if asked for `requires_grad`.
        """
        if requires_grad is not None:
            raise _refusal("replacing it")
        return Tensor._make_subclass(cls, data, False)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """The pickle of a plain parameter with the same numbers."""
        return nn.Parameter(_plain_copy(self), requires_grad=False).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A plain copy, with writable memory of its own."""
        copied: Tensor = memo.setdefault(id(self), nn.Parameter(_plain_copy(self), requires_grad=False))
        return copied


def read_only(tensor: Tensor) -> ReadOnlyTensor:
    """A guarded tensor on the same memory."""
    return tensor.as_subclass(ReadOnlyTensor)


def _plain(tensor: Tensor) -> Tensor:
    """A plain tensor on the same memory, without a guard."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
        return tensor.as_subclass(Tensor).detach()


def _plain_copy(tensor: Tensor) -> Tensor:
    return _plain(tensor).clone(memory_format=torch.contiguous_format)


def _not_writeable(result: Any) -> Any:
    if isinstance(result, np.ndarray):
        result.flags.writeable = False
    return result


def _refuse_by_name(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    if name == "__set__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute not in SETTABLE or (attribute == "requires_grad" and args[1]):
            raise _refusal(f"setting {attribute}")
    elif name == "requires_grad_":
        if args[1] if len(args) > 1 else kwargs.get("requires_grad", True):
            raise _refusal("training it")
    elif name.endswith("_") and not name.endswith("__") and name not in HARMLESS and _guarded_in(args[:1]):
        raise _refusal(name)


def _refusal(what: str) -> StorageError:
    return StorageError(
        f"this weight is read-only, since several layers read the one copy of it: {what} was refused. "
        'To train or change it, use headshare.load(..., storage="owner"); to change a copy, clone() it first.'
    )


def _guarded_in(values: Iterable[Any]) -> list[Tensor]:
    guarded: list[Tensor] = []
    for value in values:
        if isinstance(value, ReadOnlyTensor):
            guarded.append(value)
        elif isinstance(value, tuple | list):
            guarded += _guarded_in(value)
    return guarded


def _guarded(result: Any, sources: list[Tensor]) -> Any:
    """The result of an operator, with tensors that stand on guarded memory guarded too."""
    if type(result) in (tuple, list):
        return type(result)(_guarded(item, sources) for item in result)
    if not isinstance(result, Tensor) or isinstance(result, ReadOnlyTensor) or result.layout is not torch.strided:
        return result
    with torch._C.DisableTorchFunctionSubclass():
        ours = result.untyped_storage()._cdata
        shares = any(source.untyped_storage()._cdata == ours for source in sources)
    return read_only(result) if shares else result
