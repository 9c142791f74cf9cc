"""Projections of the hidden states between sublayers, in a built layer and in a stock model.

A sublayer's output a is added to what it carries, x: with a projection P the sum (x + a) P is wanted. In dense shapes
that is x + a', with a' = a P + x P - x in the place of a: so a hook on the readout is enough.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from headshare.architecture.modules import module_path
from headshare.experiments.peers.matrices import Matrices, Remade
from headshare.experiments.peers.peer import Look
from headshare.plan.units import Sublayer

Square = Float[Tensor, "hidden hidden"]


@dataclass
class SlicedLayer:
    """The hooks of one layer: its entering hidden states are noted, and its readouts' outputs changed.

    `factor` is that by which outputs are multiplied before they are added.
    """

    projections: Mapping[Sublayer, Square]
    factor: float = 1.0
    carried: list[Tensor] = field(default_factory=list)

    def entered(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what enters the layer."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.carried[:] = [hidden]

    def projecting(self, kind: Sublayer) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        """A hook of the readout of this sublayer."""

        def project(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            before = self.carried[0].float().reshape(output.shape)
            projection = self.projections.get(kind)
            added = output.float() * self.factor
            after = before + added
            if projection is not None:
                after = after @ projection.to(after)
            self.carried[:] = [after]
            return ((after - before) / self.factor).to(output.dtype)

        return project

    @contextmanager
    def on(self, layer: nn.Module, readouts: Mapping[Sublayer, nn.Module]) -> Iterator[None]:
        """A block within which the layer projects."""
        with ExitStack() as hooks:
            for hook in self.hooks(layer, readouts):
                hooks.callback(hook.remove)
            yield

    def hooks(self, layer: nn.Module, readouts: Mapping[Sublayer, nn.Module]) -> list[Any]:
        """Hang the hooks into a layer. They stay until they are removed."""
        hung: list[Any] = [layer.register_forward_pre_hook(self.entered, with_kwargs=True)]
        return hung + [module.register_forward_hook(self.projecting(kind)) for kind, module in readouts.items()]


@contextmanager
def sliced(look: Look, made: Mapping[Sublayer, Remade]) -> Iterator[None]:
    """A block within which the peer's layer projects its hidden states, where these sublayers do."""
    projections = {kind: remade.slicing for kind, remade in made.items() if remade.slicing is not None}
    if not projections:
        yield
        return
    readouts = {kind: look.own.get_submodule(look.layers.path(look.matrices.readout(kind))) for kind in Sublayer}
    with SlicedLayer(projections).on(look.own, readouts):
        yield


def slice_layer(model: nn.Module, matrices: Matrices, layer: int, made: Mapping[Sublayer, Remade]) -> None:
    """Hang a layer's projections into a stock model, for as long as it lives."""
    projections = {kind: remade.slicing for kind, remade in made.items() if remade.slicing is not None}
    if not projections:
        return
    readouts = {kind: matrices.module(model, matrices.readout(kind), layer) for kind in Sublayer}
    SlicedLayer(projections).hooks(layer_of(model, matrices, layer), readouts)


def layer_of(model: nn.Module, matrices: Matrices, layer: int) -> nn.Module:
    """The stock model's module of this layer."""
    readout = matrices.readout(Sublayer.ATTENTION)
    path = module_path(model, matrices.layers.tensor(readout, layer))
    return model.get_submodule(path.removesuffix(f".{matrices.layers.path(readout)}"))
