"""The command train: its options and the settings of a YAML file, merged into one value for `headshare.training`.

Options override the file. Imports that only training needs are made when it begins, so that other commands do not wait
for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from headshare.cli.bundles import given_options, with_bundles
from headshare.cli.options import (
    CHOOSE,
    RUN,
    TASKS,
    TEXT,
    CommonOptions,
    Context,
    FieldOption,
    RestartOption,
    is_given,
    listed,
    print_written,
    refuse_unused,
)
from headshare.cli.share_options import MATCH_NAMES, OutArgument
from headshare.errors import TrainingError
from headshare.matching.modes import MODES
from headshare.training.choices import Distance, TrainingMethod

TRAIN = "Train"
LOSS = "Loss"


class TrainDtypeName(StrEnum):
    """The types that weights can be trained in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class TopOptions:
    """Settings that stand at the top of the YAML file."""

    method: Annotated[
        TrainingMethod,
        typer.Option(
            rich_help_panel=TRAIN,
            help="Train in this way. postshare: pull pairs together, then share. recover: train a shared model. both: "
            "share, then train. dense: train MODEL as it is, to compare with or to share after.",
        ),
    ] = TrainingMethod.POSTSHARE
    seed: Annotated[int, typer.Option(rich_help_panel=RUN, help="Order the windows by this seed.")] = 0
    dtype: Annotated[
        TrainDtypeName,
        typer.Option(rich_help_panel=RUN, help="Train in this type; --bf16 true adds mixed precision to float32."),
    ] = TrainDtypeName.FLOAT32


@dataclass(frozen=True)
class TrainTextOptions:
    """The settings of `text`."""

    data: Annotated[
        str,
        typer.Option(
            rich_help_panel=TEXT,
            metavar="FILE",
            help="Train on this text: a text file, a .jsonl, .json or .csv, or hf:NAME[:CONFIG][:SPLIT].",
        ),
    ] = ""
    held_out_data: Annotated[
        str | None, typer.Option(rich_help_panel=TEXT, help="Measure on this text. Default: the end of --data.")
    ] = None
    field: FieldOption = None
    context_length: Annotated[
        int | None,
        typer.Option(
            "--context",
            rich_help_panel=TEXT,
            help="Cut the text into windows of this many tokens. Default: 1024, or the most MODEL reads.",
        ),
    ] = None
    held_out: Annotated[
        int, typer.Option(rich_help_panel=TEXT, help="Keep this many windows out of training, to measure on.")
    ] = 64
    limit: Annotated[
        int | None, typer.Option(rich_help_panel=TEXT, help="Train on at most this many windows. Default: all.")
    ] = None
    stream: Annotated[
        bool, typer.Option("--stream", rich_help_panel=TEXT, help="Read the text while training; needs --max_steps.")
    ] = False


@dataclass(frozen=True)
class SharingOptions:
    """The settings of `sharing`."""

    plan: Annotated[
        Path | None, typer.Option(rich_help_panel=CHOOSE, help="Use this plan; nothing is scored or chosen.")
    ] = None
    ratio: Annotated[float, typer.Option(rich_help_panel=CHOOSE, help="Share this fraction of all units.")] = 0.3
    match: Annotated[
        str,
        typer.Option(
            rich_help_panel=CHOOSE,
            help=f"Match units by the cosine of these parts of the weights: {', '.join(MATCH_NAMES)}.",
        ),
    ] = "qk"
    parts: Annotated[
        str,
        typer.Option(
            rich_help_panel=CHOOSE,
            help="Share these parts, matched by the weights: qkv, qk, qkvo, ffn, gateup. For others, give --plan.",
        ),
    ] = "qkv"
    mode: Annotated[
        str, typer.Option(rich_help_panel=CHOOSE, help=f"Choose ties in this way, as in `share`: {', '.join(MODES)}.")
    ] = "star"


@dataclass(frozen=True)
class LossOptions:
    """The settings of `loss`."""

    gamma: Annotated[
        float, typer.Option(rich_help_panel=LOSS, help="Weigh the distance of tied pairs by this (equation 5).")
    ] = 0.5
    lm: Annotated[
        float,
        typer.Option(rich_help_panel=LOSS, help="Weigh the language-model loss by this; the authors' code has 0.5."),
    ] = 1.0
    distance: Annotated[
        Distance, typer.Option(rich_help_panel=LOSS, help="Compare pairs in this way; frobenius is the paper's.")
    ] = Distance.FROBENIUS
    distill: Annotated[
        float,
        typer.Option(
            rich_help_panel=LOSS,
            help="Replace this fraction of the language-model loss by the divergence from the dense model.",
        ),
    ] = 0.0
    temperature: Annotated[float, typer.Option(rich_help_panel=LOSS, help="Distil at this temperature.")] = 1.0
    teacher: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=LOSS, help="Distil from this dense model. Default: the one that MODEL is or names."
        ),
    ] = None


