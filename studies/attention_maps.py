"""Recipients that use their donors' attention maps, beside those that use their weights, by who chooses the pairs.

    python -m studies.attention_maps MODEL --calibration TEXT --text TEXT [--ratios 0.1,0.2,0.3] [--tokens 8192]

A recipient of *weights* has the donor's rows of q, k and v. A recipient of *maps* has the donor's queries and keys of
the same pass, after positions, and values of its own; its query heads are paired with the donor's by the similarity of
their maps. *Deleted* units give nothing. Pairs are chosen by a score of all pairs of units, in the mode star: the
paper's (cosine of q and k), `circuit`, similarity of attention maps, or by output (what the layer's output loses, on
`--price-tokens`, after the best refit of W_o, with this donor in the unit's place). Perplexity is raw, and after W_o of
every layer from the first recipient on was refitted in closed form to the dense hidden states. Weight bytes of rows
are compared at the end of each ratio; maps also spare the recipient's cache of keys. `--donors` says before that what
each donor makes up for of a unit that is given up alone, and how well scores tell it. For models of the Llama family,
without biases. TEXT is a file, or `self`: text that the model writes.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import headshare as hs
from benchmarks.machine import machine
from headshare.attention.maps import map_products
from headshare.attention.ranks import rank_correlation
from headshare.calibration.costs.least_squares import Fit
from headshare.calibration.costs.sublayer import DenseLayer, SublayerData
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.refit.normal_equations import NormalEquations, token_weights
from headshare.calibration.refit.regression import fit_readout
from headshare.integrations.transformers.loading import load_tokenizer
from headshare.matching.pairing import make_plan
from headshare.matching.scores import Scores, ScoreTable
from headshare.plan.units import HeadUnit, Part, Sublayer
from headshare.precision import short_layers
from headshare.progress import shown, track
from headshare.text.documents import SELF
from headshare.text.tokens import Calibration
from headshare.text.windows import read_text, windows_of

SDPA = "sdpa"
MADE = (Part.Q, Part.K, Part.V)
HELD = 8  # one window in so many is held out, to choose a ridge
MAP_TOKENS = 1024
WEIGHTS, MAPS, DELETED = "weights", "maps", "deleted"
CPU = torch.device("cpu")

Pairs = Mapping[HeadUnit, HeadUnit]


@dataclass
class Lending:
    """Attention whose recipients have the queries and keys of their donors, in layers that are run one after another.

    `pairs` gives for each recipient its donor, and for each of its query heads the donor's. Queries and keys of the
    units in `kept` are noted as they pass, for each batch, whose name is in `batch`.
    """

    groups: int
    pairs: dict[HeadUnit, tuple[HeadUnit, tuple[int, ...]]] = field(default_factory=dict)
    kept: set[HeadUnit] = field(default_factory=set)
    states: dict[tuple[HeadUnit, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    batch: str = ""
    plain: Any = None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any
    ) -> Any:
        """As transformers calls it: queries and keys after positions, batch x heads x tokens x channels."""
        heads = query.shape[1] // self.groups
        units = [HeadUnit(module.layer_idx, group) for group in range(self.groups)]
        for unit in units:
            own = slice(unit.group * heads, (unit.group + 1) * heads)
            if unit in self.kept:
                self.states[unit, self.batch] = query[:, own].bfloat16(), key[:, unit.group].bfloat16()
        borrowed = [unit for unit in units if unit in self.pairs]
        if borrowed:
            query, key = query.clone(), key.clone()
        for unit in borrowed:
            donor, order = self.pairs[unit]
            queries, keys = self.states[donor, self.batch]
            query[:, unit.group * heads : (unit.group + 1) * heads] = queries[:, list(order)].to(query)
            key[:, unit.group] = keys.to(key)
        return self.plain(module, query, key, value, mask, **named)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """A block within which transformers' attention is this one."""
        self.plain = ALL_ATTENTION_FUNCTIONS[SDPA]
        ALL_ATTENTION_FUNCTIONS[SDPA] = self
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[SDPA]


