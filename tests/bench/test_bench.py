"""Benchmarks measure what they say, on models whose figures are known."""

from pathlib import Path

import pytest
import torch

import headshare as hs
from headshare.bench.bench import Loaded, Ratio, Subject, bench, dense_and_shared, load_once, measure_loading
from headshare.bench.memory import forget_cached, give_back_freed, pss_bytes
from headshare.bench.tables import bench_table
from headshare.errors import EvaluationError, OptionError, PlanError
from support import tiny


@pytest.fixture
def shared(llama: Path, tmp_path: Path) -> Path:
    dense = hs.open_checkpoint(llama)
    return hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5)).save(tmp_path / "shared")


def test_a_ratio_is_the_median_of_pairs_and_not_of_all() -> None:
    # Times drift by a factor of four within the run; every pair says 1.1.
    dense = [1.0, 2.0, 4.0, 2.0, 1.0]
    found = Ratio.of([1.1 * value for value in dense], dense)
    assert (found.median, found.ratio, found.low, found.high) == pytest.approx((2.2, 1.1, 1.1, 1.1))


def test_quartiles_show_the_spread() -> None:
    found = Ratio.of([0.9, 1.0, 1.0, 1.3], [1.0] * 4)
    assert found.low < found.ratio < found.high


# What the allocator and the reading itself take comes and goes by some MiB: far less than what is told apart here,
# which is whether so many bytes count never, once or twice.
SLACK = 16 * 2**20


def test_pss_counts_the_memory_of_a_tensor_once_it_is_written(tmp_path: Path) -> None:
    give_back_freed()
    before = pss_bytes(tmp_path)
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    after = pss_bytes(tmp_path)
    assert before is not None
    assert after is not None
    assert abs(after - before - held.numel()) < SLACK
    del held
    give_back_freed()
    assert abs((pss_bytes(tmp_path) or 0) - before) < SLACK


def test_pss_counts_files_of_the_models_folder_and_of_no_other(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(64 * 2**20))
    before = pss_bytes(tmp_path / "ours") or 0
    mapped = [
        torch.from_file(str(tmp_path / name / "file"), size=64 * 2**20, dtype=torch.uint8)
        for name in ("ours", "theirs")
    ]
    assert all(int(tensor.sum()) == 0 for tensor in mapped)
    assert abs((pss_bytes(tmp_path / "ours") or 0) - before - 64 * 2**20) < SLACK


def test_loading_is_measured_in_processes_of_their_own(shared: Path) -> None:
    (found,) = measure_loading([Subject("shared", shared, "alias")], 1, {})["shared"]
    assert 0 < found.load_s < found.first_token_s
    assert found.pss_bytes is not None
    assert found.parameter_bytes == sum(p.nbytes for p in _model(shared).parameters())


def _model(folder: Path) -> torch.nn.Module:
    from headshare.integrations.transformers.loading import load_model

    return load_model(hs.open_checkpoint(folder))


def test_a_bench_has_every_task_and_subject(llama: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"dense": Loaded(1.0, 2.0, 1000, 900), "alias": Loaded(1.5, 2.5, 910, 800)}
    monkeypatch.setattr(
        "headshare.bench.bench.measure_loading", lambda *_, **__: {name: [one] * 2 for name, one in given.items()}
    )
    subjects = [Subject("dense", llama), Subject("alias", shared, "alias")]
    found = bench(subjects, tokens=[1, 8], repeats=3, loads=2)
    assert list(found.tasks) == ["prefill 1", "prefill 8", "decode"]
    assert all(list(ratios) == ["dense", "alias"] for ratios in found.tasks.values())
    assert all(ratios["dense"].ratio == 1.0 for ratios in found.tasks.values())
    assert found.loading["load_s"]["alias"].ratio == 1.5
    assert found.memory["alias"].saved_of_ideal == pytest.approx(0.9)  # 90 of the 100 bytes that parameters save
    table = bench_table(found)
    assert "time x1.500" in table
    assert "90.0%" in table


def test_an_encoder_has_no_decoding_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.make("mpnet", tmp_path / "dense")
    monkeypatch.setattr(
        "headshare.bench.bench.measure_loading", lambda *_, **__: {"dense": [Loaded(1.0, 2.0, None, 900)]}
    )
    found = bench([Subject("dense", folder)], tokens=[4], repeats=2, loads=1)
    assert list(found.tasks) == ["prefill 4"]
    assert found.memory["dense"].saved_of_ideal is None
    assert "unknown" in bench_table(found)


def test_what_is_missing_is_made_and_removed(llama: Path, shared: Path) -> None:
    with hs.open_checkpoint(llama) as dense, dense_and_shared(dense, None, ratio=0.5, parts="qkv") as (one, other):
        assert one == llama
        assert hs.open_checkpoint(other).plan is not None
    assert not other.exists()
    with hs.open_checkpoint(shared) as opened, dense_and_shared(opened, None, ratio=0.5, parts="qkv") as (one, other):
        assert hs.open_checkpoint(one).plan is None
        assert other == shared
    assert not one.exists()
    dense, opened = hs.open_checkpoint(llama), hs.open_checkpoint(shared)
    with dense_and_shared(opened, dense, ratio=0.5, parts="qkv") as folders:
        assert folders == (llama, shared)


def test_more_tokens_than_the_model_reads_are_refused(llama: Path) -> None:
    with pytest.raises(EvaluationError, match="at most 64 tokens"):
        bench([Subject("dense", llama)], tokens=[65], repeats=1, loads=1)
    with pytest.raises(EvaluationError, match="at least 1"):
        bench([Subject("dense", llama)], tokens=[4], repeats=0, loads=1)


def test_a_dense_model_that_does_not_belong_is_refused(llama: Path, shared: Path, tmp_path: Path) -> None:
    other = hs.open_checkpoint(tiny.make_llama(tmp_path / "other", hidden_size=64))
    refused = [
        (llama, llama, OptionError, "leave --against out"),
        (shared, other.path, PlanError, "for another model"),
    ]
    for model, against, error, words in refused:
        with (
            pytest.raises(error, match=words),
            dense_and_shared(hs.open_checkpoint(model), hs.open_checkpoint(against), ratio=0.5, parts="qkv"),
        ):
            pass


def test_forgotten_files_are_read_again_and_are_the_same(shared: Path) -> None:
    before = {path.name: path.read_bytes() for path in shared.iterdir()}
    forget_cached(shared)
    assert {path.name: path.read_bytes() for path in shared.iterdir()} == before
    cold = load_once(Subject("shared", shared, "alias"), {}, 1, True)
    assert 0 < cold.load_s < cold.first_token_s
