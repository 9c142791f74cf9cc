"""A shared checkpoint behaves in transformers as any other: load, generate, save, offload, compile, train."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import headshare as hs
from headshare.experiments.controls import overwrite_recipients
from headshare.integrations.transformers.loading import load_model, unique_parameter_bytes
from headshare.plan.plan import SharePlan
from headshare.plan.ties import Selection
from headshare.storage.projection import SharedProjection, shared_projections
from support import tiny


@pytest.fixture
def shared(llama: Path, tmp_path: Path) -> Path:
    """Half of the tiny Llama's units given up, in q, k, v and o and in its feed-forward."""
    dense = hs.open_checkpoint(llama)
    scores = hs.score_units(dense, parts="qkvo+ffn", ffn_groups=2)
    return hs.share(dense, hs.make_plan(scores, 0.5, parts="qkvo+ffn")).save(tmp_path / "shared")


def stock_of(folder: Path, dense: Path, **options: object) -> nn.Module:
    model = LlamaForCausalLM.from_pretrained(dense, **options).eval()
    plan = hs.open_checkpoint(folder).plan
    assert plan is not None
    overwrite_recipients(model, plan)
    return model


def test_a_loaded_model_generates_the_same_with_and_without_cache(shared: Path, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 10).long()}
    cached = model.generate(tiny.tokens(), **options)
    uncached = model.generate(tiny.tokens(), **options, use_cache=False)
    stock = stock_of(shared, llama).generate(tiny.tokens(), **options)
    assert torch.equal(cached, uncached)
    assert torch.equal(cached, stock)


