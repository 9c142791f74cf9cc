"""Bits of a plan: the matrices that are rounded once all else of the plan is done, by their names in the dense model.

What a plan does to rows and columns is done first, so that sections know nothing of bits, nor bits of sections.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from headshare.defaults import MAX_NAME
from headshare.errors import PlanError

MAX_MATRICES = 100_000
Names = Annotated[tuple[Annotated[str, Field(max_length=MAX_NAME)], ...], Field(max_length=MAX_MATRICES)]


class PlannedBits(BaseModel):
    """The matrices that are rounded to 8 bits, a scale for each row, and to 4, a scale for every `group` inputs.

    All others keep the type that they have.

    Raises:
        PlanError: if a matrix is named twice, or there is a group without matrices in 4 bits, or the reverse.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    int8: Names = ()
    int4: Names = ()
    group: Annotated[int, Field(ge=1, le=2**16)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "PlannedBits":
        twice = [name for name, count in Counter(self.int8 + self.int4).items() if count > 1]
        if twice:
            raise PlanError(f"the plan says twice how many bits {twice[0]:.200} has.")
        if (self.group is None) == bool(self.int4):
            raise PlanError(f"matrices of 4 bits have a group of inputs; found {self.group} and {len(self.int4)}.")
        return self

    @property
    def of(self) -> Mapping[str, int]:
        """The bits of each matrix that is rounded, by name."""
        return dict.fromkeys(self.int8, 8) | dict.fromkeys(self.int4, 4)

    def in_words(self) -> str:
        """The bits of each part, with the count of layers that have them."""
        counts: dict[str, Counter[int]] = {}
        for name, bits in self.of.items():
            part = re.sub(r".*\.[0-9]+\.", "", name).removesuffix(".weight")
            counts.setdefault(part, Counter())[bits] += 1
        alike: dict[str, list[str]] = {}
        for part, count in counts.items():
            told = " and ".join(f"{bits} in {layers}" for bits, layers in sorted(count.items()))
            alike.setdefault(told, []).append(part)
        listed = "; ".join(f"{', '.join(parts)}: {told}" for told, parts in alike.items())
        group = "" if self.group is None else f", 4 with a scale for every {self.group} inputs"
        return f"bits (by count of layers{group}): {listed}; all else stays"