class Study:
    """A dense model, its layers, texts and scores; measures what sharing by some pairs does to it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.dense = hs.open_checkpoint(args.model)
        self.layout = self.dense.layouts.attention
        self.layers = Layers(self.dense, head=True)
        calibration = Calibration.load(args.calibration, self.dense, tokens=args.tokens, window=args.window)
        self.fit_on = calibration.mixed().tokens
        self.held = max(1, len(self.fit_on) // HELD)
        if args.text == SELF:  # other text than that which is fitted to, by its seed
            own = Calibration.load(SELF, self.dense, tokens=args.tokens, window=args.window, seed=1)
            self.test = own.tokens
        else:
            text = read_text(args.text)
            self.test = windows_of(load_tokenizer(self.dense), text, window=args.window, limit=args.tokens).tokens
        self.priced = self.fit_on[: max(1, args.price_tokens // args.window)]
        looked = self.fit_on[: max(1, MAP_TOKENS // args.window)]
        self.maps = map_products(self.dense, looked).by_head()
        self.heads = self.layout.parts[Part.Q].rows // self.layout.parts[Part.K].rows
        self.targets = self._targets()

    # ---- scores of pairs

    def order(self, recipient: HeadUnit, donor: HeadUnit) -> tuple[int, ...]:
        """The donor's query heads, in the order in which their maps are most like the recipient's."""
        first, second = (self.layout.index(unit) * self.heads for unit in (recipient, donor))
        alike = self.maps[first : first + self.heads, second : second + self.heads].tolist()
        return max(permutations(range(self.heads)), key=lambda order: sum(alike[i][j] for i, j in enumerate(order)))

    def by_maps(self) -> Tensor:
        """The mean similarity of the maps of the query heads of two units, paired as `order` does."""
        found = torch.zeros(self.layout.units, self.layout.units, dtype=torch.float64)
        for recipient in map(self.layout.unit, range(self.layout.groups, self.layout.units)):
            for index in range(recipient.layer * self.layout.groups):
                first, second = self.layout.index(recipient) * self.heads, index * self.heads
                order = self.order(recipient, self.layout.unit(index))
                alike = [self.maps[first + i, second + j] for i, j in enumerate(order)]
                found[self.layout.index(recipient), index] = torch.stack(alike).mean()
        return found

    def by_output(self) -> tuple[dict[str, Tensor], Tensor]:
        """For each form, less the error of the layer's output for each recipient and donor; and that of deletion."""
        units = [self.layout.unit(index) for index in range(self.layout.units)]
        scores = {form: torch.zeros(len(units), len(units), dtype=torch.float64) for form in (WEIGHTS, MAPS)}
        deleted = torch.zeros(len(units), dtype=torch.float64)
        lending = Lending(self.layout.groups, kept={*units})
        path = self.layers.path(Part.O)
        with lending.installed(), short_layers(CPU):
            stream = self.layers.start(self.priced)
            for number in track(range(self.layers.count), "prices", self.layers.count):
                module = self.layers.build(number)
                at = DenseLayer(self.dense, self.layers, number, module, stream)
                lending.batch, lending.kept = "all", {*units}
                seen, stream = _whole(at)
                lending.kept = set()  # what is run from here on is not what the dense layer does
                data = SublayerData(at, self.layout, seen, len(seen.inputs))
                fit = Fit.of(data.inputs, data.weight)
                lost = fit.lost(data.columns)
                own = slice(number * self.layout.groups, (number + 1) * self.layout.groups)
                deleted[own] = lost.costs
                for layer in range(number):
                    there = range(layer * self.layout.groups, (layer + 1) * self.layout.groups)
                    features = data.features(layer, data.parts)
                    for donor in there:
                        columns = data.columns[donor % self.layout.groups]
                        gains = fit.beside(features[:, columns]).gains_for(lost)
                        scores[WEIGHTS][own, donor] = gains - lost.costs
                    for shift in range(self.layout.groups):
                        lending.pairs = {
                            HeadUnit(number, group): (donor, self.order(HeadUnit(number, group), donor))
                            for group in range(self.layout.groups)
                            for donor in [HeadUnit(layer, (group + shift) % self.layout.groups)]
                        }
                        inputs = self.layers.run_to(module, number, at.stream, path).inputs[path].flatten(0, 1)
                        inputs = inputs * data.root
                        for group in range(self.layout.groups):
                            donor = there[(group + shift) % self.layout.groups]
                            mine = lost.only(range(group, group + 1))
                            gain = fit.beside(inputs[:, data.columns[group]]).gains_for(mine)[0]
                            scores[MAPS][own.start + group, donor] = gain - lost.costs[group]
                    lending.pairs = {}
        return scores, deleted

    def pairs(self, name: str, scores: Tensor, count: int) -> Pairs:
        """So many ties by these scores, in the mode star."""
        every = Scores(str(self.dense.config["model_type"]), (ScoreTable(self.layout, name, MADE, scores),))
        plan = make_plan(every, (count + 1e-9) / self.layout.units)
        assert plan.ties == count, (plan.ties, count)
        return {recipient: donor for selection in plan.selections for recipient, donor in selection.ties}

    # ---- measuring

    def _targets(self) -> list[Tensor]:
        """The hidden states after each layer's attention in the dense model, on the text that is fitted to."""
        path = self.layers.path(Part.O)
        found = []
        with short_layers(CPU):
            stream = self.layers.start(self.fit_on)
            for number in track(range(self.layers.count), "dense layers", self.layers.count):
                module = self.layers.build(number)
                target = torch.empty_like(stream)
                for at in self.layers.batches(range(len(stream)), stream.shape[1]):
                    left, seen = self.layers.run(module, number, stream[at], (path,))
                    target[at] = stream[at] + seen.outputs[path]
                    stream[at] = left.float()
                found.append(target.bfloat16())
        return found

    def measured(self, form: str, pairs: Mapping[HeadUnit, HeadUnit | None]) -> dict[str, Any]:
        """Perplexity with these pairs, raw and refitted, and how far the mean loss is from the dense one's."""
        borrowed = (
            {unit: (donor, self.order(unit, donor)) for unit, donor in pairs.items() if donor} if form == MAPS else {}
        )
        lending = Lending(self.layout.groups, borrowed, {donor for donor, _ in borrowed.values()})
        first = min((unit.layer for unit in pairs), default=self.layers.count)
        streams = {"fit": self.layers.start(self.fit_on), "raw": self.layers.start(self.test)}
        streams["refit"] = streams["raw"].clone()
        with torch.no_grad(), lending.installed(), short_layers(CPU):
            for number in range(self.layers.count):
                module = self._changed(number, form, pairs)
                self._run(module, number, streams["raw"], lending, "raw")
                if number >= first:
                    self._refit(module, number, streams["fit"], lending, form, pairs)
                self._run(module, number, streams["refit"], lending, "refit")
                self._run(module, number, streams["fit"], lending, "fit")
            losses = {name: self._losses(streams[name]) for name in ("raw", "refit")}
        return {name: math.exp(min(700.0, float(each.mean()))) for name, each in losses.items()} | {
            "losses": {name: each.tolist() for name, each in losses.items()}
        }

    def _changed(self, number: int, form: str, pairs: Mapping[HeadUnit, HeadUnit | None]) -> Any:
        """The layer with its recipients' weights replaced, or its deleted units' columns of o set to zero."""
        module = self.layers.build(number)
        for unit, donor in pairs.items():
            if unit.layer != number:
                continue
            if form == DELETED:
                start, stop = self.layout.parts[Part.O].span(unit.group)
                module.get_submodule(self.layers.path(Part.O)).weight.data[:, start:stop] = 0
            for part in MADE if form == WEIGHTS and donor is not None else ():
                place = self.layout.parts[part]
                start, stop = place.span(unit.group)
                rows = self.dense.read(place.name(donor.layer), *place.span(donor.group))
                module.get_submodule(self.layers.path(part)).weight.data[start:stop] = rows.float()
        return module

    def _run(self, module: Any, number: int, stream: Tensor, lending: Lending, name: str) -> None:
        for at in self._batches(stream):
            lending.batch = f"{name} {at.start}"
            stream[at] = self.layers.run(module, number, stream[at])[0].float()

    def _batches(self, stream: Tensor) -> Iterator[slice]:
        """Windows that are run together; of those that are fitted to, none with windows that are held out."""
        fitted = len(stream) - self.held
        for part in (range(fitted), range(fitted, len(stream))):
            yield from self.layers.batches(part, stream.shape[1])

    def _refit(self, module: Any, number: int, stream: Tensor, lending: Lending, form: str, pairs: Any) -> None:
        """Refit this layer's W_o, in place, so that the stream goes where the dense one does."""
        readout = module.get_submodule(self.layers.path(Part.O)).weight
        sums = [NormalEquations(readout.shape[1], readout.shape[0]) for _ in range(2)]
        path = self.layers.path(Part.O)
        fitted = len(stream) - self.held
        for at in self._batches(stream):
            lending.batch = f"fit {at.start}"
            inputs = self.layers.run_to(module, number, stream[at], path).inputs[path].float()
            target = self.targets[number][at].float()
            sums[at.start >= fitted].add(inputs, target - stream[at], token_weights(target))
        given = [unit.group for unit in pairs if unit.layer == number]
        columns = {group: torch.arange(*self.layout.parts[Part.O].span(group)) for group in range(self.layout.groups)}
        free = torch.cat([each for group, each in columns.items() if form != DELETED or group not in given])
        start = readout.double()
        prior = start.clone()
        for group in given if form == WEIGHTS else ():
            prior[:, columns[group]] = 0
        readout.copy_(fit_readout(*sums, start, free, prior=prior).weight)

    def _losses(self, stream: Tensor) -> Tensor:
        """The mean loss of each window of the text that is measured."""
        found = []
        for at in range(len(stream)):
            logits = self.layers.logits(stream[at : at + 1])[0, :-1].float()
            found.append(torch.nn.functional.cross_entropy(logits, self.test[at, 1:]).double())
        return torch.stack(found)


