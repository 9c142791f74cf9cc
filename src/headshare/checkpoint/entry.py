"""The entry of headshare in config.json: its name and its fields."""

from typing import Any

from headshare.checkpoint.int4 import NESTED, Packing
from headshare.checkpoint.refit_record import RefitRecord
from headshare.plan.plan import FORMAT, SharePlan

METHOD = "headshare"


def quantization_entry(
    plan: SharePlan,
    refit: RefitRecord | None = None,
    base_model: str | None = None,
    packing: Packing | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of a shared checkpoint, which tells transformers who is to load it. What rounds its
    matrices nests inside, under the same name."""
    entry = {"quant_method": METHOD, "format": FORMAT, "plan": plan.model_dump(mode="json")}
    if refit is not None:
        entry["refit"] = refit.model_dump(mode="json")
    if packing is not None:
        entry[NESTED] = packing.to_dict()
    return entry if base_model is None else {**entry, "base_model": base_model}
