"""The whole suite runs under checks of types and shapes; here they are seen to check."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from headshare.matching.circuits import Circuits

put = jaxtyping.jaxtyped(typechecker=None)


@put
def product(left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    return left @ right if left.shape[0] < 9 else left


@put
def several(each: "list[Float[Tensor, 'rows']]", name: "str | None" = None) -> int:
    return len(each)


@put
@dataclass(frozen=True)
class Pair:
    first: Float[Tensor, " size"]
    second: Float[Tensor, " size"]
    of: "Pair | None" = None


@put
def numbers(count: int) -> Iterator[int]:
    yield from range(count)


WRONG: dict[str, Callable[[], Any]] = {
    "two sizes of one name": lambda: product(torch.zeros(2, 3), torch.zeros(4, 5)),
    "a result of another size": lambda: product(torch.zeros(9, 3), torch.zeros(3, 5)),
    "another type of numbers": lambda: product(torch.zeros(2, 3).long(), torch.zeros(3, 5)),
    "another number of dimensions": lambda: product(torch.zeros(3), torch.zeros(3, 5)),
    "a size inside a list": lambda: several([torch.zeros(2, 2)]),
    "a type that is written as text": lambda: several([], 3),  # type: ignore[arg-type]
    "sizes of fields": lambda: Pair(torch.zeros(2), torch.zeros(3)),
    "a plain type": lambda: numbers("3"),  # type: ignore[arg-type]
    "an argument of ours": lambda: Circuits(nn.Linear(1, 1), 3),  # type: ignore[arg-type, call-arg]
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_an_error(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"violates type hint|[Tt]ype-check error"):
        call()


def test_sizes_are_those_of_one_call() -> None:
    for rows, inner, columns in ((2, 3, 4), (5, 6, 7)):
        assert product(torch.zeros(rows, inner), torch.zeros(inner, columns)).shape == (rows, columns)
    assert several([torch.zeros(3)] * 2) == 2
    assert Pair(torch.zeros(2), torch.zeros(2), Pair(torch.zeros(3), torch.zeros(3))).of is not None
    assert list(numbers(2)) == [0, 1]
