"""Types of numbers in a GGUF file: which there are, and which tensor has which."""

from collections.abc import Mapping
from dataclasses import dataclass

from headshare.architecture.llama_cpp import ENGINE
from headshare.errors import OptionError

# numbers that are rounded together; rows are cut into them
BLOCK = 32


@dataclass(frozen=True)
class NumberType:
    """A type of number in GGUF files.

    Attributes:
        name: as on the command line; in capitals it is GGUF's.
        file_type: the number by which a file says that most of its matrices have this type.
        block, nbytes: so many numbers take so many bytes.
        finer: the type of the matrix that predictions are read from, if that is to be another.
    """

    name: str
    file_type: int
    block: int
    nbytes: int
    finer: str | None = None

    def size_of(self, numbers: int) -> int:
        """The bytes of so many numbers, which fill whole blocks."""
        return numbers // self.block * self.nbytes


_LISTED = (
    NumberType("f32", 0, 1, 4),
    NumberType("f16", 1, 1, 2),
    NumberType("bf16", 32, 1, 2),
    NumberType("q8_0", 7, BLOCK, 34),
    NumberType("q5_1", 9, BLOCK, 24, finer="q8_0"),
    NumberType("q5_0", 8, BLOCK, 22, finer="q8_0"),
    NumberType("q4_1", 3, BLOCK, 20, finer="q8_0"),
    NumberType("q4_0", 2, BLOCK, 18, finer="q8_0"),
)
NUMBER_TYPES: Mapping[str, NumberType] = {each.name: each for each in _LISTED}
# of matrices that are rounded to 8 bits already: it takes their whole numbers as they are
WHOLE_NUMBERS = NUMBER_TYPES["q8_0"]
# of vectors, which are small and which llama.cpp adds to or multiplies with sums in float32
VECTORS = NUMBER_TYPES["f32"]
# of matrices whose rows do not fill whole blocks
UNEVEN = NUMBER_TYPES["f16"]


def number_type(name: str) -> NumberType:
    """The type of this name.

    Raises:
        OptionError: if there is none.
    """
    if name not in NUMBER_TYPES:
        raise OptionError(
            f"the type '{name}' is not one of {', '.join(NUMBER_TYPES)}. {ENGINE}'s own quantizer makes others, "
            "such as Q4_K_M, of a file of f16."
        )
    return NUMBER_TYPES[name]


def type_of(shape: tuple[int, ...], wanted: NumberType, *, reads_out: bool = False) -> NumberType:
    """The type of a tensor of this shape in a file of this type; `reads_out` is for the matrix of predictions."""
    if len(shape) == 1:
        return VECTORS
    if reads_out and wanted.finer is not None:
        wanted = NUMBER_TYPES[wanted.finer]
    return UNEVEN if shape[-1] % wanted.block else wanted
