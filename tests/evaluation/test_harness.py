"""Tasks of the harness's own go by their names, and report its own metrics."""

import json
import math
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager

from headshare.errors import EvaluationError, OutputError
from headshare.evaluation import harness
from headshare.evaluation.harness import Runner, chosen_tasks
from headshare.evaluation.harness_tasks import as_task, write_tasks
from headshare.evaluation.likelihoods import ContextsOnce
from headshare.evaluation.measuring import EvalText, measure
from headshare.evaluation.results import table_of
from headshare.progress import shown
from support.byte_level import SENTENCES
from support.questions import all_tasks, measured


def test_the_harnesss_own_tasks_go_by_their_names(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "tasks_of_harness", all_tasks)
    own, theirs = chosen_tasks(["boolq", "hellaswag"], data)
    assert own.parts is not None
    assert theirs.parts is None
    assert chosen_tasks(["boolq"], None)[0].parts is None
    with pytest.raises(EvaluationError, match="no task 'no_task'"):
        chosen_tasks(["no_task"], data)


def only_tasks(monkeypatch: pytest.MonkeyPatch, folder: Path, *tasks: str) -> None:
    """Let the harness have these tasks alone, each of the sentences in one file."""
    (folder / "rows.json").write_text(json.dumps([{"text": one} for one in SENTENCES]))
    for number, task in enumerate(tasks):
        (folder / f"{number}.yaml").write_text(
            f"{task}dataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.json'}}}, cache_dir: {folder / 'cache'}}}\n"
        )
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    monkeypatch.setattr(harness, "tasks_of_harness", lambda **_: manager)


def test_a_task_of_the_harness_that_does_not_choose_reports_its_own_metrics(
    runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = "task: bits\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    tasks += "metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]\n"
    only_tasks(monkeypatch, tmp_path, tasks)
    (one,) = measured(runner, data, "bits")
    nats = 0.0
    for text in SENTENCES:
        tokens = [runner.tokenizer.eos_token_id, *runner.tokenizer.encode(text)]
        logits = runner.model(input_ids=torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
        nats -= sum(row[token].item() for row, token in zip(logits, tokens[1:], strict=True))
    size = sum(len(text.encode()) for text in SENTENCES)
    assert one.metrics["bits_per_byte"].value == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert (one.questions, one.chance) == (3, None)
    assert "bits_per_byte" in table_of([one]) or "word_perplexity" in table_of([one])


@pytest.mark.parametrize(
    ("tasks", "shots"), [(["piqa", "winogrande", "race_middle", "tnews", "mmlu"], 0), (["tnews"], 1)]
)
def test_tasks_written_for_the_harness_ask_the_same_there(
    tasks: list[str], shots: int, runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own reader of files gives the model the same texts in the same order, and finds the same answers right."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (data / "tnews_dev.jsonl").write_text(json.dumps({"sentence": "\u98ce", "label_desc": "news_car"}))
    names = write_tasks(tasks, data, tmp_path / "files")
    assert names == [f"headshare_{name}" for name in tasks]
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path / "files"))
    ours = [as_task(task.task, *part) for task in chosen_tasks(tasks, data) for part in (task.parts or {}).items()]
    asked = []
    for given, more in ((names, manager), (ours, TaskManager(include_defaults=False))):
        options = {"num_fewshot": shots, "bootstrap_iters": 0, "log_samples": True, "limit": 2}
        with harness._hushed(), harness._only_results():
            out = lm_eval.simple_evaluate(model=runner._for_harness, tasks=given, task_manager=more, **options)
        asked.append(
            {
                name.removeprefix("headshare_"): [(one["arguments"], one["target"], one["acc"]) for one in samples]
                for name, samples in out["samples"].items()
            }
        )
    assert asked[0] == asked[1]
    assert sum(map(len, asked[0].values())) >= len(tasks)


def test_tasks_are_written_whole_or_not_at_all(data: Path, tmp_path: Path) -> None:
    for names, where, error, reason in (
        (["piqa", "nothing"], "files", EvaluationError, "'nothing' of ours"),
        (["piqa"], "data", OutputError, "exists"),
        (["piqa"], "gone/files", OutputError, "gone"),
    ):
        with pytest.raises(error, match=reason):
            write_tasks(names, data, tmp_path / where)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_answers_taken_from_the_text_in_several_ways_are_each_reported(
    runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gsm8k does: its questions count once."""
    only_tasks(
        monkeypatch,
        tmp_path,
        "task: twice\noutput_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: nothing\n"
        "generation_kwargs: {until: ['x'], do_sample: false, max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        "filter_list:\n"
        "- {name: always, filter: [{function: regex, regex_pattern: 'cannot be', fallback: nothing}, "
        "{function: take_first}]}\n"
        "- {name: never, filter: [{function: regex, regex_pattern: 'cannot be', fallback: other}, "
        "{function: take_first}]}\n",
    )
    (one,) = measured(runner, data, "twice")
    assert {name: metric.value for name, metric in one.metrics.items()} == {
        "exact_match,always": 1.0,
        "exact_match,never": 0.0,
    }
    assert one.questions == len(SENTENCES)


def test_a_tag_of_the_harness_is_told_its_tasks(
    runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    tasks += "metric_list: [{metric: word_perplexity}]\n"
    only_tasks(monkeypatch, tmp_path, *(f"tag: both\ntask: {name}\n{tasks}" for name in ("one", "two")))
    with pytest.raises(EvaluationError, match=r"both is several tasks.*one, two"):
        runner.run(harness.Chosen("both", "harness"), "key")


def test_without_the_harness_texts_are_measured_and_tasks_say_what_to_install(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (tmp_path / "text").write_text(" ".join(SENTENCES * 9))
    assert measure([model], text=EvalText(tmp_path / "text", 32))[0].metrics["perplexity"].value is not None
    for folder in (data, None):
        with pytest.raises(EvaluationError, match=r"not installed\. Run: pip install .*\[eval\]"):
            measure([model], tasks=["boolq"], data=folder)


def test_a_model_that_reads_contexts_again_is_named(
    runner: Runner, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ContextsOnce, "keeps_contexts", False)
    with shown():
        measured(runner, data, "piqa")
    assert "LlamaForCausalLM cannot go on from a context" in capsys.readouterr().err
