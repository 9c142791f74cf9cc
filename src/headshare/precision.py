"""Precision of float32 matrix products: in full, or with the processor's shorter numbers where it has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep all bits of float32 products within this block, though the process may allow bfloat16 or TF32."""
    with _products("ieee", "ieee", "highest"):
        yield


@contextmanager
def short_products() -> Iterator[None]:
    """Allow shorter float32 products within this block: bfloat16 on a CPU, TF32 on a GPU, where those are faster.

    Sums stay float32.
    """
    with _products("bf16", "tf32", "medium"):
        yield


@contextmanager
def _products(cpu: str, cuda: str, both: str) -> Iterator[None]:
    backends: tuple[Any, ...] = (getattr(torch.backends.mkldnn, "matmul", None), torch.backends.cuda.matmul)
    settings = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    if len(settings) < len(backends):  # before torch 2.9 one setting was for both
        with _both(both):
            yield
        return
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting, precision in zip(settings, (cpu, cuda), strict=True):
            setting.fp32_precision = precision
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@contextmanager
def _both(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
