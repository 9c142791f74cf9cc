"""What the site has besides docs/: pages that stand elsewhere in the repository, and the reference made from the code.

mkdocs calls these functions by their names (`hooks` in mkdocs.yml).
"""

import re
import sys
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from website import commands, python  # noqa: E402  found by the line above

# address in the site: page of the repository, for pages that stand elsewhere than in docs/, or under another name there
ELSEWHERE = {"index.md": "README.md", "pages.md": "docs/index.md"} | {
    page: page
    for page in (
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "results/README.md",
        "results/measured/README.md",
    )
}
ADDRESSES = {page: address for address, page in ELSEWHERE.items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Put the pages that are made from the code in their places in the navigation."""
    made = {"COMMANDS": commands.navigation(), "PYTHON": python.navigation()}
    config.nav = [_placed(entry, made) for entry in config.nav]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the reference, and pages from elsewhere in the repository with their figures. The README comes first."""
    files.remove(files.src_uris["index.md"])
    pages = {address: (ROOT / page).read_text() for address, page in ELSEWHERE.items()}
    for address, text in (pages | commands.pages() | python.pages()).items():
        files.append(File.generated(config, address, content=text))
    for path in [*sorted((ROOT / "results" / "figures").glob("*.svg")), ROOT / "results" / "report.html"]:
        address = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Let links lead to pages of the site; what the site does not have is named, as a path in the repository."""
    here = page.file.src_uri
    if here.startswith("reference/"):
        return markdown
    source = ELSEWHERE.get(here, f"docs/{here}")

    def lead(link: re.Match[str]) -> str:
        picture, words, target, anchor = link.groups()
        wanted = normpath(f"{dirname(source)}/{target}").lstrip("/")
        address = ADDRESSES.get(wanted, wanted.removeprefix("docs/"))
        if files.get_file_from_path(address) is not None:
            return f"{picture}[{words}]({relpath(address, dirname(here) or '.')}{anchor or ''})"
        if (ROOT / wanted).exists():
            return f"`{wanted}`" if words.strip("`") == wanted else f"{words} (`{wanted}`)"
        return link[0]  # leads nowhere: mkdocs says so

    return LINK.sub(lead, markdown)


def _placed(entry: Any, made: dict[str, Any]) -> Any:
    if isinstance(entry, dict):
        return {title: _placed(what, made) for title, what in entry.items()}
    if isinstance(entry, list):
        return [_placed(one, made) for one in entry]
    return made.get(entry, entry)
