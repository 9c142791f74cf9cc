"""Accuracy on questions with given options: the model chooses the option whose text it finds most likely.

Prompts, tokens and scores are those of lm-evaluation-harness 0.4.13 without examples in the prompt;
benchmarks/lm_eval_accuracy.py compares the two, likelihood by likelihood. Files hold one JSON object a line.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from headshare.errors import EvaluationError
from headshare.evaluation import check_finite, check_vocabulary, finite_or_null, is_causal, longest_window, read_text
from headshare.models import quiet
from headshare.progress import track

BATCH_TOKENS = 4096


# ---- questions


class Option(NamedTuple):
    """A text to be scored, and what it follows; one space stands between them."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Question:
    """Options, and which of them is right.

    Raises:
        EvaluationError: if there are fewer than two options, one has a blank text, or the answer is none of them.
    """

    options: tuple[Option, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.options) < 2:
            raise EvaluationError(f"a question needs two options or more, found {len(self.options)}.")
        if not 0 <= self.answer < len(self.options):
            raise EvaluationError(f"the answer is option {self.answer}; options are 0 to {len(self.options) - 1}.")
        if blank := [n for n, texts in enumerate(self.options) if not all(text.strip() for text in texts)]:
            raise EvaluationError(f"option {blank[0]} or what it follows is blank; there is nothing to score.")


# ---- tasks: rows of files


