"""Values that are narrower than keys: the module that makes them gives them in a form that attention views rightly.

Attention views what the projection of values gives as heads of the model's head size. Narrow values are a tensor whose
`view` has the narrow width in the place of that. The view is a plain tensor, so caches, kernels and the output
projection take narrow values as they are.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headshare.plan.tensors import TensorPlan
from headshare.storage.matrix import Weight
from headshare.storage.projection import SharedProjection

# The classes of narrow values, by width. A class says the width, as operations on a tensor keep its class.
_CLASSES: dict[int, type[Tensor]] = {}


class NarrowValuesProjection(SharedProjection):
    """A projection of values that are `width` wide in each head. It multiplies as the stock module does, and trains."""

    def __init__(self, dense: nn.Module, tensor: TensorPlan, width: int) -> None:
        super().__init__(dense, tensor)
        self.width = width
        _class_of(width)  # so that torch.compile finds it

    def forward(self, x: Float[Tensor, "*tokens inputs"]) -> Float[Tensor, "*tokens channels"]:
        """The values of all heads, side by side, to be viewed as heads."""
        return self.multiply(x, self.weight).as_subclass(_class_of(self.width))

    def whole_weight(self) -> Weight:
        """The weight, which has no rows for dropped dimensions."""
        return self.weight

    def extra_repr(self) -> str:
        """The text that prints show beside the class's name."""
        return f"{super().extra_repr()}, width={self.width}"


def _class_of(width: int) -> type[Tensor]:
    """The class of tensors whose view as heads has this width."""
    if width not in _CLASSES:

        class NarrowValues(Tensor):
            """Narrow values: a tensor that is viewed as heads of its own width, whatever width is asked for."""

            def view(self, *shape: Any) -> Tensor:  # torch.compile reads the width from the function, not from a class
                steps = shape[0] if isinstance(shape[0], tuple | list) else shape
                with torch._C.DisableTorchFunctionSubclass():
                    return Tensor.view(self, *steps[:-1], width)

        _CLASSES[width] = NarrowValues
    return _CLASSES[width]
