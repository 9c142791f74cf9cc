"""Two processes plan, refit and refine as one does; where one is killed the other ends, and both go on later."""

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import headshare.files.state_files
from headshare.calibration.refit.refinement import REFINEMENTS, Refinement
from headshare.calibration.refit.refitter import Refitter
from headshare.calibration.refit.steps import block_steps, whole_steps
from support import tiny
from support.command_line import Run, assert_one_error_line
from support.folders import WEIGHTS, left_behind
from support.launched import launched
from support.texts import add_tokenizer

TEXT = ["--calibration", "text", "--calibration-window", "16", "--calibration-tokens", "320"]
REMOVAL = ["share", "model", "out", "--refit", *TEXT, "--save", "6%", "--allow", "remove"]
TIES = ["share", "model", "out", "--refit", *TEXT, "--save", "3%", "--parts", "qkv+qkvo", "--allow", "none"]


def made(out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a command wrote: its plan with the record of the refit, and the weights. The folder is moved away."""
    read = json.loads((out / "config.json").read_text())["quantization_config"], load_file(out / WEIGHTS)
    out.rename(out.with_name(f"out-{len(list(out.parent.iterdir()))}"))
    return read


def made_by_one(run: Run, words: list[str], things: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    found = run(*words)
    assert found.status == 0, found.err
    return made(things / "out")


def made_by_two(words: list[str], things: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    first, other = launched(words, things)
    assert (first.status, other.status) == (0, 0), first.err + other.err
    assert "Written" in first.out
    assert other.out == other.err == ""
    assert left_behind(things) == []
    return made(things / "out")


def assert_same(one: tuple[Any, dict[str, torch.Tensor]], two: tuple[Any, dict[str, torch.Tensor]]) -> None:
    """The same plan and record, and weights that differ by rounding."""
    assert one[0] == two[0]
    assert set(one[1]) == set(two[1])
    for name, tensor in two[1].items():
        torch.testing.assert_close(tensor, one[1][name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("words", [REMOVAL, TIES], ids=["removal", "ties"])
def test_two_processes_give_what_one_gives(words: list[str], things: Path, run: Run) -> None:
    assert_same(made_by_one(run, words, things), made_by_two(words, things))


@pytest.mark.parametrize(("refine", "steps"), [("3", block_steps), ("best", whole_steps)], ids=["layers", "whole"])
def test_two_processes_take_the_gradient_steps_that_one_takes(
    refine: str, steps: ModuleType, things: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = steps._held_out
    looks = itertools.count(1)  # each is better than the last: the text is too short for real ones
    monkeypatch.setattr(steps, "_held_out", lambda *given: measured(*given) * 0 + 1 / next(looks))
    monkeypatch.setitem(REFINEMENTS, "best", Refinement(0, 64, whole=3, whole_rate=1e-3))
    # every layer has an error that is far from rounding, since a step is as long however small the gradient is
    add_tokenizer(tiny.make_llama(things / "large", initializer_range=0.2))
    words = ["share", "large", "out", "--refit", *TEXT, "--save", "20%", "--allow", "remove", "--refine", refine]
    one, two = made_by_one(run, words, things), made_by_two(words, things)
    assert "model.layers.3.mlp.up_proj.weight" in one[0]["refit"]["tensors"]
    assert one[0] == two[0]
    # A step is 1e-3 long, and of either sign for the few numbers whose gradient is next to nothing. Later layers make
    # more of that, as they do of one process's rounding in batches of another size.
    first = [name for name in one[1] if name.startswith("model.layers.0.")]
    apart = torch.cat([(two[1][name] - one[1][name]).flatten() for name in first])
    assert apart.square().mean().sqrt() < 2e-5


def killing(rank: int, name: str, number: int) -> Callable[[int], None]:
    """Kill the process of this rank once it has written so many state files whose name has this in it."""

    def begin(own: int) -> None:
        write = headshare.files.state_files.write_whole
        calls = itertools.count(1)

        def step(path: Path, data: bytes) -> None:
            write(path, data)
            if name in path.name and next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        if own == rank:
            headshare.files.state_files.write_whole = step  # type: ignore[assignment]

    return begin


def noting(things: Path) -> Callable[[int], None]:
    """Note the layer at which a process goes on with a stopped refit."""
    resume = Refitter.resume

    def begin(rank: int) -> None:
        def noted(self: Refitter, layer: int, *given: Any) -> None:
            (things / f"went on {rank}").write_text(str(layer))
            resume(self, layer, *given)

        Refitter.resume = noted  # type: ignore[method-assign]

    return begin


def test_two_processes_go_on_though_either_was_killed(things: Path, run: Run) -> None:
    whole = made_by_one(run, REMOVAL, things)

    # the first one while layers are priced, the second one while they are refitted
    found = launched(REMOVAL, things, first=killing(0, "prices", 2))
    assert found[0].status == -signal.SIGKILL
    assert found[1].status == 1
    assert found[1].err.startswith("error: another process of this run has ended")
    assert found[1].err.count("\n") == 1
    (state,) = things.glob(".out*")
    priced = {path: path.stat().st_mtime_ns for path in state.glob("prices*")}
    assert len(priced) == 2

    found = launched(REMOVAL, things, first=killing(1, "refit", 3))
    assert [each.status for each in found] == [1, -signal.SIGKILL]
    assert "another process of this run has ended" in found[0].err
    assert not (things / "out").exists()
    assert {path: path.stat().st_mtime_ns for path in priced} == priced

    # one process alone has no streams to go on from
    refused = run(*REMOVAL)
    assert_one_error_line(refused)
    assert "it had another number of processes" in refused.err

    found = launched(REMOVAL, things, first=noting(things))
    assert [each.status for each in found] == [0, 0], found[0].err
    assert [(things / f"went on {rank}").read_text() for rank in range(2)] == ["2", "2"]
    assert left_behind(things) == []
    assert_same(whole, made(things / "out"))


def test_fewer_windows_than_processes_are_one_error(things: Path) -> None:
    words = ["plan", "model", "--save", "3%", "--no-probe", *TEXT[:-1], "32"]
    first, other = launched(words, things)
    assert (first.status, first.out) == (other.status, other.out) == (1, "")
    assert first.err == (
        "error: 2 processes cannot share 1 window to fit to, as each needs one. Ask for more tokens, for a smaller "
        "window, or for fewer processes.\n"
    )
    assert other.err == ""
    assert left_behind(things) == []


def test_memory_that_runs_out_is_an_error_that_says_what_to_lower(
    things: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error code 12")

    monkeypatch.setattr(Refitter, "advance", none_left)
    found = run(*REMOVAL)
    assert_one_error_line(found)
    assert "--calibration-tokens" in found.err
    assert "--calibration-window" in found.err
