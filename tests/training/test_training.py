"""Runs of training measure what sharing gives, write checkpoints that load, and refuse what cannot be trained."""

import json
import random
from pathlib import Path as Folder
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.calibration.allocate import plan_for_bytes
from headshare.calibration.costs.actions import LOW_RANK, QKVO, REMOVE, Action
from headshare.calibration.costs.local import price_units
from headshare.errors import PlanError, TrainingError
from headshare.evaluation import Settings as Limited
from headshare.evaluation import measure
from headshare.integrations.transformers.loading import load_model
from headshare.text.tokens import Calibration
from headshare.training import SharingTrainer, TrainingMethod, train
from headshare.training.arguments import trainer_arguments
from headshare.training.windows import training_windows
from support import tiny
from support.texts import a_text, add_tokenizer
from support.trainings import CONTEXT, LONGER, PLAIN, curve_of, language_loss, plan_of, settings, states_close

# ---- what is measured and reported


def test_it_measures_the_loss_before_and_after_sharing_and_what_is_left_of_each_tie(
    model: Folder, text: Folder, tmp_path: Folder
) -> None:
    found = train(model, tmp_path / "out", settings(text, arguments={"max_steps": 6, "learning_rate": 0.05}))
    _, held = training_windows(hs.open_checkpoint(model), settings(text).text)
    direct = hs.share(hs.open_checkpoint(model), plan_of(model)).save(tmp_path / "direct")
    with torch.no_grad():
        before = language_loss(load_model(hs.open_checkpoint(model)), held.tokens.long()).item()
        shared = language_loss(hs.load(direct), held.tokens.long()).item()
        after = language_loss(hs.load(tmp_path / "out"), held.tokens.long()).item()
    assert found.loss_before == pytest.approx(before, rel=1e-5)
    assert found.shared_before == pytest.approx(shared, rel=1e-5)
    assert found.shared_after == pytest.approx(after, rel=1e-5)
    assert found.shared_after < found.shared_before
    assert found.steps == 6
    assert [one["step"] for one in found.curve if "eval_loss" in one] == list(range(7))
    assert len(found.ties) == plan_of(model).ties
    assert all(one.after < one.before for one in found.ties)
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["best_step"] == found.best_step
    assert len(record["ties"]) == len(found.ties)


def test_the_best_step_is_kept_and_not_the_last(model: Folder, text: Folder, tmp_path: Folder) -> None:
    """At this rate the text is learnt by heart, and what is held out gets worse."""
    arguments = {"max_steps": 40, "learning_rate": 0.02, "optim": "adamw_torch", "eval_steps": 2}
    found = train(model, tmp_path / "out", settings(text, "both", arguments=arguments))
    measured = {one["step"]: one["eval_loss"] for one in found.curve if "eval_loss" in one}
    best = min(measured, key=measured.__getitem__)
    assert 0 < best < 40
    assert found.best_step == best
    _, held = training_windows(hs.open_checkpoint(model), settings(text).text)
    with torch.no_grad():
        after = language_loss(hs.load(tmp_path / "out"), held.tokens.long()).item()
    assert after == pytest.approx(measured[best], rel=1e-5)


def test_training_stops_early_when_asked(model: Folder, text: Folder, tmp_path: Folder) -> None:
    arguments = {"max_steps": 40, "learning_rate": 0.02, "optim": "adamw_torch", "eval_steps": 2}
    found = train(model, tmp_path / "out", settings(text, "both", arguments=arguments, learning={"patience": 2,
                  "arguments": {**PLAIN, **arguments}}))  # fmt: skip
    assert found.steps < 40
    assert found.best_step < found.steps


