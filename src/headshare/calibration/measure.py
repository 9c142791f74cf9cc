"""Perplexity on held-out calibration text, before and after."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.opening import open_checkpoint
from headshare.errors import HeadshareError
from headshare.evaluation.perplexity import perplexity
from headshare.integrations.transformers.loading import load_model
from headshare.text.tokens import Calibration
from headshare.text.windows import Windows, finite_or_null, is_causal


@dataclass(frozen=True)
class HeldOutPerplexity:
    """Perplexity of the dense and of the shared model on held-out calibration windows; None, with a note that says why,
    where a model has none."""

    dense: float | None
    shared: float | None
    tokens: int
    window: int
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The same under the names that `--json` prints; a perplexity past any float is null."""
        return finite_or_null(asdict(self))

    def in_words(self) -> str:
        """One line for the person at the keyboard."""
        if self.dense is None or self.shared is None:
            return f"perplexity not measured: {self.note}"
        where = f"{self.tokens} held-out calibration tokens in windows of {self.window}"
        return f"perplexity measured: {self.shared:,.3f}, dense {self.dense:,.3f}, over {where}"


def measure(dense: Checkpoint, shared: Path, held_out: Calibration, *, device: str = "cpu") -> HeldOutPerplexity:
    """Perplexity of both models. What hinders measuring is noted, not raised: the work before it is done."""
    windows = Windows(held_out.tokens, held_out.bos)
    window = windows.length
    options = {} if device == "cpu" else {"device_map": device}
    try:
        model = load_model(dense, **options)
        if not is_causal(model):
            return HeldOutPerplexity(
                None, None, 0, window, f"{type(model).__name__} is an encoder, which has no perplexity."
            )
        before = perplexity(model, windows)
        del model
        with open_checkpoint(shared) as opened:
            after = perplexity(load_model(opened, **options), windows)
    except HeadshareError as error:
        return HeldOutPerplexity(None, None, 0, window, str(error))
    return HeldOutPerplexity(before.perplexity, after.perplexity, before.tokens, window)