def _whole(at: DenseLayer) -> tuple[Any, Tensor]:
    """The layer run over all windows at once: inputs of W_o, and the hidden states that leave it."""
    whole = DenseLayer(at.checkpoint, at.layers, at.number, at.module, at.stream)
    seen, stream = whole.look((Sublayer.ATTENTION,))
    return seen[Sublayer.ATTENTION], stream.float()


CHOOSERS = ("paper", "circuit", "maps", "output")

# by each chooser, how good a donor each unit is for each other one in each form; and less what deletion costs each unit
Choosers = dict[str, dict[str, Tensor]]


def choosers_of(study: Study, names: list[str]) -> tuple[Choosers, Tensor]:
    """The scores by each of these choosers, and what the deletion of each unit costs, where `output` is among them."""
    choosers: Choosers = {}
    deleted = torch.zeros(0)
    for name in names:
        if name == "output":
            choosers[name], deleted = study.by_output()
        elif name == "maps":
            choosers[name] = dict.fromkeys((WEIGHTS, MAPS), study.by_maps())
        else:
            (table,) = hs.score_units(study.dense, "qk" if name == "paper" else name).tables
            choosers[name] = dict.fromkeys((WEIGHTS, MAPS), table.scores)
    return choosers, deleted


def donor_rows(study: Study, choosers: Choosers, deleted: Tensor) -> Iterator[str]:
    """Rows of a table: what of a unit's loss the donor makes up for that each chooser picks, alone and refitted.

    Columns are the median part made up for, that as a share of the best donor's, and the rank correlation of scores
    with parts, the mean over units.
    """
    groups = study.layout.groups
    # each recipient, and how many units stand in earlier layers
    donors = {index: study.layout.unit(index).layer * groups for index in range(groups, study.layout.units)}
    for form in (WEIGHTS, MAPS):
        made_up = [1 + choosers["output"][form][index, :count] / deleted[index] for index, count in donors.items()]
        best = [float(parts.max()) for parts in made_up]
        picks = {"the best": best, "any: the mean": [float(parts.mean()) for parts in made_up]}
        told: dict[str, list[float]] = {}
        for name, scores in choosers.items():
            if name == "output":
                continue
            given = [scores[form][index, :count] for index, count in donors.items()]
            picks[name] = [float(parts[int(each.argmax())]) for parts, each in zip(made_up, given, strict=True)]
            found = (rank_correlation(each.double(), parts) for each, parts in zip(given, made_up, strict=True))
            told[name] = [one for one in found if one is not None]
        for name, parts in picks.items():
            shares = [part / most for part, most in zip(parts, best, strict=True) if most > 0]
            told_by = f"{statistics.mean(told[name]):+.3f}" if name in told else ""
            yield f"| {form} | {name} | {statistics.median(parts):.1%} | {statistics.median(shares):.1%} | {told_by} |"


