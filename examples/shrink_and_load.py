"""Shrink a small model by a tenth, load it, and let both write.

    python examples/shrink_and_load.py [MODEL FILE]

Without MODEL and FILE it trains a small model first (`small_model.py`), which takes a minute or two. MODEL is a
folder or a hub id, FILE a text like that which the model is for.
"""

import argparse
from pathlib import Path

from small_model import make
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import headshare as hs


def write(folder: str, start: str, tokens: int = 24) -> str:
    """What a model writes after the start, the likeliest token each time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)  # the same call for a dense model and for a shrunk one
    given = tokenizer(start, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**given, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def main() -> None:
    """Shrink, print the table, load, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=Path("example-output"))
    parser.add_argument("--save", default="10%")
    parser.add_argument("--tokens", type=int, default=8192, help="how many tokens of the text are looked at")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--yes", action="store_true", help="go on where the predicted loss is large")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    if arguments.model is None:
        make(arguments.out)
    model = arguments.model or str(arguments.out / "model")
    text = arguments.file or arguments.out / "calibration.txt"
    small = str(arguments.out / "small")

    shrunk = hs.shrink(
        model,
        small,
        save=arguments.save,
        calibration=str(text),
        tokens=arguments.tokens,
        window=arguments.window,
        yes=arguments.yes,
        overwrite=True,
    )
    for what, before, after, change in shrunk.rows():
        print(f"{what:40} {before:>12} {after:>12} {change:>8}")
    print(shrunk.done)
    for folder in (model, small):
        print(f"{folder}: {write(folder, 'The ')!r}")


if __name__ == "__main__":
    main()
