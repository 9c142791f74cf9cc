"""Storage `alias`: conversions, copies, pickles and other processes share anew or go on sharing."""

import copy
import gc
import io
import multiprocessing.resource_tracker
import os
import pickle
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from headshare.errors import StorageError
from headshare.integrations.transformers.loading import unique_parameter_bytes
from headshare.storage.projection import shared_projections
from support.aliases import Case, assert_equal_to_rounding, logits
from support.pages import assert_rows_are_the_donors_own, in_memory, open_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="aliases are for Linux")


# Conversion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_to_another_type_shares_anew_and_computes_as_stock(any_case: Case, dtype: torch.dtype) -> None:
    model, stock = any_case.load().to(dtype), any_case.stock().to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_rows_are_the_donors_own(model, any_case.plan)
    assert_equal_to_rounding(logits(model), logits(stock))


@pytest.mark.parametrize(
    "convert",
    [
        nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda model: model.bfloat16(),
        lambda model: model.to(torch.float16).to(torch.float32), lambda model: model.type(torch.float64),
    ],
)  # fmt: skip
def test_every_way_to_convert_shares_anew(paged: Case, convert: Callable[[nn.Module], nn.Module]) -> None:
    model, stock = convert(paged.load()), convert(paged.stock())
    assert_rows_are_the_donors_own(model, paged.plan)
    assert_equal_to_rounding(logits(model), logits(stock))
    with pytest.raises(StorageError):
        model.model.layers[0].self_attn.q_proj.weight.zero_()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_loading_in_another_type_equals_stock_and_shares(any_case: Case, dtype: torch.dtype) -> None:
    model = any_case.load(dtype=dtype)
    assert_rows_are_the_donors_own(model, any_case.plan)
    assert_equal_to_rounding(logits(model), logits(any_case.stock(dtype=dtype)))


@pytest.mark.parametrize(
    "keep",
    [
        lambda model: model.to("cpu"), lambda model: model.cpu(), nn.Module.float, lambda model: model.share_memory(),
        lambda model: model.to(torch.float32), lambda model: model.to(torch.device("cpu"), torch.float32),
        lambda model: model.eval(), lambda model: model._apply(lambda tensor: tensor.clone()),
        lambda model: model.to(memory_format=torch.channels_last),
    ],
)  # fmt: skip
def test_what_converts_nothing_keeps_the_sharing(paged: Case, keep: Callable[[nn.Module], nn.Module]) -> None:
    model = paged.load()
    expected, before = logits(model), in_memory(model.model.layers[0].self_attn.q_proj.weight)
    keep(model)
    assert_rows_are_the_donors_own(model, paged.plan)
    assert in_memory(model.model.layers[0].self_attn.q_proj.weight) == before
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("of", ["model.layers.1", "model.layers.0.self_attn.q_proj"])
def test_another_device_is_refused_and_the_model_goes_on_working(paged: Case, of: str) -> None:
    model = paged.load()
    expected = logits(model)
    with pytest.raises(StorageError, match=r"meta.*owner"):
        nn.Module.to(model.get_submodule(of), "meta")
    assert torch.equal(logits(model), expected)


def test_moving_a_whole_model_is_refused_in_words(paged: Case) -> None:
    # The modules before the first shared one are moved by then: the message says to load the model again.
    with pytest.raises(StorageError, match=r"meta.*Load the model for that device"):
        nn.Module.to(paged.load(), "meta")


@pytest.mark.parametrize(
    "change", [lambda t: t * 2, lambda t: t * t, lambda t: t.abs(), lambda t: t.clamp(-1e-3, 1.0), torch.zeros_like]
)
def test_functions_that_would_change_shared_weights_are_refused(paged: Case, change: Callable) -> None:
    model = paged.load()
    projection = model.model.layers[0].self_attn.q_proj
    before = projection.bias.clone()
    with pytest.raises(StorageError):
        projection._apply(change)
    assert torch.equal(projection.bias, before), "half of it was changed before it was refused"


def test_a_model_function_that_would_change_weights_is_refused(paged: Case) -> None:
    with pytest.raises(StorageError):
        paged.load()._apply(lambda tensor: tensor * 2)


def test_one_layer_converted_alone_still_shares_with_its_kind_and_hurts_no_other(paged: Case) -> None:
    model, stock = paged.load(), paged.stock()
    model.model.layers[1].self_attn.to(torch.float64)
    stock.model.layers[1].self_attn.to(torch.float64)
    x = torch.randn(3, 64)
    for name in ("q_proj", "k_proj", "v_proj"):
        ours, theirs = (getattr(one.model.layers[1].self_attn, name) for one in (model, stock))
        assert torch.equal(ours(x.double()), theirs(x.double()))
        ours, theirs = (getattr(one.model.layers[2].self_attn, name) for one in (model, stock))
        assert torch.equal(ours(x), theirs(x))
    assert_rows_are_the_donors_own(model.to(torch.float64), paged.plan)


# Copies, pickles, processes ------------------------------------------------------------------------------------------


