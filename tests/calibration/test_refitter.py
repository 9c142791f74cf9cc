"""A refit brings a shared model's hidden states nearer to the dense model's, and changes nothing else."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

import headshare as hs
from headshare.architecture.config import text_config
from headshare.architecture.recognition import attention_layout
from headshare.calibration.layerwise import layers as streams
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.refit import layer_fit, refitter
from headshare.calibration.refit.normal_equations import token_weights
from headshare.calibration.refit.refitter import Refitter
from headshare.calibration.refit.residuals import residual_of, watched
from headshare.calibration.refit.result import Refit, RefitStep
from headshare.calibration.refit.run import refit_readouts
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import CalibrationError, CheckpointError, PlanError
from headshare.experiments.controls import overwrite_recipients
from headshare.integrations.transformers.loading import load_model
from headshare.plan.low_rank import LowRankUnits
from headshare.plan.plan import SharePlan
from headshare.plan.ties import Selection, scale_name
from headshare.plan.units import HeadUnit, Part, Tie
from headshare.text.tokens import Calibration
from support import tiny
from support.refits import WINDOW, calibration, dense_of, last_states, missed, plan_of, refitted, same, stock
from support.walks import ALL, MORE, hidden_states

PLANS = ("qkv", "qk", "qkvo", "scaled qkvo", "removed attention", "removed neurons", "ffn", "gateup", "down", "o")
THOROUGH = ("llama-biased", "gpt2", "phi3", "bert")  # every plan; of the others two, in turns
UNREMOVABLE = ("llama-mqa", "falcon-mqa", "falcon-mha", "mpnet", "olmo2", "electra", "stablelm-parallel")


def plans_for(name: str) -> list[str]:
    """The plans that a family is refitted with."""
    unlike = ("removed neurons", "ffn", "gateup", "down") if ALL[name][2] is None else ()
    kinds = [kind for kind in PLANS if kind not in unlike and (kind != "removed attention" or name not in UNREMOVABLE)]
    if name in THOROUGH:
        return kinds
    if name in MORE:
        return ["qkv"]
    at = list(ALL).index(name)
    return [kinds[at % len(kinds)], kinds[(at + len(kinds) // 2) % len(kinds)]]


CASES = [(name, kind) for name in ALL for kind in plans_for(name)]


@pytest.fixture(autouse=True)
def _more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "FAMILIES", ALL)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[hs.Checkpoint, Any, Tensor]]:
    """Each family's checkpoint, stock model and last hidden states of the calibration, made once."""

    @functools.cache
    def made(name: str) -> tuple[hs.Checkpoint, Any, Tensor]:
        dense = dense_of(name, tmp_path_factory.mktemp(name))
        return dense, stock(dense), last_states(stock(dense), calibration().tokens)

    return made


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_refit_brings_the_last_hidden_states_nearer(name: str, kind: str, families: Any) -> None:
    (dense, model, wanted), tokens = families(name), calibration()
    plan = plan_of(dense, kind)
    found = refit_readouts(dense, plan, tokens)
    shared = copy.deepcopy(model)
    overwrite_recipients(shared, plan)
    before = missed(last_states(shared, tokens.tokens), wanted)
    after = missed(last_states(refitted(shared, found), tokens.tokens), wanted)
    assert after < before
    assert any(step.ridge is not None for step in found.steps)
    assert all(step.error_after <= step.error_before for step in found.steps)
    check_lent_and_removed(dense, plan, found)


def check_lent_and_removed(dense: hs.Checkpoint, plan: SharePlan, found: Refit) -> None:
    """Removed inputs' numbers are zero, lent ones are the donor's as refitted, times the scale where there is one."""
    for name, gapped in plan.tensors.items():
        if name not in found.tensors:
            continue
        whole, used = found.tensors[name].movedim(gapped.axis, 0), 0
        assert whole.shape[0] == gapped.size
        assert found.tensors[name].dtype == dense.tensors[name].torch_dtype
        for start, stop in gapped.removed:
            assert not whole[start:stop].any()
        for gap in gapped.gaps:
            donor = found.tensors[gap.donor] if gap.donor in found.tensors else dense.read(gap.donor)
            lent = donor.movedim(gapped.axis, 0)[gap.donor_start : gap.donor_start + gap.stop - gap.start]
            if (gap.start, gap.stop) in gapped.scaled:
                scale = found.tensors[scale_name(name)][used : used + len(lent)]
                used += len(lent)
                lent = lent * scale[:, None]
            assert torch.equal(whole[gap.start : gap.stop], lent)
        assert used == len(found.tensors.get(scale_name(name), ()))


