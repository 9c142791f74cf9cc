"""Price what every layer could give up, on calibration text: which unit, in which form, with which donor, at what error.

One layer is looked at at a time, in the dense model's stream. Its *path* is the order in which it would give units up,
each step priced with the earlier ones taken. Prices are squared errors of the layer's output relative to the hidden
state, |error|^2 / |h|^2, averaged over tokens, after the best refit of that layer; so prices of all layers and of both
halves of a layer can be compared and added up. Chooses nothing across layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from heapq import heapify, heappop, heappush, nsmallest

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headshare.calibration import Calibration
from headshare.checkpoints import Checkpoint
from headshare.configuration import text_config
from headshare.costs import Beside, Columns, Fit, Inputs
from headshare.errors import PlanError
from headshare.layout import Layout
from headshare.recognition import ffn_layout
from headshare.streams import Layers
from headshare.units import HeadUnit, Kind, Part

PRICED_TOKENS = 8192
DONORS = 4
CHUNKS = 64
READOUT = {Kind.ATTENTION: Part.O, Kind.FFN: Part.DOWN}


class Form(StrEnum):
    """What can be done to a unit. The parts it shares are its name; `remove` deletes all of the unit."""

    QK = "qk"
    QKV = "qkv"
    QKVO = "qkvo"
    GATEUP = "gateup"
    REMOVE = "remove"

    @property
    def parts(self) -> tuple[Part, ...]:
        """What a recipient gives up for its donor's."""
        return _PARTS[self]

    @property
    def kind(self) -> Kind:
        """The half of the layer this form is for; removal is for both."""
        return Kind.FFN if self is Form.GATEUP else Kind.ATTENTION


_PARTS: dict[Form, tuple[Part, ...]] = {
    Form.QK: (Part.Q, Part.K),
    Form.QKV: (Part.Q, Part.K, Part.V),
    Form.QKVO: (Part.Q, Part.K, Part.V, Part.O),
    Form.GATEUP: (Part.GATE, Part.UP),
    Form.REMOVE: (),
}


@dataclass(frozen=True)
class Step:
    """One unit given up: what it adds to the layer's error, what it saves, and its donors, best first, with their own
    prices. `groups` are the units; several neurons go in one step."""

    form: Form
    groups: tuple[int, ...]
    price: float
    saved_bytes: int
    donors: tuple[tuple[HeadUnit, float], ...] = ()


@dataclass(frozen=True)
class Path:
    """The order in which one half of one layer gives units up."""

    kind: Kind
    layer: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Prices:
    """All paths of a model, and the layouts their units are of."""

    model_type: str
    layouts: Mapping[Kind, Layout]
    paths: tuple[Path, ...]
    neurons: Layout | None = None


def price_units(
    dense: Checkpoint,
    calibration: Calibration,
    forms: Sequence[Form],
    *,
    tokens: int = PRICED_TOKENS,
    donors: int = DONORS,
    ffn_groups: int = 1,
    protect: Sequence[int] = (),
    device: str = "cpu",
) -> Prices:
    """Walk the layers and price each."""
    pricer = Pricer(dense, calibration, forms, tokens=tokens, donors=donors, protect=protect, device=device)
    return pricer.run()


