"""Calibrated runs: killed at any moment they go on to the same bytes, and never from another run's state."""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import headshare as hs
import headshare.calibration.costs.local
import headshare.calibration.costs.measured
import headshare.calibration.refit.reconstruction
import headshare.calibration.run
import headshare.cli.app
import headshare.files.folder
import headshare.files.resume
import headshare.files.state_files
import headshare.sharing.writer
import tiny
from headshare.calibration.budget import budget_of
from headshare.calibration.choose import plan_on
from headshare.calibration.costs.to_plan import Budgeted
from headshare.calibration.measure import measure
from headshare.calibration.run import Setting, calibrated_run
from headshare.checkpoint.fingerprint import fingerprint
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import CalibrationError, CheckpointError, OutputError, PlanError
from headshare.evaluation.verify import verify
from headshare.files.resume import Workspace, settle, workspace_of
from headshare.text.tokens import calibration_from
from test_cli import Run, a_text, add_tokenizer, assert_one_error_line, runs  # noqa: F401 - runs is the fixture run
from test_safety import contents, in_child, left_behind

WEIGHTS = "model.safetensors"
TEXT = ["--calibration", "text", "--calibration-window", "16", "--calibration-tokens", "256"]
BY_OUTPUT = ["share", "model", "out", "--match", "output", "--parts", "qkv", "--refit", *TEXT]
REFIT = ["refit", "shared", *TEXT]
PLAN = ["plan", "model", "-o", "plan.json", "--save", "3%", "--allow", "remove", *TEXT]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, shared too, and a text with more windows than are asked for."""
    folder = tmp_path_factory.mktemp("source")
    opened = hs.open_checkpoint(add_tokenizer(tiny.make_llama(folder / "model")))
    hs.share(opened, hs.make_plan(hs.score_units(opened), 0.5)).save(folder / "shared")
    a_text(folder / "text", 600)
    return folder


@pytest.fixture
def things(source: Path, tmp_path: Path, run: Run) -> Path:
    """These in the folder that commands run in: the model by a link, and a copy of the shared one that names it so."""
    (tmp_path / "model").symlink_to(source / "model")
    (tmp_path / "text").write_bytes((source / "text").read_bytes())
    copy_of(source / "shared", tmp_path / "shared")
    return tmp_path


def copy_of(folder: Path, out: Path) -> Path:
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    edit(out, lambda entry: entry.update(base_model="model"))
    (out / "headshare.json").unlink()  # its digest of config.json is of the other name
    return out


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def entry_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert isinstance(found, dict)
    return found


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
    monkeypatch.setattr("headshare.calibration.refit.refitter.Refitter._solve", again)
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
        assert killed([*BY_OUTPUT, "--overwrite"], (headshare.files.resume.Workspace, "_empty"), 1, after=after)
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
    "before the state is removed": ((headshare.files.resume.Workspace, "_empty"), 1, False),
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
    assert [name for name in left_behind(things) if "calibrating" in name] == []


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
    return workspace_of(things / "out")


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
    [["--parts", "qk"], ["--protect", "2"], ["--no-probe"], ["--no-refit-ffn"], ["--reconstruct", "4"]],
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
        setting = Setting("text", 256, 16)
        with calibrated_run(dense, Path("out"), setting):
            for more in ([], ["--restart"]):
                found = run(*BY_OUTPUT, *more)
                assert_one_error_line(found)
                assert "another run" in found.err
            assert run(*BY_OUTPUT[:2], "elsewhere", *BY_OUTPUT[3:]).status == 0
        with calibrated_run(dense, Path("out"), setting):
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


def test_no_name_of_a_tensor_reaches_outside_the_state(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "state", {"model": "one"})
    tensors = work.tensors("some")
    names = ["../../up", "a/b", "plain.weight", ".."]
    for number, name in enumerate(names):
        tensors[name] = torch.full((2,), float(number))
    assert sorted(tensors) == sorted(names)
    assert [float(tensors[name][0]) for name in names] == [0, 1, 2, 3]
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {work.folder, work.folder / "some"}
    del tensors[".."]
    assert ".." not in tensors
    with pytest.raises(KeyError):
        tensors[".."]
    work.close()


def test_state_is_json_and_safetensors_and_never_a_pickle(stopped: Path) -> None:
    files = [path for path in stopped.rglob("*") if path.is_file()]
    assert {path.suffix for path in files if "partial" not in path.name} == {".json", ".safetensors"}
    assert not any(path.read_bytes().startswith((b"\x80", b"PK")) for path in files)


@pytest.mark.parametrize("length", [120, 240])
def test_a_long_name_has_a_state_of_its_own(length: int, tmp_path: Path) -> None:
    one, other = (workspace_of(tmp_path / ("x" * length + end)) for end in "ab")
    assert one != other
    Workspace(one, {}).close()


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


# ---- what is predicted, and what is measured


def by_hand(folder: Path, rows: torch.Tensor) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        losses = [model(input_ids=row[None], labels=row[None]).loss.double() for row in rows]
    return float(torch.stack(losses).mean().exp())


@pytest.fixture
def loud(things: Path) -> Path:
    """The same folder with a model whose units matter to what it predicts; those of the other one hardly do."""
    (things / "model").unlink()
    add_tokenizer(tiny.make_llama(things / "model", initializer_range=0.15))
    return things


def planned(*, probe: bool) -> Budgeted:
    """What PLAN asks for, without the command."""
    with hs.open_checkpoint("model") as dense:
        text = calibration_from("text", dense, tokens=256, window=16)
        return plan_on(dense, text, budget_of(dense, save="3%", allow=["remove"]), probe=probe)


def test_a_plan_of_a_model_has_its_price_beside_what_its_refit_measures(loud: Path, run: Run) -> None:
    data = run(*PLAN, "--json").data
    assert left_behind(loud) == []
    assert data["price"] > 0
    assert (data["price"], data["price_unit"]) == (planned(probe=True).price, "nats")
    assert data["saved_bytes"] >= int(0.03 * sum(one.nbytes for one in load_file(loud / "model" / WEIGHTS).values()))
    assert run("share", "model", "out", "--plan", "plan.json", "--refit", *TEXT).status == 0
    with hs.open_checkpoint("model") as dense:
        held = calibration_from("text", dense, tokens=256, window=16).split()[1].tokens
    assert data["measured"]["dense"] == pytest.approx(by_hand(loud / "model", held), rel=1e-5)
    assert data["measured"]["shared"] == pytest.approx(by_hand(loud / "out", held), rel=1e-5)
    assert data["measured"]["shared"] != data["measured"]["dense"]
    assert (data["measured"]["tokens"], data["measured"]["window"]) == (held.numel() - len(held), 16)
    words = run(*PLAN, "--overwrite").out
    assert f"divergence from the dense model {data['price']:.4g} nats a token" in words
    assert f"{data['measured']['shared']:,.3f}, dense {data['measured']['dense']:,.3f}" in words


def test_without_probing_a_plan_is_priced_in_relative_errors(loud: Path, run: Run) -> None:
    found = planned(probe=False)
    assert not found.in_nats
    assert found.plan != planned(probe=True).plan
    data = run(*PLAN, "--no-probe", "--no-measure", "--json").data
    assert (data["price"], data["price_unit"]) == (found.price, "relative error")
    assert hs.SharePlan.load(loud / "plan.json") == found.plan
    words = run(*PLAN, "--no-probe", "--no-measure", "--overwrite").out
    assert f"predicted price {found.price:.6g} (sum of squared relative errors)" in words
    assert "nats" not in words


def test_share_says_what_it_predicts_as_plan_does(loud: Path, run: Run) -> None:
    data = run(*BY_OUTPUT, "--json").data
    assert data["price_unit"] == "nats"
    assert 0 < data["price"] < 1
    assert "sum of squared relative errors" in run(*BY_OUTPUT, "--no-probe", "--overwrite").out
    again = run(*BY_OUTPUT, "--no-probe", "--overwrite", "--json").data
    assert again["price_unit"] == "relative error"
    planned(probe=False).plan.save(loud / "plan.json")
    given = run("share", "model", "out", "--plan", "plan.json", "--refit", *TEXT, "--overwrite", "--json").data
    assert (given["price"], given["price_unit"]) == (None, None)


def test_a_plan_that_is_not_measured_is_the_same_plan(things: Path, run: Run) -> None:
    measured = run(*PLAN, "--json").data
    data = run(*PLAN, "--overwrite", "--no-measure", "--json").data
    assert data["measured"] is None
    assert {**data, "measured": 0} == {**measured, "measured": 0}


def test_share_measures_what_it_wrote_if_asked(things: Path, run: Run) -> None:
    data = run(*BY_OUTPUT, "--measure", "--json").data
    with hs.open_checkpoint("model") as dense:
        held = calibration_from("text", dense, tokens=256, window=16).split()[1]
    assert data["measured"] == measure(hs.open_checkpoint("model"), things / "out", held).to_dict()
    assert data["measured"]["shared"] == pytest.approx(by_hand(things / "out", held.tokens), rel=1e-5)
    assert data["refitted_tensors"] == len(RefitRecord.from_dict(entry_of(things / "out")["refit"]).tensors) > 0


def test_an_encoder_is_refitted_and_says_that_it_has_no_perplexity(things: Path, run: Run) -> None:
    add_tokenizer(tiny.make("bert", things / "bert"), bos=False)
    words = ["share", "bert", "out", "--ratio", "0.5", "--refit", "--measure", *TEXT]
    data = run(*words, "--json").data
    assert (data["measured"]["dense"], data["measured"]["shared"]) == (None, None)
    assert "encoder" in data["measured"]["note"]
    assert data["refitted_tensors"] > 0
    assert verify(hs.open_checkpoint("out"), hs.open_checkpoint("bert")).ok
    assert "not measured: BertForMaskedLM is an encoder" in run(*words, "--overwrite").out


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_an_encoder_is_planned_by_relative_errors_as_it_predicts_no_next_token(
    name: str, things: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_tokenizer(tiny.make(name, things / name), bos=False)
    monkeypatch.setattr("headshare.calibration.choose.probe_prices", None)
    data = run("plan", name, "-o", "plan.json", "--save", "3%", *TEXT, "--no-measure", "--json").data
    assert data["price_unit"] == "relative error"
    assert data["price"] > 0
    assert data["ties"] > 0


@pytest.mark.parametrize(("save", "allow"), [("3%", []), ("5000", ["remove"])])
def test_a_budget_is_met(save: str, allow: list[str], source: Path) -> None:
    with hs.open_checkpoint(source / "model") as dense:
        whole = sum(tensor.nbytes for tensor in load_file(source / "model" / WEIGHTS).values())
        budget = budget_of(dense, save=save, allow=allow)
    assert budget.saved_bytes == (5000 if save == "5000" else int(whole * 0.03))


# ---- the record of a refit


def test_a_refit_names_what_it_changed_and_verify_says_what_it_did_not_compare(things: Path, run: Run) -> None:
    assert run(*REFIT).status == 0
    words = run("inspect", "shared").out
    assert words.rstrip().splitlines()[-1].endswith("tensors refitted on 256 tokens of text")
    data = run("inspect", "shared", "--json").data
    assert (data["refit"]["tokens"], data["refit"]["window"], data["base_model"]) == (256, 16, "model")
    found = verify(hs.open_checkpoint("shared"), hs.open_checkpoint("model"))
    assert found.ok
    assert any("not compared" in note and "refitted on 256 tokens" in note for note in found.notes)
    dense, shared = (load_file(things / name / WEIGHTS) for name in ("model", "shared"))
    changed = {name for name, tensor in shared.items() if not torch.equal(tensor, dense[name][: len(tensor)])}
    assert set(entry_of(things / "shared")["refit"]["tensors"]) == {name for name in changed if "_proj" in name} - {
        name for name in changed if any(part in name for part in ("q_proj", "k_proj", "v_proj"))
    }


def test_verify_finds_a_changed_tensor_that_was_not_refitted(things: Path, run: Run) -> None:
    assert run(*REFIT).status == 0
    tensors = load_file(things / "shared" / WEIGHTS)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, things / "shared" / WEIGHTS, metadata={"format": "pt"})
    (things / "shared" / "headshare.json").unlink()
    found = verify(hs.open_checkpoint("shared"), hs.open_checkpoint("model"))
    assert not found.ok
    assert "model.norm.weight" in found.problems[0]


def test_verify_does_not_believe_a_record_that_names_what_no_refit_changes(things: Path, run: Run) -> None:
    assert run(*REFIT).status == 0
    tensors = load_file(things / "shared" / WEIGHTS)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, things / "shared" / WEIGHTS, metadata={"format": "pt"})
    edit(things / "shared", lambda entry: entry["refit"]["tensors"].append("model.norm.weight"))
    (things / "shared" / "headshare.json").unlink()
    found = verify(hs.open_checkpoint("shared"), hs.open_checkpoint("model"))
    assert not found.ok
    assert "model.norm.weight" in found.problems[0]


def test_a_second_refit_starts_from_the_first_and_remembers_what_that_changed(things: Path, run: Run) -> None:
    a_text(things / "other", 600, seed=5)
    assert run(*REFIT, "--out", "once").status == 0
    assert run("refit", "once", *REFIT[2:], "--calibration", "other", "--no-refit-ffn", "--out", "twice").status == 0
    once, twice = (load_file(things / name / WEIGHTS) for name in ("once", "twice"))
    changed = {name for name in once if not torch.equal(once[name], twice[name])}
    assert changed
    assert all(name.endswith("o_proj.weight") for name in changed)
    records = [entry_of(things / name)["refit"] for name in ("once", "twice")]
    assert set(records[1]["tensors"]) >= set(records[0]["tensors"])
    assert (records[0]["text"], records[1]["text"]) == ("text", "other")
    assert verify(hs.open_checkpoint("twice"), hs.open_checkpoint("model")).ok
    assert run("refit", "once", *REFIT[2:], "--calibration", "other", "--no-refit-ffn").status == 0  # in place
    assert contents(things / "once") == contents(things / "twice")
    assert left_behind(things) == []


def test_gradient_steps_change_more_than_readouts_and_the_record_says_which(
    things: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = itertools.count(1)  # every look is better than the last: the text is too short for real ones
    monkeypatch.setattr(headshare.calibration.refit.reconstruction, "_held_out", lambda *_: 1 / next(errors))
    share = [*BY_OUTPUT[:2], "stepped", *BY_OUTPUT[3:], "--reconstruct", "8"]
    assert run(*share).status == 0
    assert run(*REFIT, "--reconstruct", "8", "--out", "again").status == 0
    for name in ("stepped", "again"):
        named = set(entry_of(things / name)["refit"]["tensors"])
        assert any(tensor.endswith("up_proj.weight") for tensor in named)
        found = verify(hs.open_checkpoint(name), hs.open_checkpoint("model"))
        assert found.ok, found.problems
        assert found.tensors_checked  # embeddings, norms, and layers before the first that gives something up
    found = run(*REFIT, "--reconstruct", "-1")
    assert found.status != 0
    assert "--reconstruct" in found.err


def test_a_record_and_the_dense_models_name_survive_loading_and_saving(things: Path, run: Run) -> None:
    assert run(*REFIT).status == 0
    transformers.AutoModelForCausalLM.from_pretrained("shared").save_pretrained("again")
    before, after = entry_of(things / "shared"), entry_of(things / "again")
    assert after == before
    records = [hs.open_checkpoint(name).require_sharing().refit for name in ("again", "shared")]
    assert records[0] == records[1] is not None
    add_tokenizer(things / "again")
    assert verify(hs.open_checkpoint("again"), hs.open_checkpoint("model")).ok
    assert run("refit", "again", *TEXT).status == 0


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a list": lambda entry: entry.update(refit=[]),
    "a text": lambda entry: entry.update(refit="x"),
    "a number": lambda entry: entry.update(refit=5),
    "nothing in it": lambda entry: entry.update(refit={}),
    "another key": lambda entry: entry["refit"].update(more=1),
    "tokens below zero": lambda entry: entry["refit"].update(tokens=-1),
    "tokens as text": lambda entry: entry["refit"].update(tokens="5"),
    "tokens without end": lambda entry: entry["refit"].update(tokens=float("inf")),
    "a seed without end": lambda entry: entry["refit"].update(seed=10**400),
    "a terminal's escape": lambda entry: entry["refit"].update(text="\x1b[2Jgone"),
    "two lines": lambda entry: entry["refit"].update(text="one\ntwo"),
    "half a character": lambda entry: entry["refit"].update(text="\ud800"),
    "a long text": lambda entry: entry["refit"].update(text="x" * 513),
    "no digest": lambda entry: entry["refit"].update(text_digest="x" * 64),
    "a tensor that is a list": lambda entry: entry["refit"].update(tensors=[[]]),
    "tensors that are a text": lambda entry: entry["refit"].update(tensors="abc"),
    "a tensor of two lines": lambda entry: entry["refit"].update(tensors=["a\nb"]),
    "deep": lambda entry: entry["refit"].update(tensors=json.loads("[" * 100 + "]" * 100)),
    "a key of two lines": lambda entry: entry["refit"].update({"a\nb\x1b": 1}),
}


@pytest.fixture(scope="module")
def recorded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_of(source / "shared", tmp_path_factory.mktemp("recorded") / "shared")
    record = RefitRecord.of(["a.weight"], "text", "0" * 64, windows=(2, 16), seed=0)
    edit(folder, lambda entry: entry.update(refit=record.model_dump(mode="json")))
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_record_is_one_error_wherever_it_is_read(name: str, recorded: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    for path in recorded.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    edit(folder, HOSTILE[name])
    for command in ("inspect", "verify"):
        found = run(command, folder)
        assert_one_error_line(found)
        assert "refit" in found.err
        assert found.err.rstrip("\n").isprintable()
    with pytest.raises(CheckpointError, match="refit"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", [5, [], {"a": 1}, "x" * 600, "two\nlines", "\x1b[2J"])
def test_a_hostile_name_of_the_dense_model_is_no_name(name: object, recorded: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    for path in recorded.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    edit(folder, lambda entry: entry.update(base_model=name))
    a_text(tmp_path / "text", 300)
    found = run("refit", folder, *TEXT)
    assert_one_error_line(found)
    assert "--dense" in found.err
    assert hs.load(folder).config.quantization_config.sharing.base_model is None


def test_what_cannot_be_shown_of_a_texts_name_is_left_out_of_the_record() -> None:
    record = RefitRecord.of(["a"], "a\n\x1b\udcff" + "b" * 600, "0" * 64, windows=(1, 2), seed=3)
    assert record.text.startswith("a???b")
    assert len(record.text) == 512
    assert RefitRecord.from_dict(record.model_dump(mode="json")) == record


# ---- refit, and what it may not lose


def test_a_refit_that_fails_keeps_the_old_folder(things: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(things / "shared")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("headshare.sharing.writer.write_safetensors", full)
        found = run(*REFIT)
        assert_one_error_line(found)
        assert contents(things / "shared") == before
    assert run(*REFIT).status == 0
    assert left_behind(things) == []


@pytest.mark.parametrize("name", ["optimizer.pt", ".git/config", "more/model.safetensors"])
def test_a_refit_in_place_refuses_to_lose_files_that_would_not_come_along(name: str, things: Path, run: Run) -> None:
    (things / "shared" / name).parent.mkdir(exist_ok=True)
    (things / "shared" / name).write_bytes(b"precious")
    (things / "shared" / "notes.md").write_text("too")
    before = contents(things / "shared")
    found = run(*REFIT)
    assert_one_error_line(found)
    assert name in found.err
    assert "--out" in found.err
    assert contents(things / "shared") == before
    assert left_behind(things) == []
    assert run(*REFIT, "--out", "new").status == 0
    assert (things / "new" / "notes.md").read_text() == "too"


def test_a_refit_in_place_follows_a_link_and_keeps_it(things: Path, run: Run) -> None:
    (things / "link").symlink_to("shared")
    before = contents(things / "shared")
    assert run("refit", "link", *TEXT).status == 0
    assert (things / "link").is_symlink()
    assert contents(things / "shared") != before


def test_a_refit_with_dense_remembers_it_where_nothing_was_named(things: Path, run: Run) -> None:
    edit(things / "shared", lambda entry: entry.pop("base_model"))
    found = run(*REFIT)
    assert_one_error_line(found)
    assert "--dense" in found.err
    assert run(*REFIT, "--dense", "model").status == 0
    assert entry_of(things / "shared")["base_model"] == "model"
    assert run(*REFIT).status == 0


def test_settling_where_nothing_was_stopped_does_nothing(tmp_path: Path) -> None:
    assert settle(tmp_path / "out") is None
    assert list(tmp_path.iterdir()) == []


def test_a_workspace_cannot_stand_where_a_file_is(tmp_path: Path) -> None:
    workspace_of(tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError):
        Workspace(workspace_of(tmp_path / "out"), {})


def test_a_checkpoint_that_was_written_again_is_another(source: Path, tmp_path: Path) -> None:
    folder = copy_of(source / "shared", tmp_path / "shared")
    before = fingerprint(hs.open_checkpoint(folder))
    os.utime(folder / WEIGHTS, (1, 1))
    assert fingerprint(hs.open_checkpoint(folder)) != before


def test_a_device_that_is_not_here_is_refused() -> None:
    assert headshare.calibration.run.device_named("cpu") == "cpu"
    for name in ("cuda:999", "tpu", "", "cpu;"):
        with pytest.raises(CalibrationError, match="no device"):
            headshare.calibration.run.device_named(name)
