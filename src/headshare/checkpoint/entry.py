"""The entry of headshare in config.json, and the check of an entry that somebody else wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from headshare.checkpoint.int4 import NESTED, Packing
from headshare.checkpoint.refit_record import RefitRecord
from headshare.checkpoint.rounding.entry import METHOD as METHOD
from headshare.checkpoint.rounding.entry import Rounding, is_rounding
from headshare.errors import CheckpointError, PlanError
from headshare.files.printable import is_shown
from headshare.files.untrusted import checked_record
from headshare.plan.plan import FORMAT, SharePlan, check_format

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class Origin(BaseModel):
    """The record of what a dense model was: the digest of its tensors (`content_digest`), and its commit on the hub.

    Raises:
        CheckpointError: from `from_dict`, if a checkpoint's own record is not valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    digest: Digest
    commit: Commit | None = None

    @classmethod
    def from_dict(cls, data: Any) -> "Origin":
        """Check a record that somebody else wrote."""
        return checked_record(cls, data, "the checkpoint's record of the dense model that it came from")

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON data, without what is not known."""
        return self.model_dump(mode="json", exclude_none=True)


@dataclass(frozen=True)
class SharingEntry:
    """The `quantization_config` of a shared checkpoint. It holds no weight and no path.

    `base_model` is the name of the dense model at the time of sharing, and `origin` what it was. `packing` says how
    matrices are rounded: by `Rounding`, or as they were stored before there was that. `from_config` reads the entry
    from a dictionary, wherever that comes from; `to_config` writes one again.
    """

    plan: SharePlan
    refit: RefitRecord | None = None
    base_model: str | None = None
    packing: Packing | Rounding | None = None
    origin: Origin | None = None

    @classmethod
    def from_config(cls, entry: Any) -> "SharingEntry | None":
        """The checked entry of a `quantization_config`; None where there is none, or it is another method's.

        One that was read before stays as it is. Somebody else may have written it: a name of a dense model that cannot
        be shown is left out.

        Raises:
            CheckpointError: if it is of another format, or its plan, its records or its packing are not valid.
        """
        if isinstance(entry, cls):
            return entry
        if not isinstance(entry, dict) or entry.get("quant_method") != METHOD:
            return None
        try:
            check_format("the checkpoint", entry.get("format", FORMAT))
            plan = SharePlan.from_dict(entry.get("plan"))
        except PlanError as error:
            raise CheckpointError(str(error)) from None
        refit = entry.get("refit")
        packing = entry.get(NESTED)
        origin = entry.get("origin")
        name = entry.get("base_model")
        return cls(
            plan=plan,
            refit=None if refit is None else RefitRecord.from_dict(refit),
            base_model=name if isinstance(name, str) and is_shown(name) else None,
            packing=None if packing is None else _packing(packing),
            origin=None if origin is None else Origin.from_dict(origin),
        )

    def to_config(self) -> dict[str, Any]:
        """The entry as JSON data, which tells transformers who loads the checkpoint; the inverse of `from_config`.

        The entry of the packing nests inside, under the same name as this one.
        """
        entry = {"quant_method": METHOD, "format": FORMAT, "plan": self.plan.model_dump(mode="json")}
        if self.refit is not None:
            entry["refit"] = self.refit.model_dump(mode="json")
        if self.packing is not None:
            entry[NESTED] = self.packing.to_dict()
        if self.base_model is not None:
            entry["base_model"] = self.base_model
        if self.origin is not None:
            entry["origin"] = self.origin.to_dict()
        return entry

    @property
    def rounding(self) -> Rounding | None:
        """The record of rounding, if matrices are stored by it."""
        return self.packing if isinstance(self.packing, Rounding) else None


def _packing(entry: Any) -> Packing | Rounding:
    return Rounding.from_dict(entry) if is_rounding(entry) else Packing.from_dict(entry)


def rounding_of(config: Mapping[str, Any]) -> Rounding | None:
    """The record of rounding in config.json, without a look at the plan beside it; None where there is none.

    Raises:
        CheckpointError: if it is not valid.
    """
    entry = config.get("quantization_config")
    if isinstance(entry, SharingEntry):
        return entry.rounding
    nested = entry.get(NESTED) if isinstance(entry, dict) and entry.get("quant_method") == METHOD else None
    return Rounding.from_dict(nested) if is_rounding(nested) else None
