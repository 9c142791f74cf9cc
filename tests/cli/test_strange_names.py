"""Names and words that str cannot print, or a terminal would act on, do not end a command in a traceback."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import headshare as hs
from headshare.errors import PlanError
from support.command_line import Run, assert_one_error_line


def test_folders_whose_names_are_not_utf_8_are_shared_and_checked(llama: Path, run: Run) -> None:
    dense = llama.rename(os.fsdecode(b"mod\xffel"))
    out = os.fsdecode(b"o\xfeut")
    for words in (
        ["share", dense, out],
        ["inspect", out],
        ["verify", out, "--no-logits"],
    ):  # safetensors opens no such path
        found = run(*words)
        assert found.status == 0, found.err
        assert not any(letter in found.out for letter in ("\udcff", "\udcfe"))
    assert hs.open_checkpoint(out).require_sharing().base_model is None


def test_half_a_character_in_a_configuration_is_written_again_as_it_was(llama: Path, run: Run) -> None:
    file = llama / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "name": "\ud800 é"}))
    assert run("share", llama, "out").status == 0
    assert json.loads(Path("out/config.json").read_text())["name"] == "\ud800 é"


def test_escapes_of_a_terminal_in_a_configuration_are_shown_and_not_acted_on(llama: Path, run: Run) -> None:
    file = llama / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attn_implementation": "a/\x1b[2J"}))
    found = run("eval", llama, "--text", file)
    assert_one_error_line(found)
    assert "\x1b" not in found.err


@pytest.mark.parametrize(
    "words",
    ["inspect {}.json", "plan --from-scores {}", "share {} out", "share model {}", "eval model --text {}"],
)
def test_a_name_that_is_too_long_is_one_error(words: str, llama: Path, run: Run) -> None:
    llama.rename("model")
    found = run(*words.format("a" * 300).split())
    said = [line for line in found.err.splitlines(keepends=True) if not line.startswith("note: ")]
    assert_one_error_line(replace(found, err="".join(said)))


def test_ties_by_the_million_are_counted_and_not_read(llama: Path) -> None:
    checkpoint = hs.open_checkpoint(llama)
    data = hs.make_plan(hs.score_units(checkpoint), 0.3).model_dump(mode="json")
    layout = data["selections"][0]["layout"]
    layout.update(layers=10_000, groups=1000)
    for place in layout["parts"].values():
        place.update(step=1, rows=1, start=0, shape=[1000, 32])
    data["selections"][0]["ties"] = [[1, 0, 0, 0]] * 200_001
    with pytest.raises(PlanError, match="lists 200001 ties; for this grid there can be 200000"):
        hs.SharePlan.from_dict(data)
