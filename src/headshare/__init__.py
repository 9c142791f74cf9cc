"""headshare: make a pre-trained transformer smaller by letting attention heads of different layers share weights.

Importing it registers the checkpoint format with transformers, and changes nothing else.
"""

from headshare.calibration.budget import Budget, budget_of
from headshare.calibration.choose import plan_on
from headshare.calibration.refit.run import refit_on
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.opening import open_checkpoint
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
from headshare.integrations.transformers.config import HeadshareConfig
from headshare.integrations.transformers.loading import load
from headshare.matching.estimate import estimate
from headshare.matching.functions import match_function
from headshare.matching.pairing import make_plan
from headshare.matching.scores import Scores
from headshare.matching.similarity import score_units
from headshare.plan.plan import SharePlan
from headshare.plan.units import HeadUnit, Part, Parts, Tie
from headshare.sharing.expand import expand
from headshare.sharing.share import SharedCheckpoint, share
from headshare.sharing.size import Estimate, estimate_plan
from headshare.text.tokens import Calibration, calibration_from

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
