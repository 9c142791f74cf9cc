"""Pages in a browser: opened in Chromium at a width, photographed, and searched for what does not fit."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WIDTHS = (1280, 390)
HEIGHT = 900
KEEP = "HEADSHARE_SCREENSHOTS"

# What sticks out: the page over its window, texts of figures over their figures, and texts over one another.
FAULTS = """() => {
  const faults = [];
  const page = document.scrollingElement;
  if (page.scrollWidth > innerWidth) faults.push(`the page is ${page.scrollWidth} wide, the window ${innerWidth}`);
  for (const figure of document.querySelectorAll("svg.fig")) {
    const box = figure.getBoundingClientRect();
    const named = text => [text.firstChild?.data, text.getBoundingClientRect()];
    const texts = [...figure.querySelectorAll("text")].map(named);
    const where = `in "${figure.getAttribute("aria-label")}"`;
    texts.forEach(([name, one], number) => {
      if (Math.min(one.left - box.left, box.right - one.right, one.top - box.top, box.bottom - one.bottom) < -1)
        faults.push(`"${name}" is cut off ${where}`);
      for (const [other, two] of texts.slice(number + 1)) {
        const across = Math.min(one.right, two.right) - Math.max(one.left, two.left);
        const down = Math.min(one.bottom, two.bottom) - Math.max(one.top, two.top);
        if (across > 2 && down > 0.45 * Math.min(one.height, two.height))
          faults.push(`"${name}" lies on "${other}" ${where}`);
      }
    });
  }
  return faults;
}"""


def chromium() -> str:
    """The path of the browser; the test is skipped where there is none."""
    pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium: apt-get update && apt-get install -y chromium")
    return path


@contextmanager
def browser() -> Iterator[Any]:
    """A browser without a window, and without the network."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        # as root there is no sandbox; pages here are our own
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield opened
        finally:
            opened.close()


def look(opened: Any, page: Path, width: int, picture: Path | None = None, *, dark: bool = False) -> list[str]:
    """What is wrong with this page at this width; `picture` is where its screenshot goes, whole
    where it is kept."""
    scheme = "dark" if dark else "light"
    context = opened.new_context(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme, offline=True)
    try:
        tab = context.new_page()
        faults: list[str] = []
        tab.on("console", lambda said: faults.append(f"the console says: {said.text}"))
        tab.on("pageerror", lambda error: faults.append(f"a script fails: {error}"))
        tab.goto(page.absolute().as_uri())
        faults += tab.evaluate(FAULTS)
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            tab.screenshot(path=str(picture), full_page=KEEP in os.environ)
        return faults
    finally:
        context.close()


def kept(name: str, folder: Path) -> Path:
    """The place of a screenshot: in the folder that HEADSHARE_SCREENSHOTS names where that is set, else in this one."""
    return Path(os.environ.get(KEEP, folder)) / name
