"""Plans: units, layouts and choices that say what is shared, and what that means per tensor. They hold no weight."""

from headshare.plan.layout import Layout, Place
from headshare.plan.low_rank import Factored
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.section import Choice, Section, section_kind
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Kind, Part, Parts, Tie

__all__ = [
    "Choice",
    "Factored",
    "HeadUnit",
    "Kind",
    "Layout",
    "Part",
    "Parts",
    "Place",
    "Removal",
    "Section",
    "Selection",
    "SharePlan",
    "Tie",
    "section_kind",
]
