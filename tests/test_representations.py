"""What an interpreter and a notebook show of public values: one short line, and of a plan a table and its picture."""

from dataclasses import replace
from html import escape
from pathlib import Path

import pytest

import headshare as hs
from headshare.calibration.outcome import Outcome
from headshare.evaluation.results import Metric, TaskResult
from headshare.experiments.cells import Compared
from headshare.plan.describe import picture
from headshare.short import MOST, short
from support.texts import a_text, add_tokenizer


@pytest.fixture
def values(llama: Path, tmp_path: Path) -> dict[str, object]:
    """A value of each sort, by a word that its line has."""
    dense = hs.open_checkpoint(add_tokenizer(llama))
    scores = hs.score_units(dense)
    plan = hs.make_plan(scores, 0.5)
    shared = hs.share(dense, plan)
    written = hs.open_checkpoint(shared.save(tmp_path / "out"))
    return {
        "llama, 39 tensors": dense,
        "shared)": written,
        "8 units, qk": scores,
        "4 of 8 units given up (50.0%)": plan,
        "parts q,k,v": plan.selections[0],
        "q+k+v": plan.selections[0].layout,
        "SharePlan(": shared,
        "SharedCheckpoint(": Outcome(shared),
        "4 of 8 units shared": shared.estimate,
        "ok, 2 files": hs.verify(written, logits=False),
        "16 windows of 32 tokens": hs.Calibration.load(a_text(tmp_path / "text", 1200), dense, tokens=512, window=32),
        "bytes, remove+": hs.Budget.parse(dense, save="5%"),
        "piqa, 3 questions": TaskResult("m", "piqa", "k", {"acc": Metric(0.5, 0.1)}, 3, settings={"a" * 300: 1}),
        "directshare, 0.3": Compared("key", "directshare", 0.3, losses=(1.0,) * 300),
    }


def test_public_values_are_one_short_line_that_says_what_they_are(values: dict[str, object]) -> None:
    for word, value in values.items():
        line = repr(value)
        assert line.startswith(f"{type(value).__name__}(")
        assert word in line
        assert "\n" not in line
        assert len(line) <= MOST
        assert str(value) == line


def test_a_name_of_any_length_and_of_any_letters_is_one_short_line(values: dict[str, object]) -> None:
    dense = values["llama, 39 tensors"]
    assert isinstance(dense, hs.Checkpoint)
    assert len(repr(replace(dense, name="a\x1b\n" * 500))) <= MOST
    assert "\x1b" not in repr(replace(dense, config={"model_type": "\x1b[31m\n" * 200}))
    assert len(repr(replace(dense, config={"model_type": "long" * 200}))) == MOST
    assert short(dense, None, "", "told") == "Checkpoint(told)"


def test_a_notebook_shows_a_plan_as_a_table_and_a_picture(values: dict[str, object]) -> None:
    plan = values["4 of 8 units given up (50.0%)"]
    assert isinstance(plan, hs.SharePlan)
    html = plan._repr_html_()
    assert "<tr><td>attention, parts q,k,v</td><td>4 of 8 units given up (50.0%)</td></tr>" in html
    assert f"<pre>{escape(picture(plan))}</pre>" in html
    assert "<b>" not in hs.SharePlan(model_type="<b>")._repr_html_()


def test_the_package_says_its_version() -> None:
    from importlib.metadata import version

    assert hs.__version__ == version("headshare")
