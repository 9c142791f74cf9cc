"""The page of a report, in Markdown and in HTML."""

from collections.abc import Sequence
from pathlib import Path

from headshare.errors import OutputError
from headshare.experiments.report.claims import Checked
from headshare.experiments.report.content import COUNTED, JUDGED, Judged, Report
from headshare.files.failures import explain
from headshare.pages.page import render
from headshare.tables import Table

# the first line of a page in Markdown
TITLE = "# Results"
NOT_RUN = "What was not run, and why"


def check_page(out: Path) -> None:
    """Refuse to write a page in Markdown over a file that is none.

    Raises:
        OutputError: if there is one.
    """
    try:
        heading = out.read_bytes().split(b"\n", 1)[0] if out.exists() else TITLE.encode()
    except OSError as error:
        raise OutputError(explain(error, out)) from None
    if heading != TITLE.encode():
        raise OutputError(f"{out} is no page that `report` wrote. Move it, or write elsewhere.")


def as_markdown(report: Report, figures: Sequence[Sequence[tuple[str, str]]] = ()) -> str:
    """The page of a report in Markdown.

    `figures` holds titles and addresses of the figures of each comparison, and then of each analysis of attention.
    """
    lines = [TITLE, "", *_summary(report.judged)]
    pictures = [*figures, *[()] * (len(report.comparisons) + len(report.attended))]
    for one, shown in zip(report.comparisons, pictures, strict=False):
        lines += ["", f"## {one.heading}", "", _sentence(one.facts), "", one.table.markdown()]
        lines += ["", *one.notes] if one.notes else []
        lines += ["", *one.verdict] if one.verdict else []
        lines += [line for words, table in one.beside for line in ("", words, "", table.markdown())]
        lines += ["", claims_table(one.claims).markdown()] if one.claims else []
        lines += [line for title, address in shown for line in ("", f"![{title}]({address})")]
    for title, table in report.evaluated:
        lines += ["", f"## {title}", "", table.markdown()]
    for attended, shown in zip(report.attended, pictures[len(report.comparisons) :], strict=False):
        lines += ["", f"## {attended.title}", "", _sentence(attended.facts)]
        lines += [line for words, table in attended.tables for line in ("", words, "", table.markdown())]
        lines += [line for title, address in shown for line in ("", f"![{title}]({address})")]
    if report.absent:
        lines += ["", f"## {NOT_RUN}", "", *(f"* {title}: {why}." for title, why in report.absent)]
    return "\n".join(lines).rstrip() + "\n"


def as_html(report: Report) -> str:
    """The page of a report as one HTML file that needs no other."""
    models = list(dict.fromkeys(one.model for one in report.comparisons))
    return render(
        "report.html",
        report=report,
        models=models,
        counted=COUNTED,
        rules=JUDGED,
        not_run=NOT_RUN,
        claims=[claims_table(one.claims) for one in report.comparisons],
    )


def claims_table(claims: Sequence[Checked]) -> Table:
    """The claims that a comparison can tell about, and the numbers behind each verdict."""
    rows = [[claim.claim, claim.where, claim.says.value, claim.evidence, claim.rests] for claim in claims]
    return Table(["claim", "at, or of", "says", "figures", "rests on"], rows, words=range(5))


def _sentence(facts: Sequence[tuple[str, str]]) -> str:
    """The facts of a comparison in one sentence."""
    said = {"model": "", "questions": "", "examples": "", "versions": ""}
    return "; ".join(f"{said.get(name, f'{name} ')}{what}" for name, what in facts) + "."


def _summary(judged: Sequence[Judged]) -> list[str]:
    """Summary of the claims: how often each holds by model, and the rules."""
    if not judged:
        return ["No claim of the paper can be checked on these tables."]
    rows = [
        [one.claim, one.model, ", ".join(f"{says}: {count}" for says, count in one.counts.items())] for one in judged
    ]
    table = Table(["claim", "model", ""], rows, words=range(3))
    return [COUNTED, "", table.markdown(), "", *(f"* {rule}" for rule in JUDGED)]
