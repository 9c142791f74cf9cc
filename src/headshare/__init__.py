"""headshare: make a pre-trained transformer smaller by letting attention heads of different layers share weights.

Importing it registers the checkpoint format with transformers, and changes nothing else. torch and transformers are
imported when something is used that needs them. What is not here stands one dot away: `headshare.errors`,
`headshare.plan`, `headshare.evaluation`, `headshare.training`, `headshare.experiments`.
"""

from typing import TYPE_CHECKING

from headshare.integrations.transformers.registering import register
from headshare.lazy import lazy_names

if TYPE_CHECKING:
    from headshare.calibration.budget import Budget
    from headshare.calibration.choose import plan_by_output
    from headshare.calibration.refit.run import refit
    from headshare.checkpoint.checkpoint import Checkpoint
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.errors import HeadshareError
    from headshare.evaluation.verify import verify
    from headshare.integrations.gguf.export import export_gguf
    from headshare.integrations.transformers.loading import load
    from headshare.matching.estimate import estimate
    from headshare.matching.exact.plan import exact_plan
    from headshare.matching.exact.repeat import repeat_layers
    from headshare.matching.functions import match_function
    from headshare.matching.pairing import make_plan
    from headshare.matching.similarity import score_units
    from headshare.plan.plan import SharePlan
    from headshare.sharing.expand import expand
    from headshare.sharing.share import share
    from headshare.shrinking.run import shrink
    from headshare.text.tokens import Calibration
    from headshare.version import __version__ as __version__
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "headshare.calibration.budget": "Budget",
            "headshare.calibration.choose": "plan_by_output",
            "headshare.calibration.refit.run": "refit",
            "headshare.checkpoint.checkpoint": "Checkpoint",
            "headshare.checkpoint.opening": "open_checkpoint",
            "headshare.errors": "HeadshareError",
            "headshare.evaluation.verify": "verify",
            "headshare.integrations.gguf.export": "export_gguf",
            "headshare.integrations.transformers.loading": "load",
            "headshare.matching.estimate": "estimate",
            "headshare.matching.exact.plan": "exact_plan",
            "headshare.matching.exact.repeat": "repeat_layers",
            "headshare.matching.functions": "match_function",
            "headshare.matching.pairing": "make_plan",
            "headshare.matching.similarity": "score_units",
            "headshare.plan.plan": "SharePlan",
            "headshare.sharing.expand": "expand",
            "headshare.sharing.share": "share",
            "headshare.shrinking.run": "shrink",
            "headshare.text.tokens": "Calibration",
            "headshare.version": "__version__",
        },
    )

__all__ = [
    "Budget",
    "Calibration",
    "Checkpoint",
    "HeadshareError",
    "SharePlan",
    "estimate",
    "exact_plan",
    "expand",
    "export_gguf",
    "load",
    "make_plan",
    "match_function",
    "open_checkpoint",
    "plan_by_output",
    "refit",
    "repeat_layers",
    "score_units",
    "share",
    "shrink",
    "verify",
]

register()
