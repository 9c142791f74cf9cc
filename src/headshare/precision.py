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
def short_layers(device: torch.device) -> Iterator[None]:
    """Compute with bfloat16 numbers within this block, where the device multiplies those in hardware.

    Weights stay as they are, and so do sums and norms where torch keeps them. Elsewhere it is `short_products`.
    """
    with short_products(), torch.autocast(device.type, torch.bfloat16, enabled=_multiplies_bfloat16(device)):
        yield


def short_type(device: str | None) -> torch.dtype | None:
    """The type for weights of a model that only runs: bfloat16 where the device multiplies it, else None.

    None stands for a CPU; a name that is none of a single device, such as `auto`, gives None.
    """
    try:
        place = torch.device(device or "cpu")
    except RuntimeError:
        return None
    return torch.bfloat16 if _multiplies_bfloat16(place) else None


def _multiplies_bfloat16(device: torch.device) -> bool:
    """True if the device has instructions for products of bfloat16 numbers."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    found = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device.type == "cpu" and any(supported is not None and supported() for supported in found)


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