def rows_of(
    study: Study, ratios: list[float], choosers: Choosers, deleted: Tensor
) -> Iterator[tuple[float, str, str, dict[str, Any]]]:
    """The rows of the table: ratio, form, chooser, and what was measured."""
    units = study.layout.units
    numel = {part: place.numel for part, place in study.layout.parts.items()}
    bytes_of = {WEIGHTS: sum(numel[part] for part in MADE), MAPS: numel[Part.Q] + numel[Part.K]}
    bytes_of[DELETED] = bytes_of[WEIGHTS] + numel[Part.O]
    yield 0.0, "dense", "", study.measured(DELETED, {})
    for ratio in ratios:
        count = int(ratio * units + 1e-9)
        for form in (WEIGHTS, MAPS):
            for name, scores in choosers.items():
                yield ratio, form, f"{name}: {count}", study.measured(form, study.pairs(name, scores[form], count))
        if "output" not in choosers:
            continue
        # as many bytes of weights as the ties of q, k and v: more maps, and deleted
        wanted = count * bytes_of[WEIGHTS]
        more = -(-wanted // bytes_of[MAPS])
        if more <= units - study.layout.groups:
            pairs = study.pairs("output", choosers["output"][MAPS], more)
            yield ratio, MAPS, f"output, as many bytes: {more}", study.measured(MAPS, pairs)
        fewer = cheapest(study, deleted, -(-wanted // bytes_of[DELETED]))
        gone: dict[HeadUnit, HeadUnit | None] = dict.fromkeys(fewer)
        yield ratio, DELETED, f"output, as many bytes: {len(fewer)}", study.measured(DELETED, gone)


def cheapest(study: Study, costs: Tensor, count: int) -> list[HeadUnit]:
    """The units that cost least to delete, with one left in every layer."""
    left = [study.layout.groups] * study.layout.layers
    found: list[HeadUnit] = []
    for unit in map(study.layout.unit, costs.argsort().tolist()):
        if len(found) < count and left[unit.layer] > 1:
            left[unit.layer] -= 1
            found.append(unit)
    return found


@torch.no_grad()
def main() -> None:
    """Measure all rows; print each as it comes, and the table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument(
        "--ratios", type=lambda words: [float(word) for word in words.split(",") if word], default=[0.1, 0.2, 0.3]
    )
    parser.add_argument("--choosers", type=lambda words: words.split(","), default=list(CHOOSERS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--price-tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--donors", action="store_true", help="also print what donors make up for; needs output")
    parser.add_argument("--out", type=Path, help="also keep the rows, with the losses of all windows, in this file")
    args = parser.parse_args()
    lines, kept = [], []
    with shown():
        study = Study(args)
        print(json.dumps({**machine(), "tokens": args.tokens, "window": args.window}), flush=True)
        choosers, deleted = choosers_of(study, args.choosers)
        if args.donors:
            print("| shared | donor by | makes up for | of the best | rank correlation |\n|---|---|--:|--:|--:|")
            print("\n".join(donor_rows(study, choosers, deleted)), end="\n\n", flush=True)
        print(
            "| ratio | shared | chosen by: units | raw | refitted | nats over dense, refitted |\n"
            "|--:|---|---|--:|--:|--:|"
        )
        base: Tensor | None = None
        for ratio, form, chooser, found in rows_of(study, args.ratios, choosers, deleted):
            losses = torch.tensor(found["losses"]["refit"], dtype=torch.float64)
            base = losses if base is None else base
            apart = losses - base
            error = float(apart.std() / len(apart) ** 0.5) if len(apart) > 1 else math.nan
            nats = f"{float(apart.mean()):+.4f} ({error:.4f})"
            lines.append(f"| {ratio or ''} | {form} | {chooser} | {found['raw']:.2f} | {found['refit']:.2f} | {nats} |")
            kept.append({"ratio": ratio, "form": form, "chosen": chooser, **found})
            print(lines[-1], flush=True)
            if args.out is not None:
                args.out.write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
