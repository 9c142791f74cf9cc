"""Accuracy by choice: prompts letter by letter, likelihoods beside a token-by-token loop, and malformed files."""

import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import headshare as hs
import tiny
from headshare.choices import (
    TASKS,
    Accuracy,
    Option,
    Question,
    accuracy_of,
    log_likelihoods,
    measure_accuracy,
    read_questions,
)
from headshare.errors import EvaluationError

SENTENCES = [
    "the guinea pig went to the house because the cat was there",
    "Question: does the river freeze in winter?\nAnswer: yes",
    "Article: a kite flies when the wind is strong, and falls when it is not.",
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {"query": "Question: warm the house \n", "choices": ["light a fire", "open all of the windows"], "gold": 0},
        {"query": "Question: the Question: again\n", "choices": ["it\u2019s so", "it was never so"], "gold": 1},
    ],
    "openbook_qa": [
        {"query": "A cat eats", "choices": ["fish", "winter", "the wind", "a house"], "gold": 0},
        {"query": "When it is cold the river", "choices": ["flies", "freezes", "sings", "falls"], "gold": 1},
    ],
    "winogrande": [
        {
            "context_options": ["The cat saw the pig and the cat", "The cat saw the pig and the pig"],
            "continuation": "went away.",
            "gold": 1,
        },
    ],
    "boolq": [
        {
            "query": "Passage: Pigs fly.\nQuestion: or do they\nQuestion: do pigs fly?",
            "choices": ["no", "yes"],
            "gold": 1,
        },
        {"query": "Passage: Cats sing.\nQuestion: do cats sing?", "choices": ["no", "yes"], "gold": 0},
    ],
    "race_middle": [
        {
            "example_id": "a",
            "article": "Kites fly.",
            "question": question,
            "options": ["wind.", "rain.", "snow.", "ice."],
            "answer": answer,
        }
        for question, answer in (("What do kites need?", "A"), ("Kites need  _  .", "B"), ("And we need  _", "C"))
    ]
    + [
        {
            "example_id": "b",
            "article": "Pigs fly.",
            "question": "Do pigs?",
            "options": ["Yes.", "No.", "So.", "Not."],
            "answer": "D",
        }
    ],
}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def byte_tokenizer(*, bos: bool = False, by_words: bool = True) -> Any:
    """A byte-level tokenizer with some merges, as GPT-2's: where a word's space stands decides its tokens.

    Not `by_words`, tokens reach across spaces, and so from a context into its continuation.
    """
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["</s>", "<s>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    inner.train_from_iterator(SENTENCES, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>")


def a_model(folder: Path, **changes: Any) -> Any:
    """A tiny Llama whose logits are far from uniform."""
    settings = {"vocab_size": 340, "max_position_embeddings": 256, "initializer_range": 0.3, **changes}
    return hs.load(tiny.make_llama(folder, **settings))


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return a_model(tmp_path / "model")


@torch.inference_mode()
def token_by_token(model: Any, tokenizer: Any, option: Option, longest: int = 256) -> float:
    """The log-likelihood by its definition: one call of the model for each token, in float64."""
    context, continuation = option.context, " " + option.continuation
    while context[-1].isspace():
        context, continuation = context[:-1], context[-1] + continuation
    before = tokenizer.encode(context)
    tokens = before + tokenizer.encode(context + continuation)[len(before) :]
    start = max(0, len(tokens) - 1 - longest)
    total = 0.0
    for at in range(len(before), len(tokens)):
        logits = model(input_ids=torch.tensor([tokens[start:at]])).logits[0, -1].double()
        total += (logits[tokens[at]] - logits.logsumexp(0)).item()
    return total


def flat(likelihoods: list[list[float]]) -> list[float]:
    return [value for one in likelihoods for value in one]


def some_questions(count: int = 12, options: int = 3, words: int = 40) -> list[Question]:
    """Questions of many lengths."""
    chance = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(f"w{chance.randrange(4, tiny.VOCABULARY)}" for _ in range(chance.randint(least, most)))

    return [Question(tuple(Option(text(1, words), text(1, 9)) for _ in range(options)), 0) for _ in range(count)]


