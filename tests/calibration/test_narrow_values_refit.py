"""Values are narrowed to the directions that matter most on the calibration text, and W_o is fitted to them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headshare as hs
from headshare.calibration.refit.normal_equations import NormalEquations
from headshare.calibration.refit.refitter import Refitter
from headshare.calibration.refit.run import record_of, refit, refit_readouts
from headshare.calibration.refit.values import in_directions
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import CheckpointError
from headshare.evaluation.verify import verify
from headshare.plan.narrow_values import NarrowValues
from headshare.plan.removal import Removal
from headshare.plan.section import Section
from headshare.plan.units import Part
from headshare.sharing.factors import principal_values
from headshare.sharing.fits import open_shared
from headshare.sharing.rewrite import write_refitted
from support.refits import calibration, dense_of

WIDTHS = {0: 5, 2: 3}


def planned(dense: hs.Checkpoint, *more: Section) -> hs.SharePlan:
    values = NarrowValues(layout=dense.layouts.attention.only((Part.V, Part.O)), widths=WIDTHS)
    return hs.SharePlan.of_sections([values, *more], str(dense.config["model_type"]))


def hidden(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=calibration().tokens, output_hidden_states=True).hidden_states[-1]
    return found


# ---- directions


def inputs_of(heads: int, dims: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of a W_o over tokens, uneven as real ones are, and a W_o."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(heads * dims, heads * dims, generator=generator, dtype=torch.float64)
    z = torch.randn(300, heads * dims, generator=generator, dtype=torch.float64) @ mixed.tril()
    return z, torch.randn(24, heads * dims, generator=generator, dtype=torch.float64)


def test_one_reader_for_each_head_keeps_the_best_output_of_that_rank() -> None:
    z, readout = inputs_of(heads=3, dims=6)
    bases = principal_values(z.T @ z, readout, groups=3, dims=6)
    for head in range(3):
        own = slice(6 * head, 6 * head + 6)
        output = z[:, own] @ readout[:, own].T
        left, sizes, right = torch.linalg.svd(output, full_matrices=False)
        for width in (1, 4):
            kept = z[:, own] @ bases.into[head, :width].T @ bases.back[head, :, :width].T @ readout[:, own].T
            best = left[:, :width] * sizes[:width] @ right[:width]
            torch.testing.assert_close(kept, best, rtol=1e-4, atol=1e-4)
            lost = bases.importance[head, width:].sum()
            missed = (output - best).square().sum()
            torch.testing.assert_close(lost, missed, rtol=1e-4, atol=1e-5 * float(output.square().sum()))


def test_several_readers_keep_what_bounds_their_error_best_among_all_bases_that_were_tried() -> None:
    z, readout = inputs_of(heads=4, dims=6)
    bases = principal_values(z.T @ z, readout, groups=2, dims=6)
    for group in range(2):
        heads = [slice(6 * head, 6 * head + 6) for head in (2 * group, 2 * group + 1)]
        together = torch.cat([z[:, own] for own in heads])
        reading = torch.cat([readout[:, own] for own in heads])

        def bound(into: Tensor, back: Tensor, together: Tensor = together, reading: Tensor = reading) -> float:
            missed = together - together @ into.T @ back.T
            return float((missed @ reading.T).square().sum())

        found = bound(bases.into[group, :3], bases.back[group, :, :3])
        assert found == pytest.approx(float(bases.importance[group, 3:].sum()), rel=1e-4)
        for seed in range(50):
            turned = torch.linalg.qr(
                torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            )[0]
            into = bases.into[group] + 0.1 * turned @ bases.into[group]
            assert bound(into[:3], torch.linalg.inv(into)[:, :3]) > found


def test_the_rotation_and_its_inverse_leave_what_a_layer_computes() -> None:
    z, readout = inputs_of(heads=4, dims=6)
    bases = principal_values(z.T @ z, readout, groups=2, dims=6)
    turned = bases.of_gram(z.T).T
    torch.testing.assert_close(turned @ bases.of_readers(readout).T, z @ readout.T)
    torch.testing.assert_close(bases.of_values(torch.ones(12, 1)).view(2, 6), bases.into.sum(2))


def test_sums_in_the_directions_are_those_of_turned_inputs() -> None:
    z, readout = inputs_of(heads=4, dims=6)
    wanted = torch.randn(len(z), 24, dtype=torch.float64)
    bases = principal_values(z.T @ z, readout, groups=2, dims=6)
    sums = []
    for inputs in (z, bases.of_gram(z.T).T):
        equations = NormalEquations(24, 24, bias=True)
        equations.add(inputs, wanted, torch.ones(len(z), dtype=torch.float64))
        sums.append(equations)
    found = in_directions(sums[0], bases)
    torch.testing.assert_close(found.gram, sums[1].gram)
    torch.testing.assert_close(found.cross, sums[1].cross)
    assert (found.target, found.left_out) == (sums[1].target, 0)


# ---- refits


@pytest.mark.parametrize(
    "name", ["llama-biased", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "mixtral"))]
)
def test_a_refitted_model_of_narrow_values_is_nearer_to_the_dense_one_and_verifies(name: str, tmp_path: Path) -> None:
    dense = dense_of(name, tmp_path)
    removed = Removal(layout=dense.layouts.attention, removed={2: [1]})
    plan = planned(dense, removed)
    plain = hs.share(dense, plan)
    fitted = refit(plain, calibration())
    folders = [shared.save(tmp_path / f"shared-{n}") for n, shared in enumerate((plain, fitted))]
    wanted, before, after = (hidden(hs.load(folder)) for folder in (dense.path, *folders))
    assert (after - wanted).square().sum() < 0.9 * (before - wanted).square().sum()
    shared = hs.open_checkpoint(folders[1])
    assert sum(info.nbytes for info in shared.tensors.values()) == fitted.estimate.shared_bytes
    found = verify(shared, dense)
    assert found.ok, found.problems
    expanded = hs.expand(shared, tmp_path / "expanded")
    torch.testing.assert_close(hidden(hs.load(expanded)), after, rtol=1e-5, atol=1e-5)


def test_directions_of_the_text_do_better_than_those_of_the_weights(tmp_path: Path) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    plan = planned(dense)
    by_text = refit_readouts(dense, plan, calibration(), ffn=False).steps[0]
    shared = hs.open_checkpoint(hs.share(dense, plan).save(tmp_path / "shared"))
    refitter = Refitter(dense, plan, calibration(), ffn=False, shared=shared)
    for _ in refitter.advance():
        pass
    by_weights = refitter.result.steps[0]
    assert by_text.tensor == by_weights.tensor == "model.layers.0.self_attn.o_proj.weight"
    assert by_text.error_before < by_weights.error_before


def test_the_refit_of_a_shared_checkpoint_leaves_its_values_and_fits_what_reads_them(tmp_path: Path) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    plan = planned(dense)
    shared = hs.open_checkpoint(hs.share(dense, plan).save(tmp_path / "shared"))
    refitter = Refitter(dense, plan, calibration(), shared=shared)
    for _ in refitter.advance():
        pass
    assert not [name for name in refitter.result.tensors if "v_proj" in name]
    record = record_of(calibration(), refitter.result.tensors)
    out = write_refitted(open_shared(shared), record, refitter.result.tensors, tmp_path / "refitted")
    assert verify(hs.open_checkpoint(out), dense).ok
    wanted, before, after = (hidden(hs.load(folder)) for folder in (dense.path, shared.path, out))
    assert (after - wanted).square().sum() < (before - wanted).square().sum()


def test_a_refit_of_w_o_alone_is_refused_where_values_would_be_in_other_directions(tmp_path: Path) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    plan = planned(dense)
    tensors = dict(refit_readouts(dense, plan, calibration()).tensors)
    del tensors["model.layers.2.self_attn.v_proj.weight"]
    record = RefitRecord.of(set(tensors), "drawn", "0" * 64, windows=(32, 20), seed=0)
    with pytest.raises(CheckpointError, match=r"v_proj\.weight was not. Give both or none"):
        hs.share(dense, plan).with_refit(record, tensors).save(tmp_path / "shared")


def test_values_stay_narrow_where_no_ridge_does_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headshare.calibration.refit.regression.NOISE", float("inf"))
    dense = dense_of("llama-gqa", tmp_path)
    plain = hs.share(dense, planned(dense))
    fitted = refit(plain, calibration())
    assert {step.split(".")[-2] for step in fitted.refitted} == {"v_proj", "o_proj"}
    folders = [shared.save(tmp_path / f"shared-{n}") for n, shared in enumerate((plain, fitted))]
    assert verify(hs.open_checkpoint(folders[1]), dense).ok
    wanted, by_weights, by_text = (hidden(hs.load(folder)) for folder in (dense.path, *folders))
    assert (by_text - wanted).square().sum() < (by_weights - wanted).square().sum()
