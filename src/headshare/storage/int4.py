"""Matrices rounded to 4 bits: each module keeps the packed rows it owns, and borrows the rest from its donors."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from headshare.architecture.modules import ModuleMap, replace_module
from headshare.checkpoint.int4 import A_WORD, GUARD, GUARD_DTYPE, PACKED, SCALE_DTYPE, SHAPE, Packing, unpack
from headshare.errors import CheckpointError
from headshare.plan.tensors import TensorPlan
from headshare.storage.owner import OWN, Slot, Spans, borrowed


class PackedLinear(nn.Module):
    """A drop-in for nn.Linear whose weight is rounded to 4 bits. It is unpacked for each product, then dropped.

    With `guarded` it holds the guard that the checkpoint has beside the matrix, so that it is saved again.

    Raises:
        CheckpointError: if groups do not fill its inputs.
    """

    def __init__(self, dense: nn.Linear, packing: Packing, tensor: TensorPlan | None, *, guarded: bool) -> None:
        super().__init__()
        if dense.in_features % packing.group:
            raise CheckpointError(f"groups of {packing.group} do not fill the {dense.in_features} inputs of a matrix.")
        self.out_features = dense.out_features
        self.in_features = dense.in_features
        rows = self.out_features if tensor is None else tensor.stored_shape[0]
        device = dense.weight.device
        words = self.in_features // A_WORD
        groups = self.in_features // packing.group
        packed = torch.empty((rows, words), dtype=torch.int32, device=device)
        scale = torch.empty((rows, groups), dtype=SCALE_DTYPE, device=device)
        self.weight_packed = nn.Parameter(packed, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.register_buffer(SHAPE, torch.empty((2,), dtype=torch.int64, device=device))
        if guarded:
            self.register_buffer(GUARD, torch.empty(0, dtype=GUARD_DTYPE, device=device))
        self.bias = None if dense.bias is None else nn.Parameter(torch.empty_like(dense.bias), requires_grad=False)
        # until it is linked, the module is the only source of its rows
        self._donors: tuple[PackedLinear, ...] = ()
        self._spans: dict[int, Spans] = {OWN: ((0, rows),)}
        self._slots: tuple[Slot, ...] = (Slot(OWN, 0),)

    def check(self, path: str) -> None:
        """Refuse loaded tensors of another matrix, by the shape that they record. Tensors left on disk are not read.

        Raises:
            CheckpointError: if the shape is not this module's.
        """
        shape = self.get_buffer(SHAPE)
        wanted = [self.out_features, self.in_features]
        if not shape.is_meta and shape.tolist() != wanted:
            raise CheckpointError(
                f"{path}.{PACKED} and what stands beside it are not of the model's matrix of shape {wanted}: they are "
                "missing, or of another one. Download the checkpoint again."
            )

    def link(
        self, tensor: TensorPlan, tensors: Mapping[str, TensorPlan], modules: Mapping[str, "PackedLinear"]
    ) -> None:
        """Set the donors of this module, and the order of the rows that they lend. Donors do not become submodules."""
        if not tensor.gaps:
            return
        names, self._spans, self._slots = borrowed(tensor, tensors)
        self._donors = tuple(modules[name] for name in names)

    def forward(self, x: Tensor | None = None, *, lend: Spans = ()) -> Tensor | tuple[Tensor, ...]:
        """The projection of x; or, for a recipient that calls with `lend` alone, the rows that it borrows.

        That is a view of each of these spans of the packed rows, each followed by a view of their scales.
        """
        if x is None:
            return self._lent(lend)
        return functional.linear(x, self.whole_weight(x.dtype), self.bias)

    def whole_weight(self, dtype: torch.dtype) -> Float[Tensor, "rows inputs"]:
        """The dense weight, unpacked, with each borrowed row in its place."""
        pieces = {
            number: self._lent(spans) if number == OWN else self._donors[number](lend=spans)
            for number, spans in self._spans.items()
        }
        packed, scale = (
            [pieces[donor][2 * nth + which].to(self.weight_packed.device) for donor, nth in self._slots]
            for which in (0, 1)
        )
        return unpack(torch.cat(packed), torch.cat(scale), dtype)

    def _lent(self, spans: Spans) -> tuple[Tensor, ...]:
        return tuple(stored[start:stop] for start, stop in spans for stored in (self.weight_packed, self.weight_scale))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Apply fn as any module does, but keep the type of the scales: a conversion would round them."""
        before = self.weight_scale.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != before.dtype:
            self.weight_scale = nn.Parameter(before.to(self.weight_scale.device), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        """The text that prints show beside the class's name."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"stored={tuple(self.weight_packed.shape)}"
        )


def install_packed(
    model: nn.Module,
    packing: Packing,
    tensors: Mapping[str, TensorPlan],
    modules: ModuleMap,
    *,
    guarded: Collection[str],
) -> None:
    """Put a `PackedLinear` in place of every linear module that is not ignored, and link borrowers to donors.

    `modules` has the modules of the tensors that a plan touches. `guarded` has the paths of those whose
    matrices have guards in the checkpoint.

    Raises:
        CheckpointError: if a module that the plan touches is not replaced.
        StorageError: if a module that the plan touches holds several tensors.
    """
    # The list of ignored modules may name them with or without the prefix that the class of the model adds.
    paths = modules.paths()
    names = {path: name for name, path in paths.items()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    ignored = {name for path in packing.ignore for name in (path, path.removeprefix(prefix), prefix + path)}
    packed: dict[str, PackedLinear] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path not in ignored:
            packed[path] = PackedLinear(module, packing, tensors.get(names.get(path, "")), guarded=path in guarded)
            replace_module(model, path, packed[path])
    if left := [path for path in paths.values() if path not in packed]:
        raise CheckpointError(f"the plan shares rows of {left[0]}, which is not a linear module of four bits here.")
    # Donors must all be in place before a recipient can name them.
    by_name = {name: packed[path] for name, path in paths.items()}
    for name, module in by_name.items():
        module.link(tensors[name], tensors, by_name)


def unpacked(module: PackedLinear, dtype: torch.dtype) -> nn.Linear:
    """A stock module with the unpacked weight, and the bias, of this one."""
    with torch.device("meta"):
        like = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    like.weight = nn.Parameter(module.whole_weight(dtype))
    like.bias = None if module.bias is None else nn.Parameter(module.bias.detach().clone())
    return like
