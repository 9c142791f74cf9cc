"""CostCurves of a tiny model's units, and the stock model with overwritten rows that they are compared with."""

from collections.abc import Sequence
from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from torch import Tensor

from headshare.calibration.costs.actions import LOW_RANK, QK, QKV, QKVO, REMOVE, Action
from headshare.calibration.costs.curves import CostCurve, CostCurves, CurveStep
from headshare.calibration.costs.local import price_units
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.opening import open_checkpoint
from headshare.integrations.transformers.loading import load_model
from headshare.plan.layout import Layout
from headshare.plan.units import HeadUnit, Part, Sublayer
from headshare.text.tokens import Calibration
from support import tiny
from support.least_squares import Direct, solved

TIES = (QK, QKV, QKVO)
OWN = (QK, QKV, LOW_RANK, REMOVE)  # those that one readout may have together
READOUT = {Sublayer.ATTENTION: Part.O, Sublayer.FFN: Part.DOWN}


def calibration(windows: int = 8, window: int = 16) -> Calibration:
    return Calibration(tiny.tokens(window, windows), False, "a text", 0)


def opened(name: str, tmp_path: Folder) -> Checkpoint:
    return open_checkpoint(tiny.make(name, tmp_path / name))


class Reference:
    """A stock model, whose layer's readout inputs are seen with donors' rows in place."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, layer: int, text: Calibration | None = None) -> None:
        self.model, self.tokens = load_model(checkpoint), (text or calibration()).mixed().tokens
        self.layout, self.layer = layout, layer
        self.post_norm = layout.kind is Sublayer.FFN and checkpoint.config["model_type"] in ("bert", "mpnet")
        self.readout = layout.parts[READOUT[layout.kind]]
        self.own = {name: value.clone() for name, value in self.model.state_dict().items()}
        module = self.module(self.readout.name(layer))
        weight = module.weight.detach().double()
        self.weight = weight.T if self.readout.axis == 0 else weight
        seen = self.seen()
        out, hidden = seen["out"], seen["hidden"]
        squares = (hidden + out if layout.kind is Sublayer.ATTENTION else hidden).square().sum(-1, keepdim=True)
        self.root = (squares * len(squares)).rsqrt()
        self.inputs = seen["in"] * self.root

    def module(self, weight: str) -> Any:
        return self.model.get_submodule(weight.removesuffix(".weight"))

    @torch.no_grad()
    def seen(self) -> dict[str, Tensor]:
        """What enters and leaves the readout, and the hidden state that enters the layer (leaves it, for neurons)."""
        seen: dict[str, Tensor] = {}
        layer = self.model.get_submodule(self.readout.tensor.split("{layer}")[0] + str(self.layer))

        def note_readout(_: Any, args: Any, out: Tensor) -> None:
            seen["in"], seen["out"] = flat(args[0]), flat(out)

        def note_up(_: Any, args: Any, out: Tensor) -> None:
            seen["up"] = flat(args[0])

        def note_layer(_: Any, args: Any, kwargs: Any, out: Any) -> None:
            entered = args[0] if args else kwargs["hidden_states"]
            left = out[0] if isinstance(out, tuple) else out
            seen["hidden"] = flat(entered if self.layout.kind is Sublayer.ATTENTION else left)

        handles = [
            self.module(self.readout.name(self.layer)).register_forward_hook(note_readout),
            layer.register_forward_hook(note_layer, with_kwargs=True),
        ]
        if self.post_norm:
            handles.append(self.module(self.layout.parts[Part.UP].name(self.layer)).register_forward_hook(note_up))
        self.model(input_ids=self.tokens)
        if self.post_norm:
            seen["hidden"] = seen["up"] + seen["out"]  # what is added, before its norm
        for handle in handles:
            handle.remove()
        return seen

    def features(self, group: int, donor: HeadUnit, form: Action) -> Tensor:
        """The group's own inputs of the readout, once its rows are the donor's."""
        state = self.model.state_dict()
        for part in form.shares:
            if part is not Part.O and part in self.layout.parts:
                place = self.layout.parts[part]
                (first, last), (start, stop) = place.span(group), place.span(donor.group)
                from_donor = self.own[place.name(donor.layer)].transpose(0, place.axis)[start:stop]
                state[place.name(self.layer)].transpose(0, place.axis)[first:last] = from_donor
        found = self.seen()["in"] * self.root
        self.model.load_state_dict(self.own)
        return found[:, self.columns(group)]

    def columns(self, *groups: int) -> Tensor:
        return torch.cat([torch.arange(*self.readout.span(group)) for group in groups])

    def donor_columns(self, donor: HeadUnit) -> Tensor:
        weight = self.module(self.readout.name(donor.layer)).weight.detach().double()
        return (weight.T if self.readout.axis == 0 else weight)[:, self.columns(donor.group)]

    def errors(self, steps: Sequence[CurveStep], held_out: float = 0.0) -> list[float]:
        """The error after each of these steps, on held-out tokens where there are some."""
        direct = self.direct(held_out)
        found = []
        for step in steps:
            self.give_up(direct, step)
            found.append(direct.error_held_out() if held_out else direct.error())
        return found

    def direct(self, held_out: float = 0.0) -> "Direct":
        """The readout fitted to all windows but the last ones: as many as are wholly within the share held out, or one
        if it is too small for that."""
        windows, window = self.tokens.shape
        held = max(int(held_out * windows), held_out > 0)
        return Direct(self.inputs, self.weight, (windows - held) * window)

    def give_up(self, direct: "Direct", step: CurveStep) -> None:
        """Take the step, with its first donor."""
        columns = self.columns(*step.groups)
        features = [self.features(step.groups[0], step.donors[0][0], step.action)] if step.donors else []
        donor = [self.donor_columns(step.donors[0][0])] if Part.O in step.action.shares else []
        if step.rank:
            direct.factor(columns, *features, step.rank)
        else:
            direct.give_up(columns, *features, *donor)


def flat(value: Tensor) -> Tensor:
    return value.detach().double().flatten(0, -2).clone()


def fitted(checkpoint: Checkpoint, text: Calibration, forms: Sequence[Action], **options: Any) -> CostCurves:
    """CostCurves on the tokens that are fitted to, which are all there are."""
    return price_units(checkpoint, text, forms, held_out=0.0, **options)


def paths_of(prices: CostCurves, kind: Sublayer, layer: int) -> list[CostCurve]:
    return [path for path in prices.curves if (path.kind, path.layer) == (kind, layer)]


def path_of(prices: CostCurves, kind: Sublayer, layer: int) -> CostCurve:
    (path,) = paths_of(prices, kind, layer)
    return path


def forms_of(path: CostCurve) -> set[Action]:
    return {step.action for step in path.steps}


KEPT = ("mpnet", "falcon-mha", "falcon-mqa", "llama-mqa")  # families whose attention units cannot be removed


def pull_of(direct: "Direct", reference: Reference, step: CurveStep) -> float:
    features = reference.features(step.groups[0], step.donors[0][0], step.action)
    product = solved(features, reference.inputs @ reference.weight.T - direct.target)
    return direct.ridge_of(features) * float(product.square().sum())


CLOSE = 2e-3  # of what was removed: the walk is float32, and so is the stock model


def check_path(
    checkpoint: Checkpoint, layout: Layout, path: CostCurve, windows: int = 8, held_out: float = 0.0
) -> None:
    reference = Reference(checkpoint, layout, path.layer, calibration(windows))
    errors = reference.errors(path.steps, held_out)
    scale = max(errors)
    found = torch.tensor([step.price for step in path.steps]).cumsum(0).tolist()
    assert found == pytest.approx(errors, abs=CLOSE * scale)


def isolated(reference: Reference, group: int, donor: HeadUnit, form: Action) -> float:
    (error,) = reference.errors([CurveStep(form, (group,), 0.0, 1, ((donor, 0.0),))])
    return error