# ---- prompts


def test_every_task_writes_what_the_harness_writes(tmp_path: Path) -> None:
    found = {
        name: [
            (list(dict.fromkeys(option.context for option in one.options)), one.options[1].continuation, one.answer)
            for one in read_questions(written(tmp_path / name, rows), TASKS[name])
        ]
        for name, rows in ROWS.items()
    }
    assert found == {
        "piqa": [
            (["Question: warm the house \nAnswer:"], "open all of the windows", 0),
            (["Question: the Question: again\nAnswer:"], "it was never so", 1),
        ],
        "openbook_qa": [(["A cat eats"], "winter", 0), (["When it is cold the river"], "freezes", 1)],
        "winogrande": [(["The cat saw the pig and the cat", "The cat saw the pig and the pig"], "went away.", 1)],
        "boolq": [
            (["Pigs fly.\nQuestion: or do they\nQuestion: do pigs fly?\nAnswer:"], "yes", 1),
            (["Cats sing.\nQuestion: do cats sing?\nAnswer:"], "yes", 0),
        ],
        "race_middle": [
            (
                [
                    "Article: Kites fly.\n\nQuestion: What do kites need?\nAnswer: wind.\n"
                    "Kites need rain.\nAnd we need  _"
                ],
                "rain.",
                2,
            ),
            (["Article: Pigs fly.\n\nDo pigs?"], "No.", 3),
        ],
    }


def test_chance_is_one_of_the_options(tmp_path: Path) -> None:
    for name, task in TASKS.items():
        for question in read_questions(written(tmp_path / name, ROWS[name]), task):
            assert task.chance == 1 / len(question.options)


# ---- likelihoods


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_likelihoods_are_those_of_a_token_by_token_loop(name: str, bos: bool, model: Any, tmp_path: Path) -> None:
    questions = read_questions(written(tmp_path / "rows", ROWS[name]), TASKS[name])
    tokenizer = byte_tokenizer(bos=bos)
    expected = [token_by_token(model, tokenizer, option) for one in questions for option in one.options]
    assert flat(log_likelihoods(model, tokenizer, questions)) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 1


def test_a_token_that_reaches_across_the_border_counts_as_the_harness_counts_it(model: Any) -> None:
    tokenizer = byte_tokenizer(by_words=False)
    question = Question((Option("because the", "cat was there"), Option("the guinea", "pig went to the house")), 0)
    for context, continuation in question.options:
        whole, before = tokenizer.encode(f"{context} {continuation}"), tokenizer.encode(context)
        assert whole[: len(before)] != before
        assert whole[len(before) :] != tokenizer.encode(f" {continuation}")
    expected = [token_by_token(model, tokenizer, option) for option in question.options]
    assert flat(log_likelihoods(model, tokenizer, [question])) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("space", [" ", "  ", "\n", " \n\t"])
def test_space_at_the_end_of_a_context_is_scored_with_the_continuation(space: str, model: Any) -> None:
    tokenizer = byte_tokenizer()
    question = Question((Option("the cat" + space, "went"), Option("the pig" + space, "was there")), 0)
    expected = [token_by_token(model, tokenizer, option) for option in question.options]
    assert flat(log_likelihoods(model, tokenizer, [question])) == pytest.approx(expected, abs=1e-4)
    without = [token_by_token(model, tokenizer, Option(one.context.rstrip(), one[1])) for one in question.options]
    assert all(abs(a - b) > 0.1 for a, b in zip(expected, without, strict=True))


def test_what_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    model, tokenizer = a_model(tmp_path / "short", max_position_embeddings=20), byte_tokenizer(bos=True)
    last = ("because the cat was there", "because the pig was not there")
    question = Question(tuple(Option("the river freezes in winter " * 3, text) for text in last), 0)
    expected = [token_by_token(model, tokenizer, option, longest=20) for option in question.options]
    whole = [token_by_token(model, tokenizer, option) for option in question.options]
    assert flat(log_likelihoods(model, tokenizer, [question])) == pytest.approx(expected, abs=1e-4)
    assert all(abs(a - b) > 0.1 for a, b in zip(expected, whole, strict=True))


