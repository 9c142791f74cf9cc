"""The quantization_config of a shared checkpoint, as transformers sees it."""

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from headshare.checkpoint.entry import METHOD, quantization_entry
from headshare.checkpoint.int4 import Packing
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import PlanError, StorageError
from headshare.files.untrusted import is_shown
from headshare.plan.plan import FORMAT, SharePlan
from headshare.storage.registry import AUTO, STORAGES, check_storage


@register_quantization_config(METHOD)
class HeadshareConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """The `quantization_config` entry of a shared checkpoint: format, plan, and how to hold it in memory.

    Raises:
        PlanError: if the plan is not valid; it is untrusted until it has passed here.
        StorageError: if there is no such storage, or it does not hold such matrices.
    """

    def __init__(
        self,
        plan: Any = None,
        format: int = FORMAT,  # noqa: A002 - the key in config.json
        storage: str = "auto",
        quant_method: str = METHOD,
        refit: Any = None,
        base_model: Any = None,
        quantization_config: Any = None,
        **_: Any,
    ) -> None:
        if format != FORMAT:
            raise PlanError(
                f"the checkpoint has format {format}; this headshare reads format {FORMAT}. Upgrade headshare."
            )
        self.quant_method = quant_method
        self.format = format
        check_storage(storage)
        self.storage = storage
        self.plan = plan if isinstance(plan, SharePlan) else SharePlan.from_dict(plan)
        self.refit = refit if refit is None or isinstance(refit, RefitRecord) else RefitRecord.from_dict(refit)
        self.packing = (
            quantization_config
            if quantization_config is None or isinstance(quantization_config, Packing)
            else Packing.from_dict(quantization_config)
        )
        if self.packing is not None and storage != AUTO and not STORAGES[storage].packs:
            raise StorageError(f"matrices of four bits are held by their owners; storage {storage} is for others.")
        self.base_model = base_model if isinstance(base_model, str) and is_shown(base_model) else None

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; how a model was held in memory is not part of it."""
        return quantization_entry(self.plan, self.refit, self.base_model, self.packing)

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: a plan has no defaults to leave out."""
        return self.to_dict()

    def __deepcopy__(self, memo: dict[int, Any]) -> "HeadshareConfig":
        return HeadshareConfig(
            self.plan,
            self.format,
            self.storage,
            refit=self.refit,
            base_model=self.base_model,
            quantization_config=self.packing,
        )
