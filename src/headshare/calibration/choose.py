"""Plans for a budget, chosen on calibration text."""

from collections.abc import Collection, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from headshare.calibration import processes
from headshare.calibration.allocate import plan_for_bytes, plan_for_units
from headshare.calibration.bits.costs import MatrixCosts, checked_costs, costs_to_data, rounding_costs
from headshare.calibration.bits.joint import plan_with_bits
from headshare.calibration.budget import Budget
from headshare.calibration.costs.actions import Action
from headshare.calibration.costs.curves import CostCurve, CostCurves
from headshare.calibration.costs.kept import KeptCurves, SavedCurves
from headshare.calibration.costs.local import price_units, priced_before
from headshare.calibration.costs.measured import check_windows, predicts, probe_prices
from headshare.calibration.costs.to_plan import Budgeted
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import PlanError
from headshare.files.state_files import Workspace, key_of
from headshare.plan.plan import SharePlan
from headshare.plan.units import Sublayer
from headshare.text.tokens import Calibration


def plan_by_output(
    dense: Checkpoint,
    calibration: Calibration,
    budget: Budget | None = None,
    *,
    probe: bool = True,
    device: str = "cpu",
    **wanted: Any,
) -> SharePlan:
    """The plan that changes the model's output least on the calibration text.

    The budget is given, or made of the options that `Budget.parse` takes, such as `save="10%"` or `allow=["remove"]`.

    Raises:
        PlanError: if the budget cannot be met, or is given twice.
        CalibrationError: if the text is too short.
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
    """
    if budget is not None and wanted:
        raise PlanError(f"a budget is given, so {', '.join(wanted)} would not be used. Give one or the other.")
    asked = Budget.parse(dense, **wanted) if budget is None else budget
    return plan_on(dense, calibration, asked, probe=probe, device=device).plan


def plan_on(
    dense: Checkpoint,
    calibration: Calibration,
    budget: Budget,
    *,
    probe: bool = True,
    device: str = "cpu",
    workspace: Workspace | None = None,
    kept: KeptCurves | None = None,
) -> Budgeted:
    """The plan that meets this budget at the least cost on the calibration text.

    The cost of a unit is the change of its layer's output. With `probe`, it is the change of the model's next-token
    predictions, if the model makes any. Curves that are `kept` in a file are read there, or written if there is none.

    Raises:
        PlanError: if the budget cannot be met.
        CalibrationError: if the text is too short to measure predictions on, or what is kept is of something else.
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
    """
    rounding: list[MatrixCosts] = []
    if budget.rounded is not None:
        rounding = _costs_of_rounding(dense, calibration, probe=probe, device=device, workspace=workspace, kept=kept)
        # where bits alone are enough, nothing costs as little: what could be given up need not be priced
        if budget.rounded.is_met_by_bits(dense):
            none = priced_before(dense, budget.actions, (), ffn_groups=budget.ffn_groups)
            return plan_with_bits(dense, replace(none, in_nats=probe and predicts(dense)), rounding, budget.rounded)

    # All layers are priced, protected or not, so that one pricing serves whatever is protected.
    known = processes.from_first(lambda: None if kept is None else kept.read(budget.actions))
    prices = prices_on(
        dense,
        calibration,
        budget.actions,
        ffn_groups=budget.ffn_groups,
        multiple=budget.multiple,
        probe=probe,
        device=device,
        workspace=workspace,
        known=known,
    )
    if kept is not None and known is None and processes.is_first():
        kept.write(budget.actions, prices.curves)
    prices = prices.only(budget.actions).without_layers(budget.protect)
    if budget.rounded is not None:
        return plan_with_bits(dense, prices, rounding, budget.rounded)
    if budget.units is not None:
        return plan_for_units(prices, budget.units)
    assert budget.saved_bytes is not None
    return plan_for_bytes(prices, budget.saved_bytes)


def _costs_of_rounding(
    dense: Checkpoint,
    calibration: Calibration,
    *,
    probe: bool,
    device: str,
    workspace: Workspace | None,
    kept: KeptCurves | None,
) -> list[MatrixCosts]:
    """What rounding each matrix costs, from what is kept or what a stopped run saved, if they have it."""
    sensitive = probe and predicts(dense)
    name = f"rounding-{key_of(sensitive)}.json"

    def before() -> list[MatrixCosts] | None:
        known = None if kept is None else kept.read_rounding()
        saved = None if workspace is None or known is not None else workspace.read_json(name)
        data = known if saved is None else saved["costs"]
        return None if data is None else checked_costs(data)

    costs = processes.from_first(before)
    if costs is None:
        costs = rounding_costs(dense, calibration, sensitive=sensitive, device=device)
        if processes.is_first():
            if workspace is not None:
                workspace.write_json(name, {"costs": costs_to_data(costs)})
            if kept is not None:
                kept.write_rounding(costs_to_data(costs))
    return costs


def prices_on(
    dense: Checkpoint,
    calibration: Calibration,
    actions: tuple[Action, ...],
    *,
    ffn_groups: int = 1,
    multiple: int = 1,
    kinds: Collection[Sublayer] = tuple(Sublayer),
    probe: bool = True,
    device: str = "cpu",
    workspace: Workspace | None = None,
    known: Sequence[CostCurve] | None = None,
) -> CostCurves:
    """Cost curves of all sublayers of these kinds, by these actions.

    They are made by `price_units`. With `probe`, `probe_prices` then measures them, if the model predicts tokens. Where
    all curves are `known`, they are only checked against the model.

    Raises:
        PlanError: if the model can have none of the actions.
        CalibrationError: if the text is too short to measure predictions on.
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
    """
    dense.require_dense("plan")
    probe = probe and predicts(dense)
    if probe:
        check_windows(calibration)  # before hours of work

    if known is not None:
        return replace(priced_before(dense, actions, known, ffn_groups=ffn_groups), in_nats=probe)

    # Output errors are found for all sublayers, so that runs that differ in `kinds` alone can share them.
    what = tuple(map(str, actions)), ffn_groups, multiple, probe
    done = _saved_paths(workspace, *what)
    prices = price_units(
        dense,
        calibration,
        actions,
        ffn_groups=ffn_groups,
        multiple=multiple,
        device=device,
        done=done,
        sensitive=probe,
    )
    prices = replace(prices, curves=tuple(curve for curve in prices.curves if curve.kind in kinds))

    # Measured costs replace the output errors; they are kept apart, as other runs may want either.
    if probe:
        before = _saved_paths(workspace, "probed", sorted(kinds), *what)
        prices = probe_prices(dense, calibration, prices, device=device, done=before)
    return prices


def _saved_paths(workspace: Workspace | None, *what: object) -> MutableMapping[int, list[CostCurve]] | None:
    """Cost curves that an earlier run saved under this key, all read once to check them; None without a workspace.

    Those of the first process are on disk, and the others know them.
    """
    if workspace is None:
        return None
    saved = SavedCurves(workspace, key_of(*what))
    known = processes.from_first(lambda: dict(saved))
    return saved if processes.is_first() else known