@pytest.mark.parametrize("ffn", [True, False])
def test_only_readouts_from_the_first_tie_on_are_fitted(ffn: bool, tmp_path: Path) -> None:
    dense = dense_of("llama-biased", tmp_path)
    layout = attention_layout(dense.config, dense.shapes).only((Part.Q, Part.K, Part.V))
    tie = Tie(HeadUnit(2, 1), HeadUnit(0, 0))
    plan = SharePlan(model_type="llama", selections=(Selection(layout=layout, ties=(tie,)),))
    found = refit_readouts(dense, plan, calibration(), ffn=ffn)
    readouts = ["self_attn.o_proj", *(["mlp.down_proj"] if ffn else [])]
    assert [step.tensor for step in found.steps] == [
        f"model.layers.{layer}.{path}.weight" for layer in (2, 3) for path in readouts
    ]
    fitted = {step.tensor for step in found.steps if step.ridge is not None}
    assert "model.layers.2.self_attn.o_proj.weight" in fitted
    assert set(found.tensors) == fitted | {name.replace("weight", "bias") for name in fitted}
    assert all(step.note == "" if step.tensor in fitted else "no ridge" in step.note for step in found.steps)
    assert json.loads(json.dumps(found.to_dict()))["steps"][0]["tensor"] == "model.layers.2.self_attn.o_proj.weight"


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert", "mixtral"])
def test_a_plan_that_changes_nothing_leaves_everything_untouched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = dense_of(name, tmp_path)
    plan = hs.make_plan(hs.score_units(dense), 0.0)
    monkeypatch.setattr(streams.Layers, "build", None)  # and walks nothing
    refitter = Refitter(dense, plan, calibration())
    assert list(refitter.advance()) == [0, 1, 2, 3]
    assert (dict(refitter.result.tensors), refitter.result.steps) == ({}, [])


def test_layers_before_the_first_tie_are_walked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    layout = attention_layout(dense.config, dense.shapes)
    plan = SharePlan(
        model_type="llama", selections=(Selection(layout=layout, ties=(Tie(HeadUnit(3, 0), HeadUnit(0, 1)),)),)
    )
    built, original = [], streams.Layers.build
    monkeypatch.setattr(
        streams.Layers, "build", lambda self, layer, *given: built.append(layer) or original(self, layer, *given)
    )
    refitter = Refitter(dense, plan, calibration())
    state = refitter.state()
    assert torch.equal(state["dense"], state["shared"])
    built.clear()
    assert list(refitter.advance()) == [0, 1, 2, 3]
    assert built == [0, 1, 2, 3, 3]


# ---- how layers add


@pytest.mark.parametrize(
    ("name", "adding", "factor"),
    [("llama-biased", "plain", 1.0), ("gpt_neox", "plain", 1.0), ("granite", "plain", 0.3),
     ("gemma2", "normed output", 1.0), ("olmo2", "normed output", 1.0), ("bert", "normed sum", 1.0),
     ("mixtral", "plain", 1.0)],
)  # fmt: skip
def test_how_a_layer_adds_is_found_by_looking_and_gives_what_a_readout_should(
    name: str, adding: str, factor: float, tmp_path: Path
) -> None:
    layers = Layers(dense_of(name, tmp_path))
    entered, built = layers.start(tiny.tokens(10, 3)), layers.build(0)
    entered[0, 3] *= 1e4  # one token's size does not hide what the others say
    left, seen = layers.run(built, 0, entered, watched(layers))
    found = residual_of(layers, entered, left, seen)
    assert (found.adding, found.factor) == (adding, pytest.approx(factor, rel=1e-5))
    output, own = seen.outputs[found.o], torch.randn_like(entered)
    torch.testing.assert_close(found.wanted_of_o(entered, entered, seen), output)
    if adding == "normed output":
        torch.testing.assert_close(found.wanted_of_o(entered, own, seen), output)
    else:  # what the shared layer then comes to after attention is what the dense one came to
        reached = own + found.factor * found.wanted_of_o(entered, own, seen)
        torch.testing.assert_close(reached, entered + factor * output, rtol=1e-4, atol=1e-4)
    if found.down is not None:
        wanted = found.wanted_of_down(found.target(entered, seen), entered, seen)
        torch.testing.assert_close(wanted[1:], seen.outputs[found.down][1:], rtol=1e-4, atol=1e-4)


