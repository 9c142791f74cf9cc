"""`headshare eval`: perplexity of a text, agreement of encoders, and accuracy on tasks.

What imports torch is imported when a command begins, so that `--help` does not wait for it.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from headshare.cli.bundles import with_bundles
from headshare.cli.options import (
    RUN,
    TASKS,
    TEXT,
    TRANSLATION,
    WRITE,
    AnyBaseOption,
    Context,
    FieldOption,
    JsonOption,
    RevisionOption,
    listed,
    print_result,
    refuse_unused,
)
from headshare.errors import EvaluationError

# parameters that only tasks and translations use
OF_TASKS = ("limit", "few_shot", "batch_size", "data_dir", "reference", "prompt", "language")


class EvalDtypeName(StrEnum):
    """The types that models are run in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True)
class TextOptions:
    """A text whose perplexity is measured."""

    text: Annotated[
        Path | None,
        typer.Option(rich_help_panel=TEXT, help="Measure the perplexity of this text file, .jsonl, .json or .csv."),
    ] = None
    window: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=TEXT,
            help="Cut --text into windows of this many tokens, which do not overlap. Default: 512, or the most that "
            "the models read.",
        ),
    ] = None
    tokens: Annotated[
        int | None, typer.Option(rich_help_panel=TEXT, help="Use at most this many tokens of --text. Default: all.")
    ] = None


@dataclass(frozen=True)
class OpenedTextOptions(TextOptions):
    """A text whose perplexity is measured, its field in rows, and the beginning of its windows."""

    field: FieldOption = None
    bos: Annotated[
        bool | None,
        typer.Option(
            rich_help_panel=TEXT,
            help="Open each window with the beginning-of-text token. Default: if the model has one.",
        ),
    ] = None


@dataclass(frozen=True)
class TaskOptions:
    """The tasks that are measured, and the type that models are run in."""

    tasks: Annotated[
        str,
        typer.Option(
            rich_help_panel=TASKS,
            metavar="NAMES",
            help="Measure these tasks, joined by commas: ours, from --data-dir, or lm-eval's.",
        ),
    ] = ""
    data_dir: Annotated[
        Path | None,
        typer.Option(rich_help_panel=TASKS, help="Read our tasks' files, piqa.jsonl and so on, from this folder."),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=TASKS,
            help="Use the first so many questions of each task or subject, and lines of --source. Default: all.",
        ),
    ] = None
    few_shot: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=TASKS, help="Show this many examples before each question. Default: the task's own number."
        ),
    ] = None
    batch_size: Annotated[
        int, typer.Option(rich_help_panel=RUN, help="Run this many options of questions at once.")
    ] = 16
    dtype: Annotated[EvalDtypeName, typer.Option(rich_help_panel=RUN, help="Run in this type; auto: as stored.")] = (
        EvalDtypeName.AUTO
    )


@dataclass(frozen=True)
class TranslationOptions:
    """A text that is translated."""

    source: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=TRANSLATION, help="Translate this text line by line, and measure BLEU and METEOR."
        ),
    ] = None
    reference: Annotated[
        Path | None, typer.Option(rich_help_panel=TRANSLATION, help="Compare with this translation, line by line.")
    ] = None
    prompt: Annotated[
        str,
        typer.Option(
            show_default="{source} and a new line",
            rich_help_panel=TRANSLATION,
            help="Give the model this text for each line of --source, which replaces {source}.",
        ),
    ] = "{source}\n"
    language: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=TRANSLATION,
            help="Also match stems of this language of --reference, such as french, in METEOR.",
        ),
    ] = None


