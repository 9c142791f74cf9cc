"""Training does what equation 5 says, measures what sharing gives, writes checkpoints that load, and can be killed."""

import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path as Folder
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaMLP

import headshare as hs
import tiny
from headshare.architecture.modules import module_path
from headshare.calibration.allocate import plan_for_bytes
from headshare.calibration.costs.curves import Form
from headshare.calibration.costs.local import price_units
from headshare.errors import OutputError, PlanError, TrainingError
from headshare.evaluation import Settings as Limited
from headshare.evaluation import measure
from headshare.experiments.controls import overwrite_recipients
from headshare.integrations.transformers.loading import load_model
from headshare.plan.plan import SharePlan
from headshare.text.tokens import calibration_from
from headshare.training import Method, SharingTrainer, TrainSettings, train
from headshare.training.arguments import trainer_arguments
from headshare.training.state import checkpoints, note_writing, settle, taken_up
from headshare.training.windows import Packed, training_windows
from test_cli import Run, a_text, add_tokenizer, assert_one_error_line, runs  # noqa: F401 - runs is the fixture run

CONTEXT = 16
RHYME = "w1 w5 w2 w7 w3 " * 120
PLAIN = {"use_cpu": True, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}


@pytest.fixture(name="model")
def a_model(tmp_path: Folder) -> Folder:
    """A tiny Llama with a tokenizer."""
    return add_tokenizer(tiny.make_llama(tmp_path / "model", initializer_range=0.2))


@pytest.fixture(name="text")
def some_text(tmp_path: Folder) -> Folder:
    return a_text(tmp_path / "text.txt", words=15 * 40)


def settings(text: Folder, method: str = "postshare", /, **more: Any) -> TrainSettings:
    """Four steps of eight windows, unless told otherwise."""
    arguments = {**PLAIN, "max_steps": 4, **more.pop("arguments", {})}
    learning = {"arguments": arguments, **more.pop("learning", {})}
    text_ = {"data": str(text), "context": CONTEXT, "held_out": 4, **more.pop("text", {})}
    return TrainSettings.made({"method": method, "text": text_, "learning": learning, **more})


def plan_of(model: Folder, ratio: float = 0.3) -> SharePlan:
    dense = hs.open_checkpoint(model)
    return hs.make_plan(hs.score_units(dense), ratio)


def batches(model: Folder, text: Folder, steps: int, size: int, seed: int = 0) -> list[Tensor]:
    """The windows that the Trainer draws, step by step."""
    seen: list[Tensor] = []

    class Watched(SharingTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training:
                seen.append(inputs["input_ids"].clone())
            return super().compute_loss(model, inputs, *args, **kwargs)

    from transformers import TrainingArguments

    kept, _ = training_windows(hs.open_checkpoint(model), settings(text).text)
    arguments = TrainingArguments(
        output_dir=str(model.parent / "drawn"), per_device_train_batch_size=size, max_steps=steps, seed=seed,
        save_strategy="no", report_to="none", **PLAIN,
    )  # fmt: skip
    Watched(model=load_model(hs.open_checkpoint(model)), args=arguments, train_dataset=kept).train()
    return seen


def equation_4(model: Any, plan: SharePlan) -> Tensor:
    """As it is written."""
    (selection,) = plan.selections
    total = torch.zeros(())
    for tie in selection.ties:
        for place in selection.layout.parts.values():
            one, other = (
                model.get_submodule(module_path(model, place.name(unit.layer)))
                .weight[place.start + unit.group * place.step :][: place.rows]
                for unit in tie
            )  # fmt: skip
            total = total + (one - other).norm()
    return total / len(selection.ties)


def language_loss(model: Any, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def trained_by_hand(model: Any, steps: list[Tensor], loss_of: Callable[[Tensor], Tensor], rate: float = 0.1) -> None:
    """Plain gradient descent."""
    model.train()
    for tokens in steps:
        model.zero_grad()
        loss_of(tokens).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad


def states_close(found: Any, wanted: Any, **close: float) -> None:
    expected = wanted.state_dict()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], **close)


