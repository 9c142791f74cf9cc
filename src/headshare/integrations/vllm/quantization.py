"""The quantisation method that vLLM selects for a shared checkpoint, by the entry in its config.json.

To vLLM, as to transformers, sharing is a quantisation method. It chooses how the linear modules of the stock model
classes hold their weights, and takes the checkpoint's tensors in as vLLM loads them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from headshare.architecture.vllm import ENGINE, SERVED, UNLESS
from headshare.checkpoint.entry import METHOD, SharingEntry
from headshare.errors import ArchitectureError, StorageError
from headshare.integrations.vllm.linear import SharedLinearMethod
from headshare.integrations.vllm.plugin import REDUCED
from headshare.integrations.vllm.weights import RankWeights

NO_BITS = (
    "vLLM cannot load this model: its matrices are rounded, and headshare's plugin takes whole numbers of no kind. "
    "headshare expand writes a stock compressed-tensors folder, which vLLM loads."
)
NO_COPIES = (
    "vLLM cannot load this model: whole tensors of it are copies of others, and vLLM reads each of them for itself. "
    "headshare expand writes a stock folder, which vLLM loads."
)


@register_quantization_config(METHOD)
class HeadshareConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not typed
    """The entry of a shared checkpoint, which gives linear modules the rows that the plan leaves them."""

    def __init__(self, entry: SharingEntry) -> None:
        super().__init__()
        self.entry = entry
        self._weights: RankWeights | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "HeadshareConfig":
        """The checked entry of `quantization_config`, which is untrusted.

        Raises:
            CheckpointError: if it is not valid.
            StorageError: if the matrices are rounded, or whole tensors are copies of others.
        """
        return cls(cls._checked(config))

    @staticmethod
    def _checked(config: Mapping[str, Any]) -> SharingEntry:
        entry = SharingEntry.from_config(dict(config))
        assert entry is not None  # it has our name
        if entry.packing is not None:
            raise StorageError(NO_BITS)
        if entry.plan.copies:
            raise StorageError(NO_COPIES)
        return entry

    @classmethod
    def override_quantization_method(
        cls,
        hf_quant_cfg: Mapping[str, Any],
        user_quant: str | None,  # noqa: ARG003 - the signature is vLLM's
        hf_config: Any = None,
    ) -> str | None:
        """Look at a model's configuration, as vLLM lets every method do before it chooses the model's class.

        A shared model whose plan removes units gets the class that has layers of different widths.

        Raises:
            ArchitectureError: if vLLM is not known to compute such a shared model rightly.
        """
        if hf_config is None or hf_quant_cfg.get("quant_method") != METHOD:
            return None
        model_type = str(getattr(hf_config, "model_type", None))
        if model_type not in SERVED:
            raise ArchitectureError(
                f"this is a shared '{model_type}' model, and headshare's plugin for {ENGINE} serves "
                f"{', '.join(SERVED)} alone. headshare expand writes a stock folder for it."
            )
        entry = cls._checked(hf_quant_cfg)
        replaced = [SERVED[model_type]] == hf_config.architectures
        if entry.plan.removals and replaced and not any(getattr(hf_config, one, None) for one in UNLESS):
            hf_config.architectures = [REDUCED]
        return None

    def get_name(self) -> str:
        """The name of the method, as config.json has it."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The types of number that weights are held in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPU, as vLLM counts them, that there are kernels for."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Files beside config.json that hold the entry: none."""
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """The method of a linear module: ours where the plan touches one of its tensors. Other modules are stock."""
        if not isinstance(layer, LinearBase):
            return None
        names = self._tensors_of(prefix)
        if not any(name in self.entry.plan.tensors for name in names):
            return UnquantizedLinearMethod()
        if self._weights is None:
            self._weights = RankWeights(self.entry.plan)
        return SharedLinearMethod(self._weights, prefix, names)

    def _tensors_of(self, prefix: str) -> list[str]:
        """The checkpoint's tensors that a module holds, in its order."""
        above, _, leaf = prefix.rpartition(".")
        return [f"{above}.{name}.weight" for name in self.packed_modules_mapping.get(leaf, [leaf])]

    def __getstate__(self) -> dict[str, Any]:
        """The state for another process, without weights."""
        return {**self.__dict__, "_weights": None}
