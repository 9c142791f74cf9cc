"""Perplexity on held-out calibration text, of the dense and of the shared model."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.opening import open_checkpoint
from headshare.errors import HeadshareError
from headshare.evaluation.perplexity import perplexity
from headshare.integrations.transformers.loading import load_model
from headshare.text.tokens import Calibration
from headshare.text.windows import Windows, finite_or_null, is_causal, not_causal


@dataclass(frozen=True)
class HeldOutPerplexity:
    """Perplexity of the dense and of the shared model on held-out calibration windows.

    Both are None where a model has no perplexity, or it could not be measured; `note` then says why.
    """

    dense: float | None
    shared: float | None
    tokens: int
    window: int
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The perplexities under the names that `--json` prints; one that is not finite is null."""
        return finite_or_null(asdict(self))

    def in_words(self) -> str:
        """A line of text for the command line's report."""
        if self.dense is None or self.shared is None:
            return f"perplexity not measured: {self.note}"
        where = f"{self.tokens} held-out calibration tokens in windows of {self.window}"
        return f"perplexity measured: {self.shared:,.3f}, dense {self.dense:,.3f}, over {where}"


def measure(dense: Checkpoint, shared: Path, held_out: Calibration, *, device: str = "cpu") -> HeldOutPerplexity:
    """Measure the perplexity of both models on the windows held out.

    An error is noted, not raised, as the work before the measurement is done.
    """
    windows = Windows(held_out.tokens, held_out.bos)
    window = windows.length
    options = {} if device == "cpu" else {"device_map": device}
    # One model is in memory at a time.
    try:
        model = load_model(dense, **options)
        if not is_causal(model):
            return HeldOutPerplexity(None, None, 0, window, f"{not_causal(model)}, so it has no perplexity.")
        before = perplexity(model, windows)
        del model
        with open_checkpoint(shared) as opened:
            after = perplexity(load_model(opened, **options), windows)
    except HeadshareError as error:
        return HeldOutPerplexity(None, None, 0, window, str(error))
    return HeldOutPerplexity(before.perplexity, after.perplexity, before.tokens, window)