# ---- what the streams hold


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.bfloat16, "qkv"), (torch.bfloat16, "scaled qkvo"), (torch.bfloat16, "removed neurons"),
     (torch.float16, "scaled qkvo"), (torch.float16, "down")],
)  # fmt: skip
def test_streams_go_on_with_the_weights_as_they_are_stored(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    folder = tiny.make("llama-biased", tmp_path / "whole")
    tf.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path / "half")
    dense, tokens = hs.open_checkpoint(tmp_path / "half"), calibration()
    plan = plan_of(dense, kind)
    refitter = Refitter(dense, plan, tokens)
    for layer in refitter.advance():
        found = refitter.result
        assert {tensor.dtype for tensor in found.tensors.values()} <= {dtype}
        model = stock(dense, plan, found)
        for name, gapped in plan.tensors.items():  # what a layer multiplies is not rounded once more
            used = 0
            for gap in gapped.gaps if scale_name(name) in found.tensors else ():
                donor = found.tensors.get(gap.donor, dense.read(gap.donor) if gap.donor in dense.tensors else None)
                lent = donor[:, gap.donor_start : gap.donor_start + gap.stop - gap.start].float()
                scale = found.tensors[scale_name(name)][used : used + lent.shape[1]].float()
                used += lent.shape[1]
                model.get_submodule(name.removesuffix(".weight")).weight.data[:, gap.start : gap.stop] = lent * scale
        state = refitter.state()
        reached = hidden_states(model, refitter.tokens)[layer + 1]
        torch.testing.assert_close(state["shared"], reached, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(
            state["dense"], hidden_states(stock(dense), refitter.tokens)[layer + 1], rtol=2e-5, atol=2e-5
        )


def test_the_first_fit_is_the_least_squares_solution_on_the_stock_models_own_states(tmp_path: Path) -> None:
    """Of W_o in a layer of ties, from hooks in two stock models; tokens weigh by the stream after attention."""
    dense, tokens = dense_of("llama-biased", tmp_path), calibration()
    layout = attention_layout(dense.config, dense.shapes).only((Part.Q, Part.K, Part.V))
    plan = SharePlan(
        model_type="llama", selections=(Selection(layout=layout, ties=(Tie(HeadUnit(2, 1), HeadUnit(0, 0)),)),)
    )
    refitter = Refitter(dense, plan, tokens)
    walk = refitter.advance()
    assert [next(walk), next(walk), next(walk)] == [0, 1, 2]
    step, ids = refitter.result.steps[0], refitter.tokens
    assert step.ridge is not None
    inputs, outputs = {}, {}
    for which, model in (("dense", stock(dense)), ("shared", stock(dense, plan))):

        def note(_: Any, args: Any, output: Tensor, which: str = which) -> None:
            inputs[which], outputs[which] = args[0].double().flatten(0, 1), output.double().flatten(0, 1)

        model.model.layers[2].self_attn.o_proj.register_forward_hook(note)
        entered = hidden_states(model, ids)[2].double().flatten(0, 1)
    root = (entered + outputs["dense"]).norm(dim=1, keepdim=True).reciprocal()
    z = torch.cat([inputs["shared"], torch.ones(len(root), 1)], dim=1) * root
    prior = torch.cat([getattr(stock(dense).model.layers[2].self_attn.o_proj, leaf).double().view(32, -1)
                       for leaf in ("weight", "bias")], dim=1).detach()  # fmt: skip
    prior[:, 16:32] = 0  # group 1's features are another layer's
    strength = (step.ridge * z.square().sum(dim=0).mean()).sqrt()
    system = torch.cat([z, strength * torch.eye(33)])
    wanted = torch.cat([outputs["dense"] * root, strength * prior.T])
    solution = torch.linalg.lstsq(system, wanted, driver="gelsd").solution.T.float()
    torch.testing.assert_close(refitter.result.tensors[step.tensor], solution[:, :32], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        refitter.result.tensors[step.tensor.replace("weight", "bias")], solution[:, 32], rtol=1e-3, atol=1e-4
    )


# ---- going on


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama-biased", "scaled qkvo"), ("gemma2", "qkv"), ("bert", "ffn"), ("falcon-mha", "qk"),
     ("gpt2", "removed neurons"), ("mixtral", "scaled qkvo")],
)  # fmt: skip
def test_a_refit_that_was_stopped_goes_on_bit_for_bit(name: str, kind: str, tmp_path: Path) -> None:
    """After every layer, through files; what goes on does not disturb what was stopped."""
    dense, tokens = dense_of(name, tmp_path), calibration(windows=31)
    plan = plan_of(dense, kind)
    whole = Refitter(dense, plan, tokens)
    for layer in whole.advance():
        save_file(whole.state(), tmp_path / f"{layer}.streams")
        save_file(dict(whole.result.tensors), tmp_path / f"{layer}.tensors")
        (tmp_path / f"{layer}.json").write_text(json.dumps(whole.result.to_dict()))
    for layer in range(dense.config.get("num_hidden_layers", 4)):
        again = Refitter(dense, plan, tokens)
        steps = [RefitStep(**step) for step in json.loads((tmp_path / f"{layer}.json").read_text())["steps"]]
        state, tensors = load_file(tmp_path / f"{layer}.streams"), load_file(tmp_path / f"{layer}.tensors")
        again.resume(layer + 1, state, tensors, steps)
        assert list(again.advance()) == list(range(layer + 1, 4))
        assert same(whole.result, again.result)
        assert torch.equal(whole.state()["shared"], again.state()["shared"])
        assert torch.equal(state["shared"], load_file(tmp_path / f"{layer}.streams")["shared"])


