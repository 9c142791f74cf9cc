"""Match functions: scores of all pairs of units from their inner products. Higher means more alike.

A match function gets the inner products part by part, and never the weights: all cosines follow from the products. One
of circuits gets the inner products of W_q^T W_k in their place.
To add one, decorate a function and give it a test and a line in the docs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headshare.defaults import MAX_NAME
from headshare.errors import OptionError
from headshare.plan.units import FFN_PARTS, Part, Sublayer

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Products = Mapping[str, Float[Tensor, "units units"]]
    MatchingScores = Float[Tensor, "units units"]
else:
    Products = MatchingScores = Any  # the command line takes its choices from here, and has no time to import torch


# the name of the products of circuits, beside those of parts
CIRCUIT = "circuit"


@dataclass(frozen=True)
class MatchFunction:
    """A named match function, the parts it reads, and whether each part is matched, and tied, on its own.

    A function of `circuits` is given the products of W_q^T W_k alone, under the name CIRCUIT.
    """

    name: str
    kind: Sublayer
    parts: tuple[Part, ...]
    score: Callable[[Products], MatchingScores]
    separate: bool = False
    circuits: bool = False


MATCH_FUNCTIONS: dict[str, MatchFunction] = {}


def match_function(
    name: str, *parts: Part, kind: Sublayer = Sublayer.ATTENTION, separate: bool = False, circuits: bool = False
) -> Callable[[Callable[[Products], MatchingScores]], Callable[[Products], MatchingScores]]:
    """Register a match function under a name; `parts` are those whose inner products it needs.

    Raises:
        OptionError: if the name is longer than a plan can hold.
    """
    if len(name) > MAX_NAME:
        raise OptionError(f"a match function's name has at most {MAX_NAME} characters; this one has {len(name)}.")

    def register(score: Callable[[Products], MatchingScores]) -> Callable[[Products], MatchingScores]:
        MATCH_FUNCTIONS[name] = MatchFunction(name, kind, parts, score, separate, circuits)
        return score

    return register


def cosine(products: Products, *parts: str) -> MatchingScores:
    """Cosine of the concatenated, flattened parts (arXiv 2402.11819, Eq. 3), signed. A zero unit has cosine 0."""
    import torch

    total = torch.stack([products[part] for part in parts]).sum(dim=0)
    norms = total.diagonal().clamp(min=0).sqrt()
    scale = norms[:, None] * norms[None, :]
    return torch.where(scale > 0, total / scale, torch.zeros_like(total))


@match_function("qk", Part.Q, Part.K)
def qk(products: Products) -> MatchingScores:
    """Cosine of queries and keys, the parts that decide where a head looks: the paper's choice."""
    return cosine(products, Part.Q, Part.K)


@match_function("q", Part.Q)
def q(products: Products) -> MatchingScores:
    """Cosine of the queries alone."""
    return cosine(products, Part.Q)


@match_function("k", Part.K)
def k(products: Products) -> MatchingScores:
    """Cosine of the keys alone."""
    return cosine(products, Part.K)


@match_function("v", Part.V)
def v(products: Products) -> MatchingScores:
    """Cosine of the values alone."""
    return cosine(products, Part.V)


@match_function("qkv", Part.Q, Part.K, Part.V)
def qkv(products: Products) -> MatchingScores:
    """Cosine of queries, keys and values: all that a head reads from the hidden states."""
    return cosine(products, Part.Q, Part.K, Part.V)


@match_function("circuit", Part.Q, Part.K, circuits=True)
def circuit(products: Products) -> MatchingScores:
    """Cosine of W_q^T W_k, by which a head scores tokens, with the scale of the norm before it folded in."""
    return cosine(products, CIRCUIT)


@match_function("separate", Part.Q, Part.K, Part.V, separate=True)
def separate(products: Products) -> MatchingScores:
    """Cosine of a single part. It is called once for each of q, k and v, with that part's products only."""
    return cosine(products, *products)


@match_function("ffn", *FFN_PARTS, kind=Sublayer.FFN)
def ffn(products: Products) -> MatchingScores:
    """Cosine of the feed-forward's input weights: gate and up where both are there, else up."""
    return cosine(products, *(part for part in (Part.GATE, Part.UP) if part in products))


def get_match_function(name: str) -> MatchFunction:
    """Look a match function up by its name.

    Raises:
        OptionError: naming those that exist.
    """
    if name not in MATCH_FUNCTIONS:
        raise OptionError(f"there is no match function '{name}'. There are: {', '.join(MATCH_FUNCTIONS)}.")
    return MATCH_FUNCTIONS[name]