# ---- what is minimised


@pytest.mark.parametrize(("gamma", "lm"), [(0.5, 1.0), (0.5, 0.5)])
def test_postshare_is_gradient_descent_on_equation_5_and_then_sharing(
    model: Folder, text: Folder, gamma: float, lm: float, tmp_path: Folder
) -> None:
    plan, steps = plan_of(model), batches(model, text, 4, 8)
    found = train(model, tmp_path / "out", settings(text, loss={"gamma": gamma, "lm": lm}))
    assert found.best_step > 1
    ours = hs.load(tmp_path / "out", storage="owner").dequantize()
    theirs = load_model(hs.open_checkpoint(model))

    def loss_of(tokens: Tensor) -> Tensor:
        return lm * language_loss(theirs, tokens) + gamma * equation_4(theirs, plan)

    trained_by_hand(theirs, steps[: found.best_step], loss_of)
    overwrite_recipients(theirs, plan)
    states_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_batches_in_parts_give_the_same_step_and_the_penalty_counts_once(
    model: Folder, text: Folder, tmp_path: Folder
) -> None:
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    train(model, tmp_path / "whole", settings(text))
    train(model, tmp_path / "parts", settings(text, arguments=parts))
    one, other = (hs.load(tmp_path / name, storage="owner") for name in ("whole", "parts"))
    states_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")  # its new name is not in all versions
@pytest.mark.parametrize("method", ["postshare", "both"])
def test_layers_that_are_run_again_backwards_give_the_same_step(
    method: str, model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model, tmp_path / "plain", settings(text, method))
    ran: list[int] = []
    real = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, *a: ran.append(torch.is_grad_enabled()) or real(self, *a))
    train(model, tmp_path / "again", settings(text, method, arguments={"gradient_checkpointing": True}))
    one, other = (hs.load(tmp_path / name, storage="owner") for name in ("plain", "again"))
    states_close(one, other, rtol=1e-4, atol=1e-5)
    assert sum(ran) == 2 * 4 * 4  # of each step and layer once more than without


def test_a_window_counts_the_same_in_a_smaller_batch(model: Folder, tmp_path: Folder) -> None:
    """Twelve windows as one batch, and as one of eight and one of four."""
    held, text = a_text(tmp_path / "held.txt", words=15 * 8), a_text(tmp_path / "twelve.txt", words=15 * 12)
    found = []
    for size, parts in ((12, 1), (8, 2)):
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 1}
        asked = settings(text, text={"held_out_data": str(held)}, arguments={**more, "logging_steps": 1})
        found.append(curve_of(train(model, tmp_path / f"{size}", asked)))
    assert found[0] == [(1, pytest.approx(found[1][0][1], rel=1e-5))]


def test_batches_that_are_dropped_in_training_are_measured(model: Folder, text: Folder, tmp_path: Folder) -> None:
    found = train(model, tmp_path / "out", settings(text, arguments={"dataloader_drop_last": True}))
    assert found.loss_before == train(model, tmp_path / "all", settings(text)).loss_before


