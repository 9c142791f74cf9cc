"""Units of sharing: a unit, its parts, and a tie between two units. This module knows no tensor and no file."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from headshare.errors import OptionError


class Part(StrEnum):
    """The part of a weight matrix that belongs to a unit: rows of q, k, v, gate and up, columns of o and down."""

    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741 - the field's own name for the output projection
    GATE = "gate"
    UP = "up"
    DOWN = "down"


class Sublayer(StrEnum):
    """The sublayer of a transformer layer that a unit belongs to."""

    ATTENTION = "attention"
    FFN = "ffn"


class HeadUnit(NamedTuple):
    """The unit that is shared as one: a key/value head with the query heads that read it, or a group of neurons."""

    layer: int
    group: int

    def __str__(self) -> str:
        return f"layer {self.layer}, group {self.group}"


class Tie(NamedTuple):
    """A tie between two units: the recipient gives up its own weights and uses the donor's."""

    recipient: HeadUnit
    donor: HeadUnit

    def __str__(self) -> str:
        return f"{self.recipient} takes its weights from {self.donor}"


ATTENTION_PARTS = (Part.Q, Part.K, Part.V, Part.O)
FFN_PARTS = (Part.GATE, Part.UP, Part.DOWN)
# output projections: units are their inputs
READOUTS = (Part.O, Part.DOWN)

_NAMED_SETS: dict[str, tuple[Part, ...]] = {
    "ffn": FFN_PARTS,
    "gateup": (Part.GATE, Part.UP),
    "gate": (Part.GATE,),
    "up": (Part.UP,),
    "down": (Part.DOWN,),
}


@dataclass(frozen=True)
class Parts:
    """The parts that are shared, in each sublayer."""

    attention: tuple[Part, ...] = ()
    ffn: tuple[Part, ...] = ()

    @classmethod
    def parse(cls, text: "str | Parts") -> "Parts":
        """Read `qkv`, `qk`, `qkvo`, `ffn`, `gateup`, or several joined by `+`: `qkvo+ffn`. Parts pass through.

        Raises:
            OptionError: if a letter or a word is not a part.
        """
        if isinstance(text, Parts):
            return text
        named: set[Part] = set()
        for word in text.replace(",", "+").split("+"):
            named |= set(_parts_of(word.strip(), text))
        return cls(
            attention=tuple(part for part in ATTENTION_PARTS if part in named),
            ffn=tuple(part for part in FFN_PARTS if part in named),
        )

    def of(self, kind: Sublayer) -> tuple[Part, ...]:
        """The parts that belong to this sublayer."""
        return self.attention if kind is Sublayer.ATTENTION else self.ffn

    def __str__(self) -> str:
        ffn = "ffn" if self.ffn == FFN_PARTS else "+".join(self.ffn)
        return "+".join(filter(None, ("".join(self.attention), ffn)))


def _parts_of(word: str, text: str) -> tuple[Part, ...]:
    if word in _NAMED_SETS:
        return _NAMED_SETS[word]
    letters = {str(part): part for part in ATTENTION_PARTS}
    if not word or any(letter not in letters for letter in word):
        raise OptionError(
            f"'{text}' does not name parts. Use letters of q, k, v, o (such as qkv or qkvo), "
            "ffn, gateup, or several joined by + (such as qkvo+ffn)."
        )
    return tuple(letters[letter] for letter in word)
