"""Tasks that run from local files: the file that each is read from, and the questions that its rows become.

Prompts of English tasks are those of lm-evaluation-harness where it has the task. Prompts of CMNLI and OCNLI are those
of OpenCompass. TNEWS and CSL have options of our own: OpenCompass has options of different lengths for the first and
whole texts for the second, and compares likelihoods per token. The harness adds up the likelihoods of tokens, which is
fair between options of one length, as ours are.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from headshare.errors import EvaluationError
from headshare.evaluation.questions import Question, QuestionRow
from headshare.evaluation.task_files import exam, read_rows

# ---- rows


class _Asked(QuestionRow):
    query: str
    choices: list[str]
    gold: int


class _Fact(_Asked):
    fact1: str


class _Filled(QuestionRow):
    context_options: list[str]
    continuation: str
    gold: int


class _Premise(QuestionRow):
    premise: str
    hypothesis: str
    label: Literal["entailment", "not_entailment"]


class _Pair(QuestionRow):
    sentence1: str
    sentence2: str
    label: Literal["entailment", "not_entailment"]


class _Inference(QuestionRow):
    sentence1: str
    sentence2: str
    label: Literal["entailment", "neutral", "contradiction", "-"]


class _Read(QuestionRow):
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
        """The question with its answer, as it stands before a later question about the same article."""
        right = self.options[self.gold]
        if self.question.endswith("  _  ."):
            return self.question.removesuffix(" _  .") + right + "\n"
        return f"Question: {self.question}\nAnswer: {right}\n"


class _News(QuestionRow):
    sentence: str
    label_desc: str


class _Paper(QuestionRow):
    abst: str
    keyword: list[str]
    label: Literal["0", "1"]


class _Exam(QuestionRow):
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
        """The question, with its options below."""
        return f"{self.question.strip()}\nA. {self.A}\nB. {self.B}\nC. {self.C}\nD. {self.D}\n"


# ---- English


@read_rows("piqa", row=_Asked)
def _piqa(rows: Sequence[_Asked]) -> Question:
    goal = rows[0].query.removeprefix("Question: ").removesuffix("\n")
    return Question((f"Question: {goal}\nAnswer:",), tuple(rows[0].choices), rows[0].gold)


@read_rows("openbook_qa", row=_Asked)
def _openbook_qa(rows: Sequence[_Asked]) -> Question:
    return Question((rows[0].query,), tuple(rows[0].choices), rows[0].gold)


@read_rows("openbook_qa_fact", row=_Fact)
def _openbook_qa_fact(rows: Sequence[_Fact]) -> Question:
    return Question((f"{rows[0].fact1}\n{rows[0].query}",), tuple(rows[0].choices), rows[0].gold)


@read_rows("boolq", row=_Asked)
def _boolq(rows: Sequence[_Asked]) -> Question:
    return Question((rows[0].query.removeprefix("Passage: ") + "\nAnswer:",), tuple(rows[0].choices), rows[0].gold)


@read_rows("winogrande", row=_Filled)
def _winogrande(rows: Sequence[_Filled]) -> Question:
    return Question(tuple(rows[0].context_options), (rows[0].continuation,), rows[0].gold)


# RACE asks the last question of each article, below the earlier ones with their answers, as the harness does.
@read_rows("race_middle", "race_middle.jsonl", "race_sample.jsonl", row=_Read, together="example_id",
        kept=lambda row: "high" not in row.example_id)  # fmt: skip
@read_rows("race_high", "race_high.jsonl", "race_sample.jsonl", row=_Read, together="example_id",
        kept=lambda row: "middle" not in row.example_id)  # fmt: skip
def _race(rows: Sequence[_Read]) -> Question:
    *before, last = rows
    context = f"Article: {last.article}\n\n" + "".join(row.answered for row in before) + last.question
    return Question((context,), tuple(last.options), last.gold)


def _entails(premise: str, hypothesis: str, label: str) -> Question:
    context = f"{premise}\nQuestion: {hypothesis} True or False?\nAnswer:"
    return Question((context,), ("True", "False"), int(label != "entailment"))


@read_rows("rte", row=_Premise)
@read_rows("ax_g", row=_Premise)
def _rte(rows: Sequence[_Premise]) -> Question:
    return _entails(rows[0].premise, rows[0].hypothesis, rows[0].label)


@read_rows("ax_b", row=_Pair)
def _ax_b(rows: Sequence[_Pair]) -> Question:
    return _entails(rows[0].sentence1, rows[0].sentence2, rows[0].label)


@exam("mmlu", "test", row=_Exam, fields=("question", "A", "B", "C", "D", "answer"),
       heading="The following are multiple choice questions (with answers) about {}.\n\n".format)  # fmt: skip
def _mmlu(row: _Exam) -> Question:
    return Question((row.listed + "Answer:",), tuple("ABCD"), row.gold)


# ---- Chinese


@exam(
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
@read_rows("cmnli", row=_Inference, kept=lambda row: row.label != "-", space="")
@read_rows("ocnli", row=_Inference, kept=lambda row: row.label != "-", space="")
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


@read_rows("tnews", row=_News, examples="tnews_dev.jsonl", space="", mixed=True)
def _tnews(rows: Sequence[_News]) -> Question:
    if rows[0].label_desc not in NEWS:
        raise EvaluationError(f"there is no class {rows[0].label_desc!r:.60}; there are {', '.join(NEWS)}.")
    return Question(
        (f"{rows[0].sentence}\n这篇新闻属于：",), tuple(NEWS.values()), list(NEWS).index(rows[0].label_desc)
    )


@read_rows("csl", row=_Paper, examples="csl_dev.jsonl", space="")
def _csl(rows: Sequence[_Paper]) -> Question:
    context = f"摘要：{rows[0].abst}\n关键词：{'，'.join(rows[0].keyword)}\n这些关键词是否都出自这篇论文？\n答："
    return Question((context,), ("否", "是"), int(rows[0].label))