def test_recovery_trains_one_copy_with_the_gradients_of_all_its_users(
    model: Folder, text: Folder, tmp_path: Folder
) -> None:
    """As an expanded model would be whose equal rows are one variable."""
    plan, steps = plan_of(model), batches(model, text, 4, 8)
    found = train(model, tmp_path / "out", settings(text, "both"))
    assert found.best_step > 1
    ours = hs.load(tmp_path / "out", storage="owner").dequantize()
    theirs = load_model(hs.open_checkpoint(model))
    overwrite_recipients(theirs, plan)
    theirs.train()
    for tokens in steps[: found.best_step]:
        theirs.zero_grad()
        language_loss(theirs, tokens).backward()
        sum_over_users(theirs, plan)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter -= 0.1 * parameter.grad
    states_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_dense_model_is_trained_as_it_is_and_can_be_shared_afterwards(model: Folder, tmp_path: Folder) -> None:
    text, out = tmp_path / "rhyme.txt", tmp_path / "out"
    text.write_text(RHYME)
    steps = batches(model, text, 4, 8)
    found = train(model, out, settings(text, "dense"))
    assert found.best_step > 1
    theirs = load_model(hs.open_checkpoint(model))
    trained_by_hand(theirs, steps[: found.best_step], lambda tokens: language_loss(theirs, tokens))
    states_close(AutoModelForCausalLM.from_pretrained(out), theirs, rtol=1e-4, atol=1e-5)
    before, after = hs.open_checkpoint(model), hs.open_checkpoint(out)
    assert after.plan is None
    assert (after.shapes, after.config) == (before.shapes, before.config)
    shared = hs.share(after, plan_of(out)).save(tmp_path / "shared")
    taught = settings(text, "recover", loss={"distill": 0.5, "teacher": str(out)})
    assert train(shared, tmp_path / "again", taught).loss_after < found.loss_before


def sum_over_users(model: Any, plan: SharePlan) -> None:
    """Each of them gets the sum of all gradients, so equal rows stay equal."""
    (selection,) = plan.selections
    for place in selection.layout.parts.values():
        users: dict[Any, list[Any]] = {}
        for recipient, donor in selection.ties:
            users.setdefault(donor, [donor]).append(recipient)
        for units in users.values():
            grads = [
                model.get_submodule(module_path(model, place.name(unit.layer)))
                .weight.grad[place.start + unit.group * place.step :][: place.rows]
                for unit in units
            ]  # fmt: skip
            total = torch.stack(grads).sum(dim=0)
            for grad in grads:
                grad.copy_(total)


def test_distillation_is_the_divergence_from_the_dense_model(model: Folder, text: Folder, tmp_path: Folder) -> None:
    steps = batches(model, text, 2, 8)
    loss = {"distill": 0.75, "temperature": 2.0}
    shared = hs.share(hs.open_checkpoint(model), plan_of(model)).save(tmp_path / "shared")
    found = train(shared, tmp_path / "out", settings(text, "recover", loss=loss, arguments={"max_steps": 2}))
    assert found.best_step == 2
    ours, theirs = hs.load(tmp_path / "out", storage="owner"), hs.load(shared, storage="owner")
    teacher = load_model(hs.open_checkpoint(model))

    def loss_of(tokens: Tensor) -> Tensor:
        found, wanted = (one(input_ids=tokens).logits[:, :-1] / 2 for one in (theirs, teacher))
        p, q = wanted.softmax(-1), found.softmax(-1)
        apart = (p * (p.log() - q.log())).sum(-1).mean()
        return 0.25 * language_loss(theirs, tokens) + 0.75 * 4 * apart

    trained_by_hand(theirs, steps, loss_of)
    states_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_in_mixed_precision_the_teacher_is_run_so_too(model: Folder, text: Folder, tmp_path: Folder) -> None:
    seen: set[torch.dtype] = set()
    real = SharingTrainer._divergence

    def watched(self: Any, *args: Any) -> Tensor:
        self.teacher.model.layers[0].mlp.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SharingTrainer, "_divergence", watched)
        arguments = {"max_steps": 1, "bf16": True}
        train(model, tmp_path / "out", settings(text, "both", loss={"distill": 0.5}, arguments=arguments))
    assert seen == {torch.bfloat16}


