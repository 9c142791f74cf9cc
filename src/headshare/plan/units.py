"""The words for what is shared: a unit, its parts, and a tie between two units. Knows no tensor and no file."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from headshare.errors import OptionError


class Part(StrEnum):
    """A unit's share of one weight matrix: rows of q, k, v, gate and up, columns of o and down."""

    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741 - the field's own name for the output projection
    GATE = "gate"
    UP = "up"
    DOWN = "down"


class Sublayer(StrEnum):
    """Which half of a transformer layer a unit belongs to."""

    ATTENTION = "attention"
    FFN = "ffn"


class HeadUnit(NamedTuple):
    """What is shared as one: a key/value head with the query heads that read it, or a group of neurons."""

    layer: int
    group: int

    def __str__(self) -> str:
        return f"layer {self.layer}, group {self.group}"


class Tie(NamedTuple):
    """The recipient gives up its own weights and uses the donor's."""

    recipient: HeadUnit
    donor: HeadUnit

    def __str__(self) -> str:
        return f"{self.recipient} takes its weights from {self.donor}"


ATTENTION_PARTS = (Part.Q, Part.K, Part.V, Part.O)
FFN_PARTS = (Part.GATE, Part.UP, Part.DOWN)
# matrices that read features out: units are their inputs
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
    """Which parts are shared, in each half of the layer."""

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
        found: set[Part] = set()
        for word in text.replace(",", "+").split("+"):
            found |= set(_parts_of(word.strip(), text))
        return cls(
            attention=tuple(part for part in ATTENTION_PARTS if part in found),
            ffn=tuple(part for part in FFN_PARTS if part in found),
        )

    def of(self, kind: Sublayer) -> tuple[Part, ...]:
        """Those of this half of the layer."""
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
