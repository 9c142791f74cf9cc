"""`headshare train`: its options, over those of a YAML file, as one value for `headshare.training`.

What training needs is imported when it begins: the other commands should not wait for it.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from headshare.cli.options import (
    Context,
    JsonOption,
    OverwriteOption,
    RestartOption,
    RevisionOption,
    is_given,
    listed,
    refuse_unused,
)
from headshare.errors import TrainingError
from headshare.files.untrusted import read_yaml
from headshare.training.penalty import Distance


class MethodName(StrEnum):
    """The ways to train."""

    POSTSHARE = "postshare"
    RECOVER = "recover"
    BOTH = "both"
    DENSE = "dense"


class TrainDtypeName(StrEnum):
    """What weights are trained in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


Places = Mapping[str, tuple[str, ...]]
PLACES: Places = {
    "method": ("method",),
    "seed": ("seed",),
    "dtype": ("dtype",),
    **{name: ("sharing", name) for name in ("plan", "ratio", "match", "parts", "mode")},
    **{name: ("text", name) for name in ("data", "held_out_data", "field", "context", "held_out", "limit", "stream")},
    **{name: ("loss", name) for name in ("gamma", "lm", "distance", "distill", "temperature", "teacher")},
    **{name: ("learning", name) for name in ("lora", "patience")},
    "tasks": ("tasks", "names"),
    "data_dir": ("tasks", "data_dir"),
    "task_limit": ("tasks", "limit"),
}
"""Where each option stands in the settings."""


