"""The record of a refit in a checkpoint's config.json: the refitted tensors and the text. It holds no weight."""

from collections.abc import Callable, Collection
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_serializer

from headshare.files.printable import CONTROL, MAX_TEXT
from headshare.files.untrusted import Text, checked_record

MAX_TENSORS = 100_000
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**40)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class RefitRecord(BaseModel):
    """The record of a refit: tensors that no longer hold the dense model's numbers, and the calibration tokens.

    Raises:
        CheckpointError: from `from_dict`, if a checkpoint's own record is not valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tensors: Annotated[tuple[Text, ...], Field(max_length=MAX_TENSORS)]
    text: Text
    text_digest: Digest
    tokens: Count
    window: Count
    seed: Seed
    steps: Count = 0
    step_tokens: Count = 0
    written: Count = 0
    whole: Count = 0

    @classmethod
    def of(
        cls,
        tensors: Collection[str],
        text: str,
        digest: str,
        *,
        windows: tuple[int, ...],
        seed: int,
        steps: int = 0,
        step_tokens: int = 0,
        written: int = 0,
        whole: int = 0,
    ) -> "RefitRecord":
        """The record of these tensors, fitted on `windows` (their count and length in tokens) of a text.

        `steps` counts gradient steps a layer, `whole` those on all layers together, `step_tokens` the tokens of each,
        and `written` the tokens that the dense model wrote to be fitted to besides. Characters of the text's name that
        cannot be shown are replaced.
        """
        shown = CONTROL.sub("?", text)[:MAX_TEXT]
        count, window = windows
        return cls(
            tensors=tuple(sorted(tensors)),
            text=shown,
            text_digest=digest,
            tokens=count * window,
            window=window,
            seed=seed,
            steps=steps,
            step_tokens=step_tokens,
            written=written,
            whole=whole,
        )

    @classmethod
    def from_dict(cls, data: Any) -> "RefitRecord":
        """Check a record that somebody else wrote."""
        return checked_record(cls, data, "the checkpoint's record of its refit")

    @model_serializer(mode="wrap")
    def _written(self, plain: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """The record as JSON; what a refit had none of is left out, so that earlier records stay as they are."""
        data = plain(self)
        return {name: value for name, value in data.items() if value or name not in ("step_tokens", "written", "whole")}

    def in_words(self) -> str:
        """The record in words, as a clause of a checkpoint's description."""
        taken = [f"{self.steps} gradient steps a layer"] if self.steps else []
        taken += [f"{self.whole} gradient steps on the whole model"] if self.whole else []
        how = f", {' and '.join(taken)}" if taken else ""
        how += f" of {self.step_tokens:,} tokens" if self.step_tokens else ""
        more = f" and {self.written:,} that the model wrote after it" if self.written else ""
        return f"{len(self.tensors)} tensors refitted on {self.tokens:,} tokens of {self.text}{more}{how}"
