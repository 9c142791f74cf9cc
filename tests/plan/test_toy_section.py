"""Sections of kinds that the package does not know: all that it does with a plan, it does with them.

`Averaged` stores one row for all rows of v of a unit: a stock model computes the same. `Skipped` leaves the attention
out of whole layers: no stock model does.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import headshare as hs
from headshare.calibration.costs.actions import ACTIONS, Action, GivenUp, Output
from headshare.calibration.costs.sections import Taken
from headshare.calibration.costs.sublayer import SublayerData
from headshare.errors import CheckpointError, PlanError, StorageError
from headshare.evaluation.verify import verify
from headshare.plan.describe import describe, given_up, picture
from headshare.plan.layout import Layout
from headshare.plan.removal import counts
from headshare.plan.section import (
    SECTION_KINDS,
    AddedTensor,
    Choice,
    ModuleChange,
    Removed,
    Section,
    Touched,
    section_kind,
)
from headshare.plan.tensors import TensorPlan
from headshare.plan.units import HeadUnit, Part, Sublayer
from headshare.sharing.makers import MAKERS
from headshare.sharing.picture.page import Inspected, plan_page
from headshare.storage.changes import MODULE_CHANGES
from headshare.storage.projection import SharedProjection
from support import tiny
from support.command_line import Run
from support.texts import a_text, add_tokenizer


class MeanRows(NamedTuple):
    start: int
    stop: int
    row: int

    @property
    def maker(self) -> str:
        return "mean"

    def moved_to(self, start: int) -> "MeanRows":
        return self._replace(start=start, stop=start + self.stop - self.start)


class MeanMaker:
    def split(self, tensor: TensorPlan, dense: Tensor) -> dict[str, Tensor]:
        rows = [dense[one.start : one.stop].float().mean(0) for one in tensor.made]
        return {mean_name(tensor.name): torch.stack(rows)}

    def join(self, tensor: TensorPlan, whole: Tensor, read: Callable[[str], Tensor]) -> None:
        means = read(mean_name(tensor.name))
        for one in tensor.made:
            assert isinstance(one, MeanRows)
            whole[one.start : one.stop] = means[one.row]


def mean_name(weight: str) -> str:
    return weight.removesuffix("weight") + "row_mean"


class Averaged(Section):
    """Units whose rows of v are all their mean."""

    key: ClassVar[str] = "averaged"
    sign: ClassVar[str] = "m"
    legend: ClassVar[str] = "rows of v are their mean"

    layout: Layout
    units: tuple[HeadUnit, ...]
    chosen: Choice = Choice()

    def touched(self) -> Iterator[Touched]:
        place = self.layout.parts[Part.V]
        for layer, groups in self._by_layer().items():
            for row, group in enumerate(groups):
                yield Touched(place.name(layer), place.shape, place.axis, MeanRows(*place.span(group), row))

    def added(self) -> Iterator[tuple[str, AddedTensor]]:
        place = self.layout.parts[Part.V]
        for layer, groups in self._by_layer().items():
            name = place.name(layer)
            yield mean_name(name), AddedTensor(name, (len(groups), place.shape[1]))

    def modules(self) -> Iterator[ModuleChange]:
        return (ModuleChange(self.layout.parts[Part.V].name(layer), "mean rows") for layer in self._by_layer())

    @property
    def rounding(self) -> str | None:
        return "mean rows are multiplied once"

    @property
    def approximate(self) -> str | None:
        return "mean rows"

    def units_given(self) -> Collection[HeadUnit]:
        return self.units

    def describe(self) -> dict[str, Any]:
        return counts(self, "averaged", len(self.units))

    def picture(self, others: Collection[Section]) -> str:
        del others
        return self.title("attention, part v", len(self.units), "units averaged")

    def _by_layer(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for layer, group in sorted(self.units):
            found.setdefault(layer, []).append(group)
        return found


class MeanRowsProjection(SharedProjection):
    """Each mean row is multiplied once, and its output repeated."""

    def __init__(self, dense: nn.Module, tensor: TensorPlan) -> None:
        super().__init__(dense, tensor)
        self.made = tensor.made
        self.kept = tensor.kept()
        self.row_mean = nn.Parameter(self.weight.new_empty(len(tensor.made), self.in_features))

    def whole_weight(self) -> Tensor:
        whole = self.weight.new_empty(self.out_features, self.in_features)
        used = 0
        for start, stop in self.kept:
            whole[start:stop] = self.weight[used : used + stop - start]
            used += stop - start
        for one in self.made:
            whole[one.start : one.stop] = self.row_mean[one.row]
        return whole

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.out_features)
        used = 0
        for start, stop in self.kept:
            out[..., start:stop] = x @ self.weight[used : used + stop - start].T
            used += stop - start
        for one in self.made:
            out[..., one.start : one.stop] = x @ self.row_mean[one.row, :, None]
        return out if self.bias is None else out + self.bias


class Skipped(Section):
    """Layers that go without attention."""

    key: ClassVar[str] = "skipped"
    one_type: ClassVar[bool] = False

    layout: Layout
    layers: tuple[int, ...]
    chosen: Choice = Choice()

    def touched(self) -> Iterator[Touched]:
        for place in self.layout.parts.values():
            for layer in self.layers:
                yield Touched(place.name(layer), place.shape, place.axis, Removed(0, place.shape[place.axis]))

    def modules(self) -> Iterator[ModuleChange]:
        return (ModuleChange(self.layout.parts[Part.O].name(layer), "skip", above=1) for layer in self.layers)

    @property
    def no_stock_equivalent(self) -> str | None:
        return "layers have no attention"

    def units_given(self) -> Collection[HeadUnit]:
        return [HeadUnit(layer, group) for layer in self.layers for group in range(self.layout.groups)]

    def describe(self) -> dict[str, Any]:
        return {"layers": list(self.layers)}

    def picture(self, others: Collection[Section]) -> str:
        del others
        return f"no attention in layers {self.layers}"


class NoAttention(nn.Module):
    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Averaged, Skipped):
        monkeypatch.setitem(SECTION_KINDS, kind.key, kind)
    monkeypatch.setitem(MAKERS, "mean", MeanMaker())
    monkeypatch.setitem(MODULE_CHANGES, "mean rows", lambda stock, tensor, _: MeanRowsProjection(stock, tensor))
    monkeypatch.setitem(MODULE_CHANGES, "skip", lambda *_: NoAttention())


@pytest.fixture
def dense(llama: Path) -> hs.Checkpoint:
    return hs.open_checkpoint(llama)


def attention(dense: hs.Checkpoint) -> Layout:
    return dense.layouts.attention


UNITS = (HeadUnit(1, 0), HeadUnit(1, 1), HeadUnit(3, 0))


def averaged(dense: hs.Checkpoint, *units: HeadUnit) -> hs.SharePlan:
    section = Averaged(layout=attention(dense).only((Part.V,)), units=units or UNITS)
    return hs.SharePlan(model_type="llama", others=(section,))


def skipped(dense: hs.Checkpoint, *layers: int) -> hs.SharePlan:
    return hs.SharePlan(model_type="llama", others=(Skipped(layout=attention(dense), layers=layers),))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tiny.tokens()).logits
    return found


def averaged_by_hand(dense: hs.Checkpoint) -> Any:
    """A stock model whose rows of v are averaged by a loop."""
    model = AutoModelForCausalLM.from_pretrained(dense.path).eval()
    with torch.no_grad():
        for layer, group in UNITS:
            rows = model.model.layers[layer].self_attn.v_proj.weight[group * 8 : group * 8 + 8]
            rows.copy_(rows.mean(0, keepdim=True).expand_as(rows))
    return model


def test_a_section_shares_to_the_byte_that_was_estimated_and_loads(dense: hs.Checkpoint, tmp_path: Path) -> None:
    shared = hs.share(dense, averaged(dense))
    out = shared.save(tmp_path / "out")
    written = hs.open_checkpoint(out)
    stored = sum(info.nbytes for info in written.tensors.values())
    whole = sum(info.nbytes for info in dense.tensors.values())
    saved = sum(7 * 32 * 4 for _ in UNITS)
    assert (shared.estimate.saved_bytes, whole - stored) == (saved, saved)
    assert written.tensors["model.layers.1.self_attn.v_proj.row_mean"].shape == (2, 32)
    torch.testing.assert_close(logits(hs.load(out)), logits(averaged_by_hand(dense)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", ["owner", "alias", "auto"])
def test_it_stands_beside_ties_of_every_storage(dense: hs.Checkpoint, tmp_path: Path, storage: str) -> None:
    ties = hs.make_plan(hs.score_units(dense, match="qk", parts="qk"), ratio=0.4, parts="qk")
    both = hs.SharePlan(selections=ties.selections, others=averaged(dense).others)
    out = hs.share(dense, both).save(tmp_path / "out")
    expanded = hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")
    stock = AutoModelForCausalLM.from_pretrained(expanded).eval()
    torch.testing.assert_close(logits(hs.load(out, storage=storage)), logits(stock), rtol=1e-5, atol=1e-5)


def test_it_expands_verifies_dequantizes_and_saves_again(dense: hs.Checkpoint, tmp_path: Path) -> None:
    out = hs.share(dense, averaged(dense)).save(tmp_path / "out")
    shared = hs.open_checkpoint(out)
    found = verify(shared, dense)
    assert found.ok, found.problems
    assert any("mean rows are multiplied once" in note for note in found.notes)
    expanded = hs.expand(shared, tmp_path / "expanded")
    by_hand = averaged_by_hand(dense).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(expanded).state_dict().items():
        torch.testing.assert_close(tensor, by_hand[name], rtol=1e-6, atol=1e-7)
    model = hs.load(out)
    before = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(hs.load(tmp_path / "again")), before)
    torch.testing.assert_close(logits(model.dequantize()), before, rtol=1e-5, atol=1e-5)


def test_a_changed_number_is_noticed(dense: hs.Checkpoint, tmp_path: Path) -> None:
    out = hs.share(dense, averaged(dense)).save(tmp_path / "out")
    model = hs.load(out)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "changed")
    assert not verify(hs.open_checkpoint(tmp_path / "changed"), dense).ok


def test_its_plan_is_json_like_any_and_wrong_ones_cannot_be_made(dense: hs.Checkpoint) -> None:
    plan = averaged(dense)
    assert hs.SharePlan.from_json(plan.to_json()) == plan
    assert set(json.loads(plan.to_json())) == {"averaged", "format", "model_type", "selections"}
    assert "others" not in plan.to_json()
    with pytest.raises(PlanError, match=r"claim the same indices of model\.layers.1.self_attn.v_proj.weight"):
        hs.SharePlan(others=(*plan.others, *skipped(dense, 1).others))
    with pytest.raises(PlanError, match="under the key 'averaged' already"):
        section_kind(Averaged)
    with pytest.raises(PlanError, match="not valid at"):
        hs.SharePlan.from_dict({"format": 1, "averaged": [{"layout": 3}]})


def test_a_plan_of_a_kind_that_is_not_registered_is_refused(
    dense: hs.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = averaged(dense).to_json()
    monkeypatch.delitem(SECTION_KINDS, "averaged")
    with pytest.raises(PlanError, match="averaged"):
        hs.SharePlan.from_json(text)


def test_it_is_described_and_drawn(dense: hs.Checkpoint) -> None:
    plan = averaged(dense)
    assert describe(plan)["averaged"][0]["averaged"] == 3
    assert "3 of 8 units averaged" in picture(plan)
    assert "m rows of v are their mean" in picture(plan)
    assert plan_page(Inspected("toy", plan)).count(": rows of v are their mean</title>") == 2 * 3  # of cell and sign
    assert given_up(plan) == [0, 1.0, 0, 0.5]


def test_a_section_without_a_stock_equivalent_runs_and_is_not_expanded(
    dense: hs.Checkpoint,
    tmp_path: Path,
    run: Run,
) -> None:
    out = hs.share(dense, skipped(dense, 2)).save(tmp_path / "out")
    shared = hs.open_checkpoint(out)
    stock = AutoModelForCausalLM.from_pretrained(dense.path).eval()
    stock.model.layers[2].self_attn = NoAttention()
    model = hs.load(out)
    assert torch.equal(logits(model), logits(stock))
    with pytest.raises(CheckpointError, match="no stock equivalent: layers have no attention"):
        hs.expand(shared, tmp_path / "expanded")
    assert not (tmp_path / "expanded").exists()
    with pytest.raises(StorageError, match="layers have no attention"):
        model.dequantize()
    found = verify(shared, dense)
    assert found.ok, found.problems
    assert found.max_logit_diff is None
    assert any("layers have no attention" in note for note in found.notes)
    done = run("expand", out, tmp_path / "expanded")
    assert done.status == 1
    assert "layers have no attention" in done.err
    assert run("verify", out).status == 0
    assert "no attention in layers (2,)" in run("inspect", out).out


def test_what_nothing_builds_or_makes_is_one_error(
    dense: hs.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = hs.share(dense, averaged(dense)).save(tmp_path / "out")
    monkeypatch.delitem(MODULE_CHANGES, "mean rows")
    with pytest.raises((StorageError, CheckpointError), match="mean rows"):
        hs.load(out)
    monkeypatch.delitem(MAKERS, "mean")
    with pytest.raises(CheckpointError, match="made by 'mean', for which this headshare has no maker"):
        hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")


# ---- an action of a test's own that puts such a section in a plan


def spread_of_rows(half: SublayerData) -> Iterator[GivenUp]:
    """Each unit at the squares by which what it makes differs from its mean channel's."""
    prices = []
    for columns in half.columns:
        inputs = half.inputs[:, columns]
        prices.append(float((inputs - inputs.mean(1, keepdim=True)).square().sum()))
    for group in sorted(range(len(prices)), key=prices.__getitem__):
        yield GivenUp((group,), prices[group], SAVED)


