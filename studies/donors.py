"""What of a unit's removal a donor of q, k and v makes up for, by how the donor is chosen or made.

    python -m studies.donors MODEL --calibration TEXT [--layers 4,9,14,20,27] [--tokens 16384]

Each unit of these layers is given up on its own. Its price is the squared error of its layer's attention output
relative to the hidden state, on a quarter of the tokens, after a refit of W_o on the others; donors are chosen on
those others, or by their weights. "o whole" stores the unit's own columns of o, "o in rank 4" a product. Merged donors
are a (one donor) + (1 - a) (another) of the three that are best by output, the best a of 1/4, 1/2, 3/4.
For models whose units do the same in every place: without biases of q, k and v.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

import headshare as hs
from benchmarks.machine import machine
from headshare.architecture.config import text_config
from headshare.calibration.costs.least_squares import Fit
from headshare.calibration.costs.local import HELD_OUT, fitted_windows, looked_at
from headshare.calibration.costs.sublayer import DenseLayer, Half
from headshare.calibration.layerwise.layers import Layers
from headshare.plan.layout import Layout
from headshare.plan.units import HeadUnit, Kind, Part
from headshare.precision import short_products
from headshare.progress import shown, track
from headshare.text.tokens import Calibration

MIXES = (0.25, 0.5, 0.75)
RANK = 4
MADE = (Part.Q, Part.K, Part.V)
Score = Callable[[HeadUnit, HeadUnit], float]


class Weights:
    """Units' weights, in float64, with the norm before them folded in or not; and how alike two units are by them."""

    def __init__(self, dense: hs.Checkpoint, layout: Layout) -> None:
        self.dense, self.layout = dense, layout
        self.head = text_config(dense.config).get("head_dim") or layout.parts[Part.K].rows
        self._kept: dict[tuple[HeadUnit, Part], Tensor] = {}

    def of(self, unit: HeadUnit, part: Part) -> Tensor:
        """Channels x hidden."""
        if (unit, part) not in self._kept:
            place = self.layout.parts[part]
            start, stop = place.span(unit.group)
            whole = self.dense.read(place.name(unit.layer)).double()
            self._kept[unit, part] = whole[start:stop] if place.axis == 0 else whole[:, start:stop].T
        return self._kept[unit, part]

    def folded(self, unit: HeadUnit, part: Part) -> Tensor:
        """The same with the weight of the norm before it multiplied in."""
        return self.of(unit, part) * self.dense.read(f"model.layers.{unit.layer}.input_layernorm.weight").double()

    def cosine(self, *parts: Part, fold: bool = False) -> Score:
        """Of the parts as one vector, as the paper does it."""
        weights = self.folded if fold else self.of

        def score(one: HeadUnit, other: HeadUnit) -> float:
            first, second = (torch.cat([weights(unit, part).flatten() for part in parts]) for unit in (one, other))
            return float(torch.nn.functional.cosine_similarity(first, second, dim=0))

        return score

    def circuits(self, one: HeadUnit, other: HeadUnit) -> float:
        """Cosine of W_q^T W_k, rotated by every distance alike, plus that of W_o W_v, of all heads of the units."""
        return normalised(self._attended, one, other) + normalised(self._written, one, other)

    def _attended(self, one: HeadUnit, other: HeadUnit) -> float:
        """Over frequencies f and heads: Re <a_f, a'_f> conj <b_f, b'_f>, with a_f and b_f the two rows of W_q and W_k
        that are rotated together, as one complex row."""
        (a, b), (c, d) = ([self._pairs(unit, part) for part in (Part.Q, Part.K)] for unit in (one, other))
        across = (a * c.conj()).sum(-1) * (b * d.conj()).sum(-1).conj()
        return float(across.real.sum())

    def _pairs(self, unit: HeadUnit, part: Part) -> Tensor:
        rows = self.folded(unit, part).unflatten(0, (-1, 2, self.head // 2))
        return torch.complex(rows[:, 0], rows[:, 1])

    def _written(self, one: HeadUnit, other: HeadUnit) -> float:
        (o, v), (p, w) = (
            (self.of(unit, Part.O).unflatten(0, (-1, self.head)), self.folded(unit, Part.V)) for unit in (one, other)
        )
        return float(((o @ p.mT) * (v @ w.T)).sum())


def normalised(product: Score, one: HeadUnit, other: HeadUnit) -> float:
    """A cosine, from products."""
    return product(one, other) / (product(one, one) * product(other, other)) ** 0.5


class Layer:
    """The attention of one layer, and what every unit of the model would put in the place of its own."""

    def __init__(self, half: Half, layers: range) -> None:
        self.half, self.fitted, self.number = half, half.fitted, half.dense.number
        self.fit = Fit.of(half.inputs[: half.fitted], half.weight)
        self.target = half.inputs[half.fitted :].double() @ half.weight.double().T
        whole = {layer: half.features(layer, half.parts) for layer in layers}
        self.features = {
            HeadUnit(layer, group): features[:, columns]
            for layer, features in whole.items()
            for group, columns in enumerate(half.columns)
        }

    @cached_property
    def gains(self) -> dict[HeadUnit, Tensor]:
        """What each donor makes up for of each unit's removal, on the tokens that are fitted to."""
        lost = self.fit.lost(self.half.columns)
        return {
            unit: self.fit.beside(features[: self.fitted]).gains_for(lost) for unit, features in self.features.items()
        }

    def merged(self, group: int, mix: Mapping[HeadUnit, float], weights: Weights) -> Tensor:
        """What a weighted sum of units puts into this group's place."""
        dense, place = self.half.dense, self.half.layout.parts
        path = dense.layers.path
        own = {part: dense.module.get_submodule(path(part)).weight.data for part in MADE}
        before = {part: weight.clone() for part, weight in own.items()}
        for part, weight in own.items():
            start, stop = place[part].span(group)
            weight[start:stop] = sum(share * weights.of(unit, part) for unit, share in mix.items())
        seen = [
            dense.layers.run_to(dense.module, self.number, entering, path(Part.O)).inputs[path(Part.O)].flatten(0, 1)
            for entering in dense.batches()
        ]
        for part, weight in own.items():
            weight.copy_(before[part])
        return (torch.cat(seen) * self.half.root)[:, self.half.columns[group]]

    def missed(self, group: int, features: Tensor | None = None, *, rank: int | None = None) -> float:
        """The error on held-out tokens without the unit, or with these features in its place."""
        columns = self.half.columns[group]
        inputs, target = self.half.inputs[self.fitted :].double().clone(), self.target
        if features is None:
            fit, inputs[:, columns] = self.fit.without(columns), 0
        elif rank is None:
            fit = self.fit.without(columns).with_features(columns, features[: self.fitted])
            inputs[:, columns] = features[self.fitted :].double()
        else:
            product = self.fit.products(columns, features[: self.fitted]).product(rank)
            fit, inputs[:, columns] = self.fit.with_fixed(columns, features[: self.fitted], product), 0
            target = target - features[self.fitted :].double() @ product.T
        return float((target - inputs @ fit.weight.T).square().sum())


def ways(layer: Layer, group: int, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Donors of one unit by each way, as features in its place."""
    unit = HeadUnit(layer.number, group)
    others = [donor for donor in layer.features if donor != unit]
    earlier = [donor for donor in others if donor.layer < layer.number]

    def gain(donor: HeadUnit) -> float:
        return float(layer.gains[donor][group])

    yield "by output, earlier layers", layer.features[max(earlier, key=gain)]
    yield "by output, any layer", layer.features[max(others, key=gain)]
    beside = [donor for donor in others if donor.layer == layer.number]
    if beside:
        yield "by output, the same layer", layer.features[max(beside, key=gain)]
    by_weights: dict[str, Score] = {
        "by cosine of q, k": weights.cosine(Part.Q, Part.K),
        "by cosine of q, k, norm folded": weights.cosine(Part.Q, Part.K, fold=True),
        "by cosine of q, k, v": weights.cosine(*MADE),
        "by circuits": weights.circuits,
    }
    for name, score in by_weights.items():
        yield name, layer.features[max(earlier, key=lambda donor, score=score: score(unit, donor))]
    best = sorted(earlier, key=gain, reverse=True)[:3]
    mixes = [
        layer.merged(group, {one: mix, other: 1 - mix}, weights)
        for one, other in combinations(best, 2)
        for mix in MIXES
    ]
    lost = layer.fit.lost(layer.half.columns[group, None])
    found = [float(layer.fit.beside(features[: layer.fitted]).gains_for(lost)) for features in mixes]
    yield "by output, merged of two", mixes[max(range(len(mixes)), key=found.__getitem__)]
    mean = dict.fromkeys(earlier, 1 / len(earlier))
    yield "the mean of all earlier units", layer.merged(group, mean, weights)


def measured(layer: Layer, weights: Weights) -> Iterator[tuple[str, tuple[float, float]]]:
    """What each way makes up for of each unit's removal, with o whole and in small rank."""
    for group in range(len(layer.half.columns)):
        removed = layer.missed(group)
        for name, features in ways(layer, group, weights):
            kept = layer.missed(group, features), layer.missed(group, features, rank=RANK)
            yield name, (1 - kept[0] / removed, 1 - kept[1] / removed)


def table(found: Mapping[str, list[tuple[float, float]]]) -> str:
    """Markdown: the median, least and most over units, in percent."""
    lines = ["| donor | o whole: median (least to most) | o in rank 4 |", "|---|--:|--:|"]
    for name, parts in found.items():
        cells = [
            f"{100 * statistics.median(part):.1f} % ({100 * min(part):.1f} to {100 * max(part):.1f})"
            for part in zip(*parts, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    """Walk the layers, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument(
        "--layers", type=lambda words: [int(word) for word in words.split(",")], default=[4, 9, 14, 20, 27]
    )
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dense = hs.open_checkpoint(args.model)
    calibration = Calibration.load(args.calibration, dense, tokens=args.tokens, window=args.window, seed=args.seed)
    calibration = calibration.mixed()
    layout, layers = dense.layouts.attention, Layers(dense)
    weights, found = Weights(dense, layout), dict[str, list[tuple[float, float]]]()
    fitted = fitted_windows(calibration, args.tokens, HELD_OUT) * args.window
    with shown(), short_products():
        stream = layers.start(calibration.tokens[: looked_at(calibration, args.tokens)])
        for number in track(range(max(args.layers) + 1), "layers", max(args.layers) + 1):
            at = DenseLayer(dense, layers, number, layers.build(number), stream)
            seen, stream = at.look((Kind.ATTENTION,))
            if number in args.layers:
                half = Half(at, layout, seen[Kind.ATTENTION], fitted)
                if len(half.shifts) > 1:
                    parser.error("this model's units do not do the same in every place; there is no table for it.")
                for name, parts in measured(Layer(half, range(layers.count)), weights):
                    found.setdefault(name, []).append(parts)
    print(json.dumps({**machine(), "tokens": args.tokens, "calibration": Path(args.calibration).name}))
    print(f"\n{len(args.layers) * layout.groups} units of layers {', '.join(map(str, args.layers))}\n\n{table(found)}")


if __name__ == "__main__":
    main()
