"""Calibrated runs: killed at any moment they go on to the same bytes, and never from another run's state."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import headshare as hs
import headshare.calibration.costs.local
import headshare.calibration.costs.measured
import headshare.calibration.run
import headshare.cli.app
import headshare.files.folder
import headshare.files.resume
import headshare.files.state_files
import headshare.sharing.writer
from headshare.calibration.run import calibrated_run
from headshare.calibration.settings import CalibrationSettings
from headshare.checkpoint.fingerprint import fingerprint
from headshare.errors import CalibrationError, PlanError
from headshare.files.resume import run_folder
from support import tiny
from support.calibrated import BY_OUTPUT, PLAN, REFIT, copy_of
from support.command_line import Run, assert_one_error_line
from support.folders import WEIGHTS, contents, left_behind
from support.processes import in_child
from support.texts import a_text, add_tokenizer

# ---- killed, and run again


def killing(monkeypatch_place: tuple[Any, str], number: int, *, after: bool = False, on: str = "") -> None:
    """In a child: kill this process at the given call of a function, before or after it does its work. Only calls
    count that are about something of this name."""
    module, name = monkeypatch_place
    work, calls = getattr(module, name), iter(range(10_000))

    def step(*arguments: Any, **options: Any) -> Any:
        last = (not on or on in str(arguments[0])) and next(calls) == number
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = work(*arguments, **options)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(module, name, step)


def killed(words: list[str], place: tuple[Any, str], number: int, *, after: bool = False, on: str = "") -> bool:
    """Run a command in a child that is killed there; False if it ended before it came so far."""

    def child() -> None:
        killing(place, number, after=after, on=on)
        sys.argv = ["headshare", *words]
        try:
            headshare.cli.app.main()
        except SystemExit as ended:
            assert not ended.code

    status = in_child(child)
    assert status in (0, -signal.SIGKILL)
    return status != 0


STATE = (headshare.files.state_files, "write_whole")
LAYERS = 4  # each priced, and all but layer 0, which ties nothing, measured
PLACES = {
    "before the state is begun": (STATE, "", 0, False),
    "after layer 1 is priced": (STATE, "prices", 1, True),
    "when all are priced": (STATE, "prices", LAYERS, False),
    "after layer 2 is measured": (STATE, "prices", LAYERS + 1, True),
    "at a refitted tensor": (STATE, "_proj", 0, False),
    "between two of them": (STATE, "_proj", 0, True),
    "later still": (STATE, "_proj", 1, True),
    "in the middle of the weight file": ((headshare.sharing.writer, "stream"), "", 5, False),
    "before the folder has its name": ((headshare.files.folder, "_put_in_place"), "", 0, False),
}


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What share, refit and plan write when nothing stops them."""
    folder = tmp_path_factory.mktemp("whole")
    here = Path.cwd()
    os.chdir(folder)
    try:
        (folder / "model").symlink_to(source / "model")
        (folder / "text").write_bytes((source / "text").read_bytes())
        copy_of(source / "shared", folder / "shared")
        for words in (BY_OUTPUT, REFIT, PLAN):
            assert not in_child(lambda words=words: quietly(words))
    finally:
        os.chdir(here)
    (folder / "planned").mkdir()
    (folder / "plan.json").rename(folder / "planned" / "plan.json")
    return {name: contents(folder / name) for name in ("out", "shared", "planned")}


def quietly(words: list[str]) -> None:
    sys.argv = ["headshare", *words]
    try:
        headshare.cli.app.main()
    except SystemExit as ended:
        assert not ended.code


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_a_killed_share_goes_on_to_the_same_bytes(
    place: tuple[Any, str, int, bool],
    uninterrupted: dict[str, dict[str, str]],
    things: Path,
    run: Run,
) -> None:
    where, on, number, after = place
    assert killed(BY_OUTPUT, where, number, after=after, on=on)
    assert not (things / "out").exists()
    assert run(*BY_OUTPUT).status == 0
    assert contents(things / "out") == uninterrupted["out"]
    assert left_behind(things) == []


