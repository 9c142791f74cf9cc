"""A rounded matrix in memory, which torch's functions take in the place of a tensor. Knows no module."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headshare.checkpoint.header import TensorInfo
from headshare.checkpoint.rounding.numbers import dense, from_halves
from headshare.storage.products import product


class Held(NamedTuple):
    """What a module must know of one of its parameters that is rounded, beside its stored parts."""

    bits: int
    group: int | None
    in_out: bool
    shape: tuple[int, ...]
    guard: tuple[int, ...]

    @classmethod
    def of(cls, info: TensorInfo) -> "Held":
        """What a checkpoint's entry of the matrix tells."""
        parts = info.parts
        assert parts is not None, info.name
        return cls(parts.bits, parts.group, parts.in_out, info.shape, parts.guard.shape)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A rounded matrix in memory, which torch's functions take in the place of a tensor.

    Linear products and look-ups of rows are computed from the parts. For everything else, the matrix is unpacked first.
    """

    stored: Tensor
    scale: Tensor
    held: Held

    @property
    def shape(self) -> torch.Size:
        """The shape of the unpacked matrix."""
        return torch.Size(self.held.shape)

    @property
    def ndim(self) -> int:
        """Two."""
        return 2

    @property
    def dtype(self) -> torch.dtype:
        """The type of the scales, which is the model's."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """Where its parts are."""
        return self.stored.device

    @property
    def requires_grad(self) -> bool:
        """False: rounded numbers are not trained."""
        return False

    @property
    def T(self) -> "Matrix":  # noqa: N802 - torch's name
        """The matrix turned, with the same parts."""
        return replace(self, held=self.held._replace(in_out=not self.held.in_out, shape=self.held.shape[::-1]))

    def __len__(self) -> int:
        return self.held.shape[0]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) and key.step in (None, 1):
            start, stop, _ = key.indices(len(self))
            return self.narrow(0, start, max(0, stop - start))
        return self.dense()[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The unpacked matrix, in the type of its scales or in this one."""
        whole = dense(self._numbers(), self.scale, self.held.group, dtype or self.dtype)
        return whole.T if self.held.in_out else whole

    def narrow(self, axis: int, start: int, length: int) -> Any:
        """Some rows or columns: rounded still where they are outputs, or where a row has one scale."""
        of_outputs = axis % 2 == (1 if self.held.in_out else 0)
        if not of_outputs and (self.held.group is not None or self.held.bits != 8):
            return self.dense().narrow(axis, start, length)
        shape = tuple(length if number == axis % 2 else size for number, size in enumerate(self.held.shape))
        scale = self.scale[start : start + length] if of_outputs else self.scale
        stored = self.stored.narrow(0 if of_outputs else 1, start, length)
        return Matrix(stored, scale, self.held._replace(shape=shape))

    def product(self, x: Tensor) -> Tensor:
        """The product of inputs and this matrix, a row of which is an output."""
        if self.held.group is None and self.held.bits == 8:
            return product(x, self.stored, self.scale[:, 0])
        return nn.functional.linear(x, dense(self._numbers(), self.scale, self.held.group, x.dtype))

    def rows(self, places: Tensor) -> Tensor:
        """The unpacked rows at these places. Shape: (*places, inputs)."""
        flat = places.flatten()
        found = replace(self, stored=self.stored[flat], scale=self.scale[flat]).dense()
        return found.view(*places.shape, found.shape[-1])

    def _numbers(self) -> Tensor:
        inputs = self.held.shape[0] if self.held.in_out else self.held.shape[1]
        return self.stored if self.held.bits == 8 else from_halves(self.stored, inputs)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        own = _OWN.get(function)
        made = NotImplemented if own is None else own(*args, **kwargs)
        if made is not NotImplemented:
            return made
        return function(*map(_unpacked, args), **{key: _unpacked(value) for key, value in kwargs.items()})


# what a module's weight is: a tensor, or what stands for one. A type checker takes both for a tensor, as torch does.
if TYPE_CHECKING:
    Weight = Float[Tensor, "rows columns"]
else:
    Weight = Float[Tensor, "rows columns"] | Matrix


def _unpacked(value: Any) -> Any:
    if isinstance(value, Matrix):
        return value.dense()
    return type(value)(map(_unpacked, value)) if isinstance(value, list | tuple) else value


def _operator(name: str) -> Callable[..., Any]:
    """What an operator with a matrix on its left gives: that of the unpacked matrix."""

    def operate(matrix: Matrix, *others: Any) -> Any:
        return getattr(matrix.dense(), name)(*map(_unpacked, others))

    return operate


# Python looks operators up in the class
for _name in ("__add__", "__sub__", "__mul__", "__truediv__", "__matmul__", "__neg__"):
    setattr(Matrix, _name, _operator(_name))


def _is_of_outputs(weight: Any) -> bool:
    return isinstance(weight, Matrix) and not weight.held.in_out


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not _is_of_outputs(weight) or not isinstance(x, Tensor):
        return NotImplemented
    made = weight.product(x)
    return made if bias is None else made + bias


def _embedding(input: Any, weight: Any, *_: Any, max_norm: Any = None, **__: Any) -> Any:  # noqa: A002 - torch's name
    if not _is_of_outputs(weight) or max_norm is not None:
        return NotImplemented
    return weight.rows(input)


def _matmul(x: Any, weight: Any) -> Any:
    """x @ W.T: the product with a matrix that is turned, as it is stored."""
    return _linear(x, weight.T) if isinstance(weight, Matrix) and weight.held.in_out else NotImplemented


def _addmm(added: Any, x: Any, weight: Any, **more: Any) -> Any:
    if more or not isinstance(weight, Matrix) or not weight.held.in_out:
        return NotImplemented
    return _linear(x, weight.T, added)


_OWN: dict[Callable[..., Any], Callable[..., Any]] = {
    nn.functional.linear: _linear,
    nn.functional.embedding: _embedding,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
}
