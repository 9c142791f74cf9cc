"""Figures as files: an SVG for each."""

from collections.abc import Sequence
from pathlib import Path

from headshare.errors import OutputError
from headshare.files.atomic import write_whole
from headshare.files.failures import explain
from headshare.pages.svg import Figure, as_file


def save_figures(figures: Sequence[Figure], folder: Path, name: str) -> list[tuple[str, Path]]:
    """Write figures as SVG files whose names begin with `name`. Returns the title and the path of each.

    Raises:
        OutputError: if they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(explain(error, folder)) from None
    paths = [folder / f"{name}-{figure.kind}.svg" for figure in figures]
    for figure, path in zip(figures, paths, strict=True):
        write_whole(path, as_file(figure.panels).encode())
    return [(f"{figure.title}. {figure.note}".strip(), path) for figure, path in zip(figures, paths, strict=True)]
