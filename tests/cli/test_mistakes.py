"""One line on standard error and status 1 for whatever goes wrong."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import headshare as hs
from support import tiny
from support.command_line import Run, assert_one_error_line
from support.folders import WEIGHTS, seen
from support.texts import a_text, add_tokenizer


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bit of everything: a model, shared, its scores and plan, and broken ones."""
    tmp_path = tmp_path_factory.mktemp("things")
    model = add_tokenizer(tiny.make_llama(tmp_path / "model"))
    opened = hs.open_checkpoint(model)
    hs.share(opened, hs.make_plan(hs.score_units(opened), 0.5)).save(tmp_path / "shared")
    with hs.open_checkpoint(tmp_path / "model") as dense:
        scores = hs.score_units(dense)
        scores.save(tmp_path / "scores")
        plan = hs.make_plan(scores, 0.25)
        plan.save(tmp_path / "plan.json")
    header, matrix = json.loads(scores._header()), scores.tables[0].scores
    for name, changed in {
        "nan-scores": (header, matrix.where(matrix == 0, float("nan"))),
        "small-scores": (header, matrix[:4, :4].contiguous()),
        "float-scores": (header, matrix.float()),
        "no-scores": ({}, matrix),
        "list-scores": ([], matrix),
        "deep-scores": ("[" * 100_000, matrix),
    }.items():
        text = changed[0] if isinstance(changed[0], str) else json.dumps(changed[0])
        save_file({"0": changed[1]}, tmp_path / name, metadata={"headshare": text})
    header["tables"][0]["layout"]["groups"] = 3
    save_file({"0": matrix}, tmp_path / "wide-scores", metadata={"headshare": json.dumps(header)})
    cycle = plan.model_dump(mode="json")
    cycle["selections"][0]["ties"] = [[1, 0, 2, 0], [2, 0, 1, 0]]
    (tmp_path / "cycle.json").write_text(json.dumps(cycle))
    foreign = plan.model_dump(mode="json")
    foreign["selections"][0]["layout"]["layers"] = 9
    (tmp_path / "foreign.json").write_text(json.dumps(foreign))
    (tmp_path / "broken.json").write_text("{")
    bare = tiny.make_llama(tmp_path / "bare")
    add_tokenizer(tiny.make_llama(tmp_path / "no-bos"), bos=False)
    add_tokenizer(tiny.make_llama(tmp_path / "more-words"), extra=50)
    add_tokenizer(tiny.make("roberta", tmp_path / "roberta"), bos=False)
    (add_tokenizer(tiny.make_llama(tmp_path / "odd-tokenizer")) / "tokenizer.json").write_text("{")
    config = json.loads((bare / "config.json").read_text())
    for name, changes in {
        "quantised": {"quantization_config": {"quant_method": "gptq"}},
        "odd": {"architectures": 5},
        "contradictory": {"num_attention_heads": 5},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS).symlink_to(bare / WEIGHTS)
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **changes}))
        add_tokenizer(tmp_path / name)
    (tmp_path / "empty").write_text(" \n ")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "short").write_text("w5 w6 w7")
    (tmp_path / "file").write_text("")
    a_text(tmp_path / "text")
    a_text(tmp_path / "long", 1100)
    (tmp_path / "alien").write_text(" ".join(["w110"] * 100))
    return tmp_path