def test_without_gamma_and_sharing_nothing_it_is_the_stock_trainer(model: Folder, text: Folder) -> None:
    steps = batches(model, text, 3, 8)
    again = batches(model, text, 3, 8)
    assert all(one.equal(other) for one, other in zip(steps, again, strict=True))
    assert all(tokens.shape == (8, CONTEXT) for tokens in steps)


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


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "phi3"])
def test_what_is_written_is_a_checkpoint_like_any_other(
    method: Method, name: str, text: Folder, tmp_path: Folder
) -> None:
    dense = add_tokenizer(tiny.make(name, tmp_path / "dense", dtype=torch.bfloat16))
    start = dense
    if method is Method.RECOVER:
        start = hs.share(hs.open_checkpoint(dense), plan_of(dense)).save(tmp_path / "shared")
    train(start, tmp_path / "out", settings(text, method, arguments={"max_steps": 1}))
    written = hs.open_checkpoint(tmp_path / "out")
    expected = hs.open_checkpoint(hs.share(hs.open_checkpoint(dense), plan_of(dense)).save(tmp_path / "direct"))
    if method is Method.DENSE:
        expected = hs.open_checkpoint(hs.expand(expected, tmp_path / "expanded"))
    assert written.plan == expected.plan
    assert {name: (info.dtype, info.shape) for name, info in written.tensors.items()} == {
        name: (info.dtype, info.shape) for name, info in expected.tensors.items()
    }
    entry = written.sharing
    assert (entry and entry.base_model) == (None if method is Method.DENSE else str(hs.open_checkpoint(dense).name))
    assert {path.name for path in written.path.iterdir()} == {
        *(path.name for path in expected.path.iterdir()), "training.json",
    }  # fmt: skip
    assert not list(tmp_path.glob(".*"))
    assert hs.load(tmp_path / "out")(input_ids=tiny.tokens()).logits.isfinite().all()


