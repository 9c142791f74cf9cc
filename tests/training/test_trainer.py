"""The loss that training minimises is equation 5, step by step as by hand."""

from collections.abc import Callable
from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import headshare as hs
from headshare.architecture.modules import module_path
from headshare.experiments.controls import overwrite_recipients
from headshare.integrations.transformers.loading import load_model
from headshare.plan.plan import SharePlan
from headshare.training import SharingTrainer, train
from headshare.training.windows import training_windows
from support.texts import a_text
from support.trainings import CONTEXT, PLAIN, RHYME, curve_of, language_loss, plan_of, settings, states_close


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
