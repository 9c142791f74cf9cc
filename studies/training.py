"""PostShare and recovery against an equally trained dense model, and deletion of as many bytes: a table and curves.
Units are shared or deleted before training, when half of the steps are done, and after training.

    python -m studies.training MODEL --data TRAIN --text TEST --calibration VALIDATION --ratios 0.3 --out DIR

Every trained row has as many steps on the same windows, and keeps the step that is best on windows of TRAIN that are
held out; TEST is only measured on. `--text self` has the model write both. `--out` keeps each row as it is done, and
what is there is not done again; the curves need matplotlib.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import headshare as hs
from benchmarks.machine import machine
from headshare.calibration.allocate import plan_for_bytes
from headshare.calibration.choose import prices_on
from headshare.calibration.costs.actions import AUTO_ACTIONS, REMOVE, Action
from headshare.checkpoint.fingerprint import fingerprint
from headshare.errors import CalibrationError
from headshare.evaluation.perplexity import perplexity
from headshare.files.resume import ResumableRun
from headshare.integrations.transformers.loading import load_model, load_tokenizer
from headshare.matching.estimate import estimate
from headshare.plan.plan import SharePlan
from headshare.plan.units import Kind
from headshare.progress import shown
from headshare.sharing.size import estimate_plan
from headshare.text.tokens import Calibration
from headshare.text.windows import Windows, opening_token
from headshare.training import TrainSettings, train
from headshare.training.settings import Text
from headshare.training.windows import Packed, training_windows
from studies.products import parsed
from studies.quality import numbers, test_windows

DENSE, TRAINED_DENSE = "dense", "dense, trained"


@dataclass(frozen=True)
class Row:
    """One method at one ratio: perplexity on the test text, and what was logged on the way."""

    ratio: float
    method: str
    saved_fraction: float
    perplexity: float
    best_step: int | None
    seconds: float
    curve: list[tuple[int, float]]


class Bench:
    """A model, its texts, and the folders of what was shared from it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.dense = hs.open_checkpoint(args.model)
        steps = args.steps * args.batch
        self.data = self._written("train", steps + args.held_out, 2) if args.data == "self" else args.data
        self.windows = self._own_windows() if args.text == "self" else test_windows(self.dense, args)
        self._calibration: Calibration | None = None

    def _written(self, name: str, windows: int, seed: int) -> str:
        """A file that the model wrote: a window's text is a document."""
        args, path = self.args, self.out / f"{name}.jsonl"
        if not path.is_file():
            found = Calibration.load(
                "self", self.dense, tokens=windows * args.window, window=args.window, seed=args.seed + seed
            )
            texts = load_tokenizer(self.dense).batch_decode(found.tokens, skip_special_tokens=True)
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    def _own_windows(self) -> Windows:
        """What the model wrote, packed as what it is trained on is."""
        data = self._written("test", self.args.tokens // self.args.window, 3)
        some, last = training_windows(self.dense, Text(data=data, context=self.args.window, held_out=1))
        assert isinstance(some, Packed)
        return Windows(
            torch.cat([some.tokens, last.tokens]).long(), opening_token(load_tokenizer(self.dense), None) is not None
        )

    @property
    def calibration(self) -> Calibration:
        """What is refitted on."""
        if self._calibration is None:
            tokens = self.args.calibration_tokens
            self._calibration = Calibration.load(
                self.args.calibration, self.dense, tokens=tokens, window=self.args.window, seed=self.args.seed
            )
        return self._calibration

    # ---- plans, and what is made of them without training

    def plan(self, ratio: float) -> SharePlan:
        """The pairs that PostShare pulls together: by the weights, as in the paper."""
        return hs.make_plan(hs.score_units(self.dense), ratio)

    def by_output(self, ratio: float, *actions: Action) -> SharePlan:
        """Units by these actions that are worth as many bytes, where they cost predictions least."""
        text = self.calibration
        what = {"model": fingerprint(self.dense), "text": f"{text.digest} {text.seed}"}
        with ResumableRun(self.out / "prices", what, refused=CalibrationError, kept=True) as run:
            work = run.workspace
            prices = prices_on(self.dense, text, AUTO_ACTIONS, kinds=(Kind.ATTENTION,), workspace=work)
        least = estimate(self.dense, ratio, parts="qkv").saved_bytes
        return plan_for_bytes(prices.only(actions), least).plan

    def shared(self, name: str, plan: SharePlan, *, refit: bool, model: Path | None = None) -> Path:
        """A folder with this plan, refitted or not; of a model that was trained before, if one is named."""
        folder = self.out / f"{name}{'-refit' if refit else ''}"
        if not folder.is_dir():
            found = hs.share(self.dense if model is None else hs.open_checkpoint(model), plan)
            (hs.refit(found, self.calibration) if refit else found).save(folder)
        return folder

    def settings(self, method: str, ratio: float, steps: int, **loss: Any) -> TrainSettings:
        """What all runs have in common."""
        args = self.args
        arguments = {
            "max_steps": steps, "per_device_train_batch_size": args.batch, "learning_rate": args.rate,
            "lr_scheduler_type": "cosine", "warmup_steps": steps // 10, "logging_steps": 10,
            "use_cpu": args.device == "cpu", "bf16": args.bf16,
        }  # fmt: skip
        text = {"data": self.data, "context": args.window, "held_out": args.held_out}
        sharing = {"ratio": ratio} if method in ("postshare", "both") else {}
        return TrainSettings.made(
            {"method": method, "text": text, "sharing": sharing, "loss": loss, "learning": {"arguments": arguments},
             "seed": args.seed}
        )  # fmt: skip

    # ---- rows

    def trained(
        self, row: str, ratio: float, model: Path, method: str, *, steps: int | None = None, teacher: Path | None = None
    ) -> Path:
        """A folder with what training made; with a teacher, half of the loss is distilled."""
        folder = self.out / f"{row}-{ratio:g}"
        if not folder.is_dir():
            loss = {} if teacher is None else {"distill": 0.5, "teacher": str(teacher)}
            train(model, folder, self.settings(method, ratio, steps or self.args.steps, **loss))
        return folder

    def trained_dense(self) -> Path:
        """What all rows are held against, whatever their ratio."""
        return self.trained("dense", 0.0, self.dense.path, "dense")

    def methods(self, ratio: float) -> Iterator[tuple[str, Callable[[], Path]]]:
        """What makes each row's folder; at 0, of the rows that share nothing."""
        dense = self.dense.path
        if not ratio:
            yield DENSE, lambda: dense
            yield TRAINED_DENSE, self.trained_dense
            return

        def direct(*, refit: bool) -> Path:
            return self.shared(f"direct-{ratio:g}", self.plan(ratio), refit=refit)

        yield "DirectShare", lambda: direct(refit=False)
        yield "DirectShare + refit", lambda: direct(refit=True)
        yield "PostShare", lambda: self.trained("postshare", ratio, dense, "postshare")
        yield "DirectShare + PostShare", lambda: self.trained("both", ratio, dense, "both")
        yield "refit + recover", lambda: self.trained("recover", ratio, direct(refit=True), "recover")
        yield (
            "refit + recover + distillation",
            lambda: self.trained("distilled", ratio, direct(refit=True), "recover", teacher=dense),
        )
        yield from self.by_output_methods(ratio, "output", "sharing by output", *AUTO_ACTIONS, REMOVE)
        yield from self.by_output_methods(ratio, "deletion", "deletion", REMOVE)

    def by_output_methods(
        self, ratio: float, row: str, label: str, *actions: Action
    ) -> Iterator[tuple[str, Callable[[], Path]]]:
        """Units by these actions, chosen by what the dense model's predictions lose: before training, after it, and
        when half of the steps are done, with the model of that moment as the teacher of the other half."""
        half = self.args.steps // 2

        def chosen(when: str = "", model: Path | None = None) -> Path:
            return self.shared(f"{row}{when}-{ratio:g}", self.by_output(ratio, *actions), refit=True, model=model)

        def half_way() -> Path:
            teacher = self.trained("dense-half", 0.0, self.dense.path, "dense", steps=half)
            model, left = chosen("-half", teacher), self.args.steps - half
            return self.trained(f"{row}-half-distilled", ratio, model, "recover", steps=left, teacher=teacher)

        yield f"{label} + refit", chosen
        yield f"{label} + refit + recover", lambda: self.trained(f"{row}-recover", ratio, chosen(), "recover")
        yield (
            f"{label} + refit + recover + distillation",
            lambda: self.trained(f"{row}-distilled", ratio, chosen(), "recover", teacher=self.dense.path),
        )
        yield f"dense, trained + {label} + refit", lambda: chosen("-after", self.trained_dense())
        yield f"dense, half of the steps + {label} + refit + recover + distillation", half_way

    def measure(self, ratio: float, method: str, make: Callable[[], Path]) -> Row:
        """The row of one method."""
        begun = time.monotonic()
        with hs.open_checkpoint(make()) as found:
            record = found.path / "training.json"
            run = json.loads(record.read_text()) if record.is_file() else {"curve": [], "best_step": None}
            value = perplexity(load_model(found), self.windows).perplexity
            saved = estimate_plan(self.dense, found.plan).saved_fraction if found.plan else 0.0
        key = "eval_shared_loss" if any("eval_shared_loss" in one for one in run["curve"]) else "eval_loss"
        curve = [(one["step"], one[key]) for one in run["curve"] if key in one]
        return Row(ratio, method, saved, value, run["best_step"], round(time.monotonic() - begun, 1), curve)


def table(rows: list[Row]) -> str:
    """All rows as Markdown, against the dense model that was trained as long."""
    control = next((row.perplexity for row in rows if row.method == TRAINED_DENSE), None)
    lines = [
        "| ratio | method | saved | perplexity | against dense, trained | best step |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda one: one.ratio):
        against = "" if control is None else f"{row.perplexity / control:.4f}"
        best = "" if row.best_step is None else str(row.best_step)
        values = f"{row.saved_fraction:.2%} | {row.perplexity:.3f} | {against} | {best}"
        lines.append(f"| {row.ratio:g} | {row.method} | {values} |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Loss on the windows held out against steps: the paper's figure 7."""
    try:
        from matplotlib import pyplot
    except ImportError:
        sys.stderr.write("no figure: pip install matplotlib\n")
        return
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for row in (one for one in rows if one.curve):
        axes.plot(*zip(*row.curve, strict=True), marker=".", label=f"{row.method}, {row.ratio:g}")
    axes.set(xlabel="steps", ylabel="loss on windows held out, nats a token")
    axes.legend(fontsize="small")
    figure.savefig(path)


def main() -> None:
    """Train every row, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="text that is trained on")
    parser.add_argument("--text", required=True, help="text that is measured on")
    parser.add_argument("--calibration", required=True, help="text of the refit")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens of the test text")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--ratios", type=numbers, default=[0.3])
    parser.add_argument("--methods", help="only these rows, joined by ;")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision, as the Trainer's --bf16 does")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("training"))
    args = parsed(parser)
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "rows.jsonl"
    rows = [Row(**json.loads(line)) for line in kept.read_text().splitlines()] if kept.is_file() else []
    with shown():
        bench = Bench(args)
        for ratio in [0.0, *args.ratios]:
            for method, make in bench.methods(ratio):
                done = any((row.ratio, row.method) == (ratio, method) for row in rows)
                if done or (args.methods and method not in {DENSE, *args.methods.split(";")}):
                    continue
                rows.append(bench.measure(ratio, method, make))
                with kept.open("a") as file:
                    file.write(json.dumps(asdict(rows[-1])) + "\n")
                sys.stderr.write(f"{rows[-1]}\n")
    words = [
        json.dumps({**machine(), "products": args.products, "mixed precision": args.bf16}),
        f"{args.steps} steps of {args.batch} x {args.window} tokens of {Path(args.data).name}, rate {args.rate:g}; "
        f"measured on {bench.windows.tokens.numel()} tokens",
        table(rows),
    ]
    (args.out / "table.md").write_text("\n\n".join(words) + "\n")
    draw(rows, args.out / "curves.svg")
    sys.stdout.write("\n\n".join(words) + "\n")


if __name__ == "__main__":
    main()
