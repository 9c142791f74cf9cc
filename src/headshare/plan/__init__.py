"""Plans: which units are shared, how they were chosen, and what that means for each tensor. Plans hold no weight."""

from typing import TYPE_CHECKING

from headshare.lazy import lazy_names

if TYPE_CHECKING:
    from headshare.plan.layout import Layout, Place
    from headshare.plan.low_rank import LowRankUnits
    from headshare.plan.plan import SharePlan
    from headshare.plan.removal import Removal
    from headshare.plan.section import Choice, Section, section_kind
    from headshare.plan.ties import Selection
    from headshare.plan.units import HeadUnit, Part, Parts, Sublayer, Tie
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "headshare.plan.layout": "Layout Place",
            "headshare.plan.low_rank": "LowRankUnits",
            "headshare.plan.plan": "SharePlan",
            "headshare.plan.removal": "Removal",
            "headshare.plan.section": "Choice Section section_kind",
            "headshare.plan.ties": "Selection",
            "headshare.plan.units": "HeadUnit Part Parts Sublayer Tie",
        },
    )

__all__ = [
    "Choice",
    "HeadUnit",
    "Layout",
    "LowRankUnits",
    "Part",
    "Parts",
    "Place",
    "Removal",
    "Section",
    "Selection",
    "SharePlan",
    "Sublayer",
    "Tie",
    "section_kind",
]
