"""The result of an analysis: similarities of maps and of weights, how they agree, and the pairs that are most alike."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from headshare.attention.maps import MapProducts
from headshare.attention.ranks import over_pairs, pairs_of_layers, within_heads
from headshare.errors import EvaluationError
from headshare.files.untrusted import foreign, is_file, parse_json
from headshare.tables import Table

FILE = "attention.safetensors"
FORMAT = 1
MOST_NUMBERS = 2**28
Similarities = Float[Tensor, "heads heads"]


@dataclass(frozen=True)
class TextMaps:
    """Similarities of the maps of all pairs of heads, and of layers, on one text.

    `rest` are those of maps without the first token of each window. `tokens` were looked at, in windows of `window`,
    and the maps of `rows` of them compared.
    """

    text: str
    window: int
    tokens: int
    rows: int
    heads: Similarities
    rest: Similarities
    by_layer: Float[Tensor, "layers layers"]

    @classmethod
    def of(cls, text: str, window: int, products: MapProducts) -> "TextMaps":
        """The similarities that these products give."""
        heads, rest = (products.by_head(first=first) for first in (True, False))
        return cls(text, window, products.tokens, products.rows, heads, rest, products.by_layer())


@dataclass(frozen=True)
class Agreement:
    """How a match function agrees with maps: rank correlations, and the share of the heads most alike that it finds.

    `pairs` is over all pairs of heads of different layers, `within` the mean over heads, one at a time; `rest` is over
    all pairs, without the first token of each window. `found` is the share of the heads most alike by maps, as many as
    a layer has, that are among as many by weights. None where nothing varies.
    """

    match: str
    pairs: float | None
    within: float | None
    rest: float | None
    found: float


@dataclass(frozen=True)
class AttentionResult:
    """How alike the heads of a model attend on some texts, and how alike their weights are by each match function.

    Heads stand in the order of layers; each layer has `heads` of them.
    """

    model: str
    model_type: str
    layers: int
    heads: int
    texts: tuple[TextMaps, ...]
    weights: Mapping[str, Similarities]

    @property
    def maps(self) -> Similarities:
        """The similarities of maps, the mean over texts."""
        return torch.stack([text.heads for text in self.texts]).mean(0)

    @property
    def by_layer(self) -> Float[Tensor, "layers layers"]:
        """The similarities of layers' maps, the mean over texts."""
        return torch.stack([text.by_layer for text in self.texts]).mean(0)

    def agreements(self) -> list[Agreement]:
        """How each match function agrees with the maps, the mean over texts."""
        maps, rest = self.maps, torch.stack([text.rest for text in self.texts]).mean(0)
        return [
            Agreement(
                name,
                over_pairs(maps, scores, self.heads),
                within_heads(maps, scores, self.heads),
                over_pairs(rest, scores, self.heads),
                self._found(maps, scores),
            )
            for name, scores in self.weights.items()
        ]

    def stability(self) -> list[tuple[str, str, float | None, float | None]]:
        """For each two texts, the rank correlations of the similarities of maps on them: whole, and without the first
        token of each window."""
        return [
            (
                one.text,
                other.text,
                over_pairs(one.heads, other.heads, self.heads),
                over_pairs(one.rest, other.rest, self.heads),
            )
            for one, other in combinations(self.texts, 2)
        ]

    def most_similar(self, count: int = 10) -> list[tuple[int, int]]:
        """The pairs of heads of different layers whose maps are most alike: the later head first."""
        pairs = pairs_of_layers(self.layers, self.heads)
        alike = self.maps[pairs[:, 0], pairs[:, 1]]
        order = alike.argsort(descending=True, stable=True)[:count]
        return [(int(a), int(b)) for a, b in pairs[order]]

    def nearest(self, head: int, scores: Similarities) -> list[int]:
        """The heads of other layers most alike to this one by these scores, as many as a layer has, the best first."""
        own = torch.arange(len(scores)) // self.heads == head // self.heads
        masked = scores[head].masked_fill(own, float("-inf"))
        return [int(each) for each in masked.argsort(descending=True, stable=True)[: self.heads] if not own[each]]

    def _found(self, maps: Similarities, scores: Similarities) -> float:
        both = [
            len({*self.nearest(head, maps)} & {*self.nearest(head, scores)}) / self.heads for head in range(len(maps))
        ]
        return sum(both) / len(both)

    def named(self, head: int) -> str:
        """The layer and the number of a head, as `7.2`."""
        return "{}.{}".format(*divmod(head, self.heads))

    # ---- shown and kept

    def to_dict(self) -> dict[str, Any]:
        """The result under the names that `--json` prints, without the matrices of all pairs of heads."""
        return {
            **self._header(),
            "layers_alike": self.by_layer.tolist(),
            "agreements": [vars(each) for each in self.agreements()],
            "stability": [
                {"texts": [one, other], "pairs": pairs, "rest": rest} for one, other, pairs, rest in self.stability()
            ],
            "most_similar": [
                {
                    "heads": [list(divmod(head, self.heads)) for head in pair],
                    "maps": float(self.maps[pair]),
                    **{name: float(scores[pair]) for name, scores in self.weights.items()},
                }
                for pair in self.most_similar()
            ],
        }

    def tables(self) -> Iterator[tuple[str, Table]]:
        """Tables of the result, each with a sentence before it."""
        rows = [
            [each.match, *map(_signed, (each.pairs, each.within, each.rest)), f"{each.found:.2f}"]
            for each in self.agreements()
        ]
        yield (
            "Rank correlation of the similarity of weights with that of attention maps, over all pairs of heads of "
            "different layers, within one head (mean), and over all pairs without the first token of each window; and "
            f"of the {self.heads} heads most alike by maps, the share that is among as many by weights.",
            Table(["weights by", "all pairs", "within a head", "without first token", "found"], rows, words=(0,)),
        )
        stable = self.stability()
        if stable:
            lines = [[one, other, _signed(pairs), _signed(rest)] for one, other, pairs, rest in stable]
            yield (
                "Rank correlation of the similarities of maps on two texts.",
                Table(["text", "other text", "all pairs", "without first token"], lines, words=(0, 1)),
            )
        pairs = [
            [
                *map(self.named, pair),
                f"{float(self.maps[pair]):.3f}",
                *(f"{float(scores[pair]):+.3f}" for scores in self.weights.values()),
            ]
            for pair in self.most_similar()
        ]
        yield (
            "Heads of different layers whose maps are most alike (layer.head), and the similarity of their weights.",
            Table(["head", "other head", "maps", *self.weights], pairs, words=(0, 1)),
        )

    def in_words(self) -> str:
        """The tables for people, with what was looked at."""
        looked = ", ".join(f"{text.text} ({text.tokens:,} tokens in windows of {text.window})" for text in self.texts)
        parts = [f"{self.model}: {self.layers} layers of {self.heads} heads, on {looked}"]
        for words, table in self.tables():
            parts += [words, table.markdown()]
        return "\n\n".join(parts)

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model,
            "model_type": self.model_type,
            "layers": self.layers,
            "heads": self.heads,
            "texts": [
                {"text": text.text, "window": text.window, "tokens": text.tokens, "rows": text.rows}
                for text in self.texts
            ],
            "weights": list(self.weights),
        }

    def to_bytes(self) -> bytes:
        """The whole result as a safetensors file: matrices in float32, and everything else in its metadata."""
        tensors = {f"weights.{number}": scores for number, scores in enumerate(self.weights.values())}
        for number, text in enumerate(self.texts):
            tensors |= {f"text.{number}.{name}": getattr(text, name) for name in ("heads", "rest", "by_layer")}
        return save(
            {name: value.float().contiguous() for name, value in tensors.items()},
            metadata={"headshare": json.dumps(self._header(), sort_keys=True)},
        )

    @classmethod
    def load(cls, folder: Path) -> "AttentionResult":
        """Read the result that `headshare attention --out` wrote into a folder.

        Raises:
            EvaluationError: if there is none, or the file is not one of these.
        """
        path = folder / FILE
        if not is_file(path):
            raise EvaluationError(
                f"there is no {FILE} in {folder}. Make one with: headshare attention MODEL --out {folder}"
            )
        what = f"{path} is not a result of headshare attention"
        with foreign(what, EvaluationError), safe_open(path, framework="pt") as file:
            header = parse_json((file.metadata() or {})["headshare"], f"{what}: its description", EvaluationError)
            layers, heads = int(header["layers"]), int(header["heads"])
            if layers < 1 or heads < 1 or header["format"] != FORMAT:
                raise ValueError("its description does not fit")

            def matrix(name: str, size: int) -> Tensor:
                value = file.get_slice(name)
                if list(value.get_shape()) != [size, size] or size**2 > MOST_NUMBERS:
                    raise ValueError(f"{name} has the shape {value.get_shape()}")
                tensor: Tensor = file.get_tensor(name).double()
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{name} holds numbers that are not finite")
                return tensor

            every = layers * heads
            texts = tuple(
                TextMaps(
                    str(text["text"]),
                    int(text["window"]),
                    int(text["tokens"]),
                    int(text["rows"]),
                    matrix(f"text.{number}.heads", every),
                    matrix(f"text.{number}.rest", every),
                    matrix(f"text.{number}.by_layer", layers),
                )
                for number, text in enumerate(header["texts"])
            )
            if not texts:
                raise ValueError("it has no text")
            weights = {str(name): matrix(f"weights.{number}", every) for number, name in enumerate(header["weights"])}
            return cls(str(header["model"]), str(header["model_type"]), layers, heads, texts, weights)


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"
