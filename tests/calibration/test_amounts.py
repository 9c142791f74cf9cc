"""Amounts as people write them."""

from fractions import Fraction

import pytest

from headshare.calibration.amounts import Amount, in_units
from headshare.errors import OptionError


@pytest.mark.parametrize(
    ("text", "of_a_thousand"),
    [
        ("60%", 600),
        (" 12.5 % ", 125),
        ("250", 250),
        ("250B", 250),
        ("4GB", 4 * 10**9),
        ("4gb", 4 * 10**9),
        ("1.5 MB", 1_500_000),
        ("4GiB", 4 * 2**30),
        ("3KiB", 3072),
    ],
)
def test_an_amount_is_a_share_or_a_size(text: str, of_a_thousand: int) -> None:
    assert Amount.parse(text, "to save").of(1000) == of_a_thousand


@pytest.mark.parametrize("text", ["", "abc", "-5%", "1e9", "1/3", "nan", "4 G", "5XB", "5%%", "5 MB more", "1.2.3MB"])
def test_anything_else_is_refused_with_what_to_give(text: str) -> None:
    with pytest.raises(OptionError, match=r"no amount to shrink to\. Give a share such as 10%"):
        Amount.parse(text, "to shrink to")


def test_a_share_is_exact() -> None:
    assert Amount.parse("33.333333333%", "").of(3) == Fraction(33333333333, 10**11) * 3


@pytest.mark.parametrize("count", [0, 999, 1000, 12_345, 538_090_408, 4 * 10**9, 2 * 10**15])
def test_bytes_are_written_so_that_they_can_be_read_again(count: int) -> None:
    again = Amount.parse(in_units(count).replace(",", ""), "").of(1)
    assert abs(again - count) <= max(0.05 * 1000 ** (len(str(count)) // 3 - 1), count * 0.05)
