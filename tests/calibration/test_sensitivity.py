"""The metric of a sublayer's errors is the Fisher information that a stock model's own gradients give."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import headshare as hs
from headshare.calibration.costs import sensitivity
from headshare.calibration.costs.sensitivity import sensitivities
from headshare.calibration.layerwise.layers import Layers
from headshare.errors import CalibrationError
from headshare.integrations.transformers.loading import load_model
from headshare.plan.units import Sublayer
from headshare.precision import full_float32
from headshare.text.tokens import Calibration
from support import tiny
from support.walks import ALL

WINDOW = 16
WINDOWS = 6
KINDS = (Sublayer.ATTENTION, Sublayer.FFN)
READOUTS = {
    "llama-gqa": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gemma2": ("self_attn.o_proj", "mlp.down_proj"),
}


def text() -> Calibration:
    return Calibration(tiny.tokens(WINDOW, WINDOWS), False, "a text", 0)


@pytest.mark.parametrize("name", READOUTS)
def test_half_of_the_squared_gradients_is_the_square_of_the_metric(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "FAMILIES", ALL)
    monkeypatch.setattr(sensitivity, "short_products", full_float32)
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / name))
    found = sensitivities(Layers(dense, head=True), text(), KINDS)
    wanted = of_stock_model(dense, READOUTS[name])
    assert set(found) == set(wanted)
    for layer, metrics in found.items():
        for kind, metric in metrics.items():
            squared = metric.double() @ metric.double()
            assert torch.allclose(metric, metric.T)
            torch.testing.assert_close(squared, wanted[layer][kind], rtol=1e-3, atol=1e-4 * squared.abs().max().item())


def of_stock_model(dense: hs.Checkpoint, readouts: tuple[str, str]) -> dict[int, dict[Sublayer, Tensor]]:
    """The same sums from one backward pass through the whole model. Each window draws tokens by its own seed."""
    model = load_model(dense, dtype=torch.float32)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    kept: dict[tuple[int, Sublayer], tuple[Tensor, Tensor]] = {}
    for number, layer in enumerate(layers):
        watch(layer, number, readouts, kept)
    logits = model(input_ids=text().tokens).logits.log_softmax(dim=-1)
    seeds = torch.randint(2**62, (WINDOWS,), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = []
    for window, seed in zip(logits, seeds, strict=True):
        numbers = torch.rand(WINDOW, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
        sums = window.detach().exp().double().numpy().cumsum(axis=-1)
        places = [
            np.searchsorted(each, number * each[-1], side="right") for each, number in zip(sums, numbers, strict=True)
        ]
        drawn.append(torch.tensor(places, dtype=torch.long)[:, None])
    gradients = torch.autograd.grad(logits.gather(2, torch.stack(drawn)).sum(), [output for output, _ in kept.values()])
    sums: dict[int, dict[Sublayer, Tensor]] = {}
    for ((number, kind), (_, hidden)), gradient in zip(kept.items(), gradients, strict=True):
        size = hidden.norm(dim=-1)
        near = size <= 10 * size.median(dim=-1, keepdim=True).values
        rows = (gradient * size[..., None])[near].double()
        sums.setdefault(number, {})[kind] = rows.T @ rows / len(rows) / 2
    return sums


def watch(
    layer: torch.nn.Module,
    number: int,
    readouts: tuple[str, str],
    kept: dict[tuple[int, Sublayer], tuple[Tensor, Tensor]],
) -> None:
    """Keep the outputs of a layer's readouts with the hidden states that they are added to."""
    entered: list[Tensor] = []

    def note_entered(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        entered[:] = [args[0] if args else kwargs["hidden_states"]]

    def note_attention(_: object, __: object, output: Tensor) -> Tensor:
        kept[number, Sublayer.ATTENTION] = output, (entered[0] + output).detach()
        return output

    def note_feed_forward(_: object, __: object, output: Tensor) -> Tensor:
        kept[number, Sublayer.FFN] = output, output.detach()
        return output

    def note_left(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        left = output[0] if isinstance(output, tuple) else output
        kept[number, Sublayer.FFN] = kept[number, Sublayer.FFN][0], left.detach()

    layer.register_forward_pre_hook(note_entered, with_kwargs=True)
    layer.get_submodule(readouts[0]).register_forward_hook(note_attention)
    layer.get_submodule(readouts[1]).register_forward_hook(note_feed_forward)
    layer.register_forward_hook(note_left)


def test_a_small_error_costs_what_the_metric_says(tmp_path: Path) -> None:
    """The divergence that noise in W_down's output makes is the squared noise in the metric, averaged over draws."""
    dense = hs.open_checkpoint(tiny.make_llama(tmp_path / "llama", initializer_range=0.15))
    many = Calibration(tiny.tokens(WINDOW, 200), False, "a text", 0)
    metric = sensitivities(Layers(dense, head=True), many, KINDS)[3][Sublayer.FFN]
    model = load_model(dense, dtype=torch.float32)
    tokens = many.tokens
    with torch.no_grad():
        before = model(input_ids=tokens).logits.log_softmax(dim=-1)
        costs = []

        def disturb(_: object, __: object, output: Tensor) -> Tensor:
            size = output.norm(dim=-1, keepdim=True)
            noise = 1e-2 * torch.randn_like(output) * size
            costs.append((noise / size @ metric).square().sum(dim=-1).mean().item())
            return output + noise

        model.model.layers[3].register_forward_hook(disturb)
        after = model(input_ids=tokens).logits.log_softmax(dim=-1)
    divergence = (before.exp() * (before - after)).sum(dim=-1).mean().item()
    assert divergence == pytest.approx(costs[0], rel=0.15)


def test_gradients_that_are_not_finite_are_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = hs.open_checkpoint(tiny.make_llama(tmp_path / "llama"))
    layers = Layers(dense, head=True)
    logits = Layers.logits
    monkeypatch.setattr(Layers, "logits", lambda self, leaving: logits(self, leaving * float("nan")).nan_to_num() + 0)
    monkeypatch.setattr(torch, "multinomial", lambda known, *_, **__: torch.zeros(len(known), 1, dtype=torch.long))
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: [torch.full((WINDOWS, WINDOW, 32), float("nan"))] * 3)
    with pytest.raises(CalibrationError, match=r"the gradients at layer 3 are not finite"):
        sensitivities(layers, text(), KINDS)
