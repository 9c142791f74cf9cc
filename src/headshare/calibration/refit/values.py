"""Values in principal directions of the calibration text, in layers whose values are narrow.

A fresh share has rotated its values by the weights alone. The refit starts from the dense values again: their Gram
matrix over tokens, and W_o, say which directions to keep. What the refit of W_o needs follows from the same sums, as
values are rotated before attention mixes tokens or after, with one result.
"""

from torch import Tensor

from headshare.calibration.refit.normal_equations import NormalEquations
from headshare.plan.narrow_values import NarrowValues
from headshare.sharing.factors import ValueBases, principal_values


def bases_of(equations: NormalEquations, readout: Tensor, values: NarrowValues) -> ValueBases:
    """The principal directions of a layer's values, by the sums over tokens of the inputs of its W_o."""
    inputs = equations.inputs
    return principal_values(equations.gram[:inputs, :inputs], readout, values.layout.groups, values.dims)


def in_directions(equations: NormalEquations, bases: ValueBases) -> NormalEquations:
    """The sums for inputs of W_o in these directions. The bias, a last input, stays as it is."""
    inputs = equations.inputs
    turned = NormalEquations(inputs, equations.outputs, equations.bias, equations.device)
    turned.gram = equations.gram.clone()
    turned.gram[:inputs] = bases.of_gram(turned.gram[:inputs])
    turned.gram[:, :inputs] = bases.of_gram(turned.gram[:, :inputs].T).T
    turned.cross = equations.cross.clone()
    turned.cross[:inputs] = bases.of_gram(turned.cross[:inputs])
    turned.target = equations.target
    turned.left_out = equations.left_out
    return turned


def narrowed(rows: Tensor, bases: ValueBases, width: int) -> Tensor:
    """The rows of v, or its bias, in these directions; those of dropped dimensions are zero. In float64."""
    groups, dims, _ = bases.into.shape
    turned = bases.of_values(rows.view(len(rows), -1)).view(groups, dims, -1)
    turned[:, width:] = 0
    return turned.view(rows.shape)
