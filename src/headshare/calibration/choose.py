"""A plan for a budget, chosen on calibration text."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from headshare.calibration.allocate import plan_for_bytes, plan_for_units
from headshare.calibration.budget import Budget
from headshare.calibration.costs.actions import Action
from headshare.calibration.costs.curves import Prices
from headshare.calibration.costs.local import price_units
from headshare.calibration.costs.measured import check_windows, predicts, probe_prices
from headshare.calibration.costs.saved import SavedPaths
from headshare.calibration.costs.to_plan import Budgeted
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import PlanError
from headshare.files.state_files import Workspace, check_readable, joint_digest
from headshare.plan.plan import SharePlan
from headshare.plan.units import Kind
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
    """The plan that costs the model's output least on the calibration text.

    The budget is given, or made of the words that `Budget.parse` takes: `save="10%"`, `allow=["remove"]` and the like.

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
) -> Budgeted:
    """The plan that gives up least, by what every unit does to its layer's output on the calibration text and, with
    `probe`, by what that does to the predictions of a model that makes any.

    Raises:
        PlanError: if the budget cannot be met.
        CalibrationError: if the text is too short to probe with.
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
    """
    prices = prices_on(
        dense,
        calibration,
        budget.actions,
        ffn_groups=budget.ffn_groups,
        protect=budget.protect,
        probe=probe,
        device=device,
        workspace=workspace,
    ).only(budget.actions)
    if budget.units is not None:
        return plan_for_units(prices, budget.units)
    assert budget.saved_bytes is not None
    return plan_for_bytes(prices, budget.saved_bytes)


def prices_on(
    dense: Checkpoint,
    calibration: Calibration,
    actions: tuple[Action, ...],
    *,
    ffn_groups: int = 1,
    protect: tuple[int, ...] = (),
    kinds: Collection[Kind] = tuple(Kind),
    probe: bool = True,
    device: str = "cpu",
    workspace: Workspace | None = None,
) -> Prices:
    """The prices of all that these halves of all layers could give up by these actions: `price_units`, and with
    `probe` `probe_prices`, where the model predicts anything.

    Raises:
        PlanError: if the model can have none of the actions.
        CalibrationError: if the text is too short to probe with.
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
    """
    dense.require_dense("plan")
    probe = probe and predicts(dense)
    if probe:
        check_windows(calibration)  # before hours of work
    what = tuple(map(str, actions)), ffn_groups, protect
    done = _saved_paths(workspace, *what)
    prices = price_units(dense, calibration, actions, ffn_groups=ffn_groups, protect=protect, device=device, done=done)
    prices = replace(prices, paths=tuple(path for path in prices.paths if path.kind in kinds))
    if probe:
        known = _saved_paths(workspace, "probed", sorted(kinds), *what)
        prices = probe_prices(dense, calibration, prices, device=device, done=known)
    return prices


def _saved_paths(workspace: Workspace | None, *what: object) -> SavedPaths | None:
    """The paths that an earlier run priced under this key, all read once; None where nothing is kept."""
    if workspace is None:
        return None
    saved = SavedPaths(workspace, joint_digest(*what))
    check_readable(saved)
    return saved