def test_a_refit_can_be_walked_on_after_a_pause(tmp_path: Path) -> None:
    dense, tokens = dense_of("llama-gqa", tmp_path), calibration()
    plan = plan_of(dense, "qkv")
    paused = Refitter(dense, plan, tokens)
    for layer in paused.advance():
        if layer == 1:
            break
    assert paused.next == 2
    assert list(paused.advance()) == [2, 3]
    assert same(paused.result, refit_readouts(dense, plan, tokens))


def test_streams_of_other_tokens_are_refused(tmp_path: Path) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    refitter = Refitter(dense, plan_of(dense, "qkv"), calibration())
    state = Refitter(dense, plan_of(dense, "qkv"), calibration(windows=9)).state()
    with pytest.raises(CheckpointError, match="no stream 'dense'"):
        refitter.resume(1, state, {}, [])
    with pytest.raises(CheckpointError, match="no stream 'shared'"):
        refitter.resume(1, {"dense": refitter.state()["dense"]}, {}, [])


# ---- factored units


def factoring(dense: hs.Checkpoint, *, tied: bool = True) -> SharePlan:
    """Units of layers 1 and 3 that take q, k and v from layer 0 and keep products of ranks 2 to 4; all of layer 3."""
    layout = attention_layout(text_config(dense.config), dense.shapes)
    last = layout.groups - 1
    ranks = {1: {last: 3}, 3: {group: 2 + group % 3 for group in range(layout.groups)}}
    ties = tuple(Tie(HeadUnit(layer, group), HeadUnit(0, (group + 1) % layout.groups)) for layer, groups in
                 ranks.items() for group in groups)  # fmt: skip
    return SharePlan(
        model_type=str(dense.config["model_type"]),
        selections=(Selection(layout=layout.only((Part.Q, Part.K, Part.V)), ties=ties),) if tied else (),
        factored=(
            LowRankUnits(
                layout=layout.only((Part.O,)),
                units={layer: list(one) for layer, one in ranks.items()},
                ranks={layer: list(one.values()) for layer, one in ranks.items()},
            ),
        ),
    )


