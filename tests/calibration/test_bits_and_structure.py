"""What rounding costs, and widths and structure that are chosen together under a budget of bytes."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import headshare as hs
from headshare.calibration.bits.costs import MatrixCosts, checked_costs, costs_to_data, rounding_costs
from headshare.calibration.bits.joint import WIDTHS, ByteBudget, bytes_left, plan_with_bits
from headshare.calibration.budget import Budget
from headshare.calibration.costs.actions import NARROW_VALUES, REMOVE
from headshare.calibration.costs.curves import CostCurves
from headshare.calibration.costs.local import price_units, priced_before
from headshare.calibration.costs.to_plan import Budgeted
from headshare.calibration.refit.run import refit
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CheckpointError, OptionError, PlanError
from headshare.evaluation.verify import verify
from headshare.integrations.transformers.loading import load_model
from headshare.plan.bits import PlannedBits
from headshare.plan.plan import SharePlan
from headshare.plan.units import Part, Sublayer
from headshare.sharing.size import parameter_bytes
from support import tiny
from support.priced import Reference, calibration, opened
from support.rounded import of_kind, outputs

ACTIONS = (REMOVE, NARROW_VALUES)
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("dense")
    return hs.open_checkpoint(tiny.make("llama-gqa", folder / "model", dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def costs(dense: Checkpoint) -> list[MatrixCosts]:
    return rounding_costs(dense, calibration(), sensitive=False)


@pytest.fixture(scope="module")
def prices(dense: Checkpoint) -> CostCurves:
    return price_units(dense, calibration(), ACTIONS)


def chosen(dense: Checkpoint, prices: CostCurves, costs: list[MatrixCosts], to: float, bits: str) -> Budgeted:
    budget = ByteBudget(int(to * bytes_left(dense, None)), WIDTHS[bits])
    return plan_with_bits(dense, prices, costs, budget)


# ---- costs


def by_hand(matrix: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """The nearest multiples of each group's step, which the outermost number decides."""
    found = matrix.double().clone()
    for row in found:
        for part in row.split(group or len(row)):
            if bits == 8:
                step = part.abs().max() / 127
                part.copy_((part / step).round() * step)
            else:
                side = -part[part.abs().argmax()].sign()
                step = max((-side * part).max() / 8, (side * part).max() / 7) * side
                part.copy_((part / step).round().clamp(-8, 7) * step)
    return found


@pytest.mark.parametrize(("name", "part"), [("llama-gqa", "v"), ("llama-gqa", "down"), ("gpt2", "q"), ("phi3", "gate")])
def test_costs_are_the_change_of_what_the_sublayer_gives_in_the_stock_model(
    name: str, part: str, tmp_path: Path
) -> None:
    checkpoint = opened(name, tmp_path)
    layouts = {layout.kind: layout for layout in checkpoint.layouts.all}
    kind = Sublayer.FFN if part in ("gate", "down") else Sublayer.ATTENTION
    place = layouts[kind].parts[Part(part)]
    text = calibration()
    (matrix,) = [
        each for each in rounding_costs(checkpoint, text, sensitive=False) if each.name == place.name(1)
    ]  # fmt: skip
    reference = Reference(checkpoint, layouts[kind], 1, text)
    module = reference.module(place.name(1))
    turned = (place.axis == 1) != (part == "down")
    assert {(each.bits, each.group) for each in matrix.costs} >= {(8, 0), (4, 16)}
    for each in matrix.costs:
        own = module.weight.detach().clone()
        rounded = by_hand(own.T if turned else own, each.bits, each.group or None)
        module.weight.data.copy_(rounded.T if turned else rounded)
        seen = reference.seen()
        readout = reference.module(reference.readout.name(1)).weight.detach().double()
        now = seen["in"] @ (readout if reference.readout.axis == 0 else readout.T) * reference.root
        lost = now - reference.inputs @ reference.weight.T
        module.weight.data.copy_(own)
        assert each.price == pytest.approx(float(lost.square().sum()), rel=0.02)