class _Row(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Asked(_Row):
    query: str
    choices: list[str]
    gold: int


class _Filled(_Row):
    context_options: list[str]
    continuation: str
    gold: int


class _Read(_Row):
    example_id: str
    article: str
    question: str
    options: list[str] = Field(min_length=4, max_length=4)
    answer: Literal["A", "B", "C", "D"]

    @property
    def gold(self) -> int:
        return "ABCD".index(self.answer)

    @property
    def answered(self) -> str:
        """The question as it stands before a later one about the same article."""
        right = self.options[self.gold]
        if self.question.endswith("  _  ."):
            return self.question.removesuffix(" _  .") + right + "\n"
        return f"Question: {self.question}\nAnswer: {right}\n"


def _after(context: str, choices: Sequence[str], gold: int) -> Question:
    return Question(tuple(Option(context, choice) for choice in choices), gold)


def _piqa(rows: Sequence[_Asked]) -> Question:
    goal = rows[0].query.removeprefix("Question: ").removesuffix("\n")
    return _after(f"Question: {goal}\nAnswer:", rows[0].choices, rows[0].gold)


def _openbook_qa(rows: Sequence[_Asked]) -> Question:
    return _after(rows[0].query, rows[0].choices, rows[0].gold)


def _boolq(rows: Sequence[_Asked]) -> Question:
    return _after(rows[0].query.removeprefix("Passage: ") + "\nAnswer:", rows[0].choices, rows[0].gold)


def _winogrande(rows: Sequence[_Filled]) -> Question:
    row = rows[0]
    return Question(tuple(Option(context, row.continuation) for context in row.context_options), row.gold)


def _race(rows: Sequence[_Read]) -> Question:
    *before, last = rows
    context = f"Article: {last.article}\n\n" + "".join(row.answered for row in before) + last.question
    return _after(context, last.options, last.gold)


@dataclass(frozen=True)
class Task:
    """A file of rows, and how rows become a question.

    Each row is a question, or all rows that agree in the field `together` are one. `chance` is the share of right
    answers that guessing gives.
    """

    name: str
    file: str
    row: type[_Row]
    question: Callable[[Sequence[Any]], Question]
    chance: float
    together: str | None = None


# RACE asks the last question of each article, below the earlier ones with their answers, as the harness does.
TASKS = {
    task.name: task
    for task in (
        Task("piqa", "piqa.jsonl", _Asked, _piqa, 1 / 2),
        Task("openbook_qa", "openbook_qa.jsonl", _Asked, _openbook_qa, 1 / 4),
        Task("winogrande", "winogrande.jsonl", _Filled, _winogrande, 1 / 2),
        Task("boolq", "boolq.jsonl", _Asked, _boolq, 1 / 2),
        Task("race_middle", "race_middle.jsonl", _Read, _race, 1 / 4, together="example_id"),
    )
}


def read_questions(path: str | Path, task: Task, *, limit: int | None = None) -> list[Question]:
    """The questions in a file, in its order; with `limit` the first so many, as the harness takes them.

    Raises:
        EvaluationError: if the file is missing, empty or not text, or a line is no row of this task.
    """
    if limit is not None and limit < 1:
        raise EvaluationError(f"a limit of {limit} questions leaves nothing to measure; use at least 1.")
    lines = enumerate(read_text(path).split("\n"), start=1)
    rows = [(number, _row(task, line, f"{path}, line {number}")) for number, line in lines if line.strip()]
    groups = groupby(rows, key=lambda row: getattr(row[1], task.together) if task.together else row[0])
    return [_question(task, list(group), path) for _, group in islice(groups, limit)]


def _row(task: Task, line: str, where: str) -> _Row:
    try:
        return task.row.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at, found = ".".join(str(step) for step in first["loc"]) or "the row", first["input"]
        found = sorted(found) if isinstance(found, dict) else found
        fields, what = ", ".join(task.row.model_fields), first["msg"].replace(" at line 1 ", " at ")
        raise EvaluationError(
            f"{where} is no row of {task.name}, which has {fields}. At {at}: {what}; found {found!r:.100}."
        ) from None


def _question(task: Task, group: Sequence[tuple[int, _Row]], path: str | Path) -> Question:
    try:
        return task.question([row for _, row in group])
    except EvaluationError as error:
        raise EvaluationError(f"{path}, line {group[-1][0]}: {error}") from None


# ---- accuracy


@dataclass(frozen=True)
class Accuracy:
    """Shares of questions answered right, each with its standard error, sqrt(p (1 - p) / (questions - 1)).

    The normalised one divides each option's log-likelihood by its characters before it chooses.
    """

    task: str
    accuracy: float
    standard_error: float
    normalised_accuracy: float
    normalised_standard_error: float
    chance: float
    questions: int

    def to_dict(self) -> dict[str, Any]:
        """The same under the names that `--json` prints; the standard error of a single question is null."""
        return finite_or_null(asdict(self))


def measure_accuracy(
    model: Any, tokenizer: Any, questions: Sequence[Question], *, task: Task, batch_tokens: int = BATCH_TOKENS
) -> Accuracy:
    """How many questions the model answers right.

    Raises:
        EvaluationError: as `log_likelihoods`.
    """
    return accuracy_of(log_likelihoods(model, tokenizer, questions, batch_tokens=batch_tokens), questions, task)


def accuracy_of(likelihoods: Sequence[Sequence[float]], questions: Sequence[Question], task: Task) -> Accuracy:
    """What these log-likelihoods, one for each option of each question, choose. The first of equals is chosen."""
    right, normalised = 0, 0
    for found, question in zip(likelihoods, questions, strict=True):
        lengths = [len(option.continuation) for option in question.options]  # characters, as the harness's acc_norm
        per_character = [value / length for value, length in zip(found, lengths, strict=True)]
        right += found.index(max(found)) == question.answer
        normalised += per_character.index(max(per_character)) == question.answer
    return Accuracy(
        task.name, *_share(right, len(questions)), *_share(normalised, len(questions)), task.chance, len(questions)
    )


def _share(right: int, of: int) -> tuple[float, float]:
    share = right / of
    return share, math.sqrt(share * (1 - share) / (of - 1)) if of > 1 else math.nan


# ---- log-likelihoods


class _Scored(NamedTuple):
    """What the model reads, and the tokens that it should predict at the end of that."""

    input: tuple[int, ...]
    targets: tuple[int, ...]


def log_likelihoods(
    model: Any, tokenizer: Any, questions: Sequence[Question], *, batch_tokens: int = BATCH_TOKENS
) -> list[list[float]]:
    """The natural logarithm of each option's likelihood after its context: a list for each question.

    A batch holds at most `batch_tokens` tokens, padding included, or one option. What is longer than the model's
    longest window loses its beginning.

    Raises:
        EvaluationError: if the model is not a causal language model, the tokenizer is another model's, an option has
            no tokens or too many, or logits are not finite.
    """
    if not is_causal(model):
        raise EvaluationError(f"{type(model).__name__} does not predict the next token, so it cannot choose a text.")
    if not questions:
        raise EvaluationError("there are no questions; there is nothing to measure.")
    options = [option for question in questions for option in question.options]
    scored = [_fitted(one, longest_window(model.config.to_dict())) for one in _encode(tokenizer, options)]
    check_vocabulary(model.config.to_dict(), torch.tensor([max(one.input + one.targets) for one in scored]))
    found = iter(_scores(model, scored, batch_tokens))
    return [list(islice(found, len(question.options))) for question in questions]


def _encode(tokenizer: Any, options: Sequence[Option]) -> list[_Scored]:
    """Tokens of contexts with their continuations; the context's own count says where the continuation begins."""
    texts = [_parted(option) for option in options]
    contexts = list(dict.fromkeys(context for context, _ in texts))
    with quiet():
        context_tokens = dict(zip(contexts, tokenizer(contexts)["input_ids"], strict=True))
        wholes = tokenizer([context + continuation for context, continuation in texts])["input_ids"]
    scored = []
    for (context, continuation), whole in zip(texts, wholes, strict=True):
        before = context_tokens[context]
        targets = tuple(whole[len(before) :])
        if not before or not targets:
            raise EvaluationError(f"the tokenizer gives no token of its own to {continuation!r:.60} or its context.")
        scored.append(_Scored((*before, *targets)[:-1], targets))
    return scored


def _parted(option: Option) -> Option:
    """The same with the space between, and all other space at the context's end, in the continuation."""
    context = option.context.rstrip()
    return Option(context, option.context[len(context) :] + " " + option.continuation)


def _fitted(scored: _Scored, longest: int | None) -> _Scored:
    if longest is None:
        return scored
    if len(scored.targets) > longest:
        raise EvaluationError(
            f"an option has {len(scored.targets)} tokens, more than the model's {longest}. Leave its question out."
        )
    return scored._replace(input=scored.input[-longest:])


@torch.inference_mode()
def _scores(model: Any, scored: Sequence[_Scored], batch_tokens: int) -> list[float]:
    """Log-likelihoods of all targets. What several options have in common up to their last token is read once."""
    readers: dict[tuple[int, ...], list[int]] = {}
    for number, one in enumerate(scored):
        readers.setdefault(one.input, []).append(number)
    batches = list(_batches(readers, batch_tokens))
    found = [math.nan] * len(scored)
    for batch in track(batches, "batches", len(batches)):
        most = max(len(scored[number].targets) for tokens in batch for number in readers[tokens])
        for tokens, logits in zip(batch, _last_logits(model, batch, most), strict=True):
            for number in readers[tokens]:
                found[number] = _log_likelihood(logits, scored[number].targets)
    return found


def _batches(inputs: Iterable[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Inputs of like length together, longest first."""
    left = sorted(inputs, key=len, reverse=True)
    while left:
        rows = max(1, batch_tokens // len(left[0]))
        yield left[:rows]
        left = left[rows:]


def _last_logits(model: Any, batch: Sequence[tuple[int, ...]], count: int) -> Iterator[Float[Tensor, "end vocabulary"]]:
    """Logits of at least the last `count` tokens of each input. Padding stands behind them, where no token looks."""
    longest, shortest = len(batch[0]), len(batch[-1])
    tokens = torch.tensor([one + (0,) * (longest - len(one)) for one in batch])
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in batch])
    device = next(model.parameters()).device
    inputs = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
    out = model(**inputs, use_cache=False, logits_to_keep=longest - shortest + count).logits
    for row, one in zip(out, batch, strict=True):
        yield row[: len(row) - (longest - len(one))]  # counted from the end: not every model leaves logits out


def _log_likelihood(logits: Float[Tensor, "end vocabulary"], targets: tuple[int, ...]) -> float:
    chosen = torch.tensor(targets, device=logits.device)[:, None]
    last = logits[-len(targets) :].float().log_softmax(dim=-1)
    check_finite(last)
    total: float = last.gather(1, chosen).double().sum().item()
    return total