def saved_model(dense: hs.Checkpoint, plan: SharePlan, out: Path, found: Refit | None = None) -> Any:
    """The shared model as it is saved and loaded, refitted or not; in float32, whatever it is stored as."""
    shared = hs.share(dense, plan)
    if found is not None:
        fitted = tuple(sorted(name for name in found.tensors if name.endswith((".weight", ".bias"))))
        record = RefitRecord(tensors=fitted, text="drawn", text_digest="0" * 64, tokens=640, window=WINDOW, seed=0)
        shared = shared.with_refit(record, found.tensors)
    return load_model(hs.open_checkpoint(shared.save(out)), storage="owner", dtype=torch.float32)


def columns_of(plan: SharePlan, found: Refit) -> dict[str, list[tuple[slice, Tensor]]]:
    """Of each factored readout, the products that its factors make in float64, by columns."""
    made: dict[str, list[tuple[slice, Tensor]]] = {}
    for layer in plan.factored[0].units:
        name, at = plan.factored[0].place.name(layer), 0
        inner, outer = (found.tensors[name.removesuffix("weight") + f"factor_{end}"].double() for end in ("in", "out"))
        for group, rank in plan.factored[0].ranked(layer):
            product = torch.einsum("ri,or->oi", inner[at : at + rank], outer[:, at : at + rank])
            made.setdefault(name, []).append((slice(*plan.factored[0].place.span(group)), product))
            at += rank
        assert at == len(inner) == outer.shape[1]
    return made


@pytest.mark.parametrize(
    ("name", "tied"),
    [("llama-gqa", True), ("gpt2", True), ("phi3", True), ("gpt_neox", True), ("bert", True), ("opt", True),
     ("gpt2", False)],
)  # fmt: skip
def test_factored_units_are_refitted_and_loaded_as_a_stock_model_with_whole_readouts(
    name: str, tied: bool, tmp_path: Path
) -> None:
    dense, tokens = dense_of(name, tmp_path), calibration()
    plan = factoring(dense, tied=tied)
    found = refit_readouts(dense, plan, tokens)
    for readout, products in columns_of(plan, found).items():
        whole = found.tensors[readout] if plan.factored[0].place.axis else found.tensors[readout].T
        for span, product in products:
            torch.testing.assert_close(whole[:, span].double(), product, rtol=1e-5, atol=1e-6)
            rank = int(torch.linalg.matrix_rank(product))
            assert rank in (2, 3, 4)
            values = torch.linalg.svdvals(whole[:, span].double())
            assert values[rank] < 1e-5 * values[0]
    wanted = last_states(stock(dense), tokens.tokens)
    shared = last_states(saved_model(dense, plan, tmp_path / "refitted", found), tokens.tokens)
    torch.testing.assert_close(shared, last_states(stock(dense, plan, found), tokens.tokens), rtol=1e-4, atol=1e-4)
    before = last_states(saved_model(dense, plan, tmp_path / "as it is"), tokens.tokens)
    assert missed(shared, wanted) < missed(before, wanted)
    steps = {step.tensor: step for step in found.steps}
    for readout in columns_of(plan, found):
        assert steps[readout].ridge is not None
        assert steps[readout].error_after < steps[readout].error_before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-biased", "gpt2"])