@pytest.fixture(name="data")
def a_task(tmp_path: Folder) -> Folder:
    """A folder with questions that the tiny model's words answer."""
    draw = random.Random(3)
    rows = [
        {"query": f"w{draw.randint(4, 60)} w{draw.randint(4, 60)}", "choices": ["w7 w8", "w9"], "gold": number % 2}
        for number in range(40)
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("method", ["postshare", "both"])
def test_tasks_are_measured_each_time_on_what_sharing_gives_and_change_nothing(
    method: str, data: Folder, text: Folder, tmp_path: Folder
) -> None:
    model = add_tokenizer(tiny.make_llama(tmp_path / "model", initializer_range=0.5, attention_dropout=0.1))
    often = {
        "arguments": {"max_steps": 6, "learning_rate": 0.05, "eval_steps": 3},
        "sharing": {"ratio": 0.5},
        "text": {"limit": 16},
    }
    tasks = {"names": ["piqa"], "data_dir": str(data), "limit": 30}
    found = train(model, tmp_path / "out", settings(text, method, **often, tasks=tasks))
    without = train(model, tmp_path / "without", settings(text, method, **often))
    direct = hs.share(hs.open_checkpoint(model), plan_of(model, 0.5)).save(tmp_path / "direct")
    dense, *wanted = (
        row.metrics
        for row in measure([model, direct, tmp_path / "out"], tasks=["piqa"], data=data, settings=Limited(30))
    )
    assert dense != wanted[0]
    curve = {row["step"]: row for row in found.curve if "eval_piqa_acc" in row}
    assert sorted(curve) == [0, 3, 6]
    for step, metrics in zip((0, found.best_step), wanted, strict=True):
        for name, one in metrics.items():
            assert (curve[step][f"eval_piqa_{name}"], curve[step][f"eval_piqa_{name}_error"]) == (one.value, one.error)
    assert f"piqa_acc {wanted[0]['acc'].value:.3f} before training" in found.in_words()
    assert curve_of(found) == curve_of(without)
    one, other = (hs.open_checkpoint(tmp_path / name) for name in ("out", "without"))
    assert all(one.read(name).equal(other.read(name)) for name in one.tensors)


@pytest.mark.parametrize("method", ["postshare", "both"])
def test_where_no_step_is_better_than_none_the_weights_are_those_from_before(
    method: str, model: Folder, text: Folder, tmp_path: Folder
) -> None:
    found = train(model, tmp_path / "out", settings(text, method, arguments={"learning_rate": 1e3, "max_steps": 1}))
    assert found.best_step == 0
    assert "no step was better" in found.in_words()
    direct = hs.share(hs.open_checkpoint(model), plan_of(model)).save(tmp_path / "direct")
    ours, theirs = (hs.load(one, storage="owner") for one in (tmp_path / "out", direct))
    states_close(ours, theirs, rtol=0, atol=0)


# ---- what is written


@pytest.mark.parametrize("method", list(TrainingMethod))
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "phi3"])
def test_what_is_written_is_a_checkpoint_like_any_other(
    method: TrainingMethod, name: str, text: Folder, tmp_path: Folder
) -> None:
    dense = add_tokenizer(tiny.make(name, tmp_path / "dense", dtype=torch.bfloat16))
    start = dense
    if method is TrainingMethod.RECOVER:
        start = hs.share(hs.open_checkpoint(dense), plan_of(dense)).save(tmp_path / "shared")
    train(start, tmp_path / "out", settings(text, method, arguments={"max_steps": 1}))
    written = hs.open_checkpoint(tmp_path / "out")
    expected = hs.open_checkpoint(hs.share(hs.open_checkpoint(dense), plan_of(dense)).save(tmp_path / "direct"))
    if method is TrainingMethod.DENSE:
        expected = hs.open_checkpoint(hs.expand(expected, tmp_path / "expanded"))
    assert written.plan == expected.plan
    assert {info.dtype for info in written.tensors.values()} == {"BF16"}
    assert {name: (info.dtype, info.shape) for name, info in written.tensors.items()} == {
        name: (info.dtype, info.shape) for name, info in expected.tensors.items()
    }
    entry = written.sharing
    assert (entry and entry.base_model) == (
        None if method is TrainingMethod.DENSE else str(hs.open_checkpoint(dense).name)
    )
    assert {path.name for path in written.path.iterdir()} == {
        *(path.name for path in expected.path.iterdir()), "training.json",
    }  # fmt: skip
    assert not list(tmp_path.glob(".*"))
    assert hs.load(tmp_path / "out")(input_ids=tiny.tokens()).logits.isfinite().all()


