"""x times a weight whose rows stand in slots of a bank, as one torch operator with a derivative.

Two ways lead to the same product. A kernel reads the rows where they stand; or the rows are gathered into a whole
weight first, for a stock product. The kernel saves a copy of the weight; the stock product is the faster one where
many tokens share the cost of that copy. Which is faster is measured once on the device, for each shape and bucket of
token counts, at first use. It is not measured while a CUDA graph is recorded, which would fail: then kernels are used
up to 1024 tokens. (An estimate: there, a copy of 4096 x 4096 costs a third of the product's own time on an H200.)

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

KERNEL_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
UNMEASURED_MOST = 1024
INSTALL = 'pip install "headshare[kernels]"'


class BlockTable(NamedTuple):
    """A whole weight by reference: a bank, and the slots of it that hold the weight's rows, in order."""

    bank: Float[Tensor, "slots height width"]
    table: Int[Tensor, " n"]

    def gather(self) -> Float[Tensor, "rows width"]:
        """The weight's rows, copied out of the bank."""
        return self.bank.index_select(0, self.table).flatten(0, 1)


def slot_linear(
    x: Float[Tensor, "... inputs"], slots: BlockTable, bias: Float[Tensor, " outputs"] | None, *, across: bool
) -> Float[Tensor, "... outputs"]:
    """x W^T + bias, where W is the weight of these slots; with `across`, x W + bias. The bank gets no gradient.

    Raises:
        StorageError: if x is of another type of number than the bank.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor:
        product: Tensor = _operator(x, *slots, bias, across)
        return product
    return _product(x, *slots, bias, across)  # the same, without the dispatcher's time


def kernels_installed() -> bool:
    """Whether triton can be imported."""
    return find_spec("triton") is not None


@cache
def kernels() -> Any:
    """The module of kernels.

    Raises:
        StorageError: if triton is not installed.
    """
    if not kernels_installed():
        raise StorageError(f'storage indirect needs triton on a CUDA device: {INSTALL}, or load with storage="owner".')
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
    """The gradient of x is the other product with the same slots."""
    wanted, bias_wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    x = _operator(gradient, *ctx.saved_tensors, None, not ctx.across) if wanted else None
    bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if bias_wanted else None
    return x, None, None, bias, None


_operator.register_autograd(_backward, setup_context=_remember)
