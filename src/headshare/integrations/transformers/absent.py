"""Layers of transformers' models that go without their attention or their feed-forward.

What is left of such a sublayer is the bias of its output projection, which other tensors of the layer do not make up
for: it is added as before. Its matrices have no rows, or no columns, and keep their names.
"""

from collections.abc import Collection, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

# the attribute by which attention finds its keys and values in a cache
PLACE = "layer_idx"


class AbsentAttention(nn.Module):
    """The attention of a layer that has no units left. It looks at no other token and takes no place in a cache.

    It stands in for the `stock` attention and has its submodules, so that all tensors keep their names. `output` is the
    name of the output projection among them; None where that lies outside, and is given features of no width.
    """

    def __init__(self, stock: nn.Module, output: str | None) -> None:
        super().__init__()
        # One dictionary for both: a submodule that is replaced here is replaced there. The stock module itself is held
        # in a tuple, where torch does not look for parameters.
        self.__dict__["_modules"] = stock.__dict__["_modules"]
        self.output = output
        self._held = (stock,)
        self.train(stock.training)

    def forward(
        self, hidden_states: Float[Tensor, "*tokens hidden"], *_: object, **__: object
    ) -> tuple[Float[Tensor, "*tokens outputs"], None]:
        """The output projection's bias for each token, or zeros, and no attention weights."""
        nothing = hidden_states[..., :0]
        return (nothing if self.output is None else self.get_submodule(self.output)(nothing)), None

    def freeze(self) -> None:
        """Ask for no gradients of parameters that nothing reads, for which some engines would wait."""
        for name, module in self.named_children():
            if name != self.output:
                module.requires_grad_(requires_grad=False)

    @property
    def stock(self) -> nn.Module:
        """The module that it stands in for, with the submodules as they are by now."""
        stock = self._held[0]
        stock.training = self.training
        return stock


class BiasOnly(nn.Module):
    """An output projection without inputs, of a class that flattens its inputs and so cannot do without any."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, inputs: Float[Tensor, "*tokens nothing"]) -> Float[Tensor, "*tokens outputs"]:
        """The bias for each token, or zeros."""
        zeros = inputs.new_zeros(*inputs.shape[:-1], self.weight.shape[1])
        return zeros if self.bias is None else zeros + self.bias


def take_places(attentions: Sequence[Any], kinds: Sequence[str], absent: Collection[int]) -> None:
    """Number the layers in which a cache keeps keys and values, without those that are `absent`.

    transformers tells from the first layer of each kind (full, sliding) how many tokens a cache holds, and makes the
    layers of a cache by the configuration. So those that are left of a kind take the first places of that kind.
    Attention that uses no cache has no place.
    """
    for kind in dict.fromkeys(kinds):
        places = [layer for layer, other in enumerate(kinds) if other == kind]
        left = [layer for layer in places if layer not in absent]
        for place, layer in zip(places, left, strict=False):
            if hasattr(attentions[layer], PLACE):
                setattr(attentions[layer], PLACE, place)
