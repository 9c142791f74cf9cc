"""The record of rounding in the entry of config.json: how many inputs share a scale, and how numbers were found."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from headshare.errors import CheckpointError
from headshare.files.untrusted import Text, checked_record

METHOD = "headshare"
NEAREST = "to the nearest"


class Scheme(BaseModel):
    """How matrices of one count of bits are rounded: inputs of a row with one scale (None: all), and by what."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    group: int | None = Field(default=None, ge=1, le=2**16)
    how: Text = NEAREST


class Rounding(BaseModel):
    """The record of rounding: a scheme for each count of bits. Which matrix has which, its stored parts tell.

    Raises:
        CheckpointError: from `from_dict`, if a checkpoint's own record is not valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    int8: Scheme | None = None
    int4: Scheme | None = None

    @classmethod
    def from_dict(cls, entry: Any) -> "Rounding":
        """Check a record that somebody else wrote."""
        fields = {key: value for key, value in entry.items() if key != "quant_method"}
        rounding = checked_record(cls, fields, "the checkpoint's record of how its matrices are rounded")
        if rounding.int8 is None and rounding.int4 is None:
            raise CheckpointError("the checkpoint's record of how its matrices are rounded names no count of bits.")
        return rounding

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON data."""
        return {"quant_method": METHOD, **self.model_dump(mode="json", exclude_none=True)}

    def group(self, bits: int) -> int | None:
        """The inputs of a row that have one scale, in matrices of so many bits; None for all of a row.

        Raises:
            CheckpointError: if no matrix should have so many bits.
        """
        scheme = self._scheme(bits)
        if scheme is None:
            raise CheckpointError(f"config.json says nothing of matrices of {bits} bits, which the checkpoint has.")
        return scheme.group

    def is_to_nearest(self, bits: int) -> bool:
        """True if matrices of so many bits have the nearest numbers."""
        scheme = self._scheme(bits)
        return scheme is not None and scheme.how == NEAREST

    def _scheme(self, bits: int) -> Scheme | None:
        return {8: self.int8, 4: self.int4}[bits]

    def in_words(self) -> str:
        """The rounding in words, as a clause of a checkpoint's description."""
        parts = []
        for bits, scheme in ((8, self.int8), (4, self.int4)):
            if scheme is not None:
                each = "each row" if scheme.group is None else f"every {scheme.group} inputs of a row"
                parts.append(f"matrices of {bits} bits, {scheme.how}, a scale for {each}")
        return "; ".join(parts)


def is_rounding(entry: Any) -> bool:
    """True if a nested entry is such a record, and not that of another format."""
    return isinstance(entry, dict) and entry.get("quant_method") == METHOD