def test_costs_come_back_from_json_and_strange_ones_are_refused(costs: list[MatrixCosts]) -> None:
    assert checked_costs(costs_to_data(costs)) == costs
    with pytest.raises(PlanError, match="costs of rounding are not valid"):
        checked_costs([{"name": 3}])


# ---- the choice


@pytest.mark.parametrize("bits", ["8", "4", "auto"])
@pytest.mark.parametrize("to", [0.3, 0.42])
def test_what_is_written_has_no_more_bytes_than_were_asked_for(
    to: float, bits: str, dense: Checkpoint, prices: CostCurves, costs: list[MatrixCosts], tmp_path: Path
) -> None:
    plan = chosen(dense, prices, costs, to, bits)
    shared = hs.share(dense, plan.plan)
    with hs.open_checkpoint(shared.save(tmp_path / "out")) as out:
        left = parameter_bytes(out)
        assert left == shared.estimate.shared_bytes == bytes_left(dense, None) - plan.saved_bytes
        assert left <= to * bytes_left(dense, None)
        assert left > 0.97 * to * bytes_left(dense, None) or not plan.plan.sections
        widths = {info.parts.bits if info.parts else 16 for info in out.tensors.values() if len(info.shape) == 2}
        assert widths <= {"8": {8}, "4": {4, 8}, "auto": {4, 8, 16}}[bits]
        assert out.plan == plan.plan
        assert verify(out, dense).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_free_widths_cost_no_more_than_one_for_all_and_less_where_more_is_left(
    dense: Checkpoint, prices: CostCurves, costs: list[MatrixCosts]
) -> None:
    sizes = (0.45, 0.4, 0.35, 0.25)
    free = [chosen(dense, prices, costs, to, "auto").price for to in sizes]
    assert free == sorted(free)
    for to, price in zip(sizes, free, strict=True):
        assert price <= 1.02 * min(chosen(dense, prices, costs, to, bits).price for bits in ("8", "4"))


def test_widths_alone_are_the_cheapest_of_all_there_are(dense: Checkpoint, costs: list[MatrixCosts]) -> None:
    """Two matrices that differ in cost, all widths of both tried."""
    some = [replace(each, costs=tuple(replace(c, price=0.0) for c in each.costs)) for each in costs]
    for at, factor in ((0, 1.0), (5, 3.0)):
        prices = {(8, 0): 0.1, (4, 64): 2.0, (4, 32): 2.0, (4, 16): 1.0}
        some[at] = replace(
            some[at], costs=tuple(replace(c, price=factor * prices[c.bits, c.group]) for c in some[at].costs)
        )
    none = priced_before(dense, ACTIONS, ())
    all_four = chosen(dense, none, some, 0.99, "4").plan.bits
    assert all_four is not None
    known = {}
    for pair in product((16, 8, 4), repeat=2):
        widths: dict[str, int] = dict.fromkeys(all_four.int4, 4) | {some[0].name: pair[0], some[5].name: pair[1]}
        bits = PlannedBits(
            int8=(EMBEDDING, *(name for name, width in widths.items() if width == 8)),
            int4=tuple(name for name, width in widths.items() if width == 4),
            group=16,
        )
        known[pair] = hs.share(dense, SharePlan(bits=bits)).estimate.shared_bytes
    cost = {16: 0.0, 8: 0.1, 4: 1.0}
    for pair, size in known.items():
        found = plan_with_bits(dense, none, some, ByteBudget(size, WIDTHS["auto"]))
        best = min(cost[a] + 3 * cost[b] for (a, b), left in known.items() if left <= size)
        if best == cost[pair[0]] + 3 * cost[pair[1]]:
            assert found.price == pytest.approx(best)