class Pricer:
    def __init__(self, dense, calibration, forms, *, tokens, donors, protect, device):
        self.layers = Layers(dense, device=device)
        self.dense, self.forms, self.donors, self.protect = dense, tuple(forms), donors, frozenset(protect)
        window = calibration.tokens.shape[1]
        self.tokens = calibration.tokens[: max(1, tokens // window)]
        ffn = self.layers.ffn
        self.neurons = (
            None
            if ffn is None
            else ffn_layout(
                text_config(dense.config), dense.shapes, ffn.parts[Part.DOWN].shape[ffn.parts[Part.DOWN].axis]
            )
        )

    def run(self) -> Prices:
        from headshare.progress import track

        stream = self.layers.start(self.tokens)
        paths = []
        for layer in track(range(self.layers.count), "pricing", self.layers.count):
            built = self.layers.build(layer)
            found = self._layer(layer, built, stream)
            paths += found
            for at in self._batches():
                stream[at] = self.layers.run(built, layer, stream[at])[0].cpu()
        layouts = {Kind.ATTENTION: self.layers.attention}
        return Prices(str(self.dense.config.get("model_type")), layouts, tuple(paths), self.neurons)

    def _batches(self):
        size = self.layers.batch(self.tokens.shape[1])
        for first in range(0, len(self.tokens), size):
            yield slice(first, min(first + size, len(self.tokens)))

    def _layer(self, layer, built, stream) -> list[Path]:
        paths = []
        forms = [f for f in self.forms if f.kind is Kind.ATTENTION]
        if layer in self.protect or not forms:
            return paths
        one = LayerPricer(self, layer, built, stream)
        if layer > 0 or Form.REMOVE in forms:
            paths.append(one.attention_path(forms))
        if Form.REMOVE in forms and self.layers.ffn is not None:
            paths.append(one.neuron_path())
        return paths


class LayerPricer:
    def __init__(self, pricer, layer, built, stream):
        self.p, self.layer, self.built, self.stream = pricer, layer, built, stream
        L = pricer.layers
        o = L.path(Part.O)
        ins, wts, downs, dwts = [], [], [], []
        watch = (o,) if L.ffn is None else (o, L.path(Part.DOWN))
        for at in pricer._batches():
            left, seen = L.run(built, layer, stream[at], watch)
            ins.append(seen.inputs[o].flatten(0, 1))
            wts.append((stream[at].to(L.device) + seen.outputs[o]).square().sum(-1).flatten())
            if L.ffn is not None and Form.REMOVE in pricer.forms:
                downs.append(seen.inputs[watch[1]].flatten(0, 1))
                dwts.append(left.square().sum(-1).flatten())
        count = sum(len(w) for w in wts)
        self.root = (torch.cat(wts) * count).rsqrt()[:, None]
        self.layout = L.attention
        weight = built.get_submodule(o).weight
        self.fit = Fit(torch.cat(ins) * self.root, weight.T if L.in_out else weight)
        self.size = self.layout.parts[Part.O].rows
        if downs:
            w = built.get_submodule(watch[1]).weight
            self.down = (torch.cat(downs) * (torch.cat(dwts) * count).rsqrt()[:, None], w.T if L.in_out else w)

    def columns(self, group: int) -> Columns:
        return torch.arange(group * self.size, (group + 1) * self.size, device=self.p.layers.device)

    def features(self, donor_layer: int, parts, shift: int = 0) -> Inputs:
        """The readout's inputs with donors' parts in place: group g gets those of group g + shift. Weighted."""
        L, built = self.p.layers, self.built
        own = {}
        for part in parts:
            place = self.layout.parts[part]
            path = L.path(part)
            parameter = built.get_submodule(path).weight
            if path not in own:
                own[path] = (parameter, parameter.data.clone())
            donor = self.p.dense.read(place.name(donor_layer)).to(L.device, torch.float32)
            for g in range(self.layout.groups):
                a, b = place.span(g)
                c, d = place.span((g + shift) % self.layout.groups)
                parameter.data.narrow(place.axis, a, b - a).copy_(donor.narrow(place.axis, c, d - c))
        o = L.path(Part.O)
        found = [L.run_to(built, self.layer, self.stream[at], o).inputs[o].flatten(0, 1) for at in self.p._batches()]
        for parameter, value in own.values():
            parameter.data.copy_(value)
        return torch.cat(found) * self.root

    def bytes_of(self, form: Form) -> int:
        parts = tuple(self.layout.parts) if form is Form.REMOVE else form.parts
        total = sum(
            self.layout.parts[p].numel * self.p.dense.tensors[self.layout.parts[p].name(0)].torch_dtype.itemsize
            for p in parts
        )
        if form is Form.QKVO:
            total -= self.size * self.p.dense.tensors[self.layout.parts[Part.O].name(0)].torch_dtype.itemsize
        return total

    def donor_table(self, forms):
        """For each form and group: (gain, donor) of all donors."""
        G = self.layout.groups
        lost = [self.fit.lost(self.columns(g)) for g in range(G)]
        table = {form: [[] for _ in range(G)] for form in forms}
        for j in range(self.layer):
            F = self.features(j, (Part.Q, Part.K, Part.V))
            if Form.QKVO in forms:
                place = self.layout.parts[Part.O]
                W = self.p.dense.read(place.name(j)).to(self.p.layers.device, torch.float64)
                W = W.T if self.p.layers.in_out else W
            for d in range(G):
                beside = self.fit.beside(F[:, self.columns(d)])
                for g in range(G):
                    if Form.QKV in forms or Form.QK in forms:
                        gain = beside.gain_for(lost[g])
                        for form in (Form.QKV, Form.QK):
                            if form in forms:
                                table[form][g].append((gain, HeadUnit(j, d)))
                    if Form.QKVO in forms:
                        table[Form.QKVO][g].append(
                            (beside.scaled_gain_for(lost[g], W[:, self.columns(d)]), HeadUnit(j, d))
                        )
        if Form.QK in forms:
            for g in range(G):
                ranked = sorted(table[Form.QK][g], reverse=True)
                best, table[Form.QK][g] = ranked[: self.p.donors], []
                for _, unit in best:
                    F = self.features(unit.layer, (Part.Q, Part.K), (unit.group - g) % G)
                    table[Form.QK][g].append((self.fit.beside(F[:, self.columns(g)]).gain_for(lost[g]), unit))
                table[Form.QK][g] = sorted(table[Form.QK][g], reverse=True) + ranked[self.p.donors :]
        for form in table:
            for g in range(G):
                if form is not Form.QK:
                    table[form][g].sort(reverse=True)
        return table, lost

    def attention_path(self, forms) -> Path:
        G = self.layout.groups
        tie_forms = [f for f in forms if f is not Form.REMOVE] if self.layer else []
        table, lost = self.donor_table(tie_forms)
        fit, left, steps = self.fit, set(range(G)), []
        while left:
            best = None
            for g in sorted(left):
                bare = fit.lost(self.columns(g)).cost
                for form in (*tie_forms, *((Form.REMOVE,) if Form.REMOVE in forms and len(left) > 1 else ())):
                    option = self.option(fit, g, form, bare, table)
                    if best is None or option[0] / self.bytes_of(form) < best[0] / self.bytes_of(best[2]):
                        best = (option[0], g, form, option[1], option[2])
            if best is None:
                break
            price, g, form, donors, beside = best
            fit = fit.without(self.columns(g))
            if form in (Form.QK, Form.QKV):
                fit = fit.with_features(self.columns(g), beside)
            left.remove(g)
            steps.append(Step(form, (g,), max(price, 0.0), self.bytes_of(form), donors))
        return Path(Kind.ATTENTION, self.layer, tuple(steps))

    def option(self, fit, g, form, bare, table):
        """(price, donors with prices, what is beside) of one unit in one form, with what is already given up."""
        if form is Form.REMOVE:
            return bare, (), None
        ranked = table[form][g]
        first = self.fit.lost(self.columns(g)).cost
        if fit is self.fit:
            gain, unit = ranked[0]
            donors = tuple((unit, bare - gain) for gain, unit in ranked)
            return bare - gain, donors, self.beside(fit, g, form, unit)
        without = fit.without(self.columns(g))
        found = []
        for _, unit in ranked[: self.p.donors]:
            beside = self.beside(fit, g, form, unit, without)
            gain = beside.scaled_gain(self.donor_columns(unit)) if form is Form.QKVO else beside.gain()
            found.append((gain, unit, beside))
        found.sort(key=lambda one: -one[0])
        rest = [(unit, (first - gain) / first * bare) for gain, unit in ranked[self.p.donors :]]
        return bare - found[0][0], tuple((u, bare - gain) for gain, u, _ in found) + tuple(rest), found[0][2]

    def donor_columns(self, unit):
        place = self.layout.parts[Part.O]
        W = self.p.dense.read(place.name(unit.layer)).to(self.p.layers.device, torch.float64)
        W = W.T if self.p.layers.in_out else W
        return W[:, self.columns(unit.group)]

    def beside(self, fit, g, form, unit, without=None):
        if without is None:
            without = fit.without(self.columns(g))
        if form is Form.QK:
            F = self.features(unit.layer, (Part.Q, Part.K), (unit.group - g) % self.layout.groups)[:, self.columns(g)]
        else:
            F = self.features(unit.layer, (Part.Q, Part.K, Part.V))[:, self.columns(unit.group)]
        return without.beside(F)

    def neuron_path(self) -> Path:
        """Neurons, least first, in chunks: each chunk those whose removal costs least with the earlier ones gone."""
        inputs, weight = self.down
        fit = Fit(inputs, weight)
        neurons = weight.shape[1]
        chunk = max(1, neurons // CHUNKS)
        parts = {p: pl for p, pl in self.p.layers.ffn.parts.items()}
        unit = sum(
            pl.shape[1 - pl.axis] * self.p.dense.tensors[pl.name(0)].torch_dtype.itemsize for pl in parts.values()
        )
        left = torch.ones(neurons, dtype=torch.bool)
        steps = []
        for _ in range(CHUNKS * 3 // 4):
            diag = fit.inverse.diagonal().clone()
            score = fit.weight.square().sum(0) / diag.clamp(min=1e-300)
            score[~left] = float("inf")
            gone = score.topk(chunk, largest=False).indices.sort().values
            before = fit.error
            fit = fit.without(gone)
            left[gone] = False
            steps.append(Step(Form.REMOVE, tuple(gone.tolist()), max(fit.error - before, 0.0), unit * len(gone)))
        return Path(Kind.FFN, self.layer, tuple(steps))
