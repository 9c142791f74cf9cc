"""Triton kernels that multiply with a weight whose rows stand in slots of a bank. Needs the package triton.

A tile looks its slots up once where these hold rows of outputs, and once a step where they hold input channels. From
there on it reads rows as a dense product does. One kernel is for a single token, where memory is the limit. The other
runs on tensor cores. The fastest sizes of tiles are measured on the device at first use of a shape, and remembered.

`no_type_check` keeps run-time type checkers, which the test suite switches on, away from what triton compiles.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BUCKETS = (1, 16, 64, 256, 1024, 4096)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TILES_HIGH = tl.constexpr(8)


@triton.jit
@no_type_check
def _bank_rows(table, first, COUNT: tl.constexpr, TOTAL: tl.constexpr, HEIGHT: tl.constexpr):
    """Rows of the bank that hold COUNT rows, from `first` on, of a whole weight of TOTAL. int64, shape COUNT."""
    steps = tl.arange(0, COUNT)
    if HEIGHT % COUNT == 0:  # all of them in one slot
        slot = tl.load(table + first // HEIGHT).to(tl.int64)
        rows = slot * HEIGHT + first % HEIGHT + steps
    else:
        whole = first + steps
        slots = tl.load(table + whole // HEIGHT, mask=whole < TOTAL, other=0).to(tl.int64)
        rows = slots * HEIGHT + whole % HEIGHT
    return rows


@triton.jit
@no_type_check
def _inside(index, TOTAL: tl.constexpr, STEP: tl.constexpr):
    """The mask of indices below TOTAL. The compiler knows it to be all of them where whole steps fill TOTAL."""
    return (index < TOTAL) | (TOTAL % STEP == 0)


@triton.jit
@no_type_check
def _weights(
    bank,
    table,
    rows,
    n,
    first,
    N: tl.constexpr,
    K: tl.constexpr,
    HEIGHT: tl.constexpr,
    ACROSS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The weights from input channels [first, first + BK) to outputs n, in `rows` of the bank. Shape: BK x BN."""
    k = first + tl.arange(0, BK)
    inside = _inside(k, K, BK)[:, None] & _inside(n, N, BN)[None, :]
    if ACROSS:
        place = _bank_rows(table, first, BK, K, HEIGHT)[:, None] * N + n[None, :]
    else:
        place = rows[None, :] * K + k[:, None]
    return tl.load(bank + place, mask=inside, other=0.0)


