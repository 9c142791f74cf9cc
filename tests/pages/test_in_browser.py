"""Pages looked at in Chromium, at the widths of a desk and of a hand: nothing sticks out, nothing is cut off."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headshare.experiments.report.content import report_of
from headshare.experiments.report.page import as_html
from headshare.experiments.report.sources import Comparison
from headshare.sharing.picture.page import Inspected, plan_page
from support.browser import WIDTHS, browser, kept, look
from support.mixed import mixed_plan

MEASURED = Path(__file__).parents[2] / "results" / "measured"
LONG = "a-method-with-a-name-that-is-longer-than-any-panel-has-room-for+refit"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


def test_a_report_fits_and_its_tables_are_sorted_by_a_click(chromium: Any, tmp_path: Path) -> None:
    names = ("smollm2-135m-small", "stories15m-table-06")
    measured = [Comparison.load(MEASURED / name) for name in names]
    # names as long as strangers may give them
    last = measured[-1]
    cells = [replace(cell, method=LONG) if cell.method == "both" else cell for cell in last.cells]
    measured[-1] = Comparison(replace(last.about, model="m" * 300, title=LONG * 3), cells)
    page = tmp_path / "report.html"
    page.write_text(as_html(report_of(measured)))
    for width in WIDTHS:
        assert look(chromium, page, width, kept(f"report-{width}.png", tmp_path)) == []
    assert look(chromium, page, WIDTHS[0], kept("report-dark.png", tmp_path), dark=True) == []
    # sort by perplexity, up and down
    tab = chromium.new_page()
    tab.goto(page.as_uri())
    section = tab.locator("section").first
    section.get_by_role("button", name="perplexity").click()
    rising = perplexities(section)
    section.get_by_role("button", name="perplexity").click()
    assert rising == sorted(rising) == perplexities(section)[::-1]
    assert len(rising) == sum(cell.perplexity is not None for cell in measured[0].cells)
    tab.close()


def test_the_page_of_a_plan_fits(chromium: Any, tmp_path: Path) -> None:
    page = tmp_path / "inspect.html"
    page.write_text(plan_page(Inspected("a-model-of-a-long-name" * 9, mixed_plan())))
    for width in WIDTHS:
        assert look(chromium, page, width, kept(f"inspect-{width}.png", tmp_path)) == []
    assert look(chromium, page, WIDTHS[0], kept("inspect-dark.png", tmp_path), dark=True) == []


def test_what_sticks_out_is_seen(chromium: Any, tmp_path: Path) -> None:
    page = tmp_path / "wide.html"
    text = '<text x="80" y="20">cut off</text><text x="0" y="20">one</text><text x="4" y="20">two</text>'
    page.write_text(f'<svg class="fig" viewBox="0 0 99 30" width="99">{text}</svg><p style="width: 2000px">wide</p>')
    faults = look(chromium, page, WIDTHS[1])
    assert ["the page is" in faults[0], "is cut off" in faults[1], "lies on" in faults[2]] == [True] * 3


def perplexities(section: Any) -> list[float]:
    button = section.page.get_by_role("button", name="perplexity")
    column = section.locator("table").filter(has=button).last.locator("tbody td:nth-child(7)").all_inner_texts()
    return [float(text.replace(",", "")) for text in column if text]
