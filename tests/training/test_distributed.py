"""Two processes train as one does: DDP, and FSDP2 through accelerate, over gloo on the CPU."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, GradientState
from transformers import TrainingArguments

import headshare as hs
from headshare.training import SharingTrainer, TrainSettings, train
from support.trainings import LONGER, RHYME, killed_after, losses_of, settings, states_close

FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
EXAMPLES = Folder(__file__).parents[2] / "examples"


def in_two(work: Callable[[], object], folder: Folder, exits: int = 0) -> None:
    """Run this in two processes that know of each other.

    They are forked from a process that has run many libraries of C. Where one of them dies of its memory, which was
    seen once in gloo, both are begun again, and go on from what they left.
    """
    codes, errors = _once_in_two(work, folder)
    if -signal.SIGABRT in codes or -signal.SIGSEGV in codes:
        codes, errors = _once_in_two(work, folder)
    assert codes == [exits, exits], errors


def _once_in_two(work: Callable[[], object], folder: Folder) -> tuple[list[int | None], str]:
    """The exit codes of both processes, and their errors."""
    for path in folder.glob("error-*"):
        path.unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_one_of_two, args=(work, rank, port, folder)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
    return [child.exitcode for child in children], "\n".join(errors)


def _one_of_two(work: Callable[[], object], rank: int, port: int, folder: Folder) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    try:
        torch.distributed.init_process_group("gloo")
        work()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        sys.stderr.write(traceback.format_exc())
        os._exit(1)
    torch.distributed.destroy_process_group()
    os._exit(0)


def asked(text: Folder, method: str, size: int, /, **more: Any) -> Any:
    arguments = {"per_device_train_batch_size": size, **({"ddp_backend": "gloo"} if size < 8 else {}), **more}
    return settings(text, method, arguments=arguments, **({"text": arguments.pop("text")} if "text" in more else {}))


def engines_on_the_cpu() -> None:
    """accelerate keeps these engines for accelerators; this calls the CPU one."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", ["postshare", "both", "dense"])
def test_two_processes_give_what_one_gives(
    method: str, engine: str, model: Folder, text: Folder, tmp_path: Folder
) -> None:
    if method == "dense":  # which learns nothing from words at random
        text.write_text(RHYME)
    one = train(model, tmp_path / "one", asked(text, method, 8))

    def work() -> None:
        if engine == "fsdp2":
            engines_on_the_cpu()
        train(model, tmp_path / "two", asked(text, method, 4, **(FSDP if engine == "fsdp2" else {})))

    in_two(work, tmp_path)
    ours, theirs = (hs.load(tmp_path / name, storage="owner") for name in ("two", "one"))
    assert one.best_step > 1
    states_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_killed_processes_go_on_with_the_same_curve_to_the_same_weights(
    engine: str, model: Folder, text: Folder, tmp_path: Folder
) -> None:
    more = {**LONGER, **(FSDP if engine == "fsdp2" else {})}

    def work(name: str, *, last: int | None = None, first: int = 0) -> None:
        if engine == "fsdp2":
            engines_on_the_cpu()
        if last:
            killed_after(last)
        real = SharingTrainer.training_step

        def step(self: Any, *args: Any) -> Any:
            assert self.state.global_step >= first
            return real(self, *args)

        SharingTrainer.training_step = step  # type: ignore[method-assign]
        train(model, tmp_path / name, asked(text, "postshare", 4, **more))

    in_two(lambda: work("whole"), tmp_path)
    in_two(lambda: work("out", last=7), tmp_path, exits=-signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    in_two(lambda: work("out", first=6), tmp_path)
    one, other = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "out"))
    assert len(losses_of(one["curve"])) == 10
    assert losses_of(other["curve"]) == losses_of(one["curve"])
    ours, theirs = (hs.load(tmp_path / name, storage="owner") for name in ("out", "whole"))
    states_close(ours, theirs, rtol=0, atol=0)


def test_what_is_held_out_is_measured_once_by_two_processes_too(model: Folder, text: Folder, tmp_path: Folder) -> None:
    """Batches of eight would be filled up with windows from the beginning."""
    held = {"data": str(text), "context": 16, "held_out": 5}
    one = train(model, tmp_path / "one", asked(text, "both", 8, max_steps=1, text=held))
    in_two(lambda: train(model, tmp_path / "two", asked(text, "both", 4, max_steps=1, text=held)), tmp_path)
    two = json.loads((tmp_path / "two" / "training.json").read_text())
    assert two["loss_before"] == pytest.approx(one.loss_before, rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of deepspeed's calls into torch
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("method", ["postshare", "both"])
def test_two_processes_of_deepspeed_give_what_one_gives(
    method: str, stage: int, model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs deepspeed: pip install deepspeed, then pytest -m slow tests/training/test_distributed.py."""
    pytest.importorskip("deepspeed")
    one = train(model, tmp_path / "one", asked(text, method, 8))
    config = {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    }

    def work() -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        engines_on_the_cpu()
        train(model, tmp_path / "two", asked(text, method, 4, use_cpu=False, deepspeed=config))

    in_two(work, tmp_path)
    ours, theirs = (hs.load(tmp_path / name, storage="owner") for name in ("two", "one"))
    assert one.best_step > 1
    states_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_are_ones_that_accelerate_reads(path: Folder) -> None:
    found = load_config_from_file(str(path))
    assert found.num_processes == 8
    assert found.distributed_type.value in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    assert path.stem != "zero3" or found.deepspeed_config["zero3_save_16bit_model"]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")  # its new name is not in all versions
@pytest.mark.parametrize("path", sorted((EXAMPLES / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_settings_and_name_arguments_of_the_trainer(path: Folder, tmp_path: Folder) -> None:
    found = TrainSettings.load(path)
    arguments = {**found.learning.arguments, "bf16": False, "use_cpu": True}
    assert TrainingArguments(output_dir=str(tmp_path), **arguments).max_steps > 0