@pytest.mark.parametrize("form", [Form.QKVO, Form.FACTORED, Form.REMOVE])
def test_scales_factors_and_what_removals_leave_are_trained_too(form: Form, model: Folder, tmp_path: Folder) -> None:
    text = a_text(tmp_path / "text.txt", words=1200)
    dense = hs.open_checkpoint(model)
    calibration = calibration_from(text, dense, tokens=256, window=CONTEXT)
    plan = plan_for_bytes(price_units(dense, calibration, [form]).only([form]), 5000).plan
    shared = hs.refit_on(hs.share(dense, plan), calibration).save(tmp_path / "shared")
    found = train(shared, tmp_path / "out", settings(text, "recover"))
    assert found.best_step > 0
    before, after = hs.open_checkpoint(shared), hs.open_checkpoint(tmp_path / "out")
    assert before.shapes == after.shapes
    assert not [name for name in before.tensors if before.read(name).equal(after.read(name))]
    assert len([name for name in before.tensors if name.endswith(("scale", "factor_in", "factor_out"))]) == {
        Form.QKVO: 1, Form.FACTORED: 2, Form.REMOVE: 0
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

    monkeypatch.setattr("headshare.training.hub.HfApi", Api)
    train(model, tmp_path / "out", settings(text, arguments={"push_to_hub": True, "max_steps": 1}))
    (found,) = pushed
    assert (found["repo_id"], found["folder_path"]) == ("user/out", tmp_path / "out")
    assert {"model.safetensors", "training.json", "config.json"} <= found["files"]


def test_a_checkpoint_that_cannot_be_pushed_stays(
    model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("401 Unauthorized")

    monkeypatch.setattr("headshare.training.hub.HfApi.create_repo", refuse)
    with pytest.raises(TrainingError, match=r"is written, but was not pushed to me/mine: 401.*hf upload me/mine"):
        train(model, tmp_path / "out", settings(text, arguments={"push_to_hub": True, "hub_model_id": "me/mine"}))
    assert hs.load(tmp_path / "out")(input_ids=tiny.tokens()).logits.isfinite().all()


# ---- after a kill


def losses_of(curve: Any) -> list[tuple[int, float]]:
    return [(one["step"], one["loss"]) for one in curve if "loss" in one]


def curve_of(found: Any) -> list[tuple[int, float]]:
    return losses_of(found.curve)


def killed_after(last: int) -> None:
    """From now on, training in this process is killed after this step."""

    class Killed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == last:
                os.kill(os.getpid(), signal.SIGKILL)

    real = SharingTrainer.__init__

    def init(self: Any, *args: Any, callbacks: Any = (), **kwargs: Any) -> None:
        real(self, *args, callbacks=[*callbacks, Killed()], **kwargs)

    SharingTrainer.__init__ = init  # type: ignore[method-assign]


LONGER = {"max_steps": 10, "logging_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2}


@pytest.mark.parametrize("every", [{}, {"logging_steps": 5, "eval_steps": 3}])
def test_a_killed_run_goes_on_with_the_same_curve_to_the_same_weights(
    every: dict[str, int], model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(text, arguments={**LONGER, **every})
    whole = train(model, tmp_path / "whole", asked)

    def run_and_be_killed() -> None:
        killed_after(7)
        train(model, tmp_path / "out", asked)

    child = multiprocessing.get_context("fork").Process(target=run_and_be_killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pytest.raises(TrainingError, match=r"another loss.gamma\. .*--restart"):
        train(model, tmp_path / "out", settings(text, arguments={**LONGER, **every}, loss={"gamma": 0.1}))
    text.write_text(text.read_text().replace("w5 ", "w6 ", 1))
    with pytest.raises(TrainingError, match="it had another text"):
        train(model, tmp_path / "out", asked)
    a_text(text, words=15 * 40)
    seen: list[int] = []
    real = SharingTrainer.compute_loss
    monkeypatch.setattr(SharingTrainer, "compute_loss", lambda self, model, *a, **k: (
        seen.append(self.state.global_step) if model.training else None) or real(self, model, *a, **k))  # fmt: skip
    again = train(model, tmp_path / "out", asked)
    assert min(seen) >= 6
    assert curve_of(again) == curve_of(whole)
    one, other = (hs.open_checkpoint(tmp_path / name) for name in ("whole", "out"))
    assert all(one.read(name).equal(other.read(name)) for name in one.tensors)


def a_state(work: Folder, step: int, steps: int, content: str | None = None) -> Folder:
    folder = work / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    state = json.dumps({"global_step": step, "max_steps": steps}) if content is None else content
    (folder / "trainer_state.json").write_text(state)
    return folder


def test_checkpoints_that_are_half_written_or_after_the_last_step_are_not_gone_on_from(tmp_path: Folder) -> None:
    """The Trainer would fail at the first, and take a step too many after the second."""
    whole, early = a_state(tmp_path, 12, 20), a_state(tmp_path, 8, 20)
    torn, last = a_state(tmp_path, 16, 20, '{"global_'), a_state(tmp_path, 20, 20)
    (tmp_path / "checkpoint-18").mkdir()
    (tmp_path / "run.json").write_text('{"model": "this"}')
    with taken_up(tmp_path, {"model": "this"}, restart=False):
        assert list(checkpoints(tmp_path)) == [(12, whole), (8, early)]
        assert not torn.exists()
        assert not last.exists()
        assert not (tmp_path / "checkpoint-18").exists()
        with pytest.raises(OutputError, match="another run is working"), taken_up(tmp_path, {}, restart=True):
            pass


def test_a_state_in_which_nothing_was_saved_does_not_stand_in_the_way(
    model: Folder, text: Folder, tmp_path: Folder
) -> None:
    work = tmp_path / ".out.headshare-training"
    work.mkdir()
    (work / "run.json").write_text('{"model": "another"}')
    train(model, tmp_path / "out", settings(text, arguments={"max_steps": 1}))
    assert not work.exists()


def test_a_run_stopped_after_its_last_step_takes_no_more_of_them(
    model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(text, arguments=LONGER)
    whole = train(model, tmp_path / "whole", asked)
    with monkeypatch.context() as patched:
        patched.setattr("headshare.training.run.share", lambda *_, **__: (_ for _ in ()).throw(OutputError("full")))
        with pytest.raises(OutputError, match="full"):
            train(model, tmp_path / "out", asked)
    again = train(model, tmp_path / "out", asked)
    assert (again.steps, again.best_step, curve_of(again)) == (10, whole.best_step, curve_of(whole))


def test_a_run_killed_once_its_output_is_whole_leaves_no_state_for_good(
    model: Folder, text: Folder, tmp_path: Folder
) -> None:
    asked = settings(text, arguments={"max_steps": 2})

    def run_and_be_killed() -> None:
        real = shutil.rmtree

        def removed(path: Any, *args: Any, **kwargs: Any) -> None:
            if Folder(path).name.endswith("-training"):
                os.kill(os.getpid(), signal.SIGKILL)
            real(path, *args, **kwargs)

        shutil.rmtree = removed  # type: ignore[assignment]
        train(model, tmp_path / "out", asked)

    child = multiprocessing.get_context("fork").Process(target=run_and_be_killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (work,) = tmp_path.glob(".out.*")
    assert json.loads((tmp_path / "out" / "training.json").read_text())["steps"] == 2
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="out exists"):
        train(model, tmp_path / "out", asked)
    assert not work.exists()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_state_stays_where_the_output_is_not_there(tmp_path: Folder) -> None:
    """An old output was to be replaced; writing failed, and then the old one was removed to make room."""
    work, out = tmp_path / ".out.headshare-training", tmp_path / "out"
    for folder in (work, out):
        folder.mkdir()
    note_writing(work, out)
    assert not settle(out)
    (tmp_path / "other").mkdir()  # while the old one is there: a number of a folder that is gone may come again
    out.rmdir()
    assert not settle(out)
    (tmp_path / "other").rename(out)
    assert not settle(out)
    assert work.is_dir()
    (out / "training.json").write_text("{}")
    assert settle(out)
    assert not work.exists()


def test_a_run_that_stopped_early_and_was_not_written_stops_at_the_same_step(
    model: Folder, text: Folder, tmp_path: Folder
) -> None:
    arguments = {"max_steps": 40, "learning_rate": 0.02, "optim": "adamw_torch", "eval_steps": 2}
    asked = settings(text, "both", arguments=arguments, learning={"patience": 2, "arguments": {**PLAIN, **arguments}})
    whole = train(model, tmp_path / "whole", asked)
    with pytest.MonkeyPatch.context() as patched:
        stopped = OutputError("full")
        patched.setattr("headshare.training.run.write_trained", lambda *_, **__: (_ for _ in ()).throw(stopped))
        with pytest.raises(OutputError, match="full"):
            train(model, tmp_path / "out", asked)
    again = train(model, tmp_path / "out", asked)
    assert whole.steps < 40
    assert (again.steps, again.best_step, curve_of(again)) == (whole.steps, whole.best_step, curve_of(whole))


def test_how_fast_it_learns_may_change_on_the_way(model: Folder, text: Folder, tmp_path: Folder) -> None:
    asked = settings(text, arguments=LONGER)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("headshare.training.run.share", lambda *_, **__: (_ for _ in ()).throw(OutputError("full")))
        with pytest.raises(OutputError):
            train(model, tmp_path / "out", asked)
    assert train(model, tmp_path / "out", settings(text, arguments={**LONGER, "learning_rate": 1e-4})).steps == 10


def killed(model: Folder, out: Folder, asked: TrainSettings) -> None:
    """A run of ten steps, killed after the seventh."""

    def run() -> None:
        killed_after(7)
        train(model, out, asked)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_a_run_goes_on_at_the_rate_that_is_asked_for_now(model: Folder, text: Folder, tmp_path: Folder) -> None:
    cosine = {**LONGER, "lr_scheduler_type": "cosine"}
    whole = train(model, tmp_path / "whole", settings(text, arguments=cosine))
    killed(model, tmp_path / "out", settings(text, arguments=cosine))
    again = train(model, tmp_path / "out", settings(text, arguments={**cosine, "learning_rate": 1e-3}))
    rates = [[one["learning_rate"] for one in found.curve if "learning_rate" in one] for found in (whole, again)]
    assert rates[1] == pytest.approx([*rates[0][:6], *(rate / 10 for rate in rates[0][6:])])


def test_a_stream_that_begins_otherwise_is_another_text(model: Folder, text: Folder, tmp_path: Folder) -> None:
    held = a_text(tmp_path / "held.txt", words=15 * 8)
    asked = settings(text, text={"stream": True, "held_out_data": str(held)}, arguments=LONGER)
    killed(model, tmp_path / "out", asked)
    text.write_text(text.read_text().replace("w", "w7 w", 1))
    with pytest.raises(TrainingError, match="it had another text"):
        train(model, tmp_path / "out", asked)


def test_what_is_trained_and_not_written_yet_is_not_thrown_away_by_another_run(
    model: Folder, text: Folder, tmp_path: Folder
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("headshare.training.run.share", lambda *_, **__: (_ for _ in ()).throw(OutputError("full")))
        with pytest.raises(OutputError):
            train(model, tmp_path / "out", settings(text, arguments={"max_steps": 1}))
    with pytest.raises(TrainingError, match=r"another loss\.gamma"):
        train(model, tmp_path / "out", settings(text, arguments={"max_steps": 1}, loss={"gamma": 0.1}))
    assert train(model, tmp_path / "out", settings(text, arguments={"max_steps": 1})).steps == 1


def test_restart_throws_the_state_away(model: Folder, text: Folder, tmp_path: Folder) -> None:
    work = tmp_path / ".out.headshare-training"
    a_state(work, 1, 10)
    (work / "run.json").write_text('{"model": "another"}')
    with pytest.raises(TrainingError, match="another model"):
        train(model, tmp_path / "out", settings(text, arguments={"max_steps": 1}))
    train(model, tmp_path / "out", settings(text, arguments={"max_steps": 1}), restart=True)
    assert not work.exists()


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
        ({"arguments": {"adam_beta1": 2.0, "optim": "adamw_torch"}}, "cannot begin.*beta"),
        ({"arguments": {"optim": "adamw_8bit"}}, "cannot begin.*bitsandbytes"),
        ({"arguments": {"report_to": "wandb"}}, "cannot begin.*wandb"),
        ({"arguments": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size is 0; use 1 or more"),
        ({"arguments": {"gradient_accumulation_steps": 0}}, "gradient_accumulation_steps is 0; use 1 or more"),
        ({"arguments": {"resume_from_checkpoint": "x"}}, "resume_from_checkpoint cannot be given"),
        ({"arguments": {"eval_delay": 9}}, "eval_delay cannot be given"),
        ({"arguments": {"push_to_hub": True, "hub_model_id": "a/b/c"}}, "nothing can be pushed to 'a/b/c'"),
        ({"arguments": {"push_to_hub": True, "hub_token": "x"}}, "hub_token would be kept"),
        ({"text": {"data": "rows.json"}}, "rows.json is no plain text"),
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


# ---- text


def test_windows_are_the_text_and_what_is_held_out_is_its_end(model: Folder, text: Folder) -> None:
    checkpoint = hs.open_checkpoint(model)
    kept, held = training_windows(checkpoint, settings(text).text)
    assert isinstance(kept, Packed)
    words = text.read_text().split()
    together = torch.cat([kept.tokens, held.tokens])
    assert (together[:, 0] == 1).all()
    assert [f"w{token}" for token in together[:, 1:].flatten().tolist()] == words[: together[:, 1:].numel()]
    assert (len(kept), len(held)) == (36, 4)


def test_rows_are_packed_with_an_end_after_each(model: Folder, tmp_path: Folder) -> None:
    rows = [{"text": "w5 w6 w7"}, {"text": "w8"}] * 40
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept, held = training_windows(hs.open_checkpoint(model), settings(tmp_path / "rows.jsonl").text)
    together = torch.cat([kept.tokens, held.tokens])[:, 1:].flatten()  # type: ignore[union-attr]
    assert together.tolist() == ([5, 6, 7, 2, 8, 2] * 40)[: together.numel()]


def test_a_stream_gives_what_the_file_gives_less_its_beginning(model: Folder, text: Folder) -> None:
    checkpoint = hs.open_checkpoint(model)
    whole, end = training_windows(checkpoint, settings(text).text)
    streamed, first = training_windows(checkpoint, settings(text, text={"stream": True, "limit": 20}).text)
    every = torch.cat([whole.tokens, end.tokens])  # type: ignore[union-attr]
    assert first.tokens.equal(every[:4])
    found = torch.stack([one["input_ids"] for one in islice(streamed, 50)])
    assert found.equal(torch.cat([every[4:24]] * 3)[:50].long())


@pytest.mark.parametrize("held", [False, True])
def test_a_limit_is_kept(held: bool, model: Folder, text: Folder, tmp_path: Folder) -> None:
    other = {"held_out_data": str(a_text(tmp_path / "other.txt", words=100, seed=1))} if held else {}
    checkpoint = hs.open_checkpoint(model)
    kept, apart = training_windows(checkpoint, settings(text, text={"limit": 5, "held_out": 20, **other}).text)
    every, _ = training_windows(checkpoint, settings(text).text)
    assert isinstance(kept, Packed)
    assert isinstance(every, Packed)
    assert len(kept) == 5
    assert kept.tokens.equal(every.tokens[:5])
    assert len(apart) == (6 if held else 3)


def test_a_stream_is_trained_on(model: Folder, text: Folder, tmp_path: Folder) -> None:
    """Over and over: it has 36 windows, and 64 are taken."""
    found = train(model, tmp_path / "out", settings(text, text={"stream": True}, arguments={"max_steps": 8}))
    assert found.steps == 8
    assert hs.load(tmp_path / "out")(input_ids=tiny.tokens()).logits.isfinite().all()


# ---- the command line


def test_the_command_trains_by_options_over_a_file_and_goes_on_to_json(
    run: Run, model: Folder, text: Folder, tmp_path: Folder
) -> None:
    (tmp_path / "c.yaml").write_text(
        "text: {context: 16, held_out: 4}\nsharing: {ratio: 0.5}\nlearning: {arguments: {max_steps: 3, use_cpu: true}}"
    )
    words = ["--config", str(tmp_path / "c.yaml"), "--data", str(text), "--gamma", "0.25", "--learning_rate", "1e-3"]
    found = run("train", str(model), str(tmp_path / "out"), *words, "--max_steps", "2", "--json")
    assert found.status == 0, found.err
    data = json.loads(found.out)
    assert data["steps"] == 2
    assert data["settings"]["loss"]["gamma"] == 0.25
    assert data["settings"]["sharing"]["ratio"] == 0.5
    assert data["settings"]["learning"]["arguments"] == {"max_steps": 2, "use_cpu": True, "learning_rate": 1e-3}
    assert hs.open_checkpoint(tmp_path / "out").plan == plan_of(model, 0.5)


def test_arguments_are_found_by_all_the_names_that_the_trainer_gives_them() -> None:
    words = ["--no_dataloader_pin_memory", "--learning-rate", "1e-3", "--bf16", "--optim=sgd"]
    found = trainer_arguments(words)
    assert found == {"dataloader_pin_memory": False, "learning_rate": 1e-3, "bf16": True, "optim": "sgd"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learnin_rate", "1"], "has an option --learnin_rate"),
        (["--learning_rate", "much"], "invalid float value: 'much'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--ratio", "2"], "less than 1 at sharing.ratio"),
        (["--distill", "2"], "at loss.distill"),
        (["--plan", "p.json", "--ratio", "0.2"], "--ratio would not be used: --plan"),
        (["--method", "both", "--gamma", "0.2"], "--gamma would not be used"),
        (["--temperature", "2"], "--temperature would not be used"),
        (["--task-limit", "2"], "--task-limit would not be used"),
    ],
)
def test_wrong_options_are_one_line(
    words: list[str], message: str, run: Run, model: Folder, text: Folder, tmp_path: Folder
) -> None:
    found = run("train", str(model), str(tmp_path / "out"), "--data", str(text), *words)
    assert_one_error_line(found)
    assert message in found.err
    assert not list(tmp_path.glob("*out*"))