@pytest.mark.parametrize("form", [QKVO, LOW_RANK, REMOVE])
def test_scales_factors_and_what_removals_leave_are_trained_too(form: Action, model: Folder, tmp_path: Folder) -> None:
    text = a_text(tmp_path / "text.txt", words=1200)
    dense = hs.open_checkpoint(model)
    calibration = Calibration.load(text, dense, tokens=256, window=CONTEXT)
    plan = plan_for_bytes(price_units(dense, calibration, [form]).only([form]), 5000).plan
    shared = hs.refit(hs.share(dense, plan), calibration).save(tmp_path / "shared")
    found = train(shared, tmp_path / "out", settings(text, "recover"))
    assert found.best_step > 0
    before, after = hs.open_checkpoint(shared), hs.open_checkpoint(tmp_path / "out")
    assert before.shapes == after.shapes
    assert not [name for name in before.tensors if before.read(name).equal(after.read(name))]
    assert len([name for name in before.tensors if name.endswith(("scale", "factor_in", "factor_out"))]) == {
        QKVO: 1, LOW_RANK: 2, REMOVE: 0
    }[form]  # fmt: skip
    assert hs.load(tmp_path / "out")(input_ids=tiny.tokens()).logits.isfinite().all()


@pytest.mark.parametrize("method", ["postshare", "both"])
def test_tensors_go_back_to_the_names_they_came_under(method: str, text: Folder, tmp_path: Folder) -> None:
    """GPT-2 as its authors store it has no prefix; transformers saves one."""
    dense = add_tokenizer(tiny.make("gpt2", tmp_path / "dense"))
    file = dense / "model.safetensors"
    save_file({name.removeprefix("transformer."): one for name, one in load_file(file).items()}, file, {"format": "pt"})
    train(dense, tmp_path / "out", settings(text, method, arguments={"max_steps": 2}))
    assert set(hs.open_checkpoint(tmp_path / "out").tensors) <= set(hs.open_checkpoint(dense).tensors)
    config, before = (json.loads((one / "config.json").read_text()) for one in (tmp_path / "out", dense))
    assert config.pop("quantization_config")
    assert {**config, "dtype": before["dtype"]} == before


def test_experts_are_those_of_the_best_step_too(text: Folder, tmp_path: Folder) -> None:
    """The Trainer would load its checkpoints' attention alone: files name experts otherwise than modules do."""
    dense = add_tokenizer(tiny.make("mixtral", tmp_path / "dense"))
    arguments = {"max_steps": 40, "learning_rate": 0.02, "optim": "adamw_torch", "eval_steps": 2}
    found = train(dense, tmp_path / "out", settings(text, "both", arguments=arguments))
    assert 0 < found.best_step < 40
    _, held = training_windows(hs.open_checkpoint(dense), settings(text).text)
    with torch.no_grad():
        after = language_loss(hs.load(tmp_path / "out"), held.tokens.long()).item()
    assert after == pytest.approx(found.loss_after, rel=1e-4)


def test_lora_adapts_matrices_that_stand_the_other_way_round(text: Folder, tmp_path: Folder) -> None:
    pytest.importorskip("peft")
    dense = add_tokenizer(tiny.make("gpt2", tmp_path / "dense"))
    found = train(dense, tmp_path / "out", settings(text, "both", learning={"lora": 2, "arguments": {
        **PLAIN, "max_steps": 2, "learning_rate": 1.0}}))  # fmt: skip
    assert found.steps == 2


