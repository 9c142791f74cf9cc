"""Products with whole numbers, and rounded matrices in the place of tensors: what a loop in float64 gives."""

import pytest
import torch
from torch import Tensor, nn

from headshare.checkpoint.rounding.numbers import dense, halves, to_nearest
from headshare.storage import products
from headshare.storage.matrix import Held, Matrix


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 8, 9, 30])
@pytest.mark.parametrize("inputs", [32, 33])
def test_products_are_sums_of_whole_numbers_scaled_once(
    inputs: int, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "AT_ONCE", 7 * 33)  # some rows at a time, the last ones fewer
    numbers, scale = to_nearest(drawn(45, inputs), 8, None, dtype)
    x = drawn(2, tokens, inputs).to(dtype)
    wanted = x.double() @ dense(numbers, scale, None, torch.float64).T
    found = products.product(x, numbers, scale[:, 0])
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=0.05)


def test_inputs_get_the_gradient_of_the_unpacked_matrix() -> None:
    numbers, scale = to_nearest(drawn(9, 5), 8, None, torch.float32)
    x = drawn(3, 5).requires_grad_()
    products.product(x, numbers, scale[:, 0]).square().sum().backward()
    own = x.detach().clone().requires_grad_()
    (own @ dense(numbers, scale, None, torch.float32).T).square().sum().backward()
    torch.testing.assert_close(x.grad, own.grad)


def test_another_device_brings_a_product_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, scale = to_nearest(drawn(9, 5), 8, None, torch.float32)
    monkeypatch.setitem(products.PRODUCTS, "cpu", lambda x, numbers, _: x.new_full((len(x), len(numbers)), 7.0))
    assert products.product(drawn(2, 3, 5), numbers, scale[:, 0]).equal(torch.full((2, 3, 9), 7.0))


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 4), (4, 4), (4, None)])
def test_torchs_functions_take_it_as_they_take_the_unpacked_matrix(bits: int, group: int | None) -> None:
    numbers, scale = to_nearest(drawn(6, 10), bits, group, torch.float32)
    stored = numbers if bits == 8 else halves(numbers)
    matrix = Matrix(stored, scale, Held(bits, group, False, (6, 10), (0, 10)))
    plain = dense(numbers, scale, group, torch.float32)
    turned = Matrix(stored, scale, Held(bits, group, True, (10, 6), (10, 0)))
    x, bias, places = drawn(3, 10), drawn(6), torch.tensor([[5, 0], [2, 2]])
    close = torch.testing.assert_close
    assert (matrix.shape, matrix.dtype, len(turned)) == (plain.shape, torch.float32, 10)
    close(nn.functional.linear(x, matrix, bias), nn.functional.linear(x, plain, bias))
    close(x @ matrix.T, x @ plain.T)
    close(torch.addmm(bias, x, turned), torch.addmm(bias, x, plain.T))
    assert nn.functional.embedding(places, matrix).equal(nn.functional.embedding(places, plain))
    assert matrix.T.dense().equal(plain.T)
    for axis, start, length in ((0, 1, 4), (1, 2, 5), (-1, 0, 3)):
        part = matrix.narrow(axis, start, length)
        wanted = plain.narrow(axis, start, length)
        assert torch.empty_like(wanted).copy_(part).equal(wanted)
        other = turned.narrow(1 - axis % 2, start, length)
        assert torch.empty_like(wanted.T).copy_(other).equal(wanted.T)
    assert matrix[1:3].dense().equal(plain[1:3])
    assert torch.cat([matrix, matrix], dim=1).equal(torch.cat([plain, plain], dim=1))
    assert matrix.view(3, 20).equal(plain.view(3, 20))
    assert (matrix * 2).equal(plain * 2)


def test_torchs_product_is_never_given_inputs_that_its_steps_do_not_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads past the end of such a matrix."""
    given = []
    real = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *tensors: given.append(tensors[1].shape) or real(*tensors))
    for inputs in (31, 32, 33, 48, 64):
        numbers, scale = to_nearest(drawn(5, inputs), 8, None, torch.bfloat16)
        products.product(drawn(2, inputs).bfloat16(), numbers, scale[:, 0])
    assert given == [(5, 32), (5, 64)]
