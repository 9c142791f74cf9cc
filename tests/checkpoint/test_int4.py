"""Numbers of four bits are packed into words as compressed-tensors packs them."""

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headshare.checkpoint.int4 import unpack
from support.packed import pack


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
def test_numbers_are_packed_as_compressed_tensors_packs_them(rows: int, words: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-8, 8, (rows, 8 * words), generator=draw, dtype=torch.int8)
    assert pack(numbers).equal(pack_to_int32(numbers, 4))
    assert unpack_from_int32(pack(numbers), 4, numbers.shape).equal(numbers)
    scale = torch.rand(rows, words, generator=draw).half()
    wanted = numbers.float() * scale.float().repeat_interleave(8, dim=1)
    assert unpack(pack(numbers), scale, torch.float32).equal(wanted)


def test_no_row_is_packed_too() -> None:
    none = torch.empty(0, 32, dtype=torch.int8)
    assert unpack(pack(none), torch.empty(0, 2).half(), torch.bfloat16).shape == (0, 32)


def tensor_of(numbers: list[int]) -> Tensor:
    return torch.tensor([numbers], dtype=torch.int8)


def test_a_word_by_hand() -> None:
    """Eight numbers, plus eight, from the lowest four bits up."""
    word = pack(tensor_of([-8, -7, 0, 1, 7, 2, 3, -1]))
    assert word.tolist() == [[0x7BAF9810]]