def test_lora_changes_only_matrices_that_are_not_shared(model: Folder, text: Folder, tmp_path: Folder) -> None:
    pytest.importorskip("peft")
    shared = hs.share(hs.open_checkpoint(model), plan_of(model)).save(tmp_path / "shared")
    found = train(shared, tmp_path / "out", settings(text, "recover", learning={"lora": 2, "arguments": {
        **PLAIN, "max_steps": 4, "learning_rate": 1.0}}))  # fmt: skip
    assert found.best_step > 0
    before, after = hs.open_checkpoint(shared), hs.open_checkpoint(tmp_path / "out")
    changed = {name for name in before.tensors if not before.read(name).equal(after.read(name))}
    tied = {
        place.name(unit.layer)
        for selection in before.plan.selections
        for place in selection.layout.parts.values()
        for tie in selection.ties
        for unit in tie
    }
    assert changed
    assert not changed & tied
    assert all("proj" in name for name in changed)


def test_adapters_are_drawn_from_the_seed(model: Folder, text: Folder, tmp_path: Folder) -> None:
    pytest.importorskip("peft")
    arguments = {"max_steps": 3, "learning_rate": 1.0, "logging_steps": 1}
    curves = [
        curve_of(train(model, tmp_path / name, settings(text, "both", arguments=arguments, learning={"lora": 2})))
        for name in ("one", "other")
    ]
    assert curves[0] == curves[1]


# ---- the hub


