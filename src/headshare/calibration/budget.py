"""Budgets: how many bytes or units a plan is to save, and by which actions."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from headshare.calibration.costs.curves import Form
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.layouts import layouts_of
from headshare.errors import OptionError, PlanError
from headshare.matching.estimate import estimate
from headshare.matching.pairing import checked_recipients
from headshare.plan.units import Parts
from headshare.sharing.size import parameter_infos

AUTO = "auto"
REMOVE = "remove"
_FORMS: dict[str, tuple[Form, ...]] = {
    "qk": (Form.QK,),
    "qkv": (Form.QKV,),
    "qkvo": (Form.QKVO,),
    "gateup": (Form.GATEUP,),
    "factored": (Form.FACTORED,),
    AUTO: (Form.QKVO, Form.FACTORED),
}


@dataclass(frozen=True)
class Budget:
    """What is to be given up: units in one form, or bytes in whichever of several forms cost least."""

    forms: tuple[Form, ...]
    units: int | None = None
    saved_bytes: int | None = None
    ffn_groups: int = 1
    protect: tuple[int, ...] = ()


def budget_of(
    dense: Checkpoint,
    *,
    ratio: float = 0.3,
    save: str | None = None,
    parts: str = AUTO,
    allow: Collection[str] = (),
    ffn_groups: int = 1,
    protect: Collection[int] = (),
) -> Budget:
    """Read what a person asks for. `save` is a share of the whole model's bytes, such as "10%", or a number of bytes.

    Without it, `ratio` of the units are shared in `parts`; where there is a choice of forms (several parts, as with
    auto, or removal allowed) or of ranks (parts factored), as many bytes as sharing q, k and v at this ratio would
    save.

    Raises:
        OptionError: if a word is not known, or the amount to save is none.
        PlanError: if the budget cannot be met by any plan.
    """
    dense.require_dense("plan for it")
    unknown = [word for word in allow if word != REMOVE]
    if unknown:
        raise OptionError(f"'{unknown[0]}' is not something that can be allowed besides sharing. There is: {REMOVE}.")
    forms = _forms_of(parts) + ((Form.REMOVE,) if allow else ())
    words = "gateup" if forms[0] is Form.GATEUP else "qk"
    layout = next(iter(layouts_of(dense, Parts.parse(words), ffn_groups)))
    units = checked_recipients(layout, 0.0 if save is not None else ratio, protect)
    saved: int | None = None
    if save is not None:
        saved = _bytes_of(dense, save)
    elif len(forms) > 1 or forms[0] is Form.FACTORED:
        saved = estimate(dense, ratio, parts="qkv").saved_bytes
    return Budget(forms, units if saved is None else None, saved, ffn_groups, tuple(sorted(set(protect))))


def _forms_of(parts: str) -> tuple[Form, ...]:
    words = [word.strip() for word in parts.split("+")]
    unknown = [word for word in words if word not in _FORMS]
    if unknown:
        raise OptionError(
            f"units cannot be matched by output in parts '{unknown[0]}'. There are: {', '.join(_FORMS)}, "
            "or several joined by +."
        )
    return tuple(dict.fromkeys(form for word in words for form in _FORMS[word]))


def _bytes_of(dense: Checkpoint, save: str) -> int:
    whole = sum(info.nbytes for info in parameter_infos(dense).values())
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*(%?)", save.strip())
    if found is None:
        raise OptionError(f"{save!r:.40} is no amount to save. Give a share such as 10%, or a number of bytes.")
    wanted = Fraction(found[1]) * (Fraction(whole, 100) if found[2] else 1)
    if not 1 <= wanted < whole:
        raise PlanError(f"{save} of a model of {whole:,} bytes cannot be saved; ask for more than 0 and less than all.")
    return int(wanted)
