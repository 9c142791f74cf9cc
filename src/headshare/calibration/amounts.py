"""Amounts as people write them: a share such as 20%, a size such as 4GB or 120 MiB, or a number of bytes."""

import re
from dataclasses import dataclass
from fractions import Fraction

from headshare.errors import OptionError

# bytes of each unit of size, by its name in lower case
UNITS = {"": 1, "b": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for ending, base in (("b", 1000), ("ib", 1024))
}
_AMOUNT = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*(%|[A-Za-z]{0,3})")


@dataclass(frozen=True)
class Amount:
    """An amount of something: a fraction of it, or a number of bytes whatever there is of it."""

    number: Fraction
    is_share: bool

    @classmethod
    def parse(cls, text: str, what: str) -> "Amount":
        """The amount that a text means. `what` it is an amount of is for the error alone, as in "to save".

        Raises:
            OptionError: if it is none.
        """
        match = _AMOUNT.fullmatch(text.strip())
        unit = match[2].lower() if match else None
        if match is None or (unit != "%" and unit not in UNITS):
            raise OptionError(
                f"{text!r:.40} is no amount {what}. Give a share such as 10%, a size such as 120MB, 4GB or 4GiB, or a "
                "number of bytes."
            )
        if unit == "%":
            return cls(Fraction(match[1]) / 100, is_share=True)
        return cls(Fraction(match[1]) * UNITS[match[2].lower()], is_share=False)

    def of(self, whole: int) -> Fraction:
        """The bytes of this amount, where there are so many in all."""
        return self.number * whole if self.is_share else self.number


def in_units(count: int) -> str:
    """A number of bytes in the largest unit that it has one of, in powers of 1000, as `Amount` reads it."""
    for unit in ("TB", "GB", "MB", "kB"):
        size = UNITS[unit.lower()]
        if abs(count) >= size:
            return f"{count / size:,.{1 if count < 1000 * size else 0}f} {unit}"
    return f"{count} B"
