"""The quantization_config of a shared checkpoint, in the class that transformers expects."""

import copy
from dataclasses import dataclass
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.entry import METHOD, SharingEntry
from headshare.errors import StorageError
from headshare.storage.names import AUTO
from headshare.storage.registry import STORAGES, check_storage


@dataclass(frozen=True)
class Opened:
    """A checkpoint that headshare has opened and checked, so that its files need not be read and checked again."""

    checkpoint: Checkpoint

    def __deepcopy__(self, _: dict[int, Any]) -> "Opened":
        return self  # transformers copies configurations

    def request(self, storage: str) -> dict[str, Any]:
        """The `quantization_config` that stands for the checkpoint's own, and asks for this storage."""
        return {"quant_method": METHOD, "storage": storage, "opened": self}


@register_quantization_config(METHOD)
class HeadshareConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """The entry of a shared checkpoint, `sharing`, and the storage that is to hold it in memory.

    transformers makes it from the fields of the entry in config.json, and from `storage`. Where headshare itself loads
    a checkpoint, `opened` is that checkpoint and brings the entry.

    Raises:
        CheckpointError: if the entry is not valid; it is untrusted until it has passed here.
        StorageError: if there is no such storage, or it does not hold rounded matrices.
    """

    def __init__(self, storage: str = "auto", **entry: Any) -> None:
        check_storage(storage)
        opened = entry.get("opened")
        self.opened = opened.checkpoint if isinstance(opened, Opened) else None
        sharing = self.opened.entry if self.opened else SharingEntry.from_config({**entry, "quant_method": METHOD})
        assert sharing is not None  # it has our name
        if sharing.packing is not None and storage != AUTO and not STORAGES[storage].packs:
            raise StorageError(f"rounded matrices are held by their owners; storage {storage} is for others.")
        self.quant_method = METHOD
        self.sharing = sharing
        self.storage = storage

    def to_dict(self) -> dict[str, Any]:
        """The entry as config.json holds it. The storage of a loaded model is not part of it."""
        return self.sharing.to_config()

    def to_diff_dict(self) -> dict[str, Any]:
        """The entry as `to_dict` gives it: a plan has no defaults to leave out."""
        return self.to_dict()

    def __deepcopy__(self, _: dict[int, Any]) -> "HeadshareConfig":
        return copy.copy(self)  # an entry never changes, and that of a large model takes seconds to copy
