"""Storage `alias`: training is refused; gradients, compilation and generation are a stock model's."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from headshare.errors import StorageError
from headshare.storage.projection import shared_projections
from support import tiny
from support.aliases import Case, logits
from support.processes import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="aliases are for Linux")


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_train_warns_once_for_each_model_and_says_what_to_do(paged: Case, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "headshare")
    for number in range(1, 4):
        model = paged.load()
        assert len(warnings_in(caplog)) == number - 1, "loading warns of nothing"
        for _ in range(2):
            model.train()
            model.eval()
        assert len(warnings_in(caplog)) == number
    assert 'storage="owner"' in warnings_in(caplog)[0]


def test_a_model_that_stands_where_another_stood_warns_too(paged: Case, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "headshare")
    model = paged.load().eval()
    module = shared_projections(model)[0][1]
    kind, tensors, addresses = type(module.bank), module.bank.tensors, set()
    for number in range(1, 101):
        module.bank = kind(tensors)
        addresses.add(id(module.bank))
        module.train().eval()
        assert len(warnings_in(caplog)) == number
    assert len(addresses) < 100, "some stood where an earlier one did"


def test_the_trainer_refuses(paged: Case, tmp_path: Path) -> None:
    settings = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1)
    row = {"input_ids": tiny.tokens()[0], "labels": tiny.tokens()[0]}
    with pytest.raises(StorageError, match=r'storage="owner"'):
        Trainer(model=paged.load(), args=settings, train_dataset=[row] * 8).train()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_of_inputs_and_of_what_is_not_shared_equal_stock(any_case: Case, mode: str) -> None:
    model, stock = (make(dtype=torch.float64) for make in (any_case.load, any_case.stock))
    found = []
    for one in (model, stock):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            embedded = torch.randn(2, 5, one.config.hidden_size, dtype=torch.float64, requires_grad=True)
            getattr(one, mode)()
            one(inputs_embeds=embedded).logits.square().sum().backward()
        found.append((embedded.grad, {name: p.grad for name, p in one.named_parameters() if "norm" in name}))
    assert found[0][0].abs().sum() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-13)
    assert all(module.weight.grad is None for _, module in shared_projections(model))


def test_it_generates_what_stock_generates(any_case: Case) -> None:
    model, stock = any_case.load(), any_case.stock()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 10).long()}
    expected = stock.generate(tiny.tokens(), **options)
    assert torch.equal(model.generate(tiny.tokens(), **options), expected)
    assert torch.equal(model.generate(tiny.tokens(), **options, use_cache=False), expected)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_it_computes_the_same_with_and_without_gradients(paged: Case, context: Callable) -> None:
    model, stock = paged.load(), paged.stock()
    with context():
        assert torch.equal(model(tiny.tokens()).logits, stock(tiny.tokens()).logits)


def test_it_loads_in_any_surroundings(paged: Case) -> None:
    expected = logits(paged.stock())
    with torch.inference_mode():
        assert torch.equal(paged.load()(tiny.tokens()).logits, expected)
    with torch.device("cpu"), torch.no_grad():
        assert torch.equal(logits(paged.load()), expected)
    model = paged.load()
    with torch.inference_mode():
        model.to(torch.float64)
        assert torch.equal(model(tiny.tokens()).logits, paged.stock().to(torch.float64)(tiny.tokens()).logits)


@pytest.mark.slow
def test_torch_compile_takes_it_as_one_graph(cases: Callable[[str], Case]) -> None:
    """In a process of its own: the run-time checks of types that this suite switches on cannot be traced."""
    script = """
    for folder in sys.argv[1:]:
        torch._dynamo.reset()
        model = load_model(hs.open_checkpoint(folder), storage="alias")
        with torch.no_grad():
            expected = model(tiny.tokens(), use_cache=False).logits
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(tiny.tokens(), use_cache=False).logits, expected), folder
    """
    run(script, *(cases(kind).shared for kind in ("paged", "gpt2")), PYTHONWARNINGS="ignore")