def stored_bytes(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """Every stored tensor, bit for bit; the order of tensors in the file is ours to choose."""
    tensors = load_file(folder / "model.safetensors")
    return {name: (t.dtype, t.shape, t.flatten().view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


@pytest.mark.parametrize("storage", ["owner", "alias"])
def test_saving_again_gives_the_same_tensors_bit_for_bit(shared: Path, tmp_path: Path, storage: str) -> None:
    load_model(hs.open_checkpoint(shared), storage=storage).save_pretrained(tmp_path / "again")
    assert stored_bytes(tmp_path / "again") == stored_bytes(shared)
    first, again = hs.open_checkpoint(shared), hs.open_checkpoint(tmp_path / "again")
    assert first.plan == again.plan
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(third(tiny.tokens()).logits, AutoModelForCausalLM.from_pretrained(shared)(tiny.tokens()).logits)


def test_a_sharded_checkpoint_loads_and_saves_as_shards(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make_llama(tmp_path / "dense", save={"max_shard_size": "30KB"}))
    out = hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5)).save(tmp_path / "shared")
    assert len(list(out.glob("*.safetensors"))) == len(list(dense.path.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model(tiny.tokens()).logits, stock_of(out, dense.path)(tiny.tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_converts_the_stored_rows_once(shared: Path, llama: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared, dtype=dtype)
    stock = stock_of(shared, llama, dtype=dtype)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert torch.equal(model(tiny.tokens()).logits, stock(tiny.tokens()).logits)
    assert unique_parameter_bytes(model) == unique_parameter_bytes(AutoModelForCausalLM.from_pretrained(shared)) * (
        dtype.itemsize / 4
    )


def test_the_base_model_loads_from_a_language_models_checkpoint(shared: Path) -> None:
    base = AutoModel.from_pretrained(shared)
    full = AutoModelForCausalLM.from_pretrained(shared)
    assert torch.equal(base(tiny.tokens())[0], full.model(tiny.tokens())[0])


def test_device_map_auto_loads(shared: Path, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared, device_map="auto")
    assert torch.equal(model(tiny.tokens()).logits, stock_of(shared, llama)(tiny.tokens()).logits)


def test_layers_offloaded_to_disk_lend_and_borrow(shared: Path, llama: Path, tmp_path: Path) -> None:
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None
    assert {tie.donor.layer for tie in plan.selections[0].ties} & {0, 1}
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer in (0, 1, 3) else "cpu" for layer in range(4)}
    model = AutoModelForCausalLM.from_pretrained(shared, device_map=places, offload_folder=tmp_path / "offload")
    assert model.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    with torch.inference_mode():
        assert torch.equal(model(tiny.tokens()).logits, stock_of(shared, llama)(tiny.tokens()).logits)
        generated = model.generate(tiny.tokens(), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 15)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_takes_the_whole_model_as_one_graph(shared: Path, backend: str) -> None:
    code = f"""
import sys, torch, headshare
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(shared)!r})
tokens = torch.arange(5, 15)[None]
compiled = torch.compile(model, fullgraph=True, backend={backend!r})
with torch.no_grad():
    difference = (compiled(tokens, use_cache=False).logits - model(tokens, use_cache=False).logits).abs().max().item()
sys.exit(difference > 1e-4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def tied_gradients(stock: nn.Module, plan: SharePlan) -> dict[str, torch.Tensor]:
    """Gradients of a stock model as if recipients' rows were their donors': recipients' gradients added to donors'."""
    gradients = {f"{name}": p.grad.clone() for name, p in stock.named_parameters() if p.grad is not None}
    for selection in plan.selections:
        for place in selection.layout.parts.values():
            for recipient, donor in selection.ties:
                start, stop = place.span(recipient.group)
                taken, _ = place.span(donor.group)
                lost = gradients[place.name(recipient.layer)].narrow(place.axis, start, stop - start)
                gradients[place.name(donor.layer)].narrow(place.axis, taken, stop - start).add_(lost)
    return gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_the_expanded_model_with_tied_rows(
    shared: Path, llama: Path, checkpointing: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared, dtype=torch.float64).train()
    stock = stock_of(shared, llama, dtype=torch.float64).train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    for one in (model, stock):
        one(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None
    expected, tensors = tied_gradients(stock, plan), plan.tensors
    for name, parameter in model.named_parameters():
        whole = expected[name]
        if name in tensors:
            kept = [whole.narrow(tensors[name].axis, a, b - a) for a, b in tensors[name].kept()]
            whole = torch.cat([whole.narrow(tensors[name].axis, 0, 0), *kept], dim=tensors[name].axis)
        if parameter.numel():
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, whole, rtol=1e-10, atol=1e-12, msg=name)


def test_the_trainer_trains_and_its_checkpoint_loads(shared: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared)
    row = {"input_ids": tiny.tokens()[0], "labels": tiny.tokens()[0]}
    settings = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    before = model(tiny.tokens(), labels=tiny.tokens()).loss.item()
    trainer = Trainer(model=model, args=settings, train_dataset=[row] * 8)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert trained(tiny.tokens(), labels=tiny.tokens()).loss.item() < before
    assert unique_parameter_bytes(trained) == unique_parameter_bytes(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_shares_within_itself_and_with_nobody_else(shared: Path, duplicate) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared)
    twin = duplicate(model)
    expected = model(tiny.tokens()).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(tiny.tokens()).logits, expected)
    assert unique_parameter_bytes(twin) == unique_parameter_bytes(model)


def test_changing_a_donor_changes_its_recipients(shared: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared)
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None
    recipient, donor = plan.selections[0].ties[0]
    projections = dict(shared_projections(model))
    ours = projections[f"model.layers.{recipient.layer}.self_attn.q_proj"]
    theirs = projections[f"model.layers.{donor.layer}.self_attn.q_proj"]
    with torch.no_grad():
        theirs.weight.add_(1.0)
    rows = slice(recipient.group * 16, recipient.group * 16 + 16)
    lent = theirs.whole_weight()[donor.group * 16 : donor.group * 16 + 16]
    assert torch.equal(ours.whole_weight()[rows], lent)


def test_state_dict_names_are_the_dense_models_own(shared: Path, llama: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(shared).state_dict()
    assert set(ours) == set(LlamaForCausalLM.from_pretrained(llama).state_dict())


def test_dequantize_leaves_buffers_as_they_are(shared: Path) -> None:
    """Rotary frequencies rounded to bfloat16 would turn later tokens by other angles."""
    model = hs.load(shared, dtype=torch.bfloat16)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    dense = model.dequantize()
    assert any(buffer.dtype == torch.float32 for buffer in before.values())
    assert all(buffer.equal(before[name]) for name, buffer in dense.named_buffers())
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}


def test_dequantize_gives_back_a_dense_model_with_the_same_logits(shared: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared)
    expected = model(tiny.tokens()).logits
    dense = model.dequantize()
    assert not any(isinstance(module, SharedProjection) for module in dense.modules())
    assert torch.equal(dense(tiny.tokens()).logits, expected)
    dense.save_pretrained(tmp_path / "dense")
    assert hs.open_checkpoint(tmp_path / "dense").plan is None


def test_a_layer_that_gives_everything_up_stores_no_rows(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make_llama(tmp_path / "dense"))
    plan = hs.make_plan(hs.score_units(dense), 0.75)
    out = hs.share(dense, plan).save(tmp_path / "shared")
    assert hs.open_checkpoint(out).shapes["model.layers.3.self_attn.q_proj.weight"] == (0, 32)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model(tiny.tokens()).logits, stock_of(out, dense.path)(tiny.tokens()).logits)
    model.save_pretrained(tmp_path / "again")
    assert stored_bytes(tmp_path / "again") == stored_bytes(out)


def test_ratio_zero_is_the_identity_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(llama)
    out = hs.share(dense, hs.make_plan(hs.score_units(dense), 0.0)).save(tmp_path / "shared")
    assert stored_bytes(out) == stored_bytes(llama)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model(tiny.tokens()).logits, LlamaForCausalLM.from_pretrained(llama)(tiny.tokens()).logits)


def scaled_plan(dense: hs.Checkpoint) -> SharePlan:
    plan = hs.make_plan(hs.score_units(dense, parts="qkvo"), 0.5, parts="qkvo")
    selections = tuple(
        Selection(layout=one.layout, ties=one.ties, scale=True, chosen=one.chosen) for one in plan.selections
    )
    return SharePlan(model_type=plan.model_type, selections=selections)


def test_a_scale_of_ones_changes_nothing_and_a_scale_of_zero_deletes(llama: Path, tmp_path: Path) -> None:
    from headshare.experiments.controls import delete_units

    dense = hs.open_checkpoint(llama)
    plan = scaled_plan(dense)
    shared = hs.share(dense, plan)
    out = shared.save(tmp_path / "shared")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert unique_parameter_bytes(model) == shared.estimate.shared_bytes
    assert torch.equal(model(tiny.tokens()).logits, stock_of(out, llama)(tiny.tokens()).logits)
    with torch.no_grad():
        for _, module in shared_projections(model):
            if module.tie_scale is not None:
                module.tie_scale.zero_()
    deleted = LlamaForCausalLM.from_pretrained(llama)
    delete_units(deleted, plan.selections[0].layout, [tie.recipient for tie in plan.selections[0].ties])
    torch.testing.assert_close(model(tiny.tokens()).logits, deleted(tiny.tokens()).logits)


def test_scales_survive_saving_and_fold_into_the_expanded_model(llama: Path, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(llama)
    out = hs.share(dense, scaled_plan(dense)).save(tmp_path / "shared")
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        for _, module in shared_projections(model):
            if module.tie_scale is not None:
                module.tie_scale.normal_()
    model.save_pretrained(tmp_path / "scaled")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "scaled")
    assert torch.equal(again(tiny.tokens()).logits, model(tiny.tokens()).logits)
    expanded = hs.expand(hs.open_checkpoint(tmp_path / "scaled"), tmp_path / "expanded")
    stock = LlamaForCausalLM.from_pretrained(expanded)
    torch.testing.assert_close(stock(tiny.tokens()).logits, model(tiny.tokens()).logits)
    torch.testing.assert_close(model.dequantize()(tiny.tokens()).logits, stock(tiny.tokens()).logits)