def test_a_continuation_as_long_as_the_model_is_scored_and_a_longer_one_refused(
    tmp_path: Path, words: Callable[[Path], Any]
) -> None:
    folder = tiny.make_llama(tmp_path / "short", max_position_embeddings=8, initializer_range=0.3)
    model, tokenizer = hs.load(folder), words(folder)
    options = tuple(Option("w4 w5", " ".join(f"w{n}" for n in range(6, 6 + length))) for length in (7, 8))
    expected = [token_by_token(model, tokenizer, option, longest=8) for option in options]
    assert flat(log_likelihoods(model, tokenizer, [Question(options, 0)])) == pytest.approx(expected, abs=1e-4)
    longer = Question((options[0], Option("w4", "w5 " * 9)), 0)
    with pytest.raises(EvaluationError, match="an option has 9 tokens, more than the model's 8"):
        log_likelihoods(model, tokenizer, [longer])


@pytest.fixture
def words() -> Callable[[Path], Any]:
    """A tokenizer of the words w4, w5 and so on."""
    from test_cli import add_tokenizer

    return lambda folder: transformers.PreTrainedTokenizerFast.from_pretrained(add_tokenizer(folder))


CAUSAL = [name for name, (kind, *_) in tiny.FAMILIES.items() if kind.__name__.endswith(("ForCausalLM", "LMHeadModel"))]


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_and_company_change_no_likelihood(name: str, tmp_path: Path, words: Callable[[Path], Any]) -> None:
    folder = tiny.make(name, tmp_path / name)
    model, tokenizer, questions = hs.load(folder), words(folder), some_questions()
    alone = flat(log_likelihoods(model, tokenizer, questions, batch_tokens=1))
    together = flat(log_likelihoods(model, tokenizer, questions, batch_tokens=10_000))
    by_few = flat(log_likelihoods(model, tokenizer, questions, batch_tokens=100))
    assert together == pytest.approx(alone, abs=1e-4)
    assert by_few == pytest.approx(alone, abs=1e-4)


def test_a_model_that_gives_all_logits_is_scored_the_same(model: Any) -> None:
    tokenizer, question = byte_tokenizer(), Question((Option("the cat", "went"), Option("a", "pig was there too")), 0)
    expected = log_likelihoods(model, tokenizer, [question])
    forward = model.forward
    model.forward = lambda **given: forward(**{**given, "logits_to_keep": 0})
    assert flat(log_likelihoods(model, tokenizer, [question])) == pytest.approx(flat(expected), abs=1e-5)


