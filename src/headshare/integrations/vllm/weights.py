"""The weights of one rank: filled from the checkpoint's tensors in any order, then held with each unit once.

On a CPU every matrix is a range of addresses over the units, as in storage `alias`; on a CUDA device a table of blocks,
as in storage `indirect`. Where neither fits, each matrix is put together in memory of its own, and the log says what
that costs. This module knows no engine.
"""

import logging
from collections.abc import Mapping
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from headshare.errors import CheckpointError, StorageError
from headshare.integrations.vllm.rows import Piece, RankLayout, RankMatrix, lay_out
from headshare.plan.plan import SharePlan
from headshare.plan.section import AddedTensor
from headshare.plan.spans import Spans, joined
from headshare.plan.tensors import TensorPlan, tied_names
from headshare.plan.ties import scale_name
from headshare.sharing.makers import join
from headshare.storage.pooled.alias import AliasBank, AliasStorage
from headshare.storage.pooled.bank import BlockPool, PooledTensor
from headshare.storage.pooled.indirect import IndirectBank, IndirectStorage
from headshare.storage.pooled.product import BlockTable

LOGGER = logging.getLogger("vllm.headshare")


class RankWeights:
    """The weights of all matrices that a plan touches, on one rank.

    First every matrix is added, then every tensor of the checkpoint is put in; the first `whole` ends that.
    """

    def __init__(self, plan: SharePlan) -> None:
        self.plan = plan
        self.tensors: dict[str, TensorPlan] = dict(plan.tensors)
        self.added: Mapping[str, AddedTensor] = plan.added_tensors
        self._placed: set[str] = set()
        self._matrices: dict[str, RankMatrix] = {}
        self._like: dict[str, Tensor] = {}
        self._arrived: dict[str, Tensor | None] = {}
        self._waiting: dict[str, set[str]] = {}
        self._rows: dict[str, Tensor] = {}
        self._finished: set[str] = set()
        self._ready = False

    def tensor(self, name: str, shape: tuple[int, ...], axis: int) -> TensorPlan:
        """The plan of a tensor that a module holds a part of. If the share plan leaves it alone, its shape is this."""
        self._placed.add(name)
        return self.tensors.setdefault(name, TensorPlan(name, shape, axis))

    @cached_property
    def removed(self) -> Mapping[str, Spans]:
        """The indices that removals of units and neurons take, by the weight's name."""
        by_name: dict[str, list[tuple[int, int]]] = {}
        for removal in self.plan.removals:
            for touched in removal.touched():
                assert touched.range is not None
                by_name.setdefault(touched.name, []).append((touched.range.start, touched.range.stop))
        return {name: joined(sorted(spans)) for name, spans in by_name.items()}

    def add(self, matrix: RankMatrix, like: Tensor) -> None:
        """Add a matrix of this rank, whose numbers are to be of the type and on the device of `like`."""
        self._matrices[matrix.name] = matrix
        self._like[matrix.name] = like

    def put(self, name: str, stored: Tensor) -> None:
        """Take in a tensor of the checkpoint: what it stores of a weight, or what the plan adds to one.

        Raises:
            CheckpointError: if it has another shape than the plan says.
            StorageError: if the weights are in use already.
        """
        shape = self.added[name].shape if name in self.added else self.tensors[name].stored_shape
        if tuple(stored.shape) != shape:
            raise CheckpointError(
                f"{name} has shape {tuple(stored.shape)}; by the plan it should be {shape}. Download the model again."
            )
        if self._ready:
            raise StorageError(
                "the weights of a shared model cannot be loaded anew into a running engine. Start another."
            )
        weight = self.added[name].weight if name in self.added else name
        self._arrived[name] = stored.clone() if name in self.added else None
        for piece in self._layout.pieces.get(name, ()):
            axis = self.tensors[name].axis
            self._room(piece.matrix).narrow(axis, piece.at, piece.size).copy_(
                stored.narrow(axis, piece.start, piece.size)
            )
        for matrix in {piece.matrix for piece in self._pieces_of(weight)}:
            waiting = self._waiting[matrix]
            if name in waiting:
                waiting.remove(name)
                if not waiting:
                    self._finish(matrix)

    def whole(self, name: str) -> Tensor | BlockTable:
        """The whole weight of a matrix, in the orientation (outputs, inputs); the first call ends loading.

        Raises:
            CheckpointError: if a tensor did not load.
            StorageError: if no module holds a tensor of the plan.
        """
        if not self._ready:
            self._end()
        return self._bank.held(name).whole if name in self._bank.tensors else self._rows[name]

    def channel_scale(self, name: str) -> Tensor | None:
        """Factors of the inputs of a matrix: those of scaled ties, else one. None where no tie has a scale."""
        matrix = self._matrices[name]
        pieces = []
        for source, start, stop in matrix.runs:
            tensor = self.tensors.get(source)
            whole = torch.ones(stop - start)
            if tensor is not None and tensor.scaled:
                scale = self._arrived.get(scale_name(source))
                if scale is None:
                    raise CheckpointError(f"{scale_name(source)} did not load. Download the model again.")
                factors = torch.ones(tensor.size)
                used = 0
                for first, last in tensor.scaled:
                    factors[first:last] = scale[used : used + last - first]
                    used += last - first
                whole = factors[start:stop]
            pieces.append(whole)
        factors = torch.cat(pieces)
        return None if bool((factors == 1).all()) else factors.to(self._like[name])

    # ---- filling

    @cached_property
    def _layout(self) -> RankLayout:
        """The layout of all matrices; the first tensor that loads finds them all added."""
        layout = lay_out(self._matrices.values(), self.tensors)
        # the module of a tensor without any numbers may be absent
        wanted = {tensor.name for tensor in self.plan.tensors.values() if 0 not in tensor.reduced_shape}
        missing = sorted(wanted - self._placed)
        if missing:
            raise StorageError(
                f"the plan shares {missing[0]}, for which vLLM's model has no module on this rank. Pipeline stages are "
                "not supported for shared models; headshare expand writes a stock folder."
            )
        self._waiting = {name: set() for name in self._matrices}
        for pieces in (layout.pieces, layout.made):
            for name, many in pieces.items():
                for piece in many:
                    self._waiting[piece.matrix].add(name)
        for name, extra in self.added.items():
            for piece in layout.made.get(extra.weight, ()):
                self._waiting[piece.matrix].add(name)
        return layout

    def _pieces_of(self, weight: str) -> list[Piece]:
        return [*self._layout.pieces.get(weight, ()), *self._layout.made.get(weight, ())]

    @cached_property
    def _bank(self) -> BlockPool:
        plans = self._layout.plans
        tied = {name: plans[name] for name in tied_names(plans)}
        return bank_of(tied, self._like)

    def _room(self, matrix: str) -> Tensor:
        if matrix not in self._rows:
            shape = self._layout.plans[matrix].stored_shape
            self._rows[matrix] = self._like[matrix].new_zeros(shape)
        return self._rows[matrix]

    def _finish(self, matrix: str) -> None:
        """Compute what is made, and hand the rows to the bank if others share them."""
        rows = self._room(matrix)
        self._finished.add(matrix)
        for name, pieces in self._layout.made.items():
            mine = [piece for piece in pieces if piece.matrix == matrix]
            if mine:
                made = self._made(name)
                axis = self.tensors[name].axis
                for piece in mine:
                    rows.narrow(axis, piece.at, piece.size).copy_(made.narrow(axis, piece.start, piece.size))
        if matrix in self._bank.tensors:
            self._bank.put(matrix, self._rows.pop(matrix))

    def _made(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        whole = torch.zeros(tensor.shape)

        def read(added: str) -> Tensor:
            found = self._arrived[added]
            assert found is not None
            return found.to(torch.float32)

        join(tensor, whole, read)
        return whole

    def _end(self) -> None:
        for matrix, names in self._waiting.items():
            if names:
                raise CheckpointError(f"{min(names)} did not load, and {matrix} needs it. Download the model again.")
        for matrix in set(self._matrices) - self._finished:
            self._finish(matrix)  # it stores nothing of its own
        self._ready = True
        LOGGER.info(
            "headshare: this rank stores %s bytes of matrices that its modules see as %s: %s; %s bytes are zeros or "
            "products multiplied out",
            *(f"{self.stored_bytes:,}", f"{self.dense_bytes:,}"),
            HOW[type(self._bank)] if self._bank.tensors else "nothing is shared",
            f"{self.stored_bytes - self.loaded_bytes:,}",
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes of all matrices on this rank, each unit counted once."""
        return sum(prod(plan.stored_shape) * self._like[name].itemsize for name, plan in self._layout.plans.items())

    @property
    def loaded_bytes(self) -> int:
        """Bytes of these that the checkpoint has; all else is filled up or computed."""
        pieces = [piece for many in self._layout.pieces.values() for piece in many]
        sizes = ((piece.size * self._matrices[piece.matrix].across, piece.matrix) for piece in pieces)
        return sum(numbers * self._like[matrix].itemsize for numbers, matrix in sizes)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all matrices on this rank as modules see them."""
        return sum(prod(plan.shape) * self._like[name].itemsize for name, plan in self._layout.plans.items())


class GatheredBank(BlockPool):
    """The bank where memory cannot be shared: every whole weight is put together in memory of its own."""

    def __init__(self, tensors: Mapping[str, TensorPlan]) -> None:
        super().__init__(tensors)
        self._rows: dict[str, Tensor] = {}

    def put(self, name: str, stored: Tensor) -> Tensor:
        """Keep a tensor's stored rows until all are there."""
        self._rows[name] = stored
        return stored

    def seal(self) -> dict[str, PooledTensor]:
        """Put every whole weight together."""
        wholes = {name: self._whole(tensor) for name, tensor in self.tensors.items()}
        self._rows.clear()
        return {name: PooledTensor(whole, whole) for name, whole in wholes.items()}

    def _whole(self, tensor: TensorPlan) -> Tensor:
        axis = tensor.axis
        return torch.cat(
            [
                self._rows[source].narrow(axis, self.tensors[source].stored_index(start), stop - start)
                for source, start, stop in tensor.whole()
            ],
            dim=axis,
        )


HOW: Mapping[type[BlockPool], str] = {
    AliasBank: "each unit stands once, mapped to every matrix that uses it",
    IndirectBank: "each unit stands once, found by a table of blocks",
    GatheredBank: "shared units are put together in each matrix, which gives their saving of memory back",
}


def bank_of(tensors: Mapping[str, TensorPlan], like: Mapping[str, Tensor]) -> BlockPool:
    """An empty bank for these matrices, of the kind that fits their device."""
    dtypes = {like[name].dtype for name in tensors}
    devices = {name: like[name].device for name in tensors}
    kinds = {device.type for device in devices.values()}
    if not tensors:
        return GatheredBank({})
    if kinds == {"cuda"}:
        reason = IndirectStorage.refusal(tensors, dtypes, kinds)
        bank: BlockPool = IndirectBank(tensors, devices)
    else:
        reason = AliasStorage.refusal(tensors, dtypes, kinds)
        bank = AliasBank(tensors)
    if reason is None:
        return bank
    LOGGER.warning("headshare: shared units are held in each module that uses them: %s", reason)
    return GatheredBank(tensors)
