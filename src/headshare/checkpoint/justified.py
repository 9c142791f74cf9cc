"""Numbers of config.json held against the tensors, before any library builds something of that size.

A configuration is a few lines that anybody can write, and a library that reads a million layers from it begins to build
them. The tensors in the headers are as large as their files: what they cannot justify is refused. Bounds are wide, and
hold only numbers that size something: neither tokens, positions that are computed, bases of rotations, nor seeds.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from headshare.checkpoint.header import TensorInfo
from headshare.errors import CheckpointError
from headshare.plan.plan import SharePlan

# modules that are built one by one, each of which has a tensor; what a few tensors may repeat; what nothing has
LAYERS = re.compile(r"(^|(?<!_per)_)(layers?|blocks?|depths?|stages?|levels?)$")
FEWEST_LAYERS, MOST_LAYERS = 256, 4096
# parts of one tensor, or modules within a layer
PARTS = re.compile(r"(^|_)(heads?|experts?|codebooks?|groups?)$")
FEWEST_PARTS = 1024
# a name for each is made as the configuration is read
LABELS = re.compile(r"(^|_)labels$")
FEWEST_LABELS = 2**16
# sides of a matrix
SIDES = re.compile(r"(^|_)(sizes?|dims?|width|channels?|rank|inner|embd|features?)$|^d_(model|ff|kv|inner)$")
FEWEST_SIDES = 2**22
# rows of a table, in a model that stores one
POSITIONS = re.compile(r"positions?(_embeddings)?$")
TABLE = re.compile(r"position|pos_emb|wpe")
FEWEST_POSITIONS = 2**16
# a side may be so many times the largest that is stored: parts of a fused or cut matrix, padding
TIMES = 16
# keys whose numbers are checked elsewhere, or are the names of labels
OTHER = ("quantization_config", "id2label", "label2id")
# numbers of a head, a mask or a table that a small checkpoint does not store
BESIDE = 2**24


def check_config(name: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a configuration with a number that sizes something and that no tensor justifies.

    `shapes` are those of the tensors in the dense model.

    Raises:
        CheckpointError: naming the key, the number and the limit.
    """
    largest = max((max(shape, default=1) for shape in shapes.values()), default=1)
    tables = [max(shape, default=1) for tensor, shape in shapes.items() if TABLE.search(tensor)]
    filled = sum(1 for shape in shapes.values() if math.prod(shape))
    limits = {
        LAYERS: min(max(FEWEST_LAYERS, filled), MOST_LAYERS),
        PARTS: max(FEWEST_PARTS, filled, largest),
        LABELS: max(FEWEST_LABELS, largest),
        SIDES: max(FEWEST_SIDES, TIMES * largest),
        POSITIONS: max(FEWEST_POSITIONS, TIMES * max(tables)) if tables else math.inf,
    }
    for key, number in _numbers(config):
        limit = next((limit for words, limit in limits.items() if words.search(key.lower())), math.inf)
        if number > limit:
            raise CheckpointError(
                f"config.json of {name} says {key}: {number:g}, but its {filled} tensors, of at most {largest} numbers "
                f"along an axis, are those of a model with {limit} at most. Correct it, or download the file again."
            )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Keys and numbers, those in nested configurations and lists too; a number in a list has the list's key."""
    left: list[tuple[str, Any]] = [(str(key), value) for key, value in config.items() if key not in OTHER]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += [(str(inner), each) for inner, each in value.items() if inner not in OTHER]
        elif isinstance(value, list):
            left += [(key, each) for each in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def justified_numbers(tensors: Mapping[str, TensorInfo], plan: SharePlan | None) -> int:
    """The most numbers that a model of these tensors can have, in all its parameters and buffers, dense.

    A byte of whole numbers may hold four of a rounded matrix. A tied head may have been left out, and what else a
    class has beside the stored tensors is small.
    """
    changed = {} if plan is None else {**plan.tensors, **plan.biases}
    count = 0
    for name, info in tensors.items():
        if name in changed:
            count += math.prod(changed[name].shape)
        elif info.torch_dtype.is_floating_point:
            count += math.prod(info.shape)
        else:
            count += 4 * info.nbytes
    return 2 * count + BESIDE
