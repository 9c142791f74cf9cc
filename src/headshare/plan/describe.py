"""Descriptions of a plan: its ties, removals and low-rank units, as a text picture of the layers and as data."""

from html import escape
from typing import Any

from headshare.plan.plan import SharePlan
from headshare.plan.section import KEPT, LENDS, SECTION_KINDS
from headshare.plan.units import Sublayer

# keys that the description of every plan has
_ALWAYS = ("selections", "removals", "factored")


def describe(plan: SharePlan) -> dict[str, Any]:
    """Counts and lists of the plan's ties, removals and low-rank units, as `inspect --json` prints them."""
    listed: dict[str, list[dict[str, Any]]] = {key: [] for key in _ALWAYS}
    for section in plan.sections:
        listed.setdefault(section.key, []).append(section.describe())
    bits = {} if plan.bits is None else {"bits": plan.bits.model_dump(mode="json")}
    return {"model_type": plan.model_type, "plan_digest": plan.digest, "ties": plan.ties, **listed, **bits}


def titles(plan: SharePlan) -> list[str]:
    """The first line of each section's picture: what it does, to how many units."""
    return [section.picture(plan.sections).splitlines()[0] for section in plan.sections]


def as_html(plan: SharePlan) -> str:
    """The plan as a notebook shows it: a small table of its sections, and the picture below it."""
    rows = [section.told().partition(": ") for section in plan.sections]
    cells = "".join(f"<tr><td>{escape(what)}</td><td>{escape(done)}</td></tr>" for what, _, done in rows)
    title = f"SharePlan, {escape(plan.model_type)}, {plan.ties} ties"
    return f"<table><caption>{title}</caption>{cells}</table><pre>{escape(picture(plan))}</pre>"


def given_up(plan: SharePlan) -> list[float]:
    """The fraction of each layer's attention units that are tied, low-rank or removed: the paper's figure 6."""
    layouts = [layout for layout in plan.layouts if layout.kind is Sublayer.ATTENTION]
    if not layouts:
        return []
    sections = (section for section in plan.sections if section.layout.kind is Sublayer.ATTENTION)
    units = {unit for section in sections for unit in section.units_given()}
    layers = range(layouts[0].layers)
    return [sum(unit.layer == layer for unit in units) / layouts[0].groups for layer in layers]


def picture(plan: SharePlan) -> str:
    """The plan as text: a block for each section, a line for each layer, a sign for each unit, and a legend."""
    blocks = [section.picture(plan.sections) for section in plan.sections]
    ties = SECTION_KINDS["selections"]
    legend = f"{KEPT} kept   {LENDS} kept, and lends to a later layer   {ties.sign} given up, uses a donor's"
    for kind in SECTION_KINDS.values():
        if kind.legend and any(isinstance(section, kind) for section in plan.sections):
            legend += f"   {kind.sign} {kind.legend}"
    bits = [] if plan.bits is None else [plan.bits.in_words()]
    return "\n\n".join([*blocks, legend, *bits]) + "\n"