@dataclass(frozen=True)
class LearningOptions:
    """The settings of `learning`."""

    lora: Annotated[
        int,
        typer.Option(
            rich_help_panel=TRAIN,
            help="Train LoRA of this rank on weights that are not shared; not for postshare. 0: train all.",
        ),
    ] = 0
    patience: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=TRAIN, help="Stop after this many measurements without a better one. Default: do not."
        ),
    ] = None


@dataclass(frozen=True)
class TrainTaskOptions:
    """The settings of `tasks`."""

    tasks: Annotated[
        str,
        typer.Option(rich_help_panel=TASKS, metavar="NAMES", help="Also measure these tasks each time, as in `eval`."),
    ] = ""
    data_dir: Annotated[
        Path | None, typer.Option(rich_help_panel=TASKS, help="Read our tasks' files from this folder.")
    ] = None
    task_limit: Annotated[
        int | None, typer.Option(rich_help_panel=TASKS, help="Use the first so many questions of each task.")
    ] = None


# options whose settings have other names
RENAMED = {"context_length": "context", "tasks": "names", "task_limit": "limit"}


@with_bundles
def train(
    context: Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A dense checkpoint; for --method recover, a shared one.")
    ],
    out: OutArgument,
    config: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=TRAIN, help="Read settings from this YAML file; options on the command line override it."
        ),
    ] = None,
    *,
    top: TopOptions,
    text: TrainTextOptions,
    sharing: SharingOptions,
    loss: LossOptions,
    learning: LearningOptions,
    tasks: TrainTaskOptions,
    restart: RestartOption = False,
    common: CommonOptions,
) -> None:
    """Train by PostShare, recover a shared model, or train a dense model.

    Any argument of the Hugging Face Trainer can be added: --learning_rate 1e-4.

    A stopped run goes on with the same command. For several processes: accelerate launch -m headshare train ...
    """
    # options that nothing would use
    if sharing.plan is not None:
        refuse_unused(context, "--plan says what is shared", ["ratio", "match", "parts", "mode"])
    if is_given(context, "method") and top.method is not TrainingMethod.POSTSHARE:
        refuse_unused(context, "only PostShare pulls pairs together", ["gamma", "distance"])
    if config is None and not loss.distill:
        refuse_unused(context, "nothing is distilled without --distill", ["teacher", "temperature"])
    if config is None and not tasks.tasks:
        refuse_unused(context, "there are no --tasks", ["data_dir", "task_limit"])
    from accelerate import PartialState

    from headshare.training import TrainSettings
    from headshare.training import train as run
    from headshare.training.arguments import trainer_arguments

    # only options that were given override the file
    sections = {"text": text, "sharing": sharing, "loss": loss, "learning": learning, "tasks": tasks}
    given = {name: _given(context, bundle) for name, bundle in sections.items()}
    given["learning"]["arguments"] = trainer_arguments(context.args)
    merged = _merged(config, {**_given(context, top), **given})
    settings = TrainSettings.made(merged, str(config) if config else "the options")
    result = run(model, out, settings, overwrite=common.overwrite, restart=restart, revision=common.revision)
    if PartialState().is_main_process:
        print_written(result.to_dict(), result.in_words(), out, result.seconds, as_json=common.as_json)


def _given(context: Context, bundle: Any) -> dict[str, Any]:
    """The options of a bundle that were given, under the names of their settings."""
    given = given_options(context, bundle)
    return {RENAMED.get(name, name): listed(value) if name == "tasks" else value for name, value in given.items()}


def _merged(config: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML file's settings with the given options in their places."""
    from headshare.files.untrusted import read_yaml

    settings = {} if config is None else read_yaml(config, TrainingError) or {}
    if not isinstance(settings, dict):
        raise TrainingError(f"{config} holds no settings but {settings!r:.60}. See docs/training.md for an example.")
    settings.setdefault("method", TrainingMethod.POSTSHARE)
    _override(settings, given)
    if "text" not in settings:
        raise TrainingError("there is nothing to train on: give --data FILE, or a data set (hf:NAME).")
    return settings


def _override(settings: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Set these values in nested settings. Where nothing is given, nothing is made."""
    for name, value in given.items():
        if not isinstance(value, Mapping):
            settings[name] = value
        elif value:
            nested = settings.setdefault(name, {})
            if not isinstance(nested, dict):
                raise TrainingError(f"{name} holds settings of its own, by name; found {nested!r:.60}.")
            _override(nested, value)
