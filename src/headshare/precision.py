"""How exact products of float32 matrices are: in full, or with the processor's shorter numbers where it has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 numbers keep all their bits, though the process may allow bfloat16 or TF32 ones."""
    with _products("ieee", "ieee", "highest"):
        yield


@contextmanager
def short_products() -> Iterator[None]:
    """Products of float32 numbers may drop bits: to bfloat16 on a CPU, to TF32 on a GPU, where those are faster. Sums
    stay float32."""
    with _products("bf16", "tf32", "medium"):
        yield


@contextmanager
def _products(cpu: str, cuda: str, both: str) -> Iterator[None]:
    backends: tuple[Any, ...] = (getattr(torch.backends.mkldnn, "matmul", None), torch.backends.cuda.matmul)
    settings = [one for one in backends if hasattr(one, "fp32_precision")]
    if len(settings) < len(backends):  # before torch 2.9 one setting was for both
        with _both(both):
            yield
        return
    before = [one.fp32_precision for one in settings]
    try:
        for one, precision in zip(settings, (cpu, cuda), strict=True):
            one.fp32_precision = precision
        yield
    finally:
        for one, precision in zip(settings, before, strict=True):
            one.fp32_precision = precision


@contextmanager
def _both(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
