"""What was refitted in a shared checkpoint, and on which text: a record in its config.json. Holds no weight."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headshare.errors import PlanError

MAX_TENSORS = 100_000
MAX_TEXT = 512
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Count = Annotated[int, Field(ge=0, le=2**40)]


class RefitRecord(BaseModel):
    """The tensors that no longer hold the dense model's numbers, and the calibration tokens they were fitted on.

    Raises:
        PlanError: from `from_dict`, if a checkpoint's own record is not valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensors: Annotated[tuple[Text, ...], Field(max_length=MAX_TENSORS)]
    text: Text
    text_digest: Text
    tokens: Count
    window: Count
    seed: int

    @classmethod
    def from_dict(cls, data: Any) -> "RefitRecord":
        """Check a record that somebody else wrote."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(step) for step in first["loc"])
            raise PlanError(f"the checkpoint's record of its refit is not valid at {where}: {first['msg']}.") from None

    def in_words(self) -> str:
        """One clause for the person who reads what a checkpoint is."""
        return f"{len(self.tensors)} tensors refitted on {self.tokens:,} tokens of {self.text}"
