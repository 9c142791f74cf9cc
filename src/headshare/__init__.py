"""headshare: make a pre-trained transformer smaller by letting attention heads of different layers share weights.

Importing it registers the checkpoint format with transformers, and changes nothing else.
"""

from headshare.accounting import Estimate, estimate, estimate_plan
from headshare.calibrating import Budget, budget_of, plan_on, refit_on
from headshare.calibration import Calibration, calibration_from
from headshare.checkpoints import Checkpoint, open_checkpoint
from headshare.errors import (
    ArchitectureError,
    CalibrationError,
    CheckpointError,
    EvaluationError,
    HeadshareError,
    OutputError,
    PlanError,
    StorageError,
)
from headshare.integrations.transformers import HeadshareConfig
from headshare.matching import match_function
from headshare.models import load
from headshare.planning import make_plan
from headshare.plans import SharePlan
from headshare.scores import Scores
from headshare.sharing import SharedCheckpoint, expand, share
from headshare.similarity import score_units
from headshare.units import HeadUnit, Part, Parts, Tie

__all__ = [
    "ArchitectureError",
    "Budget",
    "Calibration",
    "CalibrationError",
    "Checkpoint",
    "CheckpointError",
    "Estimate",
    "EvaluationError",
    "HeadUnit",
    "HeadshareConfig",
    "HeadshareError",
    "OutputError",
    "Part",
    "Parts",
    "PlanError",
    "Scores",
    "SharePlan",
    "SharedCheckpoint",
    "StorageError",
    "Tie",
    "budget_of",
    "calibration_from",
    "estimate",
    "estimate_plan",
    "expand",
    "load",
    "make_plan",
    "match_function",
    "open_checkpoint",
    "plan_on",
    "refit_on",
    "score_units",
    "share",
]