# each line is a command that must end in one line and status 1, and what that line must say
MISTAKES = """
share model out --ratio -0.1                            | ratio of -0.1
share model out --ratio 0.99                            | from 0 to 0.7500
share model out --ratio nan                             | ratio
share model out --ratio inf                             | ratio
share model out --ratio abc                             | abc|number
share model out --parts xyz                             | 'xyz' does not name parts
share model out --parts ,                               | does not name parts
share model out --match xx                              | xx
share model out --mode xx                               | xx
share model out --dtype int8                            | int8
share model out --protect 1,x                           | '1,x'
share model out --protect 99                            | 99
share model out --protect -1                            | -1
share model out --ratio 0.6 --protect 1,2               | 0.2500
share model out --parts ffn --ffn-groups 5              | 48 neurons
share model out --parts ffn --ffn-groups 0              | neurons
share model out --parts ffn --ffn-groups -4             | neurons
share model out --parts qkv+ffn --ffn-ratio 2           | ratio
share model out --parts qkv+ffn --ffn-ratio nan         | ratio
share model out --plan nothing.json                     | no plan file
share model out --plan broken.json                      | not JSON
share model out --plan cycle.json                       | earlier layer
share model out --plan foreign.json                     | another model
share model out --plan text                             | not JSON
share model out --plan model                            | no plan file
share model shared                                      | exists
share model file --overwrite                            | not a checkpoint folder
share model gone/out                                    | no folder
share model model/out                                   | inside the input
share model . --overwrite                               | not a checkpoint folder|inside the output
share gone out                                          | gone
share ./gone out                                        | no folder
share file out                                          | is a file
share quantised out                                     | gptq
share shared out                                        | already shared
share contradictory out                                 | heads
estimate model --ratio -0.1                             | ratio of -0.1
estimate model --ratio 0.99                             | from 0 to 0.7500
estimate model --ratio nan                              | ratio
estimate model --ratio abc                              | abc|number
estimate model --parts xyz                              | 'xyz' does not name parts
estimate model --match xx                               | xx
estimate quantised                                      | gptq
estimate shared                                         | already shared
estimate nobody/nothing                                 | fetched
score gone                                              | gone
score quantised                                         | gptq
score model --parts xyz                                 | 'xyz' does not name parts
score model --match xx                                  | xx
score model -o gone/scores                              | no folder
score model -o model                                    | exists
score model -o model --overwrite                        | model
score model --parts ffn --ffn-groups 7                  | 48 neurons
plan --from-scores gone                                               | no scores file
plan --from-scores text                                               | not a scores file
plan --from-scores file                                               | not a scores file
plan --from-scores model                                              | no scores file
plan --from-scores model/model.safetensors                            | not a scores file
plan --from-scores nan-scores                                         | not a scores file
plan --from-scores small-scores                                       | not a scores file
plan --from-scores float-scores                                       | not a scores file
plan --from-scores no-scores                                          | not a scores file
plan --from-scores list-scores                                        | not a scores file
plan --from-scores deep-scores                                        | not a scores file
plan --from-scores wide-scores                                        | does not fit
plan --from-scores scores --ratio -0.1                                | ratio of -0.1
plan --from-scores scores --ratio 0.99                                | from 0 to 0.7500
plan --from-scores scores --ratio nan                                 | ratio
plan --from-scores scores --parts xyz                                 | 'xyz' does not name parts
plan --from-scores scores --parts ffn                                 | no ffn units
plan --from-scores scores --protect 99                                | 99
plan --from-scores scores -o plan.json                                | exists
plan --from-scores scores -o gone/plan.json                           | no folder
inspect model                                           | dense checkpoint
inspect gone.json                                       | no plan file
inspect broken.json                                     | not JSON
inspect cycle.json                                      | earlier layer
inspect ./gone                                          | no folder
verify model                                            | not a shared checkpoint
verify ./gone                                           | no folder
verify shared --against ./gone                          | no folder
expand model out                                        | not a shared checkpoint
expand shared model                                     | exists
expand shared shared/out                                | inside the input
eval ./gone --text text                                 | no folder
eval model --text gone                                  | gone
eval model --text model                                 | model
eval model --text empty                                 | empty
eval model --text binary                                | UTF-8
eval model --text short --window 16                     | 3 tokens, less than one window of 16
eval model --text text --window 65                      | window
eval model --text text --window 65                      | --window 64
eval model --text text --window 1                       | window
eval model --text text --window 0                       | window
eval model --text text --window -8                      | window
eval model --text text --window 32 --tokens 8           | less than one window
eval model --text text --window 32 --tokens 0           | limit
eval model --text text --window 32 --tokens -50         | limit
eval bare --text text --window 32                       | no tokenizer
eval odd-tokenizer --text text --window 32              | no tokenizer
eval no-bos --text text --window 32 --bos               | beginning-of-text
eval more-words --text alien --window 32                | vocabulary
eval roberta --text text --window 32                    | no perplexity
eval roberta --text text --window 64 --against roberta  | window
eval odd --text text --window 32                        | architectures
demo ./gone                                             | no folder
demo bare --text text                                   | no tokenizer
demo model --text gone                                  | gone
demo model --text short                                 | 3 tokens
demo model --text long --tokens 128 --work file          | file
demo model --text long --tokens 0                       | --tokens
demo model --text long --tokens -1                      | --tokens
share model out --refit                                 | needs text
share model out --match output                          | needs text
share model out --save 10%                              | needs text
share model out --allow remove                          | needs text
share model out --multiple 8                            | --multiple would not be used
share model out --calibration text                      | would not be used
share model out --calibration text --plan plan.json     | would not be used
share model out --device cpu                            | --device would not be used
share model out --restart                               | --restart would not be used
share model out --measure                               | --measure would not be used
share model out --seed 3                                | --seed would not be used
share model out --no-refit-ffn                          | --refit-ffn would not be used
share model out --refine fast                           | --refine would not be used
share model out --no-probe                              | --probe would not be used
share model out --refit --no-probe --calibration text   | --probe would not be used
share model out --save 5% --calibration text --calibration-window 32 --calibration-tokens 64 | text gave 2 windows
share model out --plan plan.json --ratio 0.2            | --ratio would not be used
share model out --plan plan.json --allow remove         | --allow would not be used
share model out --plan plan.json --save 5%              | --save would not be used
share model out --plan plan.json --match output         | --match would not be used
share model out --parts auto                            | 'auto' does not name parts
share model out --refit --calibration text --plan foreign.json | another model
share shared out --refit --calibration text             | already shared
share quantised out --refit --calibration text          | gptq
share model out --refit --calibration gone --calibration-window 32 | no file
share model out --refit --calibration empty --calibration-window 32 | less than one window
share model out --refit --calibration text --calibration-window 65 | --calibration-window 64
share model out --refit --calibration short --calibration-window 16 | less than one window
share model out --refit --calibration text --calibration-window 32 --calibration-tokens 32 | two windows
share model out --refit --calibration text --calibration-window 32 --device tpu | no device
share model out --refit --calibration text --calibration-window 32 --device cuda:99 | no device
share bare out --refit --calibration text --calibration-window 32 | no tokenizer
share model out --save 0% --calibration text            | cannot be saved
share model out --save 150% --calibration text          | cannot be saved
share model out --save 100% --calibration text          | cannot be saved
share model out --save abc --calibration text           | no amount to save
share model out --save -5% --calibration text           | no amount to save
share model out --save 1e99999999 --calibration text    | no amount to save
share model out --save 1/3 --calibration text           | no amount to save
share model out --save nan --calibration text           | no amount to save
share model out --save 5% --ratio 0.2 --calibration text | --ratio would not be used
share model out --save 5% --match qk --calibration text | --match would not be used
share model out --allow all --calibration text          | all
share model out --save 5% --allow none --multiple 8 --calibration text | no neurons are removed, in multiples of 8
share model out --save 5% --allow remove --multiple 32 --calibration text | no multiple of 32. Remove them in multiples
share model out --save 5% --allow remove --multiple 0 --calibration text | --multiple
share model out --match output --mode root --calibration text | --mode would not be used
share model out --match output --ffn-ratio 0.2 --calibration text | --ffn-ratio would not be used
share model out --match output --ffn-groups 4 --calibration text | --ffn-groups would not be used
share model out --match output --parts ffn --calibration text | 'ffn'
share model out --match output --parts xyz --calibration text | 'xyz'
share model out --match output --ratio 0.99 --calibration text | from 0 to 0.7500
share model out --match output --ratio nan --calibration text | ratio
share model out --match output --parts auto --ratio 0.99 --calibration text | from 0 to 0.7500
share model out --match output --protect 99 --calibration text | no layer 99
share model out --save 5% --protect 99 --calibration text | no layer 99
share model out --save 5% --protect -1 --calibration text | no layer -1
plan --from-scores scores --save 5%                                   | --save would not be used
plan --from-scores scores --allow remove                              | --allow would not be used
plan --from-scores scores --multiple 8                                | --multiple would not be used
plan --from-scores scores --no-measure                                | --measure would not be used
plan --from-scores scores --restart                                   | --restart would not be used
plan --from-scores scores --no-probe                                  | --probe would not be used
plan --from-scores scores --revision v1                               | --revision would not be used
plan --from-scores scores --ffn-groups 2                              | --ffn-groups would not be used
plan                                                    | Give one of MODEL and --from-scores
plan model --from-scores scores                         | Give one of MODEL and --from-scores
plan model                                              | Give --calibration FILE
plan --from-scores scores --calibration text            | --calibration would not be used
plan scores --calibration text                          | is a file
plan gone --calibration text                            | gone
plan shared --calibration text                          | already shared
plan model --calibration text --mode root               | --mode would not be used
plan model --calibration text --save 0%                 | cannot be saved
plan model --calibration text --protect 99              | no layer 99
plan model --calibration text --calibration-window 32 --calibration-tokens 64 | text gave 2 windows
plan model --calibration text -o plan.json              | exists
plan model --calibration text -o model/plan.json        | inside the model
plan model --calibration text -o gone/plan.json         | no folder
refit model --calibration text                          | not a shared checkpoint
refit ./gone --calibration text                         | no folder
refit someone/model --calibration text                  | --out
refit shared                                            | calibration
refit shared --calibration gone --calibration-window 32 | no file
refit shared --calibration text --calibration-window 65 | --calibration-window 64
refit shared --calibration text --dense ./gone          | no folder
refit shared --calibration text --dense shared          | already shared
refit shared --calibration text --dense roberta         | another model
refit shared --calibration text --out model             | exists
refit shared --calibration text --out gone/new          | no folder
refit shared --calibration text --calibration-window 32 --out shared/new | inside the input
refit shared --calibration text --calibration-window 32 --device tpu | no device
"""


