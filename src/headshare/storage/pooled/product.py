"""The product of x and a weight whose rows stand in slots of a bank, as a torch operator with a derivative.

There are two ways to compute it. A kernel reads the rows in their slots, which saves a copy of the weight. Or the rows
are first gathered into a whole weight, for a stock product, which is faster where many tokens share the cost of that
copy. The faster way is measured on the device at first use, for each shape and bucket of token counts. A measurement
while a CUDA graph is recorded would fail; then kernels are used up to 1024 tokens. (An estimate: at that number, a copy
of 4096 x 4096 costs a third of the product's own time on an H200.)

On a CPU the rows are always gathered, unless triton interprets its kernels (TRITON_INTERPRET=1, for tests).
"""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from headshare.errors import StorageError
from headshare.installing import install

KERNEL_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
# The most tokens for which a kernel is used where its speed cannot be measured.
UNMEASURED_MOST = 1024


class BlockTable(NamedTuple):
    """A whole weight by reference: a bank, and its slots that hold the weight's rows, in order."""

    bank: Float[Tensor, "slots height width"]
    table: Int[Tensor, " n"]

    def gather(self) -> Float[Tensor, "rows width"]:
        """The weight's rows, copied out of the bank."""
        return self.bank.index_select(0, self.table).flatten(0, 1)


def slot_linear(
    x: Float[Tensor, "... inputs"], slots: BlockTable, bias: Float[Tensor, " outputs"] | None, *, across: bool
) -> Float[Tensor, "... outputs"]:
    """The product x W^T + bias, or x W + bias with `across`. W is the weight in these slots, and gets no gradient.

    Raises:
        StorageError: if x is of another type of number than the bank.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor:
        product: Tensor = _operator(x, *slots, bias, across)
        return product
    return _product(x, *slots, bias, across)  # the same product, without the dispatcher's time


def kernels_installed() -> bool:
    """Whether triton can be imported."""
    return find_spec("triton") is not None


@cache
def kernels() -> Any:
    """The module of kernels, imported at first use.

    Raises:
        StorageError: if triton is not installed.
    """
    if not kernels_installed():
        raise StorageError(
            f'storage indirect needs triton on a CUDA device: {install("kernels")}, or load with storage="owner".'
        )
    from headshare.storage.pooled import kernels

    return kernels


def _product(x: Tensor, bank: Tensor, table: Tensor, bias: Tensor | None, across: bool) -> Tensor:
    if x.dtype != bank.dtype:
        raise StorageError(f"this projection's weights are {bank.dtype} and its input is {x.dtype}. Convert the input.")
    if x.dtype in KERNEL_DTYPES and x.numel() and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        ours = kernels()
        shape = ours.shape_of(x, bank, table, across)
        if not x.is_cuda or _kernel_wins(shape, x, bank, table, bias):
            result: Tensor = ours.product(shape, x, bank, table, bias)
            return result
    return _gathered(x, bank, table, bias, across)


def _gathered(x: Tensor, bank: Tensor, table: Tensor, bias: Tensor | None, across: bool) -> Tensor:
    rows = BlockTable(bank, table).gather()
    return functional.linear(x, rows.T if across else rows, bias)


_KERNEL_WINS: dict[Any, bool] = {}


def _kernel_wins(shape: Any, x: Tensor, bank: Tensor, table: Tensor, bias: Tensor | None) -> bool:
    if shape not in _KERNEL_WINS:
        if torch.cuda.is_current_stream_capturing():
            return bool(x.numel() <= UNMEASURED_MOST * shape.inputs)
        ours = kernels()
        with torch.cuda.device(x.device):
            kernel = ours.milliseconds(lambda: ours.product(shape, x, bank, table, bias))
            gather = ours.milliseconds(lambda: _gathered(x, bank, table, bias, shape.across))
        _KERNEL_WINS[shape] = bool(kernel <= gather)
    return _KERNEL_WINS[shape]


@torch.library.custom_op(
    "headshare::slot_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor bank, Tensor table, Tensor? bias, bool across) -> Tensor",
)
def _operator(x: Tensor, bank: Tensor, table: Tensor, bias: Tensor | None, across: bool) -> Tensor:
    return _product(x, bank, table, bias, across)


@_operator.register_fake
def _fake(
    x: Tensor,
    bank: Tensor,
    table: Tensor,
    bias: Tensor | None,  # noqa: ARG001 - the signature is the operator's
    across: bool,
) -> Tensor:
    _, height, width = bank.shape
    return x.new_empty(*x.shape[:-1], width if across else table.shape[0] * height)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - the signature is torch's
    _, bank, table, _, across = inputs
    ctx.save_for_backward(bank, table)
    ctx.across = across


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    """Gradients of x and of the bias. That of x is the other product (`across` or not) with the same slots."""
    wanted = ctx.needs_input_grad[0]
    bias_wanted = ctx.needs_input_grad[3]
    x = _operator(gradient, *ctx.saved_tensors, None, not ctx.across) if wanted else None
    bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if bias_wanted else None
    return x, None, None, bias, None


_operator.register_autograd(_backward, setup_context=_remember)