def through_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle of a deepcopy": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
    "torch": through_torch,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_shares_within_itself_and_computes_the_same(any_case: Case, way: str) -> None:
    model = any_case.load()
    expected = logits(model)
    twin = WAYS[way](model)
    assert_rows_are_the_donors_own(twin, any_case.plan)
    assert torch.equal(logits(twin), expected)
    del model
    gc.collect()
    assert torch.equal(logits(twin), expected)
    assert_equal_to_rounding(logits(twin.to(torch.float64)), logits(any_case.stock().to(torch.float64)))


@pytest.mark.parametrize("way", WAYS)
def test_biases_of_a_copy_are_its_own_and_its_shared_weights_still_refuse(paged: Case, way: str) -> None:
    model = paged.load()
    twin = WAYS[way](model)
    expected = logits(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(1)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(twin), expected)
    with pytest.raises(StorageError):
        twin.model.layers[0].self_attn.q_proj.weight.zero_()


def test_a_deep_copy_takes_no_memory_for_shared_weights(any_case: Case) -> None:
    model = any_case.load()
    for (_, ours), (_, theirs) in zip(shared_projections(model), shared_projections(copy.deepcopy(model)), strict=True):
        assert not ours.weight.numel() or in_memory(ours.weight) == in_memory(theirs.weight)
        assert ours.whole_weight().data_ptr() == theirs.whole_weight().data_ptr()


def test_a_conversion_that_is_dropped_is_forgotten_though_the_original_lives(paged: Case) -> None:
    model = paged.load()
    twin = copy.deepcopy(model).to(torch.float64)
    bank = weakref.ref(twin.model.layers[0].self_attn.q_proj.bank)
    assert copy.deepcopy(model).to(torch.float64).model.layers[0].self_attn.q_proj.bank is bank()
    del twin
    gc.collect()
    assert bank() is None


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_or_a_projection_is_copied_alone(paged: Case, way: str) -> None:
    layer = paged.load().model.layers[3]
    x = torch.randn(2, 3, 64)
    twin = WAYS[way](layer)
    for name in ("q_proj", "k_proj", "v_proj"):
        one = WAYS[way](getattr(layer.self_attn, name))
        assert torch.equal(one(x), getattr(layer.self_attn, name)(x))
        assert torch.equal(getattr(twin.self_attn, name)(x), getattr(layer.self_attn, name)(x))


@pytest.mark.parametrize("kind", ["paged", "padded"])
def test_a_pickled_model_holds_each_unit_once(cases: Callable[[str], Case], kind: str) -> None:
    case = cases(kind)
    size, stored = len(pickle.dumps(case.load())), unique_parameter_bytes(case.load("owner"))
    assert stored < size < stored + 150_000
    assert len(pickle.dumps(case.stock())) > stored * 1.2


def test_a_module_is_copied_shallowly(paged: Case) -> None:
    _, projection = shared_projections(paged.load())[-1]
    twin, x = copy.copy(projection), torch.randn(2, projection.in_features)
    assert torch.equal(twin(x), projection(x))
    assert twin.whole_weight().data_ptr() == projection.whole_weight().data_ptr()


def send_logits(model: nn.Module, pipe: Any) -> None:
    torch.set_num_threads(1)
    pipe.send((logits(model).tolist(), in_memory(model.model.layers[0].self_attn.o_proj.weight)[0] != b"00:00:0"))


def test_a_spawned_process_takes_the_model_and_computes_the_same(paged: Case) -> None:
    model = paged.load()
    context = torch.multiprocessing.get_context("spawn")
    multiprocessing.resource_tracker.ensure_running()
    before = open_files()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=send_logits, args=(model, sender))
    child.start()
    sender.close()
    found, mapped = receiver.recv()
    child.join()
    assert child.exitcode == 0
    assert torch.equal(torch.tensor(found), logits(model))
    assert mapped, "the child's copy shares within itself"
    child.close()
    receiver.close()
    gc.collect()
    # torch moves ordinary tensors to memory with descriptors, and keeps those open, as of any model
    ordinary = sum(1 for tensor in (*model.parameters(), *model.buffers()) if type(tensor) in (nn.Parameter, Tensor))
    assert open_files() <= before + ordinary, "the copy that was lent to the child is kept for ever"
    assert torch.equal(logits(model), torch.tensor(found))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_computes_the_same_and_dropping_its_model_does_not_hurt_the_parent(paged: Case) -> None:
    model = paged.load()
    expected = logits(model)
    child = os.fork()
    if not child:
        try:
            same = torch.equal(logits(model), expected)
            twin = copy.deepcopy(model).to(torch.float64)
            logits(twin)
            del model, twin
            gc.collect()
            os._exit(0 if same else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copy.deepcopy(model).to(torch.float64)), logits(paged.stock().to(torch.float64)))


class Embedded(torch.utils.data.Dataset):
    """Rows that workers make with the model that the parent uses too."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, _: int) -> Tensor:
        return logits(self.model)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_data_loader_workers_use_the_model_beside_the_parent(paged: Case) -> None:
    model = paged.load()
    expected = logits(model)
    loader = torch.utils.data.DataLoader(Embedded(model), batch_size=1, num_workers=2, multiprocessing_context="fork")
    for batch in loader:
        assert torch.equal(batch[0], expected)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