def test_where_bits_are_enough_nothing_is_given_up_and_that_is_said(
    dense: Checkpoint, prices: CostCurves, costs: list[MatrixCosts]
) -> None:
    plan = chosen(dense, prices, costs, 0.6, "auto")
    assert not plan.plan.sections
    assert "bits alone reach this size" in plan.in_words()
    assert plan.price == plan.rounding > 0
    assert "bits alone" not in chosen(dense, prices, costs, 0.25, "auto").in_words()


def test_what_cannot_be_reached_is_one_error(
    dense: Checkpoint, prices: CostCurves, costs: list[MatrixCosts], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="cannot be reached; what was priced leaves at least"):
        chosen(dense, prices, costs, 0.02, "auto")
    odd = hs.open_checkpoint(tiny.make_llama(tmp_path / "odd", intermediate_size=36))
    with pytest.raises(CheckpointError, match="groups of 16 inputs do not divide"):
        plan_with_bits(odd, priced_before(odd, ACTIONS, ()), (), ByteBudget(10, (4,)))
    for options, error, why in (
        ({"to": "40%", "save": "60%"}, OptionError, "both of --save and --to"),
        ({"to": "40%", "bits": "3"}, OptionError, "no rounding to '3' bits"),
        ({"bits": "8"}, OptionError, "no size is asked for"),
        ({"to": "0%", "bits": "8"}, PlanError, "cannot be saved"),
        ({"to": "40%", "bits": "8", "target": "gguf"}, OptionError, "gguf has its own numbers"),
    ):
        given: dict[str, Any] = options
        with pytest.raises(error, match=why):
            Budget.parse(dense, **given)


# ---- a plan with bits, whatever else it does


@pytest.mark.parametrize("kind", ["ties", "low_rank", "narrow_values"])
def test_a_plan_of_any_kind_is_rounded_as_it_says(kind: str, dense: Checkpoint, tmp_path: Path) -> None:
    plan = of_kind(dense, kind)
    names = [place.name(layer) for layout in dense.layouts.all for place in layout.parts.values() for layer in range(4)]
    bits = PlannedBits(int8=(EMBEDDING, *names[::2]), int4=tuple(names[1::2]), group=16)
    shared = hs.share(dense, plan.model_copy(update={"bits": bits}))
    with hs.open_checkpoint(shared.save(tmp_path / "out")) as out:
        assert parameter_bytes(out) == shared.estimate.shared_bytes
        assert verify(out, dense).ok
        parts = {name: info.parts for name, info in out.tensors.items()}
        assert {name: each.bits for name, each in parts.items() if each and each.bits == 4}
        for name, each in parts.items():
            if each and name in bits.of and 2 * max(each.guard.shape) >= 16:
                assert each.bits == bits.of[name]
        narrow = [each.bits for each in parts.values() if each and 2 * max(each.guard.shape) < 16]
        assert set(narrow) == ({8} if kind == "low_rank" else set())


def test_a_refit_makes_up_for_rounding_too(dense: Checkpoint, tmp_path: Path) -> None:
    names = [place.name(layer) for layout in dense.layouts.all for place in layout.parts.values() for layer in range(4)]
    shared = hs.share(dense, SharePlan(bits=PlannedBits(int4=tuple(names), group=16)))
    text = calibration(64)
    lost = {}
    for name, each in (("rounded", shared), ("repaired", refit(shared, text))):
        with hs.open_checkpoint(each.save(tmp_path / name)) as out:
            assert verify(out, dense).ok
            model, own = load_model(out, dtype=torch.float32), load_model(dense, dtype=torch.float32)
            lost[name] = float((outputs(model, text.tokens) - outputs(own, text.tokens)).square().mean())
    assert lost["repaired"] < 0.8 * lost["rounded"]


def test_a_plan_that_rounds_what_the_model_has_not_is_refused(dense: Checkpoint, tmp_path: Path) -> None:
    plan = SharePlan(bits=PlannedBits(int8=("model.layers.9.mlp.up_proj.weight",)))
    with pytest.raises(PlanError, match="is no matrix of this model"):
        hs.share(dense, plan).save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