@with_bundles
def evaluate_command(
    context: Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL_OR_SHARED...", help="Dense or shared checkpoints.")],
    *,
    texts: OpenedTextOptions,
    asked: TaskOptions,
    translation: TranslationOptions,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", rich_help_panel=RUN, help="Run on this device, such as cuda:0.")
    ] = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WRITE, help="Keep results.json in this folder; what it has is not measured again."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(rich_help_panel=TEXT, help="For encoders: compare embeddings with this dense model.")
    ] = None,
    any_base: AnyBaseOption = False,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity of a text and accuracy on tasks; for encoders, agreement of their embeddings.

    With --out, one folder serves many models: each is measured once, and a stopped run goes on.
    """
    from headshare.text.formats import check_field

    text = texts.text
    tasks = listed(asked.tasks)
    source = translation.source
    reference = translation.reference
    check_field(texts.field, text, source, reference)
    if text is not None and not (tasks or out or source or len(models) > 1):
        refuse_unused(context, "of one model a text alone is measured", OF_TASKS)
        from headshare.checkpoint.opening import open_checkpoint
        from headshare.evaluation.embeddings import Agreement
        from headshare.evaluation.perplexity import evaluate
        from headshare.text.windows import read_text

        content = read_text(text, texts.field)
        other = None if against is None else open_checkpoint(against)
        model = open_checkpoint(models[0], revision=revision)
        result = evaluate(
            model,
            content,
            against=other,
            window=texts.window,
            limit=texts.tokens,
            bos=texts.bos,
            any_base=any_base,
            dtype=asked.dtype.value,
            device_map=device,
        )
        if isinstance(result, Agreement):
            words = (
                f"mean cosine with {against}: {result.cosine:.6f}; first halves that find their second halves: "
                f"{result.retrieved:.1%} (dense {result.dense_retrieved:.1%}),"
            )
        else:
            words = f"perplexity {result.perplexity:,.3f}"
        print_result(result.to_dict(), f"{words} over {result.tokens} tokens in windows of {result.window}", as_json)
        return
    # options that contradict each other, or that nothing would use
    if against is not None:
        raise EvaluationError("--against compares one encoder with its dense model on --text. Leave the rest out.")
    if (source is None) != (reference is None):
        raise EvaluationError("a translation needs both --source and --reference.")
    if text is None:
        refuse_unused(context, "there is no --text", ("window", "tokens", "bos"))
    if text is None and source is None:
        refuse_unused(context, "there is no --text and no --source", ("field",))
    if not tasks:
        refuse_unused(context, "there are no --tasks", ("data_dir", "few_shot"))
    if source is None:
        refuse_unused(context, "there is no --source", ("prompt", "language"))
        if not tasks:
            refuse_unused(context, "there are no --tasks and no --source", ("limit", "batch_size"))
    from headshare.evaluation import EvalText, Parallel, Settings, measure, table_of
    from headshare.evaluation.measuring import to_dict

    rows = measure(
        models,
        tasks=tasks,
        data=asked.data_dir,
        text=None if text is None else EvalText(text, texts.window, texts.tokens, texts.bos, texts.field),
        parallel=None
        if source is None or reference is None
        else Parallel(
            source, reference, translation.prompt, asked.limit, language=translation.language, text_field=texts.field
        ),
        settings=Settings(asked.limit, asked.few_shot, asked.dtype.value, device, asked.batch_size),
        out=out,
        revision=revision,
    )
    print_result(to_dict(rows), table_of(rows), as_json, written=out)


def generate_command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL_OR_SHARED...", help="Dense or shared checkpoints.")],
    prompt: Annotated[
        list[str] | None, typer.Option(rich_help_panel=TEXT, help="Continue this prompt; may be given several times.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=TEXT, help="Continue each line of this text file, or row of a .jsonl, .json or .csv."
        ),
    ] = None,
    field: FieldOption = None,
    tokens: Annotated[int, typer.Option(rich_help_panel=RUN, help="Write at most this many tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(rich_help_panel=RUN, help="Draw at this temperature; 0: the likeliest token.")
    ] = 0,
    seed: Annotated[int, typer.Option(rich_help_panel=RUN, help="Draw by this seed.")] = 0,
    dtype: Annotated[
        EvalDtypeName, typer.Option(rich_help_panel=RUN, help="Run in this type; auto: as stored.")
    ] = EvalDtypeName.AUTO,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", rich_help_panel=RUN, help="Run on this device, such as cuda:0.")
    ] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Continue the same prompts by several models, and show the texts side by side."""
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.evaluation import Runner, Settings, Writing, continuations, samples_of
    from headshare.text.formats import check_field, read_lines

    check_field(field, prompts)
    given = [*(prompt or []), *([] if prompts is None else read_lines(prompts, field))]
    given = [line for line in given if line.strip()]
    if not given:
        raise EvaluationError("there is nothing to go on from: give --prompt TEXT, or --prompts FILE.")
    writing = Writing(tokens, None, temperature, seed)
    settings = Settings(dtype=dtype.value, device=device)
    texts = []
    for model in models:
        with open_checkpoint(model) as checkpoint:
            texts.append((model, continuations(Runner.of(checkpoint, settings), given, writing)))
    data = {"prompts": given, "texts": dict(texts), "temperature": temperature, "seed": seed}
    print_result(data, samples_of(texts, given), as_json)
