"""CostCurves in nats are what a stock model loses whose layer was given other weights, and nothing else."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

import headshare as hs
from headshare.architecture.modules import module_path
from headshare.calibration.costs import measured as probing
from headshare.calibration.costs.actions import GATEUP, LOW_RANK, QK, QKV, QKVO, REMOVE, Action
from headshare.calibration.costs.curves import CostCurve, CostCurves, CurveStep, repriced
from headshare.calibration.costs.local import price_units
from headshare.calibration.costs.measured import beside, leader_of, marked, predicts, probe_prices
from headshare.calibration.costs.to_plan import plan_for_steps
from headshare.calibration.layerwise import layers as streams
from headshare.calibration.refit.refitter import Refitter
from headshare.errors import ArchitectureError, CalibrationError
from headshare.experiments.controls import overwrite_recipients
from headshare.integrations.transformers.loading import load_model
from headshare.plan.units import HeadUnit, Sublayer
from headshare.precision import full_float32
from headshare.text.tokens import Calibration
from support import tiny
from support.priced import Reference
from support.walks import ALL

WINDOW, WINDOWS = 16, 14
SEEN = {"tokens": 10 * WINDOW, "held_out": 0.25}  # of ten windows, eight are fitted to
FITTED = 8
PROBED = 3 * WINDOW
EVERY = 4
FORMS = (QKV, REMOVE)
TIGHT = {"rel": 1e-3, "abs": 2e-7}
ENCODERS = ("bert", "roberta", "mpnet", "electra")
EXTRAS = ("tie_scale", "factor_in", "factor_out")


def text(windows: int = WINDOWS) -> Calibration:
    return Calibration(tiny.tokens(WINDOW, windows), False, "a text", 0)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probing without short products."""
    monkeypatch.setattr(probing, "short_products", full_float32)


def llama_in(folder: Folder) -> hs.Checkpoint:
    """Grouped queries, four groups of two heads in three layers, whose units matter to what it predicts."""
    changes = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.15}
    return hs.open_checkpoint(tiny.make_llama(folder / "llama", **changes))


# ---- the reference: a stock model with one layer's weights changed


def changed(
    dense: hs.Checkpoint, prices: CostCurves, path: CostCurve, steps: int, fitted: Calibration, ffn: bool
) -> Any:
    """A stock model whose layer takes these steps, and has the readouts that a refit gives it when it comes there."""
    if path.actions == {REMOVE}:
        return without(dense, prices, path, steps, fitted)
    plan = plan_for_steps(prices, path, steps)
    refitter = Refitter(dense, plan, fitted, ffn=ffn)
    for _ in takewhile(lambda layer: layer < path.layer, refitter.advance()):
        pass
    model = load_model(dense, dtype=torch.float32)
    overwrite_recipients(model, plan)
    own = re.compile(rf"\.(?:layers|h)\.{path.layer}\.")
    put = {
        name: tensor
        for name, tensor in refitter.result.tensors.items()
        if own.search(name) and not name.endswith(EXTRAS)
    }
    assert put or not plan.factored  # else the factors are not known here
    with torch.no_grad():
        for name, tensor in put.items():
            stem, _, leaf = name.rpartition(".")
            getattr(model.get_submodule(module_path(model, f"{stem}.weight")), leaf).copy_(tensor)
    return model


@torch.no_grad()
def without(dense: hs.Checkpoint, prices: CostCurves, path: CostCurve, steps: int, fitted: Calibration) -> Any:
    """A stock model whose readout does what it did without these units, as far as ridge regression brings it there."""
    reference = Reference(dense, prices.layout_of(path), path.layer, fitted)
    gone = reference.columns(*(group for step in path.steps[:steps] for group in step.groups))
    kept = torch.tensor([column for column in range(reference.weight.shape[1]) if column not in set(gone.tolist())])
    ridge = 1e-3 * reference.inputs.square().sum(0).mean()
    rows = torch.cat([reference.inputs[:, kept], ridge.sqrt() * torch.eye(len(kept))])
    missed = torch.cat(
        [reference.inputs[:, gone] @ reference.weight[:, gone].T, torch.zeros(len(kept), len(reference.weight))]
    )
    weight = torch.zeros_like(reference.weight)
    weight[:, kept] = reference.weight[:, kept] + torch.linalg.lstsq(rows, missed).solution.T
    own = reference.module(reference.readout.name(path.layer)).weight
    own.copy_(weight.T if reference.readout.axis == 0 else weight)
    return reference.model


