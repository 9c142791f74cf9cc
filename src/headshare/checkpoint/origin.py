"""The record of the dense model that a shared checkpoint came from: a model found again by name is checked by it."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from headshare.files.untrusted import checked_record

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