def train(
    context: Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A dense checkpoint; for --method recover, a shared one.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
    method: Annotated[
        MethodName,
        typer.Option(
            help="postshare: pull pairs together, then share. recover: train a shared model. both: share, then train. "
            "dense: train MODEL as it is, to compare with or to share after."
        ),
    ] = MethodName.POSTSHARE,
    data: Annotated[
        str, typer.Option(metavar="FILE|DATASET", help="A text file, a .jsonl, or hf:NAME[:CONFIG][:SPLIT].")
    ] = "",
    config: Annotated[
        Path | None, typer.Option(help="Settings from a YAML file; options on the command line override it.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Use this plan; nothing is scored or chosen.")] = None,
    ratio: Annotated[float, typer.Option(help="Share of all units that give up their weights.")] = 0.3,
    match: Annotated[str, typer.Option(help="Match function, by the weights: qk, q, k, v, qkv, separate.")] = "qk",
    parts: Annotated[
        str, typer.Option(help="What is shared, by the weights: qkv, qk, qkvo, ffn, gateup; else --plan.")
    ] = "qkv",
    mode: Annotated[str, typer.Option(help="How ties are chosen, as of `share`.")] = "star",
    held_out_data: Annotated[str | None, typer.Option(help="Measure on this text, not on the end of --data.")] = None,
    field: Annotated[str | None, typer.Option(help="The field of a row that is its text.")] = None,
    context_length: Annotated[int, typer.Option("--context", help="Tokens in a window.")] = 1024,
    held_out: Annotated[int, typer.Option(help="Windows that are not trained on, to measure on.")] = 64,
    limit: Annotated[int | None, typer.Option(help="Train on this many windows at most.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Read while training; needs --max_steps.")] = False,
    gamma: Annotated[float, typer.Option(help="Weight of the distance of tied pairs (equation 5).")] = 0.5,
    lm: Annotated[float, typer.Option(help="Weight of the language-model loss; the authors' code has 0.5.")] = 1.0,
    distance: Annotated[
        Distance, typer.Option(help="How pairs are compared; frobenius is the paper's.")
    ] = Distance.FROBENIUS,
    distill: Annotated[
        float, typer.Option(help="This part of the language-model loss is the divergence from the dense model.")
    ] = 0.0,
    temperature: Annotated[float, typer.Option(help="Temperature of --distill.")] = 1.0,
    teacher: Annotated[
        str | None, typer.Option(help="The dense model of --distill. Default: the one that MODEL is or names.")
    ] = None,
    lora: Annotated[
        int, typer.Option(help="Train LoRA of this rank on what nobody shares; not for postshare. 0: train all.")
    ] = 0,
    patience: Annotated[int | None, typer.Option(help="Stop after so many measurements without a better one.")] = None,
    tasks: Annotated[str, typer.Option(metavar="NAMES", help="Measure these tasks too each time, as of `eval`.")] = "",
    data_dir: Annotated[Path | None, typer.Option(help="The folder of our tasks' files.")] = None,
    task_limit: Annotated[int | None, typer.Option(help="Of each task, the first so many questions.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of windows.")] = 0,
    dtype: Annotated[
        TrainDtypeName, typer.Option(help="Train in this type; --bf16 true adds mixed precision to float32.")
    ] = TrainDtypeName.FLOAT32,
    restart: RestartOption = False,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """PostShare, recovery training, or training of a dense model.

    Any argument of the Hugging Face Trainer can be added: --learning_rate 1e-4.

    Stopped, the same command goes on. For several processes: accelerate launch -m headshare train ...
    """
    given = {
        "method": method, "data": data, "plan": plan, "ratio": ratio, "match": match, "parts": parts, "mode": mode,
        "held_out_data": held_out_data, "field": field, "context": context_length, "held_out": held_out,
        "limit": limit, "stream": stream, "gamma": gamma, "lm": lm, "distance": distance, "distill": distill,
        "temperature": temperature, "teacher": teacher, "lora": lora, "patience": patience,
        "tasks": listed(tasks), "data_dir": data_dir, "task_limit": task_limit, "seed": seed, "dtype": dtype,
    }  # fmt: skip
    names = {**dict.fromkeys(given), "context": "context_length"}
    chosen = {name: value for name, value in given.items() if is_given(context, names[name] or name)}
    if plan is not None:
        refuse_unused(context, "--plan says what is shared", ["ratio", "match", "parts", "mode"], TrainingError)
    if is_given(context, "method") and method is not MethodName.POSTSHARE:
        refuse_unused(context, "only PostShare pulls pairs together", ["gamma", "distance"], TrainingError)
    if config is None and not distill:
        refuse_unused(context, "nothing is distilled without --distill", ["teacher", "temperature"], TrainingError)
    if config is None and not tasks:
        refuse_unused(context, "there are no --tasks", ["data_dir", "task_limit"], TrainingError)
    from accelerate import PartialState

    from headshare.training import TrainSettings
    from headshare.training import train as run
    from headshare.training.arguments import trainer_arguments

    merged = _merged(config, chosen, trainer_arguments(context.args))
    settings = TrainSettings.made(merged, str(config) if config else "the options")
    found = run(model, out, settings, overwrite=overwrite, restart=restart, revision=revision)
    if PartialState().is_main_process:
        words = f"{found.in_words()}\nWritten and checked in {found.seconds:.1f} s: {out}"
        sys.stdout.write((json.dumps(found.to_dict(), default=str) if as_json else words) + "\n")


def _merged(config: Path | None, chosen: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML file's settings with the options in their places."""
    found = {} if config is None else read_yaml(config, TrainingError) or {}
    if not isinstance(found, dict):
        raise TrainingError(f"{config} holds no settings but {found!r:.60}. See docs/training.md for an example.")
    found.setdefault("method", MethodName.POSTSHARE)
    for name, value in chosen.items():
        _put(found, PLACES[name], value)
    for name, value in arguments.items():
        _put(found, ("learning", "arguments", name), value)
    if "text" not in found:
        raise TrainingError("there is nothing to train on: give --data FILE, or a data set (hf:NAME).")
    return found


def _put(found: dict[str, Any], place: Sequence[str], value: Any) -> None:
    *above, last = place
    for step in above:
        found = found.setdefault(step, {})
        if not isinstance(found, dict):
            raise TrainingError(f"{step} holds settings of its own, by name; found {found!r:.60}.")
    found[last] = value
