"""What strangers wrote is read within limits and through one door, and printed without what a terminal acts on."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headshare.errors import CheckpointError, EvaluationError, HeadshareError, PlanError
from headshare.files.printable import shown
from headshare.files.untrusted import foreign, is_file, parse_json, read_json, read_yaml

ODD = [TypeError("a\nb"), KeyError("model_type"), ZeroDivisionError("division by zero"), IndexError(), RecursionError()]


class OddError(Exception):
    """What a library below a library raises."""


@pytest.mark.parametrize(
    "error", [*ODD, OddError("missing field `max_length` at line 1")], ids=lambda e: type(e).__name__
)
def test_whatever_a_library_raises_is_one_error_that_names_the_file_and_the_cause(error: Exception) -> None:
    with pytest.raises(EvaluationError) as refused, foreign("model has no tokenizer", EvaluationError, "Put it there."):
        raise error
    said = str(refused.value)
    assert said.startswith("model has no tokenizer: ")
    assert said.endswith(". Put it there.")
    assert "\n" not in said
    assert (str(error).split("\n")[0].strip("'") or type(error).__name__) in said
    assert refused.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("ours"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        KeyboardInterrupt(),
    ],
    ids=["ours", "memory", "memory of a GPU", "memory of a CPU", "a person who stops it"],
)
def test_our_own_errors_and_what_is_no_fault_of_a_file_pass_the_door(error: BaseException) -> None:
    with pytest.raises(type(error)) as passed, foreign("a file cannot be read", PlanError):
        raise error
    assert passed.value is error


def test_an_error_is_one_line_that_a_terminal_shows() -> None:
    said = str(HeadshareError("the tensor \x1b[2J\x07\u202eabc\ud800 is\n  wrong.\r\nTake it out"))
    assert said == "the tensor \\x1b[2J\\x07\\u202eabc\\ud800 is wrong. Take it out"
    long = str(HeadshareError("begin " + "x" * 10_000_000 + " end"))
    assert len(long) < 1000
    assert long.startswith("begin xxx")
    assert long.endswith("xxx end")


def test_printed_results_keep_their_lines_and_lose_what_a_terminal_acts_on() -> None:
    assert shown("a\tb\nc é \x1b]0;title\x07\u2066") == "a\tb\nc é \\x1b]0;title\\x07\\u2066"


MANY = {
    "objects": b"[" + b"{}," * 3_000_000 + b"{}]",
    "lists": b"[" + b"[]," * 3_000_000 + b"[]]",
    "keys": b"{" + b",".join(b'"%d":0' % number for number in range(2_500_000)) + b"}",
}


@pytest.mark.parametrize("text", MANY.values(), ids=MANY.keys())
def test_small_values_by_the_million_are_counted_and_not_read(text: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"values or more; at most 2,000,000 are read"):
        read_json(file)
    assert tracemalloc.get_traced_memory()[1] < len(text) + 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\udc80", "{"])
def test_json_that_a_parser_stumbles_over_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="a plan is not JSON"):
        parse_json(text, "a plan", PlanError)


def test_what_json_may_hold_is_read() -> None:
    data = {"rope_theta": 1e9, "time_step_limit": [0.0, float("inf")], "name": "é\ud800", "ids": list(range(1000))}
    assert parse_json(json.dumps(data).encode(), "a file") == data


@pytest.mark.parametrize(
    "text",
    [
        "a: !!int x", "a: !!float z", "a: !!timestamp 1", "a: !!binary é", "!!python/name:os.system",
        "a: !!bool perhaps", "a: 2001-13-45", "? [a]\n: b", "? {a: b}\n: c", "a: &x [*x]", "a: \x07", "[" * 3000,
        "!!set [a]", "<<: x",
    ],
)  # fmt: skip
def test_yaml_that_a_parser_stumbles_over_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(EvaluationError, match=r"recipe\.yaml cannot be read as YAML") as refused:
        read_yaml(file, EvaluationError)
    assert "\n" not in str(refused.value)


def test_a_large_yaml_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("- a\n" * 300_000)
    with pytest.raises(EvaluationError, match="too large"):
        read_yaml(tmp_path / "recipe.yaml", EvaluationError)


BAD_NAMES: dict[str, Callable[[Path], Any]] = {
    "too long": lambda folder: folder / ("a" * 300),
    "far too long": lambda folder: folder / "/".join(["a" * 200] * 30),
    "with a zero byte": lambda folder: folder / "a\0b",
}


@pytest.mark.parametrize("named", BAD_NAMES.values(), ids=BAD_NAMES.keys())
def test_a_name_that_no_file_can_have_is_no_file(named: Callable[[Path], Path], tmp_path: Path) -> None:
    assert not is_file(named(tmp_path))
