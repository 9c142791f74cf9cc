"""Table 6 of the paper on any small model: fine-tune it to translate, share it at growing ratios, measure BLEU.

    python -m studies.translation MODEL --train multi30k.train --test multi30k.test_2016_flickr --out DIR

`--train` and `--test` name two files each, with `.en` and `.fr` after the name, line by line. The model is trained on
"English: ...", "French: ..." by the same Trainer that PostShare uses, and so are the methods that train, for `--steps`
steps of the same text. What is done is kept in DIR, and the comparison in DIR/compared goes on where it was stopped.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import headshare as hs
from benchmarks.machine import machine
from headshare.experiments import Recipe, compare
from headshare.experiments.report.tables import table
from headshare.files.digests import SHA256, file_digest
from headshare.progress import shown
from headshare.sharing.expand import expand
from headshare.training import TrainSettings, train
from studies.products import parsed

RECIPE = Path(__file__).parent.parent / "recipes" / "table-6.yaml"


def documents(name: Path, out: Path) -> Path:
    """The parallel text as documents, a pair each."""
    sides = [Path(f"{name}.{side}").read_text(encoding="utf-8").rstrip("\n").split("\n") for side in ("en", "fr")]
    pairs = zip(*sides, strict=True)
    out.write_text("".join(json.dumps({"text": f"English: {en}\nFrench: {fr}\n"}) + "\n" for en, fr in pairs))
    return out


def settings(args: argparse.Namespace, data: Path, steps: int, rate: float) -> dict[str, object]:
    """Settings of a training run, but for its method."""
    arguments = {
        "max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": rate, "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 10, "use_cpu": args.device == "cpu",
    }  # fmt: skip
    text = {"data": str(data), "context": args.window, "held_out": 32}
    return {"text": text, "learning": {"arguments": arguments}}


def finetuned(args: argparse.Namespace, data: Path) -> Path:
    """The model, taught to translate: shared at nothing, trained, and written back as a stock folder. One that was
    taught otherwise is not taken."""
    folder: Path = args.out / f"{Path(args.model).resolve().name}-finetuned"
    how = {
        "model": str(Path(args.model).resolve()), "text": file_digest(data, SHA256), "steps": args.finetune_steps,
        "rate": args.finetune_rate, "window": args.window, "products": args.products,
    }  # fmt: skip
    record = args.out / "finetuned.json"
    if record.is_file() and json.loads(record.read_text()) != how:
        sys.exit(f"{args.out} holds a model that was fine-tuned otherwise ({record}). Use another --out.")
    record.write_text(json.dumps(how))
    if not folder.is_dir():
        dense = hs.open_checkpoint(args.model)
        same, trained = args.out / "same", args.out / "trained"
        if not trained.is_dir():
            shutil.rmtree(same, ignore_errors=True)
            hs.share(dense, hs.make_plan(hs.score_units(dense), 0.0)).save(same)
            run = settings(args, data, args.finetune_steps, args.finetune_rate)
            train(same, trained, TrainSettings.made({"method": "recover", **run}))
        expand(hs.open_checkpoint(trained), folder)
    return folder


def main() -> None:
    """Fine-tune, compare, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--finetune-steps", type=int, default=1000)
    parser.add_argument("--finetune-rate", type=float, default=5e-4)
    parser.add_argument("--steps", type=int, default=200, help="of methods that train")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--limit", type=int, help="translate the first so many lines")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("translation"))
    args = parsed(parser)
    args.out.mkdir(parents=True, exist_ok=True)
    with shown():
        data = documents(args.train, args.out / "train.jsonl")
        model = hs.open_checkpoint(finetuned(args, data))
        recipe = Recipe.load(
            RECIPE,
            {
                "source": f"{args.test}.en", "reference": f"{args.test}.fr", "limit": args.limit,
                "calibration": str(data), "calibration_tokens": args.calibration_tokens,
                "calibration_window": args.window, "train": settings(args, data, args.steps, args.rate),
                "device": args.device,
            },
        )  # fmt: skip
        text = recipe.calibration_on(model)
        cells = compare(
            model, recipe.grid(), args.out / "compared", calibration=text, device=args.device, title=recipe.title
        )
    words = [
        json.dumps({**machine(), "products": args.products}),
        f"fine-tuned for {args.finetune_steps} steps of 8 x {args.window} tokens, rate {args.finetune_rate:g}; methods "
        f"that train: {args.steps} steps, rate {args.rate:g}",
        table(cells),
    ]
    (args.out / "table.md").write_text("\n\n".join(words) + "\n")
    sys.stdout.write("\n\n".join(words) + "\n")


if __name__ == "__main__":
    main()
