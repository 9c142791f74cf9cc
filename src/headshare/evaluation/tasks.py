"""Our tasks: which file each is read from, and how its rows become questions.

Prompts of English tasks are those of lm-evaluation-harness where it has the task. CMNLI and OCNLI ask as OpenCompass
does. Its options for TNEWS are of different lengths, and those for CSL are whole texts; it compares likelihoods by
token. The harness adds them up, which is fair to options of one length: ours are.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from headshare.errors import EvaluationError
from headshare.evaluation.questions import Question, Row, csv_rows, json_lines

Rows = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Part:
    """A subject of a task, or all of it: its questions, and others to be shown as examples, with their answers."""

    questions: tuple[Question, ...]
    examples: tuple[Question, ...] = ()
    heading: str = ""


@dataclass(frozen=True)
class Task:
    """A task of ours. `files` are the names it may be read from, in the folder of data; `space` is what stands between
    a context and its ending."""

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], dict[str, Part]]
    space: str = " "

    def parts(self, folder: Path) -> dict[str, Part]:
        """All questions, by subject; where there is one part alone, it is the task's own name.

        Raises:
            EvaluationError: if there is none of the files, or one cannot be used.
        """
        for name in self.files:
            if (folder / name).exists():
                found = self.read(folder / name)
                if not any(part.questions for part in found.values()):
                    raise EvaluationError(f"{folder / name} holds no question of {self.name}.")
                return {part or self.name: kept for part, kept in found.items() if kept.questions}
        raise EvaluationError(
            f"{self.name} is read from {' or '.join(self.files)}, and {folder} holds no such file. Name the folder "
            "that does with --data-dir."
        )


TASKS: dict[str, Task] = {}


def digest_of(parts: Mapping[str, Part]) -> str:
    """What changes with any question, and with which examples are shown first."""
    order = ["in their order"] if any(part.examples for part in parts.values()) else []
    kept = [[name, asdict(part)] for name, part in parts.items()]
    return hashlib.sha256(json.dumps([*kept, *order]).encode()).hexdigest()


# ---- how files are read


def _lines(
    name: str,
    *files: str,
    row: type[Row],
    together: str | None = None,
    kept: Callable[[Any], bool] = lambda _: True,
    examples: str | None = None,
    space: str = " ",
    mixed: bool = False,
) -> Callable[[Callable[[Sequence[Any]], Question]], Callable[[Sequence[Any]], Question]]:
    """Register a task of which every line is a question, or all lines that agree in the field `together` are one;
    `kept` says of which lines, and `examples` is the file of those that are shown. `mixed` puts the questions in the
    order of their digests: those of a file that goes class by class would begin with one class alone."""

    def register(question: Callable[[Sequence[Any]], Question]) -> Callable[[Sequence[Any]], Question]:
        def questions(path: Path) -> tuple[Question, ...]:
            rows = [(where, one) for where, one in json_lines(path, row, name) if kept(one)]
            groups = groupby(rows, key=lambda pair: getattr(pair[1], together) if together else pair[0])
            found = [_asked(question, list(group)) for _, group in groups]
            return tuple(sorted(found, key=_mixing) if mixed else found)

        def read(path: Path) -> dict[str, Part]:
            shown = path.with_name(examples) if examples else path
            return {"": Part(questions(path), questions(shown) if shown != path and shown.is_file() else ())}

        TASKS[name] = Task(name, files or (f"{name}.jsonl",), read, space)
        return question

    return register


def _mixing(question: Question) -> str:
    return hashlib.sha256("\n".join(question.contexts).encode()).hexdigest()


def _exam(
    name: str,
    split: str,
    *,
    heading: Callable[[str], str],
    fields: Sequence[str] | None,
    row: type[Row],
    space: str = " ",
) -> Callable[[Callable[[Any], Question]], Callable[[Any], Question]]:
    """Register a task of one CSV a subject, in a folder or a zip; examples are those of the split `dev`."""

    def register(question: Callable[[Any], Question]) -> Callable[[Any], Question]:
        def read(path: Path) -> dict[str, Part]:
            asked, shown = (csv_rows(path, one, row, name, fields) for one in (split, "dev"))
            if not asked:
                raise EvaluationError(f"{path} holds no file SUBJECT_{split}.csv, which {name} is read from.")
            return {
                subject: Part(
                    tuple(_asked(lambda rows: question(rows[0]), [one]) for one in rows),
                    tuple(_asked(lambda rows: question(rows[0]), [one]) for one in shown.get(subject, ())),
                    heading(subject.replace("_", " ")),
                )
                for subject, rows in asked.items()
            }

        TASKS[name] = Task(name, (name, f"{name}.zip"), read, space)
        return question

    return register


def _asked(question: Callable[[Sequence[Any]], Question], rows: Rows) -> Question:
    try:
        return question([row for _, row in rows])
    except EvaluationError as error:
        raise EvaluationError(f"{rows[-1][0]}: {error}") from None


# ---- rows


class _Asked(Row):
    query: str
    choices: list[str]
    gold: int


class _Fact(_Asked):
    fact1: str


class _Filled(Row):
    context_options: list[str]
    continuation: str
    gold: int


class _Premise(Row):
    premise: str
    hypothesis: str
    label: Literal["entailment", "not_entailment"]


class _Pair(Row):
    sentence1: str
    sentence2: str
    label: Literal["entailment", "not_entailment"]


class _Inference(Row):
    sentence1: str
    sentence2: str
    label: Literal["entailment", "neutral", "contradiction", "-"]


class _Read(Row):
    example_id: str
    article: str
    question: str
    options: list[str] = Field(min_length=4, max_length=4)
    answer: Literal["A", "B", "C", "D"]

    @property
    def gold(self) -> int:
        """Which option is right."""
        return "ABCD".index(self.answer)

    @property
    def answered(self) -> str:
        """The question as it stands before a later one about the same article."""
        right = self.options[self.gold]
        if self.question.endswith("  _  ."):
            return self.question.removesuffix(" _  .") + right + "\n"
        return f"Question: {self.question}\nAnswer: {right}\n"


class _News(Row):
    sentence: str
    label_desc: str


class _Paper(Row):
    abst: str
    keyword: list[str]
    label: Literal["0", "1"]


class _Exam(Row):
    question: str
    A: str
    B: str
    C: str
    D: str
    answer: Literal["A", "B", "C", "D"]

    @property
    def gold(self) -> int:
        """Which option is right."""
        return "ABCD".index(self.answer)

    @property
    def listed(self) -> str:
        """The question, and its options below."""
        return f"{self.question.strip()}\nA. {self.A}\nB. {self.B}\nC. {self.C}\nD. {self.D}\n"


# ---- English


@_lines("piqa", row=_Asked)
def _piqa(rows: Sequence[_Asked]) -> Question:
    goal = rows[0].query.removeprefix("Question: ").removesuffix("\n")
    return Question((f"Question: {goal}\nAnswer:",), tuple(rows[0].choices), rows[0].gold)


@_lines("openbook_qa", row=_Asked)
def _openbook_qa(rows: Sequence[_Asked]) -> Question:
    return Question((rows[0].query,), tuple(rows[0].choices), rows[0].gold)


@_lines("openbook_qa_fact", row=_Fact)
def _openbook_qa_fact(rows: Sequence[_Fact]) -> Question:
    return Question((f"{rows[0].fact1}\n{rows[0].query}",), tuple(rows[0].choices), rows[0].gold)


@_lines("boolq", row=_Asked)
def _boolq(rows: Sequence[_Asked]) -> Question:
    return Question((rows[0].query.removeprefix("Passage: ") + "\nAnswer:",), tuple(rows[0].choices), rows[0].gold)


@_lines("winogrande", row=_Filled)
def _winogrande(rows: Sequence[_Filled]) -> Question:
    return Question(tuple(rows[0].context_options), (rows[0].continuation,), rows[0].gold)


# RACE asks the last question of each article, below the earlier ones with their answers, as the harness does.
@_lines("race_middle", "race_middle.jsonl", "race_sample.jsonl", row=_Read, together="example_id",
        kept=lambda row: "high" not in row.example_id)  # fmt: skip
@_lines("race_high", "race_high.jsonl", "race_sample.jsonl", row=_Read, together="example_id",
        kept=lambda row: "middle" not in row.example_id)  # fmt: skip
def _race(rows: Sequence[_Read]) -> Question:
    *before, last = rows
    context = f"Article: {last.article}\n\n" + "".join(row.answered for row in before) + last.question
    return Question((context,), tuple(last.options), last.gold)


def _entails(premise: str, hypothesis: str, label: str) -> Question:
    context = f"{premise}\nQuestion: {hypothesis} True or False?\nAnswer:"
    return Question((context,), ("True", "False"), int(label != "entailment"))


@_lines("rte", row=_Premise)
@_lines("ax_g", row=_Premise)
def _rte(rows: Sequence[_Premise]) -> Question:
    return _entails(rows[0].premise, rows[0].hypothesis, rows[0].label)


@_lines("ax_b", row=_Pair)
def _ax_b(rows: Sequence[_Pair]) -> Question:
    return _entails(rows[0].sentence1, rows[0].sentence2, rows[0].label)


@_exam("mmlu", "test", row=_Exam, fields=("question", "A", "B", "C", "D", "answer"),
       heading="The following are multiple choice questions (with answers) about {}.\n\n".format)  # fmt: skip
def _mmlu(row: _Exam) -> Question:
    return Question((row.listed + "Answer:",), tuple("ABCD"), row.gold)


# ---- Chinese


@_exam(
    "ceval",
    "val",
    row=_Exam,
    fields=None,
    heading=lambda _: "以下是中国考试中的单项选择题，请选出其中的正确答案。\n\n",
    space="",
)
def _ceval(row: _Exam) -> Question:
    return Question((row.listed + "答案：",), tuple("ABCD"), row.gold)


# Rows whose annotators did not agree are labelled "-", and left out.
@_lines("cmnli", row=_Inference, kept=lambda row: row.label != "-", space="")
@_lines("ocnli", row=_Inference, kept=lambda row: row.label != "-", space="")
def _cmnli(rows: Sequence[_Inference]) -> Question:
    labels = ("entailment", "contradiction", "neutral")
    context = f"语句一：“{rows[0].sentence1}”\n语句二：“{rows[0].sentence2}”\n请问这两句话是什么关系？\n"
    return Question((context,), ("蕴含", "矛盾", "无关"), labels.index(rows[0].label))


NEWS = {
    "news_story": "故事", "news_culture": "文化", "news_entertainment": "娱乐", "news_sports": "体育",
    "news_finance": "财经", "news_house": "房产", "news_car": "汽车", "news_edu": "教育", "news_tech": "科技",
    "news_military": "军事", "news_travel": "旅游", "news_world": "国际", "news_stock": "股票",
    "news_agriculture": "农业", "news_game": "游戏",
}  # fmt: skip


@_lines("tnews", row=_News, examples="tnews_dev.jsonl", space="", mixed=True)
def _tnews(rows: Sequence[_News]) -> Question:
    if rows[0].label_desc not in NEWS:
        raise EvaluationError(f"there is no class {rows[0].label_desc!r:.60}; there are {', '.join(NEWS)}.")
    return Question(
        (f"{rows[0].sentence}\n这篇新闻属于：",), tuple(NEWS.values()), list(NEWS).index(rows[0].label_desc)
    )


@_lines("csl", row=_Paper, examples="csl_dev.jsonl", space="")
def _csl(rows: Sequence[_Paper]) -> Question:
    context = f"摘要：{rows[0].abst}\n关键词：{'，'.join(rows[0].keyword)}\n这些关键词是否都出自这篇论文？\n答："
    return Question((context,), ("否", "是"), int(rows[0].label))
