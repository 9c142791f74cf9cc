"""Storage `owner`: each module keeps the rows it owns, and a recipient calls its donors' modules for the rest.

A recipient calls its donor rather than hold the donor's parameter, so that hooks do their work: offload loads the
donor's weight for the call, FSDP gathers it, and autograd sums the gradients of all users in the only copy.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from headshare.architecture.modules import ModuleMap
from headshare.plan.tensors import TensorPlan
from headshare.storage.matrix import Weight
from headshare.storage.projection import SharedProjection

# The most tokens for which a product for each run of rows is faster than putting the whole weight together.
FEW_TOKENS = 3

Spans = tuple[tuple[int, int], ...]

# The number of the module itself, where donors are numbered from 0.
OWN = -1


class Slot(NamedTuple):
    """The source of the next rows of a whole weight: the n-th span that a donor lends, or (OWN) the module stores."""

    donor: int
    nth: int


def borrowed(
    tensor: TensorPlan, tensors: Mapping[str, TensorPlan]
) -> tuple[list[str], dict[int, Spans], tuple[Slot, ...]]:
    """The composition of a whole weight: its donors, the spans of rows that each source gives, and their order.

    Sources are numbered: donors by their place in the list, and the tensor itself by OWN. Spans count stored rows.
    """
    names = list(dict.fromkeys(gap.donor for gap in tensor.gaps))
    spans: dict[int, list[tuple[int, int]]] = {number: [] for number in range(OWN, len(names))}
    slots = []
    for source, start, stop in tensor.whole():
        first = tensors[source].stored_index(start)
        donor = OWN if source == tensor.name else names.index(source)
        slots.append(Slot(donor, len(spans[donor])))
        spans[donor].append((first, first + stop - start))
    return names, {number: tuple(lent) for number, lent in spans.items()}, tuple(slots)


class OwnerProjection(SharedProjection):
    """A projection that stores the rows (or columns) it owns, and borrows the others from donors when it runs.

    Its result equals, bit for bit, that of the dense module with the borrowed rows written in.
    """

    def __init__(self, dense: nn.Module, tensor: TensorPlan) -> None:
        super().__init__(dense, tensor)
        self._shape = tensor.shape
        self._donors: tuple[OwnerProjection, ...] = ()
        self._spans: tuple[Spans, ...] = ()
        self._own: Spans = ()
        self._slots: tuple[Slot, ...] = ()

    def link(self, tensor: TensorPlan, tensors: Mapping[str, TensorPlan], modules: Mapping[str, nn.Module]) -> None:
        """Set the donors of this module, and the order of the rows that they lend. Donors do not become submodules."""
        if not tensor.gaps:
            return
        names, spans, self._slots = borrowed(tensor, tensors)
        self._donors = tuple(_owner(modules[name]) for name in names)
        self._spans = tuple(spans[number] for number in range(len(names)))
        self._own = spans[OWN]

    def forward(
        self,
        x: Tensor | None = None,
        *,
        lend: Spans | None = None,
        biases: Sequence[Tensor | None] = (),
        into: Sequence[Tensor] = (),
    ) -> Tensor | tuple[Tensor, ...]:
        """The projection of x; or, for a recipient that calls with `lend`, the lent rows or products with them.

        Without x, that is a copy of each of these spans, put `into` the recipient's tensors where it gives some. With
        x, it is the product of x with each of these spans of rows, each with a bias of the recipient's.
        """
        if x is None:
            assert lend is not None
            lent = [self.weight.narrow(self.axis, start, stop - start) for start, stop in lend]
            if not into:
                return tuple(span.clone() for span in lent)
            return tuple(target.copy_(span) for target, span in zip(into, lent, strict=True))
        if lend is not None:
            rows = [self.weight[start:stop] for start, stop in lend]
            return tuple(linear(x.to(self.weight.device), w, b) for w, b in zip(rows, biases, strict=True))
        if self._multiplies_by_runs(x):
            return self._product_by_runs(x)
        return self.multiply(x, self.whole_weight())

    def _multiplies_by_runs(self, x: Tensor) -> bool:
        """Whether to multiply by each run of rows on its own, rather than put the whole weight together first.

        For few tokens that is faster, and equal bit for bit. For more tokens the library may round the narrower
        products in another way.
        """
        return (
            bool(self._slots)
            and not self.in_out
            and not self.bias_after
            and self.axis == 0
            and x.numel() <= FEW_TOKENS * x.shape[-1]
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )

    def _product_by_runs(self, x: Tensor) -> Tensor:
        sources: list[OwnerProjection] = [self, *self._donors]
        biases: dict[int, list[Tensor | None]] = {slot.donor: [] for slot in self._slots}
        at = 0
        for slot in self._slots:
            start, stop = (self._own if slot.donor < 0 else self._spans[slot.donor])[slot.nth]
            biases[slot.donor].append(None if self.bias is None else self.bias[at : at + stop - start])
            at += stop - start
        products = {
            donor: sources[donor + 1](x, lend=self._own if donor < 0 else self._spans[donor], biases=many)
            for donor, many in biases.items()
        }
        return torch.cat([products[donor][nth].to(x.device) for donor, nth in self._slots], dim=-1)

    def whole_weight(self) -> Weight:
        """The dense weight: the stored parameter itself where nothing is borrowed, else put together anew."""
        if not self._slots:
            return self.weight
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self._copied_together()
        lent = [
            [rows.to(self.weight.device) for rows in donor(lend=spans)]
            for donor, spans in zip(self._donors, self._spans, strict=True)
        ]
        own = [self.weight.narrow(self.axis, start, stop - start) for start, stop in self._own]
        return torch.cat([own[nth] if donor < 0 else lent[donor][nth] for donor, nth in self._slots], dim=self.axis)

    def _copied_together(self) -> Float[Tensor, "rows columns"]:
        """The dense weight, put together without gradients: every row is copied once, to its final place."""
        whole = self.weight.new_empty(self._shape)
        spans = {OWN: self._own, **dict(enumerate(self._spans))}
        # Every source writes straight into the whole weight, so that no row is copied twice.
        lengths = [stop - start for donor, nth in self._slots for start, stop in spans[donor][nth : nth + 1]]
        into: dict[int, list[Tensor]] = {donor: [] for donor in spans}
        for slot, target in zip(self._slots, torch.split(whole, lengths, dim=self.axis), strict=True):
            into[slot.donor].append(target)
        for target, (start, stop) in zip(into.pop(OWN), self._own, strict=True):
            target.copy_(self.weight.narrow(self.axis, start, stop - start))
        for donor, targets in into.items():
            self._donors[donor](lend=spans[donor], into=targets)
        return whole


class OwnerStorage:
    """The storage that installs an `OwnerProjection` wherever a plan lends or borrows."""

    name: ClassVar[str] = "owner"
    trains: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    replicates: ClassVar[bool] = False
    brings_memory: ClassVar[bool] = False

    def __init__(self, devices: Mapping[str, str]) -> None:
        """Take tensors on any devices: hooks bring a donor's rows to where they are needed."""

    @classmethod
    def refusal(cls, *_: object) -> None:
        """None: owners hold all tensors, on all devices."""
        return

    def install(self, model: nn.Module, tensors: Mapping[str, TensorPlan], modules: ModuleMap) -> None:
        """Replace all modules first and link them afterwards: a donor must be in place before its recipients name it.

        Raises:
            StorageError: if a module holds several tensors.
        """
        shared: dict[str, nn.Module] = {}
        for name, tensor in tensors.items():
            shared[name] = OwnerProjection(modules.module(model, name), tensor)
            modules.replace(model, name, shared[name])
        for name, tensor in tensors.items():
            _owner(shared[name]).link(tensor, tensors, shared)


def _owner(module: nn.Module) -> OwnerProjection:
    assert isinstance(module, OwnerProjection)
    return module
