"""`headshare eval`: perplexity of a text, agreement of encoders, and accuracy on tasks.

What tasks need is imported when they begin: the other commands should not wait for it.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from headshare.checkpoint.opening import open_checkpoint
from headshare.cli.options import Context, JsonOption, RevisionOption, listed, print_result, refuse_unused
from headshare.errors import EvaluationError
from headshare.evaluation.embeddings import Agreement
from headshare.evaluation.perplexity import evaluate
from headshare.text.windows import WINDOW, read_text

OF_TASKS = ("limit", "few_shot", "batch_size", "data_dir", "reference", "prompt", "language")


class EvalDtypeName(StrEnum):
    """What models are run in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def evaluate_command(
    context: Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL_OR_SHARED...", help="Dense or shared checkpoints.")],
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file, for perplexity.")] = None,
    tasks: Annotated[
        str, typer.Option(metavar="NAMES", help="Tasks, joined by commas: ours, from --data-dir, or lm-eval's.")
    ] = "",
    data_dir: Annotated[Path | None, typer.Option(help="The folder of our tasks' files: piqa.jsonl and so on.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="The first so many questions of each task, or subject, and lines of --source.")
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option(help="Examples before each question. Default: the task's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Options of questions run at once.")] = 16,
    dtype: Annotated[EvalDtypeName, typer.Option(help="Type to run in; auto: as stored.")] = EvalDtypeName.AUTO,
    device: Annotated[str, typer.Option(help="Where to run, such as cuda:0.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Folder that keeps results.json; what it has is not measured again.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window of --text; windows do not overlap.")] = WINDOW,
    tokens: Annotated[int | None, typer.Option(help="Use at most this many tokens of --text.")] = None,
    bos: Annotated[
        bool | None,
        typer.Option(help="Open each window with the beginning-of-text token. Default: if the model has one."),
    ] = None,
    source: Annotated[Path | None, typer.Option(help="A text to be translated, line by line: BLEU and METEOR.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Its translation.")] = None,
    prompt: Annotated[
        str, typer.Option(help="What the model is given for a line of --source, which stands in the place of {source}.")
    ] = "{source}\n",
    language: Annotated[
        str | None, typer.Option(help="Language of --reference, such as french: METEOR matches its stems too.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="For encoders: the dense model, to compare embeddings with.")
    ] = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a text in windows, and accuracy on tasks; for encoders, agreement of their embeddings.

    A folder that keeps results serves many models: each is measured once, and a run that is stopped goes on.
    """
    if text is not None and not (tasks or out or source or len(models) > 1):
        refuse_unused(context, "of one model a text alone is measured", OF_TASKS, EvaluationError)
        content, other = read_text(text), None if against is None else open_checkpoint(against)
        model = open_checkpoint(models[0], revision=revision)
        found = evaluate(
            model, content, against=other, window=window, limit=tokens, bos=bos, dtype=dtype.value, device_map=device
        )
        if isinstance(found, Agreement):
            words = (
                f"mean cosine with {against}: {found.cosine:.6f}; first halves that find their second halves: "
                f"{found.retrieved:.1%} (dense {found.dense_retrieved:.1%}),"
            )
        else:
            words = f"perplexity {found.perplexity:,.3f}"
        print_result(found.to_dict(), f"{words} over {found.tokens} tokens in windows of {found.window}", as_json)
        return
    if against is not None:
        raise EvaluationError("--against compares one encoder with its dense model on --text. Leave the rest out.")
    if (source is None) != (reference is None):
        raise EvaluationError("a translation needs both --source and --reference.")
    if text is None:
        refuse_unused(context, "there is no --text", ("window", "tokens", "bos"), EvaluationError)
    if not tasks:
        refuse_unused(context, "there are no --tasks", ("data_dir", "few_shot"), EvaluationError)
    if source is None:
        refuse_unused(context, "there is no --source", ("prompt", "language"), EvaluationError)
        if not tasks:
            refuse_unused(context, "there are no --tasks and no --source", ("limit", "batch_size"), EvaluationError)
    from headshare.evaluation import EvalText, Parallel, Settings, measure, table_of
    from headshare.evaluation.measuring import to_dict

    rows = measure(
        models,
        tasks=listed(tasks),
        data=data_dir,
        text=None if text is None else EvalText(text, window, tokens, bos),
        parallel=None
        if source is None or reference is None
        else Parallel(source, reference, prompt, limit, language=language),
        settings=Settings(limit, few_shot, dtype.value, device, batch_size),
        out=out,
        revision=revision,
    )
    print_result(to_dict(rows), table_of(rows), as_json)


def generate_command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL_OR_SHARED...", help="Dense or shared checkpoints.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to go on from; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A UTF-8 text file with a prompt a line.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to write, at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="Draw at this temperature; 0: the likeliest token each time.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    dtype: Annotated[EvalDtypeName, typer.Option(help="Type to run in; auto: as stored.")] = EvalDtypeName.AUTO,
    device: Annotated[str, typer.Option(help="Where to run, such as cuda:0.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """What models write after the same prompts, side by side."""
    from headshare.evaluation import Runner, Settings, Writing, continuations, samples_of

    given = [*(prompt or []), *([] if prompts is None else read_text(prompts).splitlines())]
    given = [one for one in given if one.strip()]
    if not given:
        raise EvaluationError("there is nothing to go on from: give --prompt TEXT, or --prompts FILE.")
    writing, settings = Writing(tokens, None, temperature, seed), Settings(dtype=dtype.value, device=device)
    texts = []
    for model in models:
        with open_checkpoint(model) as checkpoint:
            texts.append((model, continuations(Runner.of(checkpoint, settings), given, writing)))
    data = {"prompts": given, "texts": dict(texts), "temperature": temperature, "seed": seed}
    print_result(data, samples_of(texts, given), as_json)