def batches_of(model: Any, tokenizer: Any, questions: list[Question], batch_tokens: int) -> list[tuple[int, int]]:
    """Shapes of what the model was given."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    log_likelihoods(model, tokenizer, questions, batch_tokens=batch_tokens)
    hook.remove()
    return shapes


def test_a_batch_holds_no_more_tokens_than_asked_or_one_option(llama: Path, words: Callable[[Path], Any]) -> None:
    shapes = batches_of(hs.load(llama), words(llama), some_questions(), 60)
    assert all(rows * tokens <= 60 or rows == 1 for rows, tokens in shapes)
    assert any(rows > 1 for rows, _ in shapes)
    assert sum(rows for rows, _ in shapes) == 36


def test_options_of_one_token_are_read_once(llama: Path, words: Callable[[Path], Any]) -> None:
    question = Question(tuple(Option("w5 w6 w7", f"w{n}") for n in (8, 9, 10)), 0)
    tokenizer, model = words(llama), hs.load(llama)
    assert batches_of(model, tokenizer, [question], 60) == [(1, 3)]
    expected = [token_by_token(model, tokenizer, option) for option in question.options]
    assert flat(log_likelihoods(model, tokenizer, [question])) == pytest.approx(expected, abs=1e-4)


def test_a_shared_model_is_measured_as_its_expanded_twin(llama: Path, tmp_path: Path, words: Callable) -> None:
    dense = hs.open_checkpoint(llama)
    plan = hs.make_plan(hs.score_units(dense), 0.5)
    shared = hs.share(dense, plan).save(tmp_path / "shared")
    twin = hs.expand(hs.open_checkpoint(shared), tmp_path / "twin")
    questions, tokenizer = some_questions(), words(llama)
    one, other = (flat(log_likelihoods(hs.load(folder), tokenizer, questions)) for folder in (shared, twin))
    assert one == pytest.approx(other, abs=1e-4)
    assert one != pytest.approx(flat(log_likelihoods(hs.load(llama), tokenizer, questions)), abs=1e-4)


# ---- accuracy


def asked(*answers: int, texts: tuple[str, ...] = ("a", "b")) -> list[Question]:
    return [Question(tuple(Option("so", text) for text in texts), answer) for answer in answers]


def test_accuracy_is_the_mean_of_right_answers_and_its_error_the_standard_one() -> None:
    likelihoods = [[-1.0, -2.0], [-1.0, -2.0], [-2.0, -1.0], [-3.0, -4.0], [-9.0, -8.0]]
    right = [1, 0, 1, 1, 1]
    found = accuracy_of(likelihoods, asked(0, 1, 1, 0, 1), TASKS["piqa"])
    error = pytest.approx(statistics.stdev(right) / math.sqrt(5))
    assert found == Accuracy("piqa", 0.8, found.standard_error, 0.8, found.standard_error, 0.5, 5)
    assert found.standard_error == error


def test_the_normalised_choice_is_by_likelihood_per_character() -> None:
    texts = ("ab", "\u00e9" * 5)  # the second has five characters, and ten bytes of UTF-8
    found = accuracy_of([[-4.0, -9.0], [-4.0, -11.0]], asked(1, 0, texts=texts), TASKS["piqa"])
    assert (found.accuracy, found.normalised_accuracy) == (0.5, 1)


def test_the_first_of_equally_likely_options_is_chosen() -> None:
    found = accuracy_of([[-1.0, -1.0], [-1.0, -1.0]], asked(0, 0), TASKS["piqa"])
    assert (found.accuracy, found.normalised_accuracy) == (1, 1)


def test_a_single_question_has_no_standard_error_and_json_says_so() -> None:
    found = accuracy_of([[-1.0, -2.0]], asked(0), TASKS["piqa"])
    assert math.isnan(found.standard_error)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["standard_error"] is None


def test_measured_accuracy_is_that_of_the_loop(model: Any, tmp_path: Path) -> None:
    task, tokenizer = TASKS["openbook_qa"], byte_tokenizer()
    chance = random.Random(0)
    texts = " ".join(SENTENCES).split()
    rows = [
        {
            "query": " ".join(chance.choices(texts, k=5)),
            "choices": [" ".join(chance.choices(texts, k=2)) for _ in "abcd"],
            "gold": chance.randrange(4),
        }
        for _ in range(12)
    ]
    questions = read_questions(written(tmp_path / "rows", rows), task)
    loop = [[token_by_token(model, tokenizer, option) for option in one.options] for one in questions]
    right = sum(one.index(max(one)) == row["gold"] for one, row in zip(loop, rows, strict=True))
    found = measure_accuracy(model, tokenizer, questions, task=task, batch_tokens=64)
    assert found.accuracy == pytest.approx(right / 12)
    assert (found.task, found.chance, found.questions) == ("openbook_qa", 0.25, 12)


# ---- files


def test_a_limit_takes_the_first_questions(tmp_path: Path) -> None:
    for name, rows in ROWS.items():
        path = written(tmp_path / name, rows)
        assert read_questions(path, TASKS[name], limit=1) == read_questions(path, TASKS[name])[:1]
        assert read_questions(path, TASKS[name], limit=99) == read_questions(path, TASKS[name])
    with pytest.raises(EvaluationError, match="limit of 0"):
        read_questions(path, TASKS["race_middle"], limit=0)


def test_blank_lines_and_unusual_line_separators_part_no_rows(tmp_path: Path) -> None:
    row = {**ROWS["piqa"][0], "choices": ["a\u2028b", "c\x85d"]}
    path = tmp_path / "rows"
    path.write_text(f"\n{json.dumps(row, ensure_ascii=False)}\r\n\n", encoding="utf-8", newline="")
    assert [option.continuation for option in read_questions(path, TASKS["piqa"])[0].options] == row["choices"]


ASKED, READ, FILLED = ROWS["piqa"][0], ROWS["race_middle"][0], ROWS["winogrande"][0]
WRONG = [
    ("piqa", "{", "line 2 is no row of piqa.*At the row: Invalid JSON: .*found '{'"),
    ("piqa", "[" * 100_000, "line 2.*Invalid JSON: recursion"),
    ("piqa", "[1]", r"line 2 is no row of piqa, which has query, choices, gold.*found \[1\]"),
    ("piqa", {"query": "a", "gold": 0}, r"At choices: Field required; found \['gold', 'query'\]"),
    ("piqa", {**ASKED, "gold": "0"}, "At gold: .*valid integer; found '0'"),
    ("piqa", {**ASKED, "gold": True}, "At gold: .*valid integer; found True"),
    ("piqa", {**ASKED, "choices": ["a", 1]}, r"At choices\.1: .*valid string; found 1"),
    ("piqa", {**ASKED, "query": "\ud800"}, "Invalid JSON: .*hex escape at column 18;"),
    ("piqa", {**ASKED, "gold": 2}, "line 2: the answer is option 2; options are 0 to 1"),
    ("piqa", {**ASKED, "gold": -1}, "line 2: the answer is option -1"),
    ("piqa", {**ASKED, "choices": ["a"]}, "line 2: a question needs two options or more, found 1"),
    ("piqa", {**ASKED, "choices": ["a", " "]}, "line 2: option 1 or what it follows is blank"),
    ("openbook_qa", {**ASKED, "query": "\n"}, "line 2: option 0 or what it follows is blank"),
    ("winogrande", {**FILLED, "context_options": ["a", ""]}, "line 2: option 1 or what it follows is blank"),
    ("winogrande", ASKED, "line 2 is no row of winogrande.*At context_options: Field required"),
    ("race_middle", {**READ, "answer": "E"}, "line 2.*At answer: .*found 'E'"),
    ("race_middle", {**READ, "options": ["a", "b", "c"]}, "line 2.*At options: .*at least 4"),
]


@pytest.mark.parametrize(("name", "row", "message"), WRONG)
def test_a_row_that_is_not_right_is_named_by_its_line(name: str, row: Any, message: str, tmp_path: Path) -> None:
    second = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "rows").write_text(f"{json.dumps(ROWS[name][0])}\n{second}\n")
    with pytest.raises(EvaluationError, match=message) as caught:
        read_questions(tmp_path / "rows", TASKS[name])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 400


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"\n \n", "is empty"), (b"\xff", "UTF-8")])
def test_a_file_with_nothing_to_read_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        read_questions(tmp_path / "rows", TASKS["piqa"])
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_questions(tmp_path / "nowhere", TASKS["piqa"])


# ---- models that cannot be measured


def test_models_that_cannot_choose_say_why(tmp_path: Path, words: Callable[[Path], Any]) -> None:
    folder = tiny.make_llama(tmp_path / "llama")
    model, tokenizer, questions = hs.load(folder), words(folder), some_questions(2)
    with pytest.raises(EvaluationError, match="no questions"):
        log_likelihoods(model, tokenizer, [])
    with pytest.raises(EvaluationError, match="BertForMaskedLM does not predict"):
        log_likelihoods(hs.load(tiny.make("bert", tmp_path / "bert")), tokenizer, questions)
    with pytest.raises(EvaluationError, match="tokenizer belongs to another model"):
        log_likelihoods(hs.load(tiny.make_llama(tmp_path / "small", vocab_size=50)), tokenizer, questions)
    model.lm_head.weight.data[7] = math.nan
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        log_likelihoods(model, tokenizer, questions)


def test_a_tokenizer_that_leaves_nothing_to_score_is_refused(model: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("went", "")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(EvaluationError, match="gives no token of its own to ' went'"):
        log_likelihoods(model, tokenizer, [Question((Option("the cat", "went"), Option("the cat", "is")), 0)])