def averaged_sections(taken: Sequence[Taken], choice: Choice) -> Iterator[Section]:
    units = tuple(sorted(unit for step in taken for unit in step.units))
    yield Averaged(layout=taken[0].layout.only((Part.V,)), units=units, chosen=choice)


SAVED = 7 * 32 * 4  # seven of eight rows of 32 numbers in float32
AVERAGE = Action("average", Sublayer.ATTENTION, (), Output.OWN, costs=spread_of_rows, sections=(averaged_sections,))


@pytest.fixture
def average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ACTIONS, AVERAGE.name, AVERAGE)


def test_an_action_prices_and_plans_a_section_that_is_shared_refitted_measured_and_verified(
    average: None, llama: Path, run: Run, tmp_path: Path
) -> None:
    add_tokenizer(llama)
    dense = hs.open_checkpoint(llama)
    text = hs.Calibration.load(a_text(tmp_path / "text", 600), dense, tokens=320, window=16)
    plan = hs.plan_by_output(dense, text, parts="none", allow=["average"], save=f"{3 * SAVED}")
    (section,) = plan.others
    assert isinstance(section, Averaged)
    assert len(section.units) == 3
    assert hs.estimate(dense, plan).saved_bytes == 3 * SAVED
    refitted = hs.refit(hs.share(dense, plan), text)
    assert {step for step in refitted.refitted if "o_proj" in step}
    out = refitted.save(tmp_path / "out")
    found = hs.verify(hs.open_checkpoint(out), dense)
    assert found.ok, found.problems
    done = run("plan", llama, "-o", "plan.json", "--parts", "none", "--allow", "average", "--save", str(3 * SAVED),
               "--calibration", "text", "--calibration-window", "16", "--calibration-tokens", "320")  # fmt: skip
    assert done.status == 0, done.err
    assert hs.SharePlan.load(tmp_path / "plan.json") == plan
