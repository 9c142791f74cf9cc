"""Names that follow: a model that transformers loaded and saved again can have other names than its plan says.

transformers adds or takes away what comes first: GPT-2 as on the hub gets `transformer.`, an encoder under a head gets
`bert.`, and a causal model that is loaded bare loses `model.`. The rest of a name stays, so that a plan's tensors tell.
"""

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

from headshare.checkpoint.entry import SharingEntry
from headshare.checkpoint.int4 import PACKED, Packing, part_of
from headshare.plan.plan import SharePlan


class Prefixes(NamedTuple):
    """What comes first in names: in the old ones, and in its place in the new ones."""

    old: str
    new: str

    def back(self) -> "Prefixes":
        """The change from the new names to the old ones."""
        return Prefixes(self.new, self.old)

    def renamed(self, name: str) -> str:
        """The new name of a tensor or of a template of names."""
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else name


def follow(entry: SharingEntry, names: Collection[str]) -> SharingEntry:
    """The entry, with its tensors called as they are in the checkpoint that has these names."""
    prefixes = changed_prefixes(entry.plan, names)
    if prefixes is None:
        return entry
    # what stands outside of the model that got the prefix, such as a head, keeps its name
    known = {name.rpartition(".")[0] for name in names}
    refit = entry.refit
    if refit is not None:
        tensors = tuple(new if (new := prefixes.renamed(old)) in names else old for old in refit.tensors)
        refit = refit.model_copy(update={"tensors": tensors})
    packing = entry.packing
    if isinstance(packing, Packing):
        ignored = tuple(new if (new := prefixes.renamed(old)) in known else old for old in packing.ignore)
        packing = packing.model_copy(update={"ignore": ignored})
    return dataclasses.replace(entry, plan=_renamed_plan(entry.plan, prefixes), refit=refit, packing=packing)


def changed_prefixes(plan: SharePlan, names: Collection[str]) -> Prefixes | None:
    """The change of names between a plan and a checkpoint; None where there is none, or no single one."""
    templates = sorted({place.tensor for layout in plan.layouts for place in layout.parts.values()})
    if not templates or any(_is_stored(_of_layer(template), names) for template in templates):
        return None
    # wherever the first layer's tensor ends as one in the checkpoint does, its beginning may have been changed so
    own, core = _split(templates[0])
    changes = {_prefixes(own, name.removesuffix(end)) for end in _ends(core) for name in names if name.endswith(end)}
    fitting = [
        each for each in sorted(changes) if all(_is_stored(_of_layer(each.renamed(t)), names) for t in templates)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _split(template: str) -> tuple[str, str]:
    """A template's beginning, and the rest of it from the list of layers on, in layer 0."""
    before = template[: template.index("{layer}")]
    own = before[: before.rstrip(".").rfind(".") + 1]
    return own, _of_layer(template.removeprefix(own))


def _of_layer(template: str) -> str:
    return template.replace("{layer}", "0")


def _ends(core: str) -> tuple[str, str]:
    return core, part_of(core, PACKED)


def _prefixes(old: str, new: str) -> Prefixes:
    """Both prefixes, before the end that they share: `bert.encoder.` and `encoder.` differ by `bert.`"""
    ours = old.split(".")[:-1]
    theirs = new.split(".")[:-1]
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return Prefixes("".join(f"{step}." for step in ours), "".join(f"{step}." for step in theirs))


def _is_stored(name: str, names: Collection[str]) -> bool:
    return name in names or part_of(name, PACKED) in names


def _renamed_plan(plan: SharePlan, prefixes: Prefixes) -> SharePlan:
    data = plan.model_dump(mode="json")
    for sections in data.values():
        for section in sections if isinstance(sections, list) else ():
            for place in section["layout"]["parts"].values():
                place["tensor"] = prefixes.renamed(place["tensor"])
    return SharePlan.from_dict(data)
