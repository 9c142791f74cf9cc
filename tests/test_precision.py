"""Products are as exact as asked for, inside a block and nowhere else."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

import headshare as hs
from headshare import precision
from headshare.matching import products
from headshare.precision import full_float32, short_products

Block = Callable[[], AbstractContextManager[None]]
BLOCKS = [full_float32, short_products]
MATMULS = [one for one in (getattr(torch.backends.mkldnn, "matmul", None), torch.backends.cuda.matmul) if one]
BY_BACKEND = len(MATMULS) == 2 and all(hasattr(one, "fp32_precision") for one in MATMULS)


def settings() -> tuple[str, ...]:
    """How each kind of processor multiplies; before torch 2.9, how both do."""
    if BY_BACKEND:
        return tuple(one.fp32_precision for one in MATMULS)
    return (torch.get_float32_matmul_precision(),)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """No test changes what the process does afterwards, by either name that torch has for it."""
    before = (*settings(), torch.get_float32_matmul_precision())
    yield
    assert (*settings(), torch.get_float32_matmul_precision()) == before


@pytest.fixture
def allowed() -> Iterator[None]:
    """A process that allows short products."""
    own, both = settings(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(both)
    for one, before in zip(MATMULS if BY_BACKEND else [], own, strict=BY_BACKEND):
        one.fp32_precision = before


def product() -> tuple[Tensor, Tensor]:
    """A product of float32 numbers, and the same in float64."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(192, 192, generator=generator) for _ in range(2))
    return left @ right, left.double() @ right.double()


def error() -> float:
    found, exact = product()
    assert found.dtype is torch.float32
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_leaves_the_settings_as_they_were(block: Block, allowed: None) -> None:
    before = (*settings(), torch.get_float32_matmul_precision())
    with block():
        pass
    assert (*settings(), torch.get_float32_matmul_precision()) == before
    with pytest.raises(ZeroDivisionError), block():
        raise ZeroDivisionError
    assert (*settings(), torch.get_float32_matmul_precision()) == before


@pytest.mark.parametrize("outer", BLOCKS)
@pytest.mark.parametrize("inner", BLOCKS)
def test_of_blocks_inside_one_another_the_innermost_counts(outer: Block, inner: Block) -> None:
    with inner():
        alone = settings()
    with outer():
        before = settings()
        with inner():
            assert settings() == alone
        assert settings() == before
        with pytest.raises(ZeroDivisionError), inner():
            raise ZeroDivisionError
        assert settings() == before
    assert (before == alone) is (outer is inner)


@pytest.mark.parametrize("outer", BLOCKS)
def test_full_products_keep_all_their_bits_whatever_is_allowed_around_them(outer: Block, allowed: None) -> None:
    with full_float32():
        exact = product()[0]
    with outer(), full_float32():
        with short_products():
            pass
        assert error() < 1e-6
        assert product()[0].equal(exact)


def test_short_products_are_near_and_as_short_as_the_processor_has_them() -> None:
    with short_products():
        lost = error()
    assert lost < 1e-2
    if BY_BACKEND and hasattr(torch.cpu, "_is_amx_tile_supported") and torch.cpu._is_amx_tile_supported():
        assert lost > 1e-4  # the sums of products of eight bits


@pytest.mark.skipif(not BY_BACKEND, reason="this torch has one setting for both")
def test_each_kind_of_processor_is_given_the_word_that_it_knows() -> None:
    with short_products():
        assert settings() == ("bf16", "tf32")
        with full_float32():
            assert settings() == ("ieee", "ieee")


@pytest.mark.parametrize(("block", "word"), [(full_float32, "highest"), (short_products, "medium")])
def test_an_older_torch_has_one_word_for_both(
    block: Block, word: str, allowed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_products", lambda cpu, cuda, both: precision._both(both))
    for before in ("high", "highest", "medium"):
        torch.set_float32_matmul_precision(before)
        with pytest.raises(ZeroDivisionError), block():
            assert torch.get_float32_matmul_precision() == word
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == before


class Multiplied(TorchFunctionMode):
    """Within it, how matrices of float32 were multiplied is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: set[tuple[str, ...]] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.matmul, Tensor.__matmul__) and args[0].dtype is torch.float32:
            self.settings.add(settings())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "block"), [(torch.bfloat16, short_products), (torch.float32, full_float32)])
def test_units_are_multiplied_in_full_but_for_those_that_are_stored_short(
    dtype: torch.dtype, block: Block, allowed: None, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "EXACT_PRODUCTS", 0)
    weights = load_file(llama / "model.safetensors")
    save_file({name: one.to(dtype) for name, one in weights.items()}, llama / "model.safetensors", {"format": "pt"})
    with hs.open_checkpoint(llama) as dense, Multiplied() as seen:
        hs.score_units(dense)
    with block():
        assert seen.settings == {settings()}