def test_streams_go_on_with_products_of_factors_as_they_are_stored(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Factors are rounded, and what a layer multiplies by is their product, which is not rounded again."""
    folder = tiny.make(name, tmp_path / "whole")
    ALL[name][0].from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path / "half")
    dense = hs.open_checkpoint(tmp_path / "half")
    plan = factoring(dense)
    refitter = Refitter(dense, plan, calibration())
    assert list(refitter.advance()) == [0, 1, 2, 3]
    found = refitter.result
    assert {tensor.dtype for tensor in found.tensors.values()} == {dtype}
    shared = last_states(saved_model(dense, plan, tmp_path / "refitted", found), refitter.tokens)
    torch.testing.assert_close(refitter.state()["shared"], shared, rtol=2e-5, atol=2e-5)
    for readout, products in columns_of(plan, found).items():
        whole = found.tensors[readout] if plan.factored[0].place.axis else found.tensors[readout].T
        assert all(torch.equal(whole[:, span], product.to(dtype)) for span, product in products)


def test_factors_of_a_shared_checkpoint_are_refitted_again(tmp_path: Path) -> None:
    """Though training moved them."""
    dense, tokens = dense_of("gpt_neox", tmp_path), calibration()
    plan = factoring(dense)
    out = hs.share(dense, plan).save(tmp_path / "shared")
    tensors = load_file(out / "model.safetensors")
    for key, tensor in tensors.items():
        tensor += 0.03 * torch.randn_like(tensor) * (3 if "factor" in key else 1)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shared = hs.open_checkpoint(out)
    refitter = Refitter(dense, plan, tokens, shared=shared)
    before = hidden_states(load_model(shared, storage="owner"), refitter.tokens)
    assert list(refitter.advance()) == [0, 1, 2, 3]
    rewrite(out, plan, refitter.result)
    after = hidden_states(load_model(hs.open_checkpoint(out), storage="owner"), refitter.tokens)[-1]
    torch.testing.assert_close(refitter.state()["shared"], after, rtol=1e-3, atol=1e-3)
    wanted = last_states(stock(dense), refitter.tokens)
    assert missed(after, wanted) < missed(before[-1], wanted)


# ---- of a shared checkpoint


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gpt2", "qk"), ("llama-gqa", "removed attention"), ("bert", "removed neurons"), ("llama-gqa", "o"),
     ("phi3", "down"), ("mpnet", "qkvo")],
)  # fmt: skip
def test_a_freshly_shared_checkpoint_is_refitted_as_the_plan_is(name: str, kind: str, tmp_path: Path) -> None:
    """Where no features are borrowed that an own column would read: there the prior is another."""
    dense, tokens = dense_of(name, tmp_path), calibration()
    plan = plan_of(dense, kind)
    shared = hs.open_checkpoint(hs.share(dense, plan).save(tmp_path / "shared"))
    found = Refitter(dense, plan, tokens, shared=shared)
    assert list(found.advance()) == [0, 1, 2, 3]
    by_plan = refit_readouts(dense, plan, tokens)
    assert [(step.tensor, step.ridge) for step in found.result.steps] == [
        (step.tensor, step.ridge) for step in by_plan.steps
    ]
    for key, tensor in by_plan.tensors.items():
        torch.testing.assert_close(found.result.tensors[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama-biased", "qkv"), ("llama-biased", "scaled qkvo"), ("llama-biased", "ffn"), ("gpt2", "scaled qkvo"),
     ("gpt2", "removed neurons"), ("bert", "removed neurons"), ("bert", "qkv"), ("mixtral", "scaled qkvo")],
)  # fmt: skip
def test_a_trained_shared_checkpoint_is_refitted_from_what_it_is(name: str, kind: str, tmp_path: Path) -> None:
    """Every tensor of it has moved, embeddings and scales too; the scales fold into what is walked."""
    dense, tokens = dense_of(name, tmp_path), calibration()
    plan = plan_of(dense, kind)
    out = hs.share(dense, plan).save(tmp_path / "shared")
    tensors = load_file(out / "model.safetensors")
    for key, tensor in tensors.items():
        tensor += 0.03 * torch.randn_like(tensor) * (10 if key.endswith("tie_scale") else 1)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shared = hs.open_checkpoint(out)
    refitter = Refitter(dense, plan, tokens, shared=shared)
    ids = refitter.tokens
    before = hidden_states(load_model(shared, storage="owner"), ids)
    torch.testing.assert_close(refitter.state()["shared"], before[0])
    for layer in refitter.advance():
        if layer < refitter.first:
            torch.testing.assert_close(refitter.state()["shared"], before[layer + 1], rtol=1e-4, atol=1e-4)
    found = refitter.result
    rewrite(out, plan, found)
    after = hidden_states(load_model(hs.open_checkpoint(out), storage="owner"), ids)[-1]
    torch.testing.assert_close(refitter.state()["shared"], after, rtol=1e-3, atol=1e-3)
    wanted = last_states(stock(dense), ids)
    assert missed(after, wanted) < missed(before[-1], wanted)


def rewrite(folder: Path, plan: SharePlan, found: Refit) -> None:
    """Put refitted tensors into a shared folder: of each, what it keeps."""
    tensors, gapped = load_file(folder / "model.safetensors"), plan.tensors
    for name, tensor in found.tensors.items():
        spans = gapped[name].kept() if name in gapped else None
        if spans is not None:
            axis = gapped[name].axis
            kept = [index for start, stop in spans for index in range(start, stop)]
            tensor = tensor.index_select(axis, torch.tensor(kept, dtype=torch.long))
        assert tensor.shape == tensors[name].shape
        tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_shared_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    shared = hs.open_checkpoint(hs.share(dense, plan_of(dense, "qk")).save(tmp_path / "shared"))
    with pytest.raises(PlanError, match="not shared by this plan"):
        Refitter(dense, plan_of(dense, "qkv"), calibration(), shared=shared)
    with pytest.raises(CheckpointError, match="already shared"):
        Refitter(shared, plan_of(dense, "qk"), calibration())
    with pytest.raises(PlanError, match="for another model"):
        refit_readouts(hs.open_checkpoint(tiny.make("gpt2", tmp_path / "gpt2")), plan_of(dense, "qk"), calibration())
    with pytest.raises(CalibrationError, match="gave 1 window"):
        refit_readouts(dense, plan_of(dense, "qk"), calibration(windows=1))


# ---- numbers that are hard


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama-biased", "scaled qkvo"), ("gpt2", "removed neurons"), ("bert", "qkv"), ("gpt_neox", "qkv")],
)
def test_results_do_not_depend_on_how_many_tokens_are_run_at_once(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, ids, found = dense_of(name, tmp_path), calibration().tokens, []
    plan = plan_of(dense, kind)
    for tokens in (12 * WINDOW, 4096):
        monkeypatch.setattr(streams, "BATCH_TOKENS", tokens)
        found.append(refit_readouts(dense, plan, calibration()))
    first, second = found
    assert [(step.tensor, step.ridge) for step in first.steps] == [(step.tensor, step.ridge) for step in second.steps]
    assert first.tensors.keys() == second.tensors.keys()
    states = [last_states(stock(dense, plan, one), ids) for one in found]
    assert missed(*states) < 1e-9


@pytest.mark.parametrize(("windows", "window"), [(2, 5), (3, 7), (50, 20), (9, 64)])
def test_any_number_of_windows_is_fitted(
    windows: int, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of fitted and of held-out windows have sizes that batches of all windows have not."""
    monkeypatch.setattr(streams, "BATCH_TOKENS", 160)
    dense = dense_of("gpt2", tmp_path)
    found = refit_readouts(dense, plan_of(dense, "qkvo"), calibration(windows, window))
    assert found.steps
    assert all(torch.isfinite(tensor).all() for tensor in found.tensors.values())


def changed(dense: hs.Checkpoint, **values: Any) -> hs.Checkpoint:
    """The same folder with rows of tensors set: name ends (dots as __): (row or slice, value or factor function)."""
    tensors = load_file(dense.path / "model.safetensors")
    for ending, (rows, make) in values.items():
        for key in [key for key in tensors if key.endswith(ending.replace("__", "."))]:
            tensors[key][rows] = make(tensors[key][rows])
    save_file(tensors, dense.path / "model.safetensors", metadata={"format": "pt"})
    return hs.open_checkpoint(dense.path)


def test_a_token_with_enormous_activations_does_not_rule_the_fit(tmp_path: Path) -> None:
    """One token of 640 is ten thousand times as large; the others are brought as near as without it."""
    dense = changed(dense_of("llama-gqa", tmp_path), embed_tokens__weight=(7, lambda row: row * 1e4))
    tokens = calibration()
    tokens.tokens[tokens.tokens == 7] = 8
    plain, plan = tokens.tokens.clone(), plan_of(dense, "qkv")
    tokens.tokens[4, WINDOW - 1] = 7  # last in its window: no other attends to it
    wanted = last_states(stock(dense), plain)
    errors = {}
    for name, ids in (("with", tokens.tokens), ("without", plain)):
        found = refit_readouts(dense, plan, Calibration(ids, False, name, 0))
        errors[name] = missed(last_states(stock(dense, plan, found), plain), wanted)
    before = missed(last_states(stock(dense, plan), plain), wanted)
    assert errors["with"] < 0.5 * before
    assert errors["with"] < 1.2 * errors["without"]


@pytest.mark.parametrize(
    ("name", "bad"),
    [("llama-biased", float("nan")), ("llama-biased", float("inf")), ("llama-biased", 1e30), ("gemma2", float("nan")),
     ("bert", float("nan")), ("gpt2", 1e30), ("mixtral", float("inf"))],
)  # fmt: skip
def test_tokens_whose_activations_are_not_finite_are_left_out_and_said_so(
    name: str, bad: float, tmp_path: Path
) -> None:
    ending = {"bert": "word_embeddings__weight", "gpt2": "wte__weight"}.get(name, "embed_tokens__weight")
    dense = changed(dense_of(name, tmp_path), **{ending: (7, lambda row: torch.full_like(row, bad))})
    tokens = calibration()
    tokens.tokens[tokens.tokens == 7] = 8
    tokens.tokens[4, WINDOW // 2] = 7
    plan = plan_of(hs.open_checkpoint(tiny.make(name, tmp_path / "sound")), "scaled qkvo")
    found = refit_readouts(dense, plan, tokens)
    assert found.tensors
    assert all(torch.isfinite(tensor).all() for tensor in found.tensors.values())
    assert all(step.error_after == step.error_after for step in found.steps)
    if bad != 1e30:
        assert "left out" in found.steps[0].note
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_model_that_is_not_finite_anywhere_keeps_its_readouts(tmp_path: Path) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    plan = plan_of(dense, "qkv")
    dense = changed(dense, input_layernorm__weight=(slice(None), lambda row: row * float("nan")))
    found = refit_readouts(dense, plan, calibration())
    assert not found.tensors
    assert all("cannot be solved" in step.note and "left out" in step.note for step in found.steps)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("ending", ["v_proj__weight", "up_proj__weight", "embed_tokens__weight", "o_proj__weight"])
@pytest.mark.parametrize("kind", ["scaled qkvo", "ffn"])
def test_weights_that_are_all_zero_are_no_obstacle(ending: str, kind: str, tmp_path: Path) -> None:
    dense = dense_of("llama-biased", tmp_path)
    plan = plan_of(dense, kind)
    biases = ending.replace("weight", "bias")
    zeros = {name: (slice(None), torch.zeros_like) for name in (ending, biases)}
    found = refit_readouts(changed(dense, **zeros), plan, calibration())
    assert all(torch.isfinite(tensor).all() for tensor in found.tensors.values())
    json.dumps(found.to_dict(), allow_nan=False)


def test_fewer_tokens_than_inputs_are_fitted(tmp_path: Path) -> None:
    dense, tokens = dense_of("llama-biased", tmp_path), calibration(windows=2, window=6)
    plan = plan_of(dense, "qkv")
    found = refit_readouts(dense, plan, tokens)
    wanted = last_states(stock(dense), tokens.tokens)
    after = missed(last_states(stock(dense, plan, found), tokens.tokens), wanted)
    assert after < missed(last_states(stock(dense, plan), tokens.tokens), wanted)


def test_tokens_weigh_one_over_their_squared_size_and_nothing_where_that_is_zero() -> None:
    hidden = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0], [float("inf"), 0.0], [1e18, 1e18]]])
    expected = torch.tensor([[1 / 25, 0, 0, 0, 5e-37]])
    torch.testing.assert_close(token_weights(hidden), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "gpt_neox", "granite", "bert"])
def test_layers_in_short_numbers_are_refitted_as_well(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How a layer adds its outputs is seen in full precision, and sums are made there, whatever layers run in."""
    dense = dense_of(name, tmp_path)
    plan = plan_of(dense, "qkv")
    full = refit_readouts(dense, plan, calibration())
    for module in (layer_fit, refitter):
        monkeypatch.setattr(module, "short_layers", lambda _: torch.autocast("cpu", torch.bfloat16))
    short = refit_readouts(dense, plan, calibration())
    tokens = calibration(seed=4).tokens
    wanted = last_states(stock(dense), tokens)
    alone = missed(last_states(stock(dense, plan), tokens), wanted)
    in_full, in_short = (missed(last_states(stock(dense, plan, one), tokens), wanted) for one in (full, short))
    assert in_full < alone
    assert in_short == pytest.approx(in_full, rel=0.03)
