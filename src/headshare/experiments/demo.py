"""The demo: a real model made smaller from start to end, beside 8 bits and the paper's method."""

import pydoc_data.topics
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from headshare.calibration.allocate import plan_for_bytes
from headshare.calibration.budget import Budget
from headshare.calibration.costs.local import price_units
from headshare.calibration.costs.measured import predicts
from headshare.calibration.refit.run import refit
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.opening import open_checkpoint
from headshare.defaults import DEMO_RATIO as RATIO
from headshare.defaults import DEMO_SAVED as SAVED
from headshare.defaults import DEMO_TOKENS as TOKENS
from headshare.errors import EvaluationError, HeadshareError, OutputError
from headshare.evaluation.perplexity import perplexity
from headshare.evaluation.verify import verify
from headshare.files.failures import explain
from headshare.integrations.transformers.loading import load_model, load_tokenizer, unique_parameter_bytes
from headshare.matching.pairing import make_plan
from headshare.matching.similarity import score_units
from headshare.progress import say
from headshare.sharing.rounded.write import RoundedCheckpoint, round_to_nearest
from headshare.sharing.share import SharedCheckpoint, share
from headshare.text.tokens import Calibration
from headshare.text.windows import Windows, finite_or_null, window_for, windows_of

# Shorter windows than those that are measured, so that few tokens still make enough of them to hold some out.
CALIBRATION_WINDOW = 256
DENSE = "dense"
EIGHT_BITS = "8 bits, rounded to the nearest"


@dataclass(frozen=True)
class DemoRow:
    """The measurements of one model.

    Bytes are measured: the files on disk, and the parameters and buffers of the loaded model, each counted once.
    `perplexity` is on text that nothing was fitted to.
    """

    name: str
    disk_bytes: int
    memory_bytes: int
    perplexity: float
    tokens: int
    window: int

    def to_dict(self) -> dict[str, Any]:
        """The row under the names that `--json` prints; a perplexity past any float is null."""
        return finite_or_null(asdict(self))

    def saved(self, dense: "DemoRow") -> float:
        """The part of the dense model's bytes in memory that this one does without."""
        return 1 - self.memory_bytes / dense.memory_bytes

    def over(self, dense: "DemoRow") -> float:
        """The perplexity as a multiple of the dense model's."""
        return self.perplexity / dense.perplexity


def paper(ratio: float, mode: str = "star") -> str:
    """The name of the paper's method in the table."""
    return f"the paper's DirectShare, {ratio:.0%} of the heads, mode {mode}"


def shrunk(saved: str) -> str:
    """The name of `shrink` in the table."""
    return f"shrink --save {saved}"


def language_reference() -> str:
    """The Python language reference, which every CPython carries."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def run_demo(
    model: str | Path,
    work: Path,
    text: str,
    *,
    saved: Sequence[str] = SAVED,
    tokens: int = TOKENS,
    keep: bool = False,
    mode: str = "star",
) -> Iterator[DemoRow]:
    """Measure a model, and write, verify and measure it in 8 bits, by the paper's method, and shrunk by each amount.

    The models are written into `work`, one at a time, and removed when they are measured, unless they are to be kept.
    As many `tokens` of the text are measured as are calibrated on after those.

    Raises:
        HeadshareError: if any step fails, or a model does not verify.
    """
    if tokens < 1:
        raise EvaluationError(f"--tokens {tokens} leaves nothing to measure; use at least one window's worth.")
    dense = open_checkpoint(model)
    windows, calibration = _texts(load_tokenizer(dense), text, window_for(None, dense.config), tokens)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(explain(error, work)) from None
    table = _Table(dense, work, windows, keep)
    yield table.of(DENSE, dense)

    # what is done without a text
    yield table.written(EIGHT_BITS, round_to_nearest(dense))
    plan = make_plan(score_units(dense, "qk", "qkv"), RATIO, mode=mode)
    yield table.written(paper(RATIO, mode), share(dense, plan))

    # One pricing serves all amounts. `shrink` also measures what it prices; that would take longer than all else here.
    budgets = [Budget.parse(dense, save=amount) for amount in saved]
    prices = price_units(dense, calibration, budgets[0].actions, sensitive=predicts(dense))
    for amount, budget in zip(saved, budgets, strict=True):
        assert budget.saved_bytes is not None
        plan = plan_for_bytes(prices, budget.saved_bytes).plan
        yield table.written(shrunk(amount), refit(share(dense, plan), calibration))


@dataclass(frozen=True)
class _Table:
    """What all rows have in common: the dense model, where models are written, and the text to measure on."""

    dense: Checkpoint
    work: Path
    windows: Windows
    keep: bool

    def written(self, name: str, made: SharedCheckpoint | RoundedCheckpoint) -> DemoRow:
        """The row of a model that is written, verified, loaded and measured.

        Raises:
            HeadshareError: if it does not verify.
        """
        out = made.save(self.work / "".join(letter if letter.isalnum() else "-" for letter in name), overwrite=True)
        try:
            with open_checkpoint(out) as checkpoint:
                report = verify(checkpoint, self.dense)
                if not report.ok:
                    raise HeadshareError(f"{name}: what was written does not verify: {'; '.join(report.problems)}")
                return self.of(name, checkpoint)
        finally:
            if not self.keep:
                shutil.rmtree(out, ignore_errors=True)

    def of(self, name: str, checkpoint: Checkpoint) -> DemoRow:
        """The row of a model on disk."""
        loaded = load_model(checkpoint)
        row = DemoRow(
            name=name,
            disk_bytes=sum(path.stat().st_size for path in checkpoint.path.glob("*.safetensors")),
            memory_bytes=unique_parameter_bytes(loaded),
            perplexity=perplexity(loaded, self.windows).perplexity,
            tokens=self.windows.tokens.numel(),
            window=self.windows.length,
        )
        say(f"{name}: perplexity {row.perplexity:,.2f}, {row.memory_bytes / 2**20:,.1f} MiB")
        return row


def _texts(tokenizer: PreTrainedTokenizerBase, text: str, window: int, tokens: int) -> tuple[Windows, Calibration]:
    """The windows to measure on (the first, as many as these tokens fill) and those after them to calibrate on.

    Raises:
        EvaluationError: if there are too few.
    """
    windows = windows_of(tokenizer, text, window=window)
    count = max(1, tokens // window)
    measured = Windows(windows.tokens[:count], windows.bos)

    # no token of the text is in both, whatever a window begins with
    short = windows_of(tokenizer, text, window=min(CALIBRATION_WINDOW, window))
    first = ceil(count * (window - windows.bos) / (short.length - short.bos))
    rest = short.tokens[first : first + max(4, tokens // short.length)]
    if len(rest) < 4:
        raise EvaluationError(
            f"the text has {len(windows.tokens)} windows of {window} tokens; {count} to measure on leave too "
            "few to calibrate on. Use a longer --text, or fewer --tokens."
        )
    return measured, Calibration(rest, short.bos, "the same text, after what is measured on", 0)


def in_one_sentence(rows: Sequence[DemoRow]) -> str:
    """The result of the table in words that follow from its numbers."""
    dense, bits, direct, *smaller = rows
    costs = ", ".join(f"{row.saved(dense):.1%} for {row.over(dense) - 1:+.1%}" for row in smaller)
    return (
        f"`shrink` saved {costs} perplexity, repaired on {dense.tokens:,} tokens; more of them cost less. "
        f"The paper's method saved {direct.saved(dense):.1%}, at {direct.over(dense):.1f} times the dense perplexity. "
        f"8 bits saved {bits.saved(dense):.1%} for {bits.over(dense) - 1:+.2%}: take those first."
    )
