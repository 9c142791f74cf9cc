"""Rows that several runs keep in one file, each killed at any moment."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import headshare
from headshare.errors import EvaluationError
from headshare.files.atomic import write_whole
from headshare.files.kept_rows import KeptRows, Keyed, read_rows
from headshare.files.scratch import scratch_file
from support.processes import killed_before_step

NAME = "rows.json"
SOURCES = Path(headshare.__file__).parent


@dataclass(frozen=True)
class Row(Keyed):
    """A row with a value."""

    key: str
    value: int = 0


def kept_rows(folder: Path) -> KeptRows[Row]:
    return KeptRows(folder / NAME, Row, "rows of a test", refused=EvaluationError)


def rows_of(folder: Path) -> list[Row]:
    return read_rows(folder / NAME, Row, "rows of a test", refused=EvaluationError)


def test_a_row_replaces_the_one_of_its_key_and_no_other(tmp_path: Path) -> None:
    with kept_rows(tmp_path) as kept:
        for row in (Row("a", 1), Row("b", 2), Row("a", 3)):
            kept.add(row)
    assert rows_of(tmp_path) == [Row("b", 2), Row("a", 3)]


def test_killed_at_any_step_of_adding_the_rows_are_those_before_or_with_the_new_one(tmp_path: Path) -> None:
    seen = set()

    def add() -> None:
        with kept_rows(folder) as kept:
            kept.add(Row("new"))

    for step in itertools.count():
        folder = tmp_path / str(step)
        with kept_rows(folder) as kept:
            kept.add(Row("old"))
        killed = killed_before_step(step, add)
        # the next run goes on from there, and clears up
        with kept_rows(folder) as kept:
            seen.add(len(kept.rows))
            assert kept.rows == [Row("old"), Row("new")][: len(kept.rows)]
        assert [path.name for path in folder.iterdir()] == [NAME]
        if not killed:
            break
    assert step > 3
    assert seen == {1, 2}


def test_temporary_files_of_living_writers_in_the_folder_are_left_to_them(tmp_path: Path) -> None:
    (tmp_path / ".headshare-partial-of-a-dead-one").write_text("half")
    with scratch_file(tmp_path) as living, kept_rows(tmp_path):
        assert list(tmp_path.iterdir()) == [living]


def test_runs_that_add_at_the_same_time_lose_no_row(tmp_path: Path) -> None:
    def add(run: int) -> None:
        with kept_rows(tmp_path) as kept:
            for number in range(20):
                kept.add(Row(f"{run} {number}"))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(add, range(3)))
    assert len(rows_of(tmp_path)) == 60


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"key": 1}]', "", '[{"key": "a", "value": "many"}]'])
def test_a_file_of_something_else_is_one_line_and_stays(content: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(content)
    with pytest.raises(EvaluationError, match="holds no rows of a test") as refused, kept_rows(tmp_path):
        pass
    assert "\n" not in str(refused.value)
    assert (tmp_path / NAME).read_text() == content


def test_a_folder_that_was_made_for_nothing_goes_and_one_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        with pytest.raises(KeyError), kept_rows(tmp_path / name):
            assert (tmp_path / name).is_dir()
            raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    with kept_rows(tmp_path / "new") as kept:
        kept.add(Row("a"))
    assert json.loads((tmp_path / "new" / NAME).read_text()) == [{"key": "a", "value": 0}]


def test_a_file_with_a_name_as_long_as_can_be_is_written_whole(tmp_path: Path) -> None:
    for name in ("n" * 255, "é" * 127):
        write_whole(tmp_path / name, b"all")
        assert (tmp_path / name).read_bytes() == b"all"
    assert len(list(tmp_path.iterdir())) == 2


def test_only_the_package_of_files_locks_and_clears_up() -> None:
    """Whoever keeps something beyond a run does it by `ResumableRun`, `KeptRows` or `whole_folder`."""
    for source in SOURCES.rglob("*.py"):
        if source.parent != SOURCES / "files":
            text = source.read_text()
            assert not [word for word in ("flock", "files.lock", "remove_partials") if word in text], source
