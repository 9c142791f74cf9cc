"""Self-contained pages in HTML, made from the templates of this package: no script, font or image from elsewhere."""

import re
from pathlib import Path
from typing import Any

from headshare.errors import OutputError
from headshare.files.atomic import write_whole
from headshare.files.failures import explain
from headshare.files.printable import shown
from headshare.pages.style import DARK, FONT, LIGHT, figure_css
from headshare.pages.svg import inline

# what stands near the top of every page, by which it is known again
MADE_BY = '<meta name="generator" content="headshare">'
NEAR = 1000


def render(template: str, **content: Any) -> str:
    """The page of this template. Every text in it is escaped, and so are signs that a browser would act on."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("headshare.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: shown(value) if type(value) is str else value,
    )
    environment.filters["inline"] = inline
    environment.filters["anchor"] = lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    look = {"light": LIGHT, "dark": DARK, "font": FONT, "figures": (figure_css(LIGHT), figure_css(DARK))}
    return environment.get_template(template).render(made_by=MADE_BY, look=look, **content)


def check_page(out: Path) -> None:
    """Refuse to write a page over a file that is none.

    Raises:
        OutputError: if there is one.
    """
    try:
        if not out.exists():
            return
        with out.open("rb") as file:
            start = file.read(NEAR)
    except OSError as error:
        raise OutputError(explain(error, out)) from None
    if MADE_BY.encode() not in start:
        raise OutputError(f"{out} is no page that headshare wrote. Move it, or write elsewhere.")


def write_page(out: Path, page: str) -> None:
    """Write a page over nothing, or over a page.

    Raises:
        OutputError: if something else is there, or it cannot be written.
    """
    check_page(out)
    write_whole(out, page.encode())