@torch.no_grad()
def divergence(dense: Any, other: Any, tokens: Tensor) -> float:
    """sum p (log p - log q) in float64, of every fourth token."""
    total, count = 0.0, 0
    for window in tokens:
        ours, theirs = (model(input_ids=window[None]).logits[0, ::EVERY].double() for model in (dense, other))
        wanted, got = functional.softmax(ours, dim=-1), functional.softmax(theirs, dim=-1)
        total += float((wanted * (wanted / got).log()).sum())
        count += len(ours)
    return total / count


def losses(
    dense: hs.Checkpoint, prices: CostCurves, paths: Sequence[CostCurve], measured: Tensor, *, ffn: bool = True
) -> list[dict[int, float]]:
    """What each path costs after the marked steps."""
    whole = load_model(dense, dtype=torch.float32)
    fitted = replace(text(), tokens=text().mixed().tokens[:FITTED])
    return [
        {
            steps: divergence(whole, changed(dense, prices, path, steps, fitted, ffn), measured)
            for steps in marked(len(path.steps))
        }
        for path in paths
    ]


def sums(path: CostCurve, marks: Iterable[int]) -> dict[int, float]:
    """What the first steps cost in all."""
    return {steps: sum(step.price for step in path.steps[:steps]) for steps in marks}


def assert_adds_up(
    found: Sequence[CostCurve], wanted: Sequence[Mapping[int, float]], close: Mapping[str, float]
) -> None:
    assert len(found) == len(wanted)
    for path, loss in zip(found, wanted, strict=True):
        assert sums(path, loss) == pytest.approx(dict(loss), **close)


# ---- against it


@pytest.fixture(scope="module")
def llama_prices(tmp_path_factory: pytest.TempPathFactory) -> tuple[hs.Checkpoint, CostCurves]:
    dense = llama_in(tmp_path_factory.mktemp("dense"))
    return dense, shortened(price_units(dense, text(), FORMS, **SEEN), 11)


def shortened(prices: CostCurves, most: int) -> CostCurves:
    """The same with the first steps of each path, as every mark of it is a refit here."""
    return replace(prices, curves=tuple(replace(path, steps=path.steps[:most]) for path in prices.curves))


@pytest.fixture(scope="module")
def truth(llama_prices: tuple[hs.Checkpoint, CostCurves]) -> list[dict[int, float]]:
    dense, prices = llama_prices
    return losses(dense, prices, prices.curves, text().mixed().tokens[-3:])


@pytest.fixture
def thin(llama_prices: tuple[hs.Checkpoint, CostCurves]) -> tuple[hs.Checkpoint, CostCurves]:
    """The same with one path a layer, which is enough where it is not about numbers."""
    dense, prices = llama_prices
    first = {path.layer: path for path in reversed(prices.curves) if path.kind is Sublayer.ATTENTION}
    return dense, replace(prices, curves=tuple(first[layer] for layer in sorted(first)))


def probe(dense: hs.Checkpoint, prices: CostCurves, **more: Any) -> CostCurves:
    return probe_prices(dense, text(), prices, **{**SEEN, "probed": PROBED, **more})


def test_prices_add_up_to_what_a_stock_model_loses_by_the_steps_of_one_layer(
    llama_prices: tuple[hs.Checkpoint, CostCurves], truth: list[dict[int, float]], full: None
) -> None:
    dense, prices = llama_prices
    found = probe(dense, prices)
    assert found.in_nats
    assert not prices.in_nats
    assert_adds_up(found.curves, truth, TIGHT)
    assert min(loss for losses in truth for loss in losses.values()) > 1e-4  # there is something to see


def test_paths_of_the_same_half_are_each_measured(
    llama_prices: tuple[hs.Checkpoint, CostCurves], truth: list[dict[int, float]], full: None
) -> None:
    """Ties and removals are of the same units; each is what it is without the other."""
    dense, prices = llama_prices
    both = [path for path in prices.curves if (path.kind, path.layer) == (Sublayer.ATTENTION, 1)]
    assert [{step.action for step in path.steps} for path in both] == [{QKV}, {REMOVE}]
    for path in both:
        (alone,) = probe(dense, replace(prices, curves=(path,))).curves
        assert_adds_up([alone], [truth[prices.curves.index(path)]], TIGHT)