@triton.jit
@no_type_check
def _vector_product(
    x,
    bank,
    table,
    bias,
    y,
    N: tl.constexpr,
    K: tl.constexpr,
    HEIGHT: tl.constexpr,
    ACROSS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute a tile of BN outputs of the only token, summed in float32."""
    first_n = tl.program_id(0) * BN
    n = first_n + tl.arange(0, BN)
    # where slots hold rows of outputs, all steps read the same rows: they are looked up once
    rows = n if ACROSS else _bank_rows(table, first_n, BN, N, HEIGHT)
    products = tl.zeros((BK, BN), tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        inputs = tl.load(x + k, mask=_inside(k, K, BK), other=0.0).to(tl.float32)
        weights = _weights(bank, table, rows, n, first, N, K, HEIGHT, ACROSS, BN, BK)
        products += inputs[:, None] * weights.to(tl.float32)
    # threads sum among each other only once, after the last step
    total = tl.sum(products, axis=0)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + n, total.to(y.dtype.element_ty), mask=n < N)


@triton.jit
@no_type_check
def _matrix_product(
    x,
    bank,
    table,
    bias,
    y,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    HEIGHT: tl.constexpr,
    ACROSS: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute a tile of BM tokens by BN outputs, summed in float32."""
    # neighbouring programs work on neighbouring tiles, so that they find each other's weights in the cache
    tiles_n = tl.cdiv(N, BN)
    at = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(at // tiles_n, at % tiles_n, tl.cdiv(tokens, BM), tiles_n, _TILES_HIGH)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    rows = n if ACROSS else _bank_rows(table, tile_n * BN, BN, N, HEIGHT)
    # tokens beyond the last read the last one, and are masked when the tile is stored
    tokens_at = x + tl.minimum(m, tokens - 1).to(tl.int64)[:, None] * K
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        inputs = tl.load(tokens_at + k[None, :], mask=_inside(k, K, BK)[None, :], other=0.0)
        weights = _weights(bank, table, rows, n, first, N, K, HEIGHT, ACROSS, BN, BK)
        if WIDEN:  # triton's interpreter cannot multiply matrices of bfloat16
            inputs = inputs.to(tl.float32)
            weights = weights.to(tl.float32)
        total = tl.dot(inputs, weights, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    places = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(places, total.to(y.dtype.element_ty), mask=(m < tokens)[:, None] & (n < N)[None, :])


class Shape(NamedTuple):
    """The key for the choice of tiles: a bucket of token counts, the product's sizes, and its type of number."""

    tokens: int
    outputs: int
    inputs: int
    height: int
    across: bool
    dtype: torch.dtype
    device: torch.device


def shape_of(
    x: Float[Tensor, "... inputs"], bank: Float[Tensor, "slots height width"], table: Int[Tensor, " n"], across: bool
) -> Shape:
    """The shape of this product. Token counts fall into buckets, of which the last is open."""
    _, height, width = bank.shape
    rows = table.numel() * height
    inputs = x.shape[-1]
    tokens = x.numel() // inputs
    bucket = next((most for most in BUCKETS if tokens <= most), BUCKETS[-1])
    return Shape(bucket, width if across else rows, inputs, height, across, x.dtype, x.device)


# Tiles as (BM, BN, BK, warps, stages): tokens, outputs and input channels. The best guess comes first.
Tiles = tuple[int, int, int, int, int]
_VECTOR: tuple[Tiles, ...] = (
    *((1, 4, 1024, 4, 1), (1, 8, 512, 4, 1), (1, 2, 2048, 4, 1), (1, 4, 2048, 8, 1), (1, 16, 256, 4, 1)),
)
_VECTOR_ACROSS: tuple[Tiles, ...] = (
    *((1, 16, 512, 4, 1), (1, 32, 512, 8, 1), (1, 16, 1024, 8, 1), (1, 32, 256, 4, 1), (1, 16, 256, 4, 1)),
)
_MATRIX: dict[int, tuple[Tiles, ...]] = {
    16: ((16, 32, 128, 4, 4), (16, 16, 256, 4, 3), (16, 32, 256, 4, 3), (16, 64, 128, 4, 4)),
    64: ((64, 32, 128, 4, 4), (64, 64, 64, 4, 4), (32, 64, 64, 4, 5), (64, 128, 64, 4, 3)),
    256: ((64, 64, 64, 4, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 128, 64, 8, 3)),
    1024: ((128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (128, 64, 64, 4, 4), (128, 256, 64, 8, 3)),
    4096: ((128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 32, 4, 4)),
}


def candidates(shape: Shape) -> list[triton.Config]:
    """Sizes of tiles that are worth trying for this shape, the best guess first. None is larger than the product."""
    tiles = _MATRIX[shape.tokens] if shape.tokens > 1 else _VECTOR_ACROSS if shape.across else _VECTOR
    largest = 128 * 128 if shape.dtype == torch.float32 else 128 * 256  # what registers hold
    configs = [_config(shape, *sizes) for sizes in tiles if sizes[0] * sizes[1] <= largest]
    return list({str(config): config for config in configs}.values())


def _config(shape: Shape, bm: int, bn: int, bk: int, warps: int, stages: int) -> triton.Config:
    """The configuration of these tiles, cut to the product's sizes.

    float32 takes half the depth, to fit into the same shared memory.
    """
    depth = bk // 2 if shape.dtype == torch.float32 else bk
    least = 1 if shape.tokens == 1 else 16
    sizes = {
        "BN": max(least, min(bn, triton.next_power_of_2(shape.outputs))),
        "BK": max(least, min(depth, triton.next_power_of_2(shape.inputs))),
    }
    if shape.tokens > 1:
        sizes["BM"] = bm
    ahead = (stages - 1) * (1 + shape.across)  # looking slots up takes as many stages again as reading their rows
    return triton.Config(sizes, num_warps=warps, num_stages=ahead + 1)


_CHOSEN: dict[Shape, triton.Config] = {}


def product(
    shape: Shape,
    x: Float[Tensor, "... inputs"],
    bank: Float[Tensor, "slots height width"],
    table: Int[Tensor, " n"],
    bias: Float[Tensor, " outputs"] | None,
) -> Float[Tensor, "... outputs"]:
    """The product of x and the whole weight, plus bias. Tiles are measured on the device at first use of the shape.

    Nothing is measured while a CUDA graph is recorded. The best guess then serves until the shape is next used outside
    of a recording.
    """
    flat = x.reshape(-1, shape.inputs).contiguous()
    y = flat.new_empty(flat.shape[0], shape.outputs)
    tensors = (flat, bank, table, bias, y)
    kernel = _vector_product if shape.tokens == 1 else _matrix_product
    config = _CHOSEN.get(shape)
    with torch.cuda.device(x.device if x.is_cuda else -1):
        if config is None and x.is_cuda and not torch.cuda.is_current_stream_capturing():
            tuner = triton.autotune(candidates(shape), key=[], do_bench=_quantiles)(kernel)
            _launch(tuner, shape, tensors)
            _CHOSEN[shape] = tuner.best_config
        else:
            _launch(kernel, shape, tensors, **(config or candidates(shape)[0]).all_kwargs())
    return y.view(*x.shape[:-1], shape.outputs)


def _launch(kernel: Any, shape: Shape, tensors: tuple[Tensor | None, ...], **tiles: Any) -> None:
    y = tensors[-1]
    assert y is not None
    tokens, outputs = y.shape
    sizes = {"N": outputs, "K": shape.inputs, "HEIGHT": shape.height, "ACROSS": shape.across, **tiles}
    sizes["enable_fp_fusion"] = True  # its default changes between versions of triton
    if shape.tokens == 1:
        kernel[lambda meta: (triton.cdiv(outputs, meta["BN"]),)](*tensors, **sizes)
    else:
        kernel[lambda meta: (triton.cdiv(tokens, meta["BM"]) * triton.cdiv(outputs, meta["BN"]),)](
            *tensors, tokens, WIDEN=INTERPRETED, **sizes
        )


def _quantiles(call: Callable[[], object], quantiles: tuple[float, ...]) -> Any:
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def milliseconds(call: Callable[[], object]) -> float:
    """The median time of this call on the current device, with a cold cache."""
    return float(_quantiles(call, (0.5, 0.2, 0.8))[0])