def mistakes() -> list[Any]:
    lines = [line.partition(" | ") for line in MISTAKES.strip().splitlines()]
    return [pytest.param(words.split(), reason.strip(), id=words.strip()) for words, _, reason in lines]


@pytest.mark.parametrize(("words", "reason"), mistakes())
def test_a_mistake_is_one_line_that_says_so_and_status_1_and_leaves_nothing(
    words: list[str], reason: str, run: Run, things: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(things)
    before, there = seen(things), set(things.iterdir())
    found = run(*words)
    after = seen(things)
    for path in set(things.iterdir()) - there:  # the next mistake is made in the same folder
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert_one_error_line(found)
    assert any(word in found.err for word in reason.split("|"))
    assert after.keys() == before.keys()
    assert all(after[path] == before[path] for path in before if path != things)


@pytest.mark.parametrize(
    "words", ["share model", "share model out --raito 0.3", "shrae model out", "eval model", "--json"]
)
def test_a_slip_of_the_pen_prints_nothing_on_standard_output(words: str, run: Run) -> None:
    found = run(*words.split())
    assert found.status != 0
    assert found.out == ""
    assert found.err
    assert "Traceback" not in found.err


def test_an_error_with_json_prints_nothing_on_standard_output(things: Path, run: Run) -> None:
    assert_one_error_line(run("verify", things / "model", "--json"))
    assert_one_error_line(run("share", things / "quantised", "out", "--json"))


def test_a_pickle_is_refused_in_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    for command in ("estimate", "score", "inspect", "verify"):
        found = run(command, "old")
        assert_one_error_line(found)
        assert "pytorch_model.bin" in found.err


def test_an_interrupted_command_ends_without_a_traceback_and_leaves_nothing(
    model: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> Iterator[torch.Tensor]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("headshare.sharing.writer.stream", interrupt)
    before = seen(tmp_path)
    found = run("share", model, "out")
    assert found.status == 130
    assert found.out == ""
    assert found.err.split("\n")[1:] == ["stopped. Run the same command to go on.", ""]  # after the note
    assert seen(tmp_path) == before


def test_a_command_that_keeps_nothing_says_that_it_starts_over(
    model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("headshare.matching.estimate.estimate", interrupt)
    found = run("estimate", model)
    assert (found.status, found.out, found.err) == (130, "", "stopped. The same command starts over.\n")


KEPT = [
    "score model -o letter",
    "plan --from-scores scores -o letter",
    "share model letter",
    "plan --from-scores scores -o model/config.json",
]


@pytest.mark.parametrize("words", KEPT)
def test_overwriting_replaces_nothing_that_we_did_not_write(
    words: str, things: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(things)
    (things / "letter").write_text("Dear diary")
    before = seen(things)
    found = run(*words.split(), "--overwrite")
    after = seen(things)
    (things / "letter").unlink()
    assert_one_error_line(found)
    assert after == before
