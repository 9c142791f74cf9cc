"""The model card of a folder that headshare writes: its base model, its licence, what was done, and how to load it.

The card of the model that it was made from is not passed on, for its figures are another model's. Only its licence is.
What is measured later is put in by `add_measured`, and lost when the model is changed and its card written anew.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.contents import is_inside
from headshare.checkpoint.entry import SharingEntry
from headshare.files.atomic import write_whole
from headshare.files.folder import copy_file, write_text
from headshare.files.model_files import CARD
from headshare.files.printable import is_shown
from headshare.installing import FROM_A_CHECKOUT
from headshare.plan.describe import titles
from headshare.sharing.manifest import note_changed

_MAX_FRONT = 100_000
_NOT_MEASURED = "How well it does was not measured when it was written."
# comments, which are not shown, around what was measured
_BEGIN = "<!-- measured by headshare -->"
_END = "<!-- end of what was measured -->"
_MEASURED = re.compile(f"{_BEGIN}.*?{_END}", re.DOTALL)
_CITE = """## Cite

Cite the base model. Units of different layers that share weights are the method of this paper:

```bibtex
@misc{cao2024headwise,
  title  = {Head-wise Shareable Attention for Large Language Models},
  author = {Cao, Zouying and Yang, Yifei and Zhao, Hai},
  year   = {2024},
  eprint = {2402.11819},
  archivePrefix = {arXiv}
}
```
"""
_LICENCE = re.compile(r"(license|license_name|license_link): *[\"']?([\w.+:/~-]+(?: [\w.+:/~-]+)*)[\"']? *")
_SAID = re.compile(_LICENCE.pattern.replace("license|", "base_model|license|", 1))
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(folder: Path, source: Checkpoint, config: Mapping[str, Any], *, in_place: bool = False) -> None:
    """Write the card of a model with this configuration, made from this source, into its folder.

    Where the source itself is replaced (`in_place`), a card that somebody else wrote for it stays.
    """
    card = source.path / CARD
    if in_place and card.is_file() and not _is_ours(card, source):
        copy_file(card, folder / CARD)
    else:
        write_text(folder / CARD, model_card(source, config))


def _is_ours(card: Path, source: Checkpoint) -> bool:
    """True if a card says no more than what was written for this checkpoint, and what was measured of it."""
    try:
        text = card.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return _MEASURED.sub(_NOT_MEASURED, text) == model_card(source, source.config)


def add_measured(folder: Path, measured: str) -> None:
    """Put what was measured of a model, as Markdown, into the card that was written for it, and into its manifest.

    What was put there before gives way. A card that somebody else wrote stays as it is.
    """
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    block = f"{_BEGIN}\n{measured.strip()}\n{_END}"
    changed = _MEASURED.sub(_NOT_MEASURED, text).replace(_NOT_MEASURED, block, 1)
    if changed != text:
        write_whole(card, changed.encode())
        note_changed(folder, CARD)


def model_card(source: Checkpoint, config: Mapping[str, Any]) -> str:
    """The text of the card, front matter first."""
    entry = SharingEntry.from_config(config.get("quantization_config"))
    before = source.sharing
    base = next((each.base_model for each in (entry, before) if each and each.base_model), None)
    # a name on the hub is a fact about the model; a folder's is one about somebody's disk
    named = base or source.name
    on_hub = _HUB_ID.fullmatch(named) is not None and not Path(named).exists()
    shown = named if on_hub else Path(named).name
    shown = shown if is_shown(shown) and "`" not in shown else "a model"
    front = {"base_model": named} if on_hub else {}
    front |= {"library_name": "transformers", **licence_of(source.path)}
    front |= {"pipeline_tag": "text-generation"} if model_class(config).endswith("ForCausalLM") else {}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "tags: [headshare]", "---", ""]
    lines += [f"# Made from `{shown}`", "", f"Written by headshare. {_kind(entry, before)}", ""]
    lines += [f"* {step}" for step in _steps(entry)]
    lines += ["", _NOT_MEASURED, ""]
    lines += [f"transformers loads it once headshare is imported: {FROM_A_CHECKOUT}.", ""] if entry else []
    lines += ["```python", *(["import headshare"] if entry else []), f"from transformers import {model_class(config)}"]
    lines += ["", f'model = {model_class(config)}.from_pretrained("this folder")', "```", ""]
    return "\n".join([*lines, *([_CITE] if entry else [])])


def model_class(config: Mapping[str, Any]) -> str:
    """The name of the class in transformers that loads a model of this configuration."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) and first.isascii() and first.isidentifier() else "AutoModel"


def _kind(entry: SharingEntry | None, before: SharingEntry | None) -> str:
    if entry is not None:
        return "Some of its weights are stored once and used in several layers:"
    return "It computes what the shared model does that it was expanded from." if before else "It is an ordinary model."


def _steps(entry: SharingEntry | None) -> list[str]:
    """What was done to the base model, a line for each section of the plan and for what came after."""
    if entry is None:
        return []
    refit = entry.refit
    if refit is not None and Path(refit.text).is_absolute():  # where it lies is nobody's business
        refit = refit.model_copy(update={"text": Path(refit.text).name})
    return titles(entry.plan) + [each.in_words() for each in (refit, entry.packing) if each is not None]


def front_matter(folder: Path) -> dict[str, str]:
    """The base model and the licence in the front matter of a folder's card, each if it is one plain word there."""
    return {key: value for key, value in _front(folder, _SAID).items() if key in ("base_model", "license")}


def licence_of(folder: Path) -> dict[str, str]:
    """What the front matter of a folder's card says of its licence."""
    return _front(folder, _LICENCE)


def _front(folder: Path, wanted: re.Pattern[str]) -> dict[str, str]:
    card = folder / CARD
    if not card.is_file() or not is_inside(folder, CARD):
        return {}
    with card.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_MAX_FRONT)
    front = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    found = map(wanted.fullmatch, front[1].splitlines() if front else ())
    return {line[1]: line[2] for line in found if line}