def test_the_checkpoint_is_pushed_once_it_is_written(
    model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[dict[str, Any]] = []

    class Api:
        def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> Any:
            return SimpleNamespace(repo_id=f"user/{name}")

        def upload_folder(self, **what: Any) -> None:
            pushed.append({**what, "files": {path.name for path in what["folder_path"].iterdir()}})

    monkeypatch.setattr("headshare.integrations.hub.HfApi", Api)
    train(model, tmp_path / "out", settings(text, arguments={"push_to_hub": True, "max_steps": 1}))
    (found,) = pushed
    assert (found["repo_id"], found["folder_path"]) == ("user/out", tmp_path / "out")
    assert {"model.safetensors", "training.json", "config.json"} <= found["files"]


def test_a_checkpoint_that_cannot_be_pushed_stays(
    model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("401 Unauthorized")

    monkeypatch.setattr("headshare.integrations.hub.HfApi.create_repo", refuse)
    with pytest.raises(TrainingError, match=r"is written, but was not pushed to me/mine: 401.*hf upload me/mine"):
        train(model, tmp_path / "out", settings(text, arguments={"push_to_hub": True, "hub_model_id": "me/mine"}))
    assert hs.load(tmp_path / "out")(input_ids=tiny.tokens()).logits.isfinite().all()


# ---- bad input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"text": {"data": "/nowhere.txt"}}, "no file '/nowhere.txt'"),
        ({"text": {"context": 65}}, "longer than the model's 64. Use --context 64"),
        ({"text": {"held_out_data": "/nowhere.txt"}}, "no file '/nowhere.txt'"),
        ({"text": {"stream": True}, "arguments": {"max_steps": -1}}, "no known end.*max_steps"),
        ({"arguments": {"learning_rat": 1}}, "no argument 'learning_rat'"),
        ({"arguments": {"output_dir": "x"}}, "output_dir cannot be given"),
        ({"arguments": {"save_steps": 5}}, "save_steps cannot be given"),
        ({"arguments": {"learning_rate": "much"}}, "invalid float value: 'much'"),
        ({"arguments": {"learning_rate": -1.0, "optim": "adamw_torch"}}, "cannot begin.*learning rate: -1"),
        ({"arguments": {"learning_rate": None}}, "does not take learning_rate None: .*valid number"),
        ({"arguments": {"learning_rate": [1]}}, r"does not take learning_rate \[1\]"),
        ({"arguments": {"max_steps": 1.5}}, "does not take max_steps 1.5"),
        ({"arguments": {"accelerator_config": "/nowhere"}}, "does not take these arguments: .*/nowhere"),
        ({"arguments": {"adam_beta1": 2.0, "optim": "adamw_torch"}}, "cannot begin.*beta"),
        ({"arguments": {"optim": "adamw_8bit"}}, "cannot begin.*bitsandbytes"),
        ({"arguments": {"report_to": "wandb"}}, "cannot begin.*wandb"),
        ({"arguments": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size is 0; use 1 or more"),
        ({"arguments": {"gradient_accumulation_steps": 0}}, "gradient_accumulation_steps is 0; use 1 or more"),
        ({"arguments": {"resume_from_checkpoint": "x"}}, "resume_from_checkpoint cannot be given"),
        ({"arguments": {"eval_delay": 9}}, "eval_delay cannot be given"),
        ({"arguments": {"push_to_hub": True, "hub_model_id": "a/b/c"}}, "nothing can be pushed to 'a/b/c'"),
        ({"arguments": {"push_to_hub": True, "hub_token": "x"}}, "hub_token would be kept"),
        ({"text": {"data": "rows.json"}}, "there is no file .*rows.json"),
        ({"text": {"stream": True}, "arguments": {"dataloader_num_workers": 2}}, "read by one process"),
        ({"loss": {"distill": 0.5, "teacher": "/nowhere"}, "method": "both"}, "nowhere"),
        ({"learning": {"lora": 2}}, "LoRA cannot move weights together"),
        ({"sharing": {"plan": "/nowhere.json"}}, "nowhere.json"),
        ({"tasks": {"names": ["no_task"]}}, "there is no task 'no_task'"),
        ({"tasks": {"names": ["piqa"], "data_dir": "/nowhere"}}, "nowhere"),
    ],
)
def test_what_cannot_be_trained_is_one_error_and_leaves_nothing(
    more: dict[str, Any], message: str, model: Folder, text: Folder, tmp_path: Folder
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(hs.HeadshareError, match=message):
        train(model, place / "out", settings(text, more.pop("method", "postshare"), **more))
    assert not (place / "out").exists()
    if any(place.iterdir()):  # state in which nothing was done yet is no other's
        train(model, place / "out", settings(text, arguments={"max_steps": 1}))


def test_a_folder_that_deepspeed_would_take_for_a_pattern_is_refused(
    model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model, tmp_path / "out[1]", settings(text, arguments={"max_steps": 1}))
    real = SharingTrainer.__init__

    def under_deepspeed(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(SharingTrainer, "__init__", under_deepspeed)
    with pytest.raises(TrainingError, match="for a pattern"):
        train(model, tmp_path / "out[2]", settings(text, arguments={"max_steps": 1}))


@pytest.mark.parametrize("content", ["", "w5 " * 10, "w5 " * 15])
def test_too_little_text_is_refused(content: str, model: Folder, tmp_path: Folder) -> None:
    """Empty, shorter than a window, and one window, of which none could be held out."""
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(TrainingError, match=r"whole windows|and another held out"):
        train(model, tmp_path / "out", settings(tmp_path / "text.txt"))
    assert not list(tmp_path.glob("*out*"))


def test_models_that_are_not_for_the_method_are_refused(model: Folder, text: Folder, tmp_path: Folder) -> None:
    shared = hs.share(hs.open_checkpoint(model), plan_of(model)).save(tmp_path / "shared")
    with pytest.raises(TrainingError, match="is not shared, so there is nothing to recover"):
        train(model, tmp_path / "out", settings(text, "recover"))
    with pytest.raises(TrainingError, match=r"shared already. Train it with --method recover"):
        train(shared, tmp_path / "out", settings(text))
    with pytest.raises(TrainingError, match="its plan is not chosen again"):
        train(shared, tmp_path / "out", settings(text, "recover", sharing={"ratio": 0.5}))
    with pytest.raises(TrainingError, match="trained as it is, and no plan is chosen"):
        train(model, tmp_path / "out", settings(text, "dense", sharing={"ratio": 0.5}))
    with pytest.raises(TrainingError, match=r"shared already. Train it with --method recover"):
        train(shared, tmp_path / "out", settings(text, "dense"))
    other = tiny.make_llama(tmp_path / "other", hidden_size=64)
    plan_of(other).save(tmp_path / "plan.json")
    with pytest.raises(PlanError):
        train(model, tmp_path / "out", settings(text, sharing={"plan": tmp_path / "plan.json"}))


@pytest.mark.parametrize("method", ["postshare", "both"])
def test_a_loss_that_is_no_number_stops_training_and_keeps_what_was_saved(
    method: str, model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SharingTrainer.compute_loss

    def broken(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and self.state.global_step == 2:
            with torch.no_grad():
                next(iter(model.parameters())).fill_(torch.nan)
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SharingTrainer, "compute_loss", broken)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3.*Lower the learning rate"):
        train(model, tmp_path / "out", settings(text, method))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert train(model, tmp_path / "out", settings(text, method)).steps == 4


def test_weights_that_are_no_numbers_are_not_saved(
    model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update before a measurement gives them: no training loss has been computed with them yet."""
    asked = settings(text, arguments={**LONGER, "eval_steps": 2})
    real = SharingTrainer.training_step

    def broken(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        found = real(self, model, *args, **kwargs)
        if self.state.global_step == 3:
            next(iter(model.parameters())).data.fill_(torch.nan)
        return found

    monkeypatch.setattr(SharingTrainer, "training_step", broken)
    with pytest.raises(TrainingError, match=r"held out is nan after step 4.*Lower the learning rate and run again"):
        train(model, tmp_path / "out", asked)
    monkeypatch.undo()
    seen: list[int] = []
    monkeypatch.setattr(SharingTrainer, "training_step", lambda self, *a, **k: (
        seen.append(self.state.global_step) or real(self, *a, **k)))  # fmt: skip
    assert train(model, tmp_path / "out", asked).steps == 10
    assert seen[0] == 2


def test_a_model_that_gives_no_number_is_not_trained(model: Folder, text: Folder, tmp_path: Folder) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.inf)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="is nan before the first step"):
        train(model, tmp_path / "out", settings(text))


@pytest.mark.parametrize("place", ["model.to", "evaluate", "step"])
def test_too_little_memory_is_an_error_wherever_it_shows(
    place: str, model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    name = {"model.to": "_move_model_to_device", "evaluate": "evaluation_loop", "step": "training_step"}[place]
    monkeypatch.setattr(SharingTrainer, name, full)
    arguments = {"use_cpu": True, "max_steps": 1}
    with pytest.raises(TrainingError, match=r"Lower per_device_train_batch_size.* or per_device_eval_batch_size"):
        train(model, tmp_path / "out", settings(text, arguments=arguments))


def test_no_more_windows_are_measured_at_once_than_are_trained_on(
    model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: set[int] = set()
    real = SharingTrainer.compute_loss
    monkeypatch.setattr(SharingTrainer, "compute_loss", lambda self, model, inputs, *a, **k: (
        sizes.add(len(inputs["input_ids"])) or real(self, model, inputs, *a, **k)))  # fmt: skip
    train(model, tmp_path / "out", settings(text, arguments={"per_device_train_batch_size": 1, "max_steps": 1}))
    assert sizes == {1}


def test_too_little_memory_is_an_error_that_says_what_to_lower(
    model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(SharingTrainer, "training_step", full)
    with pytest.raises(TrainingError, match="Lower per_device_train_batch_size"):
        train(model, tmp_path / "out", settings(text))


# ---- arguments


def test_arguments_are_found_by_all_the_names_that_the_trainer_gives_them() -> None:
    words = ["--no_dataloader_pin_memory", "--learning-rate", "1e-3", "--bf16", "--optim=sgd"]
    found = trainer_arguments(words)
    assert found == {"dataloader_pin_memory": False, "learning_rate": 1e-3, "bf16": True, "optim": "sgd"}
