"""Scales: from numbers to places in a panel, and the round numbers that mark them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

# steps between marks, times a power of ten
STEPS = (1, 2, 2.5, 5, 10)
# a logarithmic scale that spans less than this factor has marks at equal steps, others at these digits, the most first
SHORT = 3.0
DIGITS = ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))

# numbers that differ by less than this part of their size, or by less than this at all, are taken for one
CLOSE = 1e-9
LEAST = 1e-12


@dataclass(frozen=True)
class Scale:
    """A scale from the numbers `low` to `high` to the places `start` to `stop`, in pixels."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    @classmethod
    def over(
        cls, values: Iterable[float], start: float, stop: float, *, log: bool = False, margin: float = 0.06
    ) -> "Scale":
        """The scale of these numbers, with a margin at both ends."""
        low, high = _ends(list(values), log)
        if log:
            wider = (high / low) ** margin
            return cls(low / wider, high * wider, start, stop, log=True)
        return cls(low - margin * (high - low), high + margin * (high - low), start, stop)

    def __call__(self, value: float) -> float:
        """The place of a number, inside the scale."""
        low, high, at = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * min(1.0, max(0.0, (at - low) / (high - low)))

    def marks(self, most: int = 6) -> list[float]:
        """Round numbers within the scale, at most this many."""
        if not self.log or self.high / self.low < SHORT:
            return _steps(self.low, self.high, most)
        low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        found: list[float] = []
        for digits in DIGITS:
            found = [digit * 10.0**power for power in range(low, high + 1) for digit in digits]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) <= most:
                return found
        every = -(-len(found) // most)
        return found[::every]


def said(value: float) -> str:
    """A number as it stands beside a mark: short, without an exponent where that can be."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:,.10g}" if abs(value) >= 10_000 else f"{value:.6g}"


def _ends(values: list[float], log: bool) -> tuple[float, float]:
    """The least and the greatest of the numbers; further apart where no picture could tell them apart."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low > max(size * CLOSE, LEAST):
        return low, high
    if log:
        return low / 1.2, high * 1.2
    around = 0.2 * (size if size > LEAST else 1.0)
    return low - around, high + around


def _steps(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in STEPS if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]
