"""The card of a folder that headshare writes."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import headshare as hs
from headshare.checkpoint.refit_record import RefitRecord
from headshare.evaluation.verify import verify
from headshare.files.folder import not_written_by_us
from headshare.sharing.card import add_measured
from headshare.sharing.fits import open_shared
from headshare.sharing.rewrite import write_refitted
from support.shares import a_plan, share

THEIRS = """---
license: other
license_name: "small-model-licence"
license_link: https://example.com/licence
datasets: [secret/data]
model-index:
- name: tiny
---
# Tiny
It scores 73.2 on MMLU.
"""


def front_of(folder: Path) -> dict[str, object]:
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def dense(llama: Path) -> Path:
    (llama / "README.md").write_text(THEIRS)
    return llama


def test_a_card_carries_the_licence_on_and_not_the_figures(dense: Path, tmp_path: Path) -> None:
    out = share(dense, tmp_path / "out")
    again = hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")
    (out / "README.md").rename(tmp_path / "ours")
    (out / "README.md").write_text(THEIRS)  # as somebody may have put it there
    record = RefitRecord.of([], "text", "0" * 64, windows=(2, 16), seed=0)
    with hs.open_checkpoint(out) as shared:
        refitted = write_refitted(open_shared(shared), record, {}, tmp_path / "refitted")
    (tmp_path / "ours").replace(out / "README.md")
    for folder in (out, again, refitted):
        card = (folder / "README.md").read_text()
        assert "73.2" not in card
        assert front_of(folder) == {
            "library_name": "transformers", "license": "other", "license_name": "small-model-licence",
            "license_link": "https://example.com/licence", "pipeline_tag": "text-generation", "tags": ["headshare"],
        }  # fmt: skip
    assert "`llama`" in (out / "README.md").read_text()
    assert str(tmp_path) not in (out / "README.md").read_text()
    assert "attention, parts q,k,v: 4 of 8 units given up" in (out / "README.md").read_text()
    assert "given up" not in (again / "README.md").read_text()


def test_the_code_of_a_card_loads_the_folder(dense: Path, tmp_path: Path) -> None:
    out = share(dense, tmp_path / "out")
    for folder in (out, hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")):
        code = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n")
        assert (code.splitlines()[0] == "import headshare") == (folder == out)
        names: dict[str, object] = {}
        exec(code.replace("this folder", str(folder)), names)
        assert type(names["model"]).__name__ == "LlamaForCausalLM"


def test_a_model_of_the_hub_is_named_as_the_base(dense: Path, tmp_path: Path) -> None:
    checkpoint = replace(hs.open_checkpoint(dense), name="someone/tiny")
    out = hs.share(checkpoint, a_plan(dense)).save(tmp_path / "out")
    assert front_of(out)["base_model"] == "someone/tiny"


@pytest.mark.parametrize(
    "theirs",
    [
        "license: mit",
        "---\nlicense: [a, b]\n---\n",
        "---\nlicense: '\x1b]0;x'\n---\n",
        "---\nlicense: mit\n",
        "\xff---",
    ],
)
def test_what_is_no_licence_in_a_front_matter_is_left_out(theirs: str, dense: Path, tmp_path: Path) -> None:
    (dense / "README.md").write_bytes(theirs.encode("latin-1"))
    assert "license" not in front_of(share(dense, tmp_path / "out"))


def test_a_folder_written_in_place_keeps_a_card_that_somebody_else_wrote(dense: Path, tmp_path: Path) -> None:
    out = share(dense, tmp_path / "out")
    record = RefitRecord.of([], "text", "0" * 64, windows=(2, 16), seed=0)
    with hs.open_checkpoint(out) as shared:
        write_refitted(open_shared(shared), record, {}, out)
    assert "refitted on" in (out / "README.md").read_text()
    (out / "README.md").write_text("my own words")
    with hs.open_checkpoint(out) as shared:
        write_refitted(open_shared(shared), record, {}, out)
    assert (out / "README.md").read_text() == "my own words"


def test_what_is_measured_later_stands_in_the_card_until_the_model_changes(dense: Path, tmp_path: Path) -> None:
    out = share(dense, tmp_path / "out")
    plain = (out / "README.md").read_text()
    add_measured(out, "## Measured\n\nIt has 12.3.")
    add_measured(out, "## Measured\n\nIt has 45.6.")
    card = (out / "README.md").read_text()
    assert "It has 45.6." in card
    assert "12.3" not in card
    assert "was not measured" not in card
    assert list(not_written_by_us(out)) == []  # so it may still be overwritten
    with hs.open_checkpoint(out) as shared, hs.open_checkpoint(dense) as original:
        assert verify(shared, original).ok
        write_refitted(open_shared(shared), RefitRecord.of([], "text", "0" * 64, windows=(2, 16), seed=0), {}, out)
    again = (out / "README.md").read_text()
    assert "45.6" not in again
    assert "was not measured" in again
    assert "was not measured" in plain


def test_a_card_of_somebody_elses_words_gets_no_figures(dense: Path, tmp_path: Path) -> None:
    out = share(dense, tmp_path / "out")
    (out / "README.md").write_text("my own words")
    add_measured(out, "figures")
    assert (out / "README.md").read_text() == "my own words"


def test_a_card_says_how_to_cite_and_not_where_the_text_lay(dense: Path, tmp_path: Path) -> None:
    record = RefitRecord.of([], str(tmp_path / "words.txt"), "0" * 64, windows=(2, 16), seed=0)
    card_of = hs.share(hs.open_checkpoint(dense), a_plan(dense)).with_refit(record, {}).save(tmp_path / "out")
    card = (card_of / "README.md").read_text()
    assert "@misc{cao2024headwise" in card
    assert "of words.txt" in card
    assert str(tmp_path) not in card
