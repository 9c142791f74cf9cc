"""The command line that both harnesses have: how much is tried, of what, for how long, and where findings are kept."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers


class Count(NamedTuple):
    """An option for how much is tried: its name, its default and its help."""

    name: str
    default: int
    help: str


class Choice(NamedTuple):
    """An option for what is tried: its name, all that there is, and its help."""

    name: str
    known: Iterable[str]
    help: str


def parsed(prog: str, description: str | None, count: Count, choice: Choice, single: str) -> argparse.Namespace:
    """The options of a harness, once torch and transformers are set to run many small models quietly.

    `single` is what one number names, as a finding gives it.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    parser.add_argument(count.name, type=int, default=count.default, help=count.help)
    parser.add_argument("--seed", type=int, default=0, help=f"another seed gives other {single}s")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after so many minutes")
    parser.add_argument(choice.name, default=",".join(choice.known), help=f"{choice.help}, joined by commas")
    parser.add_argument("--only", type=int, help=f"the one {single} of this number, as a finding names it")
    parser.add_argument("--kept", type=Path, default=Path("fuzz-findings"), help="the folder of findings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return options
