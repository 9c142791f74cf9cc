"""The demo: sharing a real model from start to end, with its savings and costs beside its controls."""

import pydoc_data.topics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headshare.bench.bench import Subject, measure_loading
from headshare.calibration.allocate import plan_for_units
from headshare.calibration.costs.actions import QKV
from headshare.calibration.costs.curves import CostCurves
from headshare.calibration.costs.local import price_units
from headshare.calibration.refit.run import refit
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.opening import open_checkpoint
from headshare.defaults import DEMO_RATIOS as RATIOS
from headshare.defaults import DEMO_TOKENS as TOKENS
from headshare.errors import EvaluationError, HeadshareError, OutputError
from headshare.evaluation.perplexity import perplexity
from headshare.evaluation.verify import verify
from headshare.experiments.controls import delete_units, overwrite_recipients, recipients_of, with_random_donors
from headshare.files.failures import explain
from headshare.integrations.transformers.loading import load_model, load_tokenizer, unique_parameter_bytes
from headshare.matching.pairing import make_plan
from headshare.matching.similarity import score_units
from headshare.plan.layout import Layout
from headshare.plan.plan import SharePlan
from headshare.sharing.share import share
from headshare.text.tokens import Calibration
from headshare.text.windows import Windows, finite_or_null, window_for, windows_of

CALIBRATED_TIMES = 2  # tokens to calibrate on, as a multiple of the tokens to measure on


@dataclass(frozen=True)
class DemoRow:
    """The measurements at one ratio.

    Bytes are measured: the files on disk, the parameters of the loaded model (each counted once), and the PSS that
    loading adds to a fresh process (None where the system does not say).

    `shared`, `deleted`, `random_donors` and `refit` are perplexities. The first three treat the paper's pairs. `refit`
    shares as many units, matched by output and refitted on text of the same sort that is not measured on.
    """

    ratio: float
    recipients: int
    disk_bytes: int
    memory_bytes: int
    pss_bytes: int | None
    verified: bool
    shared: float
    deleted: float
    random_donors: float
    dense: float
    refit: float
    tokens: int
    window: int

    def to_dict(self) -> dict[str, Any]:
        """The row under the names that `--json` prints; a perplexity past any float is null."""
        return finite_or_null(asdict(self))


def language_reference() -> str:
    """The Python language reference, which every CPython carries."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def run_demo(
    model: str | Path, work: Path, text: str, *, ratios: Sequence[float] = RATIOS, tokens: int = TOKENS, seed: int = 0
) -> Iterator[DemoRow]:
    """Share at each ratio into `work`, verify, measure, and yield one row at a time.

    Raises:
        HeadshareError: if any step fails, or a shared model does not verify.
    """
    if tokens < 1:
        raise EvaluationError(f"--tokens {tokens} leaves nothing to measure; use at least one window's worth.")
    dense = open_checkpoint(model)
    # the dense model's perplexity, and the windows to measure and to calibrate on
    tokenizer = load_tokenizer(dense)
    model_at_rest = load_model(dense)
    window = window_for(None, dense.config)
    windows, calibration = _halved(windows_of(tokenizer, text, window=window), tokens, seed)
    dense_value = perplexity(model_at_rest, windows).perplexity
    del model_at_rest
    # what plans at all ratios are made from: scores of pairs for the paper's plan, cost curves for the refitted one
    scores = score_units(dense, "qk", "qkv")
    curves = price_units(dense, calibration, [QKV])
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(explain(error, work)) from None
    for ratio in ratios:
        plan = make_plan(scores, ratio)
        out = share(dense, plan).save(work / f"shared-{ratio:g}", overwrite=True)
        with open_checkpoint(out) as shared:
            report = verify(shared, dense)
            if not report.ok:
                raise HeadshareError(f"the model shared at {ratio} does not verify: {'; '.join(report.problems)}")
            # the shared model, and its controls on the same windows
            loaded = load_model(shared)
            yield DemoRow(
                ratio=ratio,
                recipients=plan.ties,
                disk_bytes=sum(path.stat().st_size for path in out.glob("*.safetensors")),
                memory_bytes=unique_parameter_bytes(loaded),
                pss_bytes=measure_loading([Subject("shared", out)], 1, {})["shared"][0].pss_bytes,
                verified=True,
                shared=perplexity(loaded, windows).perplexity,
                deleted=_with_deleted(dense, plan, scores.tables[0].layout, windows) if ratio else dense_value,
                random_donors=_with_random(dense, plan, windows, seed) if ratio else dense_value,
                dense=dense_value,
                refit=_refitted(dense, curves, plan.ties, calibration, windows, work / f"refit-{ratio:g}"),
                tokens=windows.tokens.numel(),
                window=window,
            )


def _halved(windows: Windows, tokens: int, seed: int) -> tuple[Windows, Calibration]:
    """The windows to measure on (the first, as many as these tokens fill) and those after them to calibrate on.

    Raises:
        EvaluationError: if there are too few.
    """
    count = max(1, tokens // windows.length)
    rest = windows.tokens[count : count * (1 + CALIBRATED_TIMES)]
    if len(rest) < 2:
        raise EvaluationError(
            f"the text has {len(windows.tokens)} windows of {windows.length} tokens; {count} to measure on leave too "
            "few to calibrate on. Use a longer --text, or fewer --tokens."
        )
    source = "the same text, after what is measured on"
    return Windows(windows.tokens[:count], windows.bos), Calibration(rest, windows.bos, source, seed)


def _refitted(
    dense: Checkpoint, curves: CostCurves, units: int, calibration: Calibration, windows: Windows, out: Path
) -> float:
    """Perplexity of this many units matched by output and refitted, written and loaded again."""
    shared = share(dense, plan_for_units(curves, units).plan)
    with open_checkpoint(refit(shared, calibration).save(out, overwrite=True)) as written:
        return perplexity(load_model(written), windows).perplexity


def _with_deleted(dense: Checkpoint, plan: SharePlan, layout: Layout, windows: Windows) -> float:
    model = load_model(dense)
    for units in recipients_of(plan).values():
        delete_units(model, layout, units)
    return perplexity(model, windows).perplexity


def _with_random(dense: Checkpoint, plan: SharePlan, windows: Windows, seed: int) -> float:
    model = load_model(dense)
    overwrite_recipients(model, with_random_donors(plan, seed))
    return perplexity(model, windows).perplexity


def in_one_sentence(rows: Sequence[DemoRow]) -> str:
    """The result of the table in words that follow from its numbers."""
    last = rows[-1]
    saved = 1 - last.memory_bytes / rows[0].memory_bytes
    named = [(last.shared, "the paper's pairs"), (last.random_donors, "random donors"), (last.deleted, "deletion")]
    repaired = f"Matched by output and refitted, it is {last.refit:.1f}."
    order = ", then ".join(f"{name} ({value:,.0f})" for value, name in sorted(named))
    where = f"on disk and in memory alike{_in_pss(rows)}"
    return (
        f"At ratio {last.ratio:g} the saving is real, {saved:.1%} of the model {where}, but "
        f"without repair it costs {last.shared / last.dense:.0f} times the dense perplexity ({last.dense:.1f} to "
        f"{last.shared:,.0f}); best to worst at the same recipients: {order}. {repaired}"
    )


def _in_pss(rows: Sequence[DemoRow]) -> str:
    """The saving as the system sees it: the dense model's PSS against the last row's."""
    dense = rows[0].pss_bytes
    shared = rows[-1].pss_bytes
    if dense is None or shared is None:
        return ""
    return f" (PSS of dense {dense / 2**20:,.1f} MiB, of shared {shared / 2**20:,.1f} MiB)"