def test_short_products_change_little(
    llama_prices: tuple[hs.Checkpoint, CostCurves],
    truth: list[dict[int, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether or not this machine is faster with them."""
    dense, prices = llama_prices
    monkeypatch.setattr(probing, "short_layers", lambda _: torch.autocast("cpu", torch.bfloat16))
    assert_adds_up(probe(dense, prices).curves, truth, {"rel": 0.1, "abs": 1e-4})


def test_a_price_does_not_depend_on_which_other_paths_there_are(thin: tuple[hs.Checkpoint, CostCurves]) -> None:
    """Each layer gives up its own alone: nothing of an earlier layer's steps reaches it."""
    dense, prices = thin
    found = probe(dense, prices).curves
    for at, path in enumerate(prices.curves):
        assert probe(dense, replace(prices, curves=(path,))).curves == (found[at],)


@pytest.mark.parametrize(("probed", "windows"), [(1, 1), (2 * WINDOW + 15, 2), (10**9, WINDOWS - FITTED)])
def test_as_many_of_the_last_windows_are_measured_as_were_asked_for_and_never_fitted_ones(
    probed: int, windows: int, llama_prices: tuple[hs.Checkpoint, CostCurves], full: None
) -> None:
    dense, prices = llama_prices
    one = replace(prices, curves=(prices.curves[2],))
    wanted = losses(dense, prices, one.curves, text().mixed().tokens[-windows:])
    assert_adds_up(probe(dense, one, probed=probed).curves, wanted, TIGHT)


def test_without_the_feed_forwards_refit_attention_pays_alone(
    llama_prices: tuple[hs.Checkpoint, CostCurves], truth: list[dict[int, float]], full: None
) -> None:
    dense, prices = llama_prices
    tie = next(at for at, path in enumerate(prices.curves) if path.actions == {QKV})
    one = replace(prices, curves=(prices.curves[tie],))
    wanted = losses(dense, prices, one.curves, text().mixed().tokens[-3:], ffn=False)
    assert wanted[0] != pytest.approx(truth[tie], rel=0.01)
    assert_adds_up(probe(dense, one, ffn=False).curves, wanted, TIGHT)


def test_batches_change_nothing(
    thin: tuple[hs.Checkpoint, CostCurves], full: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows and then one."""
    dense, prices = thin
    whole = [sums(path, marked(len(path.steps))) for path in probe(dense, prices).curves]
    monkeypatch.setattr(streams, "BATCH_TOKENS", 2 * WINDOW + 5)
    assert_adds_up(probe(dense, prices).curves, whole, TIGHT)


def test_a_number_added_to_all_logits_changes_nothing(
    llama_prices: tuple[hs.Checkpoint, CostCurves], full: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of GPT-2 lie about -100, where one more bit is as large as a small price."""
    dense, prices = llama_prices
    one = replace(prices, curves=prices.curves[-1:])
    (before,) = probe(dense, one).curves
    marks = sums(before, marked(len(before.steps)))
    assert min(marks.values()) < 2e-4
    logits = streams.Layers.logits
    monkeypatch.setattr(streams.Layers, "logits", lambda self, leaving: logits(self, leaving) - 100)
    assert_adds_up(probe(dense, one).curves, [marks], {"rel": 1e-4, "abs": 3e-7})


def test_what_changes_no_prediction_costs_nothing_and_not_less_by_rounding(
    thin: tuple[hs.Checkpoint, CostCurves], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, prices = thin
    last = shortened(replace(prices, curves=prices.curves[-1:]), 1)
    for _ in range(8):  # of such sums, about every other is rounded to less than nothing
        same = torch.randn(1, WINDOW // EVERY, 1000)
        monkeypatch.setattr(streams.Layers, "logits", lambda self, leaving, same=same: same.clone())
        assert 0 <= probe(dense, last).curves[0].steps[0].price < 2e-6


@pytest.mark.parametrize(
    ("name", "forms"),
    [("gpt2", (QK, REMOVE)), ("gemma2", (QKV, GATEUP)), ("mixtral", (QKV,)),
     ("gpt_neox", (QK,)), ("opt-post-norm", (REMOVE,)), ("llama-mqa", (QKVO, LOW_RANK))],
)  # fmt: skip
def test_every_kind_of_model_is_measured_as_the_stock_model_runs(
    name: str, forms: tuple[Action, ...], tmp_path: Folder, full: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored the other way round, behind norms and soft caps, with experts, renamed, with norms after the sum."""
    monkeypatch.setattr(tiny, "FAMILIES", ALL)
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / name))
    prices = shortened(price_units(dense, text(), forms, **SEEN), 3)
    prices = replace(prices, curves=tuple(path for path in prices.curves if path.layer == 2))
    assert prices.curves
    assert_adds_up(probe(dense, prices).curves, losses(dense, prices, prices.curves, text().mixed().tokens[-3:]), TIGHT)


def test_ties_that_follow_a_removal_cost_it_less_part_of_what_they_make_up_for(
    tmp_path: Folder,
) -> None:
    """They are not measured themselves, and do not change what is."""
    dense = llama_in(tmp_path)
    prices = price_units(dense, text(), (QKVO, LOW_RANK), **SEEN)
    removals = [path for path in prices.curves if path.steps[0].action is REMOVE]
    found = probe(dense, prices)
    assert [path for path in found.curves if path.steps[0].action is REMOVE] == list(
        probe(dense, replace(prices, curves=tuple(removals))).curves
    )
    leaders = {
        path.layer: (path, after) for path, after in zip(prices.curves, found.curves, strict=True) if path in removals
    }
    seen = 0
    for path, after in zip(prices.curves, found.curves, strict=True):
        before, led = leaders[path.layer]
        assert without_prices(after) == without_prices(path)
        for steps in range(1, len(path.steps) + 1):
            own, removed, lost, measured = (
                sum(step.price for step in one.steps[:steps]) for one in (path, before, after, led)
            )
            if removed > 0:
                part = 1.0 if path.actions == {QKVO} else 0.4
                assert lost == pytest.approx(measured * (1 - part * (1 - own / removed)), rel=1e-9)
            seen += path is not before
    assert seen > 10


@pytest.mark.parametrize(
    ("forms", "groups", "answer"),
    [((LOW_RANK,) * 2, (0, 1), True), ((QKVO,) * 2, (0, 1), True),
     ((QKVO, LOW_RANK), (0, 1), False), ((LOW_RANK,), (0,), True), ((LOW_RANK,) * 2, (1, 0), False),
     ((LOW_RANK,) * 3, (0, 1, 2), False), ((QKV,) * 2, (0, 1), False), ((REMOVE,) * 2, (0, 1), False)],
)  # fmt: skip
def test_a_path_follows_a_removal_of_the_same_units_in_the_same_order(
    forms: tuple[Action, ...], groups: tuple[int, ...], answer: bool
) -> None:
    def path(kind: Sublayer, forms: tuple[Action, ...], groups: tuple[int, ...]) -> CostCurve:
        ties = [((HeadUnit(0, 0), 0.1),) if form is not REMOVE else () for form in forms]
        each = zip(forms, groups, ties, strict=True)
        return CostCurve(
            kind, 1, tuple(CurveStep(form, (unit,), 0.1, 9, tie, int(form is LOW_RANK)) for form, unit, tie in each)
        )

    own, removal = path(Sublayer.ATTENTION, forms, groups), path(Sublayer.ATTENTION, (REMOVE,) * 2, (0, 1))
    neurons = path(Sublayer.FFN, (REMOVE,) * 2, (0, 1))
    assert leader_of(own, [neurons, own, removal]) == (removal if answer else None)
    assert leader_of(own, [neurons, own]) is None


def test_a_path_whose_leader_had_no_error_costs_what_that_costs() -> None:
    before = CostCurve(Sublayer.ATTENTION, 1, (CurveStep(REMOVE, (0,), 0.0, 9), CurveStep(REMOVE, (1,), 0.0, 9)))
    after = repriced(before, {1: 0.1, 2: 0.3})
    own = CostCurve(Sublayer.ATTENTION, 1, (CurveStep(LOW_RANK, (0,), 0.0, 8, ((HeadUnit(0, 0), 0.0),), 1),))
    assert sums(beside(own, before, after), [1]) == pytest.approx({1: 0.1})


def test_nothing_but_prices_and_donors_prices_changes(thin: tuple[hs.Checkpoint, CostCurves]) -> None:
    dense, prices = thin
    tokens = text()
    before = tokens.tokens.clone()
    found = probe_prices(dense, tokens, prices, **SEEN, probed=PROBED)
    assert tokens.tokens.equal(before)
    assert replace(found, curves=prices.curves, in_nats=False) == prices
    assert [without_prices(path) for path in found.curves] == [without_prices(path) for path in prices.curves]


def without_prices(path: CostCurve) -> CostCurve:
    steps = (replace(step, price=0.0, donors=tuple((unit, 0.0) for unit, _ in step.donors)) for step in path.steps)
    return replace(path, steps=tuple(steps))


# ---- stopped, and refused


def test_a_stopped_measurement_goes_on_to_the_same_prices_and_measures_nothing_again(
    thin: tuple[hs.Checkpoint, CostCurves], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, prices = thin
    whole, done, measured = probe(dense, prices), dict[int, list[CostCurve]](), list[int]()
    priced = probing._Walk._priced

    def stopping(self: Any, layer: int, paths: Sequence[CostCurve]) -> list[CostCurve]:
        if layer == 2:
            raise KeyboardInterrupt
        return priced(self, layer, paths)

    def noting(self: Any, layer: int, paths: Sequence[CostCurve]) -> list[CostCurve]:
        measured.append(layer)
        return priced(self, layer, paths)

    with monkeypatch.context() as patched:
        patched.setattr(probing._Walk, "_priced", stopping)
        with pytest.raises(KeyboardInterrupt):
            probe(dense, prices, done=done)
    assert sorted(done) == [0, 1]
    monkeypatch.setattr(probing._Walk, "_priced", noting)
    assert probe(dense, prices, done=done) == whole
    assert measured == [2]
    monkeypatch.setattr(probing, "Layers", None)  # nothing is walked
    assert probe(dense, prices, done=done) == whole


def test_what_was_measured_of_other_layers_neither_hides_these_nor_comes_along(
    thin: tuple[hs.Checkpoint, CostCurves],
) -> None:
    dense, prices = thin
    whole = probe(dense, prices)
    done = {0: [path for path in whole.curves if path.layer == 0]}
    later = tuple(path for path in prices.curves if path.layer > 0)
    found = probe(dense, replace(prices, curves=later), done=done)
    assert found.curves == tuple(path for path in whole.curves if path.layer > 0)


def test_nothing_to_price_is_nothing_to_measure(thin: tuple[hs.Checkpoint, CostCurves]) -> None:
    dense, prices = thin
    found = probe(dense, replace(prices, curves=()))
    assert found.curves == ()
    assert found.in_nats


@pytest.mark.parametrize(
    ("windows", "more"),
    [(1, {}), (2, {}), (WINDOWS, {"tokens": WINDOW}), (4, {"held_out": 0.0}), (WINDOWS, {"tokens": 1})],
)
def test_too_few_windows_are_one_error(
    windows: int, more: dict[str, Any], thin: tuple[hs.Checkpoint, CostCurves]
) -> None:
    dense, prices = thin
    with pytest.raises(
        CalibrationError, match=rf"a text gave {windows} windows?, .*(more tokens|smaller window)"
    ) as one:
        probe_prices(dense, text(windows), prices, **{**SEEN, **more})
    assert "\n" not in str(one.value)


def test_three_windows_are_enough(llama_prices: tuple[hs.Checkpoint, CostCurves]) -> None:
    dense, prices = llama_prices
    one = replace(prices, curves=(prices.curves[2],))
    assert probe_prices(dense, text(3), one).curves[0].steps[0].price > 0


def test_predictions_that_are_not_finite_are_one_error(
    thin: tuple[hs.Checkpoint, CostCurves], tmp_path: Folder
) -> None:
    dense, prices = thin
    (tmp_path / "broken").mkdir()
    for path in dense.path.iterdir():
        (tmp_path / "broken" / path.name).write_bytes(path.read_bytes())
    tensors = load_file(dense.path / "model.safetensors")
    tensors["lm_head.weight"][7, 3] = math.inf
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=r"layer 0 .*not finite on a text"):
        probe(hs.open_checkpoint(tmp_path / "broken"), prices)


# ---- who predicts


@pytest.mark.parametrize(
    ("architectures", "answer"),
    [(["LlamaForCausalLM"], True), (["GPT2LMHeadModel"], True), (["LlamaModel"], False), ([], True), (None, True),
     (["LlamaForSequenceClassification"], False), (["LlavaForConditionalGeneration"], False), ([5], True),
     (["LLaMAForCausalLM"], True)],
)  # fmt: skip
def test_who_predicts_is_what_the_configuration_says_or_else_the_models_type_and_tensors(
    architectures: object, answer: bool, llama: Folder
) -> None:
    dense = hs.open_checkpoint(llama)
    dense.config["architectures"] = architectures
    assert predicts(dense) is answer


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_not_measured(name: str, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "FAMILIES", ALL)
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / name))
    assert not predicts(dense)
    prices = price_units(dense, text(3), (QK,), tokens=2 * WINDOW)
    with pytest.raises(ArchitectureError, match="predict"):
        probe(dense, prices)


# ---- marks and shares


def test_a_path_is_measured_after_some_shares_of_its_steps_and_at_its_end() -> None:
    assert [marked(steps) for steps in (1, 2, 3, 8, 48)] == [[1], [1, 2], [1, 3], [1, 3, 8], [5, 17, 48]]
    for steps in range(1, 3000):
        assert 1 <= marked(steps)[0] <= max(1, round(steps / 10))
        assert marked(steps)[-1] == steps
        assert len(marked(steps)) <= 3


OLD = NEW = st.one_of(st.just(0.0), st.floats(1e-9, 1e3), st.floats(-1e3, -1e-9))


Steps = list[tuple[Any, ...]]  # what a CurveStep is made of: beartype draws lots, which no strategy may


@st.composite
def steps_of(draw: st.DrawFn) -> Steps:
    """Ties or removals at any old prices, ties with donors that lie behind the first by some distance."""
    ties, prices = draw(st.booleans()), draw(st.sampled_from((OLD, st.floats(1e-9, 1e3), st.just(0.0))))
    steps = []
    for group in range(draw(st.integers(1, 20))):
        price = draw(prices)
        distances = sorted([0.0, *draw(st.lists(st.floats(0, 10), max_size=3))]) if ties else []
        donors = tuple((HeadUnit(at % 3, at), price + distance) for at, distance in enumerate(distances))
        steps.append((QKV if ties else REMOVE, (group,), price, draw(st.integers(1, 10**6)), donors))
    return steps


def path_of(steps: Steps) -> CostCurve:
    return CostCurve(Sublayer.ATTENTION, 3, tuple(CurveStep(*step) for step in steps))


@settings(max_examples=100, deadline=None)
@given(steps_of(), st.dictionaries(st.integers(1, 20), NEW, max_size=5), NEW)
def test_steps_share_what_was_measured_beside_to_what_they_cost_before(
    steps: Steps, some: dict[int, float], last: float
) -> None:
    """Or to what they save, where they did not cost anything before or were said to bring something."""
    path = path_of(steps)
    measured = {end: loss for end, loss in some.items() if end < len(steps)} | {len(steps): last}
    ends = sorted(measured)
    found = repriced(path, measured)
    assert without_prices(found) == without_prices(path)
    size = max(map(abs, measured.values()))
    assert sums(found, ends) == pytest.approx(measured, rel=1e-9, abs=1e-9 * size)
    for start, end in zip([0, *ends], ends, strict=False):
        before, after = path.steps[start:end], found.steps[start:end]
        cost = measured[end] - (measured[start] if start else 0)
        usable = min(step.price for step in before) >= 0 and any(step.price for step in before)
        parts = [step.price if usable else step.saved_bytes for step in before]
        wanted = [cost * (part / sum(parts)) for part in parts]
        assert [step.price for step in after] == pytest.approx(wanted, rel=1e-9, abs=1e-12 * size)


@settings(max_examples=100, deadline=None)
@given(steps_of(), NEW)
def test_donors_keep_their_order_and_their_distances_in_the_new_unit(steps: Steps, loss: float) -> None:
    path = path_of(steps)
    for old, new in zip(path.steps, repriced(path, {len(path.steps): loss}).steps, strict=True):
        if not old.donors:
            continue
        unit = abs(new.price / old.price) if old.price else 1.0
        prices = [price for _, price in new.donors]
        wanted = [new.price + unit * (price - old.price) for _, price in old.donors]
        assert prices == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        assert prices[0] == new.price
        assert prices == sorted(prices)