def test_a_run_goes_on_and_does_not_begin_anew(
    things: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert killed(BY_OUTPUT, (headshare.files.folder, "_put_in_place"), 0)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("it was done already")

    monkeypatch.setattr("headshare.calibration.costs.local._paths", again)
    monkeypatch.setattr("headshare.calibration.costs.measured._Walk", again)
    monkeypatch.setattr("headshare.calibration.refit.layer_fit.LayerFit._solve", again)
    assert run(*BY_OUTPUT).status == 0


def test_a_run_that_was_killed_while_it_measured_prices_nothing_again_and_measures_the_rest(
    uninterrupted: dict[str, dict[str, str]], things: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert killed(BY_OUTPUT, STATE, LAYERS, on="prices", after=True)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("it was done already")

    measured, priced = [], headshare.calibration.costs.measured._Walk._priced

    def noting(self: Any, layer: int, paths: Any) -> Any:
        measured.append(layer)
        return priced(self, layer, paths)

    monkeypatch.setattr("headshare.calibration.costs.local._paths", again)
    monkeypatch.setattr("headshare.calibration.costs.measured._Walk._priced", noting)
    assert run(*BY_OUTPUT).status == 0
    assert measured == [2, 3]
    assert contents(things / "out") == uninterrupted["out"]


def test_a_share_killed_when_its_output_was_there_leaves_no_state_to_the_next(
    uninterrupted: dict[str, dict[str, str]],
    things: Path,
    run: Run,
) -> None:
    for after in (False, True):
        assert killed([*BY_OUTPUT, "--overwrite"], (headshare.files.resume, "_empty"), 1, after=after)
        assert contents(things / "out") == uninterrupted["out"]
        assert_one_error_line(found := run(*BY_OUTPUT))
        assert "exists" in found.err
        assert left_behind(things) == []


REFIT_PLACES = {
    "before the first tensor": (STATE, 1, False),
    "between the streams and the progress": (STATE, 4, True),
    "in a later layer": (STATE, 9, False),
    "before the folders are exchanged": ((headshare.files.folder, "_exchange"), 0, False),
    "after the folders are exchanged": ((headshare.files.folder, "_exchange"), 0, True),
    "before the state is removed": ((headshare.files.resume, "_empty"), 1, False),
}


@pytest.mark.parametrize("place", REFIT_PLACES.values(), ids=REFIT_PLACES.keys())
def test_a_killed_refit_in_place_goes_on_to_the_same_bytes_and_refits_once(
    place: tuple[Any, int, bool],
    uninterrupted: dict[str, dict[str, str]],
    things: Path,
    run: Run,
) -> None:
    where, number, after = place
    before = contents(things / "shared")
    assert killed(REFIT, where, number, after=after)
    assert contents(things / "shared") in (before, uninterrupted["shared"])
    assert run(*REFIT).status == 0
    assert contents(things / "shared") == uninterrupted["shared"]
    assert left_behind(things) == []


@pytest.mark.parametrize(("on", "number"), [("prices", LAYERS + 1), ("refit", 3)])
def test_a_killed_plan_goes_on_to_the_same_bytes(
    on: str,
    number: int,
    uninterrupted: dict[str, dict[str, str]],
    things: Path,
    run: Run,
) -> None:
    assert killed(PLAN, STATE, number, on=on)
    assert run(*PLAN).status == 0
    (things / "planned").mkdir()
    (things / "plan.json").rename(things / "planned" / "plan.json")
    assert contents(things / "planned") == uninterrupted["planned"]
    assert left_behind(things) == []


# ---- whose state it is


@pytest.fixture
def stopped(things: Path) -> Path:
    """A share that was killed while it refitted. Its state."""
    assert killed(BY_OUTPUT, STATE, 1, on="_proj", after=True)
    return run_folder(things / "out", "calibrating")


CHANGED = {
    "text": ["--calibration", "other"],
    "seed": ["--seed", "1"],
    "text by its window": ["--calibration-window", "32"],
    "text by its length": ["--calibration-tokens", "128"],
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_state_of_another_text_or_seed_is_refused_and_kept(what: str, stopped: Path, things: Path, run: Run) -> None:
    a_text(things / "other", 600, seed=1)
    before = contents(stopped)
    found = run(*BY_OUTPUT, *CHANGED[what])
    assert_one_error_line(found)
    assert what.split()[0] in found.err
    assert "--restart" in found.err
    assert contents(stopped) == before
    assert run(*BY_OUTPUT).status == 0


def test_a_seed_that_only_chooses_what_is_held_out_is_another_run(things: Path, run: Run) -> None:
    # A short text gives all its windows whatever the seed; which of them are held out is the seed's.
    a_text(things / "text", 160)
    assert killed(BY_OUTPUT, STATE, 0, on="_proj")
    found = run(*BY_OUTPUT, "--seed", "1")
    assert_one_error_line(found)
    assert "another seed" in found.err


def test_a_state_of_another_model_is_refused(stopped: Path, things: Path, run: Run) -> None:
    (things / "model").unlink()
    add_tokenizer(tiny.make_llama(things / "model", seed=1))
    found = run(*BY_OUTPUT)
    assert_one_error_line(found)
    assert "another model" in found.err


@pytest.mark.parametrize(
    "words",
    [["--parts", "qk"], ["--protect", "2"], ["--no-probe"], ["--no-refit-ffn"], ["--refine", "4"]],
    ids=" ".join,
)
def test_another_plan_or_setting_of_the_same_text_does_not_mix_with_what_was_done(
    words: list[str],
    stopped: Path,
    things: Path,
    run: Run,
) -> None:
    wanted = [word for word in BY_OUTPUT if word not in ("--parts", "qkv")] if "--parts" in words else BY_OUTPUT
    fresh = [*wanted[:2], "fresh", *wanted[3:], *words]
    assert run(*fresh).status == 0
    assert stopped.is_dir()  # a run to another output disturbs nothing
    assert run(*wanted, *words).status == 0
    assert contents(things / "out") == contents(things / "fresh")
    assert left_behind(things) == []


def test_restart_begins_anew(stopped: Path, things: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    priced = []
    paths = headshare.calibration.costs.local._paths
    monkeypatch.setattr(
        "headshare.calibration.costs.local._paths",
        lambda layer, *rest: (priced.append(layer.number), paths(layer, *rest))[1],
    )
    assert run(*BY_OUTPUT, "--seed", "1", "--restart").status == 0
    assert priced == [0, 1, 2, 3]
    assert left_behind(things) == []


def test_a_second_run_to_the_same_output_is_refused_while_the_first_is_on_its_way(things: Path, run: Run) -> None:
    with hs.open_checkpoint("model") as dense:
        settings = CalibrationSettings("text", 256, 16)
        with calibrated_run(dense, Path("out"), settings):
            for more in ([], ["--restart"]):
                found = run(*BY_OUTPUT, *more)
                assert_one_error_line(found)
                assert "another run" in found.err
            assert run(*BY_OUTPUT[:2], "elsewhere", *BY_OUTPUT[3:]).status == 0
        with calibrated_run(dense, Path("out"), settings):
            pass
    assert left_behind(things) == []


def damages(state: Path) -> Iterator[tuple[Path, str, bytes]]:
    for path in sorted(state.rglob("*")):
        if path.is_file():
            whole = path.read_bytes()
            yield path, "cut off", whole[: len(whole) // 2]
            yield path, "empty", b""
            yield path, "a bit at its beginning", bytes([whole[0] ^ 1]) + whole[1:]
            middle = len(whole) // 2
            yield path, "a bit in its middle", whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]


def test_a_damaged_state_is_one_error_that_says_restart_and_never_goes_into_the_result(
    stopped: Path,
    things: Path,
    uninterrupted: dict[str, dict[str, str]],
    run: Run,
) -> None:
    kinds = set()
    for path, damage, content in damages(stopped):
        whole, kind = path.read_bytes(), (path.suffix, path.name.split("-")[0][:6], damage)
        if kind in kinds:
            continue
        kinds.add(kind)
        path.write_bytes(content)
        found = run(*BY_OUTPUT)
        assert_one_error_line(found)
        assert "--restart" in found.err
        path.write_bytes(whole)
    assert len(kinds) > 8
    path.write_bytes(b"{")
    assert not (things / "out").exists()
    assert run(*BY_OUTPUT, "--restart").status == 0
    assert contents(things / "out") == uninterrupted["out"]


def test_a_refitted_tensor_that_is_missing_is_not_gone_on_without(
    uninterrupted: dict[str, dict[str, str]], things: Path, run: Run
) -> None:
    """The result would have the weights from before the refit, and nobody would know."""
    assert killed(BY_OUTPUT, STATE, 3, on="_proj", after=True)
    state = run_folder(things / "out", "calibrating")
    names = json.loads(next(state.glob("refit-*.json")).read_bytes()[:-32])["tensors"]
    for file in [path for path in state.rglob("*_proj*") if path.name.removesuffix(".safetensors") in names]:
        whole = file.read_bytes()
        file.unlink()
        found = run(*BY_OUTPUT)
        assert_one_error_line(found)
        assert "is not there" in found.err
        assert "--restart" in found.err
        file.write_bytes(whole)
    assert names
    assert run(*BY_OUTPUT).status == 0
    assert contents(things / "out") == uninterrupted["out"]


def test_state_is_json_and_safetensors_and_never_a_pickle(stopped: Path) -> None:
    files = [path for path in stopped.rglob("*") if path.is_file()]
    assert {path.suffix for path in files if "partial" not in path.name} == {".json", ".safetensors"}
    assert not any(path.read_bytes().startswith((b"\x80", b"PK")) for path in files)


def test_nothing_is_kept_of_a_run_that_failed_before_it_did_anything(things: Path, run: Run) -> None:
    (things / "text").write_text("w5 " * 20)
    found = run(*BY_OUTPUT)
    assert_one_error_line(found)
    assert "two windows" in found.err
    assert left_behind(things) == []


def test_nothing_is_kept_of_a_run_that_failed_when_it_was_to_begin(
    things: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PlanError("this model can have none of the forms asked for.")

    monkeypatch.setattr("headshare.calibration.choose.price_units", refuse)
    assert_one_error_line(run(*BY_OUTPUT))
    assert left_behind(things) == []


@pytest.mark.parametrize("command", ["plan", "share"])
def test_a_text_that_is_too_short_to_measure_predictions_on_is_one_error_before_anything_is_done(
    command: str, things: Path, run: Run
) -> None:
    a_text(things / "text", 32)  # two windows of 16, each opened by the token of a beginning
    words = PLAN if command == "plan" else BY_OUTPUT
    found = run(*words)
    assert_one_error_line(found)
    assert "text gave 2 windows" in found.err
    assert left_behind(things) == []  # else a longer text would be refused, as another run's
    assert run(*words, "--no-probe").status == 0


def test_a_checkpoint_that_was_written_again_is_another(source: Path, tmp_path: Path) -> None:
    folder = copy_of(source / "shared", tmp_path / "shared")
    before = fingerprint(hs.open_checkpoint(folder))
    os.utime(folder / WEIGHTS, (1, 1))
    assert fingerprint(hs.open_checkpoint(folder)) != before


def test_a_device_that_is_not_here_is_refused() -> None:
    assert CalibrationSettings("text", device="cpu").device_name == "cpu"
    for name in ("cuda:999", "tpu", "", "cpu;"):
        with pytest.raises(CalibrationError, match="no device"):
            _ = CalibrationSettings("text", device=name).device_name
