"""The steps of the paper, one by one, and its method beside its controls: score, plan, share, compare.

    python examples/research.py [MODEL FILE TEST]

Without MODEL, FILE and TEST it trains a small model first (`small_model.py`), which takes a minute or two. FILE is a
text to calibrate on, TEST another one to measure on.
"""

import argparse
from pathlib import Path

from small_model import make

import headshare as hs
from headshare.evaluation import EvalText
from headshare.experiments import Grid, compare

METHODS = ("directshare", "random-donors", "deletion-same", "directshare+refit", "neurons+refit", "int8")


def main() -> None:
    """Go through the steps, printing what each of them gives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("test", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=Path("example-output"))
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=8192, help="how many tokens of each text are looked at")
    parser.add_argument("--window", type=int, default=128)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.model is None:
        make(arguments.out)
    text = arguments.file or arguments.out / "calibration.txt"
    test = arguments.test or arguments.out / "test.txt"

    # 1. open: names and shapes, no weight is read yet
    dense = hs.open_checkpoint(arguments.model or str(arguments.out / "model"))
    print(dense)

    # 2. score: how alike every two heads are, by the weights of q and k
    scores = hs.score_units(dense, match="qk")

    # 3. plan: who lends to whom; a plan holds no weight, and can be printed, saved and compared
    plan = hs.make_plan(scores, ratio=arguments.ratio)
    for tie in plan.selections[0].ties[:5]:
        print(tie)

    # 4. share: write the smaller model, and check every number of it
    shared = hs.share(dense, plan)
    shared.save(arguments.out / "shared", overwrite=True)
    print(hs.verify(hs.open_checkpoint(arguments.out / "shared"), dense))

    # 5. compare: the method beside its controls and others, each saving at least as many bytes
    calibration = hs.Calibration.load(text, dense, tokens=arguments.tokens, window=arguments.window)
    measured = EvalText(test, window=arguments.window, tokens=arguments.tokens)
    grid = Grid(METHODS, (arguments.ratio,), text=measured)
    compare(dense, grid, arguments.out / "compared", calibration=calibration)
    print((arguments.out / "compared" / "table.md").read_text())


if __name__ == "__main__":
    main()
