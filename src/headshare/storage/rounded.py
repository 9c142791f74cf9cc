"""Rounded matrices in the modules of a model: whole numbers and scales in the place of any module's parameter.

The plan's modules are built first, as for numbers of 16 bits. Then each parameter that the checkpoint holds rounded
gives way to its parts. Once these are loaded, the module gets a class of its own, in which the parameter's name stands
for a `Matrix`: torch's functions take it as they take a tensor. So whatever a module does with its weight, it does with
the rounded one: products and look-ups without unpacking it whole, everything else on the unpacked numbers.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headshare.checkpoint.header import TensorInfo
from headshare.checkpoint.rounding.tensors import SCALE, SUFFIXES
from headshare.errors import CheckpointError
from headshare.storage.matrix import Held, Matrix

# classes of modules with rounded parameters, by the class that they are like and the names of the parameters
_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}
# the attribute of a module that lists what of it is rounded
_HELD = "_rounded_parts"


def hold(module: nn.Module, name: str, info: TensorInfo) -> None:
    """Put the parts of a rounded matrix in the place of a module's parameter, before anything is loaded.

    Raises:
        CheckpointError: if the parameter has another shape than the matrix.
    """
    parameter = module._parameters.get(name)
    parts = info.parts
    assert parts is not None, info.name
    if parameter is None or tuple(parameter.shape) != info.shape:
        shape = "none" if parameter is None else tuple(parameter.shape)
        raise CheckpointError(f"{info.name} is a rounded matrix of shape {info.shape}; the model's has shape {shape}.")
    device = parameter.device
    numbers = torch.empty(parts.numbers.shape, dtype=parts.numbers.torch_dtype, device=device)
    scale = torch.empty(parts.scale.shape, dtype=parameter.dtype, device=device)
    delattr(module, name)
    module.register_parameter(f"{name}{SUFFIXES[parts.bits]}", nn.Parameter(numbers, requires_grad=False))
    module.register_parameter(f"{name}{SCALE}", nn.Parameter(scale, requires_grad=False))
    module.register_buffer(name, torch.empty(parts.guard.shape, dtype=torch.int8, device=device))
    held_by(module)[name] = Held.of(info)


def held_by(module: nn.Module) -> dict[str, Held]:
    """What of a module is rounded, by the names of its parameters."""
    held: dict[str, Held] = module.__dict__.setdefault(_HELD, {})
    return held


def is_rounded(module: nn.Module) -> bool:
    """True if a module holds a rounded matrix."""
    return bool(module.__dict__.get(_HELD))


def rounded_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold rounded matrices, by path."""
    return {path: module for path, module in model.named_modules() if is_rounded(module)}


def stored_parts(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a module holds its rounded matrices as, by name."""
    for name, held in held_by(module).items():
        for part in _names(name, held):
            parameter = module._parameters[part]
            assert parameter is not None
            yield part, parameter


def stand_in(module: nn.Module) -> None:
    """Give a module whose parts are loaded the class in which they are its weights. Its guards go."""
    held = held_by(module)
    for name in held:
        module._buffers.pop(name, None)
    module.__class__ = _class_of(type(module), tuple(held))


def unrounded(module: nn.Module) -> None:
    """Give a module its own class again, and unpacked parameters in the type of their scales. Undoes `stand_in`."""
    for name, held in module.__dict__.pop(_HELD).items():
        parameter = nn.Parameter(_matrix(module, name, held).dense().clone(), requires_grad=False)
        for part in _names(name, held):
            del module._parameters[part]
        module._parameters[name] = parameter
    module.__class__ = type(module).__bases__[0]


class Tied:
    """The output embedding that is the input's: it has no numbers of its own, and reads those of that module."""

    def __init__(self, embedding: nn.Module, name: str = "weight") -> None:
        self.embedding = embedding
        self.name = name


def tie(head: nn.Module, embedding: nn.Module, name: str = "weight") -> None:
    """Let a head read another module's rounded matrix as its own, which it has none of."""
    head._parameters.pop(name, None)
    head.__dict__["_tied_to"] = Tied(embedding, name)
    head.__class__ = _class_of(type(head), (name,))


def untied(head: nn.Module) -> None:
    """Give a tied head the ordinary weight that its embedding has by now, as the same parameter. Undoes `tie`."""
    tied: Tied | None = head.__dict__.pop("_tied_to", None)
    if tied is not None:
        head.__class__ = type(head).__bases__[0]
        head._parameters[tied.name] = tied.embedding._parameters[tied.name]


def _matrix(module: nn.Module, name: str, held: Held) -> Matrix:
    stored, scale = (module._parameters[part] for part in _names(name, held))
    assert stored is not None
    assert scale is not None
    return Matrix(stored, scale, held)


def _names(name: str, held: Held) -> tuple[str, str]:
    return f"{name}{SUFFIXES[held.bits]}", f"{name}{SCALE}"


def _weight(name: str, module: nn.Module) -> Matrix:
    """The matrix that stands for a parameter of this name."""
    tied: Tied | None = module.__dict__.get("_tied_to")
    if tied is not None:
        module = tied.embedding
    return _matrix(module, name, held_by(module)[name])


def _class_of(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class of modules like `base` in which these parameters are rounded."""
    if (base, names) not in _CLASSES:
        _CLASSES[base, names] = _made_class(base, names)
    return _CLASSES[base, names]


def _made_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:

    def save(module: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        base._save_to_state_dict(module, destination, prefix, keep_vars)
        for name, held in module.__dict__.get(_HELD, {}).items():
            destination[prefix + name] = torch.empty(held.guard, dtype=torch.int8)

    def reduce(module: nn.Module, _: Any) -> tuple[Any, ...]:
        return _blank, (base, names), module.__dict__

    members: Mapping[str, Any] = {
        **{name: property(partial(_weight, name)) for name in names},
        "_save_to_state_dict": save,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
    }
    return type(f"Rounded{base.__name__}", (base,), dict(members))


def _blank(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = _class_of(base, names)
    blank: nn.Module = made.__new__(made)
    return blank
