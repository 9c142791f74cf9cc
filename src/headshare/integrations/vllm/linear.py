"""Linear modules of vLLM whose weights are matrices of a rank: they load through it, and multiply by what it holds."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear, RowParallelLinear

from headshare.errors import StorageError
from headshare.integrations.vllm.rows import RankMatrix, range_of
from headshare.integrations.vllm.weights import RankWeights
from headshare.plan.tensors import NOTHING, Source, bias_name
from headshare.storage.pooled.product import BlockTable, slot_linear

# what vLLM calls the tensors that it fuses, in order; elsewhere it counts them
FUSED = ("q", "k", "v")


class SharedLinearMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM is not typed
    """The method of one linear module, which holds these tensors one below the other (`names`)."""

    def __init__(self, weights: RankWeights, prefix: str, names: Sequence[str]) -> None:
        self.weights = weights
        self.prefix = prefix
        self.names = list(names)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,  # noqa: ARG002 - the signature is vLLM's
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Note which rows, or columns, of its tensors this rank's module holds, and let them load through the rank.

        Raises:
            StorageError: if the module and the plan see the tensors in different ways.
        """
        columns = isinstance(layer, RowParallelLinear)
        sizes = [input_size_per_partition] if columns else output_partition_sizes
        if len(sizes) != len(self.names):
            raise StorageError(
                f"{self.prefix} has {len(sizes)} parts in vLLM, and {len(self.names)} in the checkpoint."
            )
        first = next(name for name in self.names if name in self.weights.tensors)
        shape = self.weights.tensors[first].shape
        across = sum(output_partition_sizes) if columns else input_size
        axis = 1 if columns else 0
        if self.weights.tensors[first].axis != axis or shape[1 - axis] != across:
            raise StorageError(
                f"{self.prefix} of vLLM's model is not laid out as the plan's {first}, of shape {shape}."
            )
        self.parts = [self._part(layer, number, size, shape) for number, size in enumerate(sizes)]
        runs = tuple(run for part in self.parts for run in part)
        weight = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        self.weights.add(RankMatrix(self.prefix, axis, across, runs), weight.data)
        _register(layer, "weight", weight, self._load)
        for name in self._added():
            _register(layer, name.rpartition(".")[2], weight.data, partial(self._load_added, name))
        if not columns:  # vLLM gives the bias, which it makes later, this loader
            layer.weight_loader = self._load_bias

    def process_weights_after_loading(self, layer: Any) -> None:
        """Let the module find its weight, once all are loaded."""
        whole = self.weights.whole(self.prefix)
        for name in self._added():
            delattr(layer, name.rpartition(".")[2])
        layer.weight = nn.Parameter(whole.bank if isinstance(whole, BlockTable) else whole, requires_grad=False)
        layer.register_buffer("block_table", whole.table if isinstance(whole, BlockTable) else None, persistent=False)
        layer.register_buffer("channel_scale", self.weights.channel_scale(self.prefix), persistent=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of x and the module's weight."""
        if layer.channel_scale is not None:
            x = x * layer.channel_scale
        if layer.block_table is not None:
            table = BlockTable(layer.weight, layer.block_table)
            return slot_linear(x, table, bias, across=isinstance(layer, RowParallelLinear))
        return linear(x, layer.weight, bias)

    def _part(self, layer: Any, number: int, size: int, shape: tuple[int, ...]) -> list[Source]:
        """The dense ranges of one of the module's tensors that this rank holds."""
        # keys and values are held again where there are more ranks than heads of them
        again = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and number else 1
        total = size * layer.tp_size // again
        start = size * (layer.tp_rank // again)
        name = self.names[number]
        tensor = self.weights.tensor(name, (total, *shape[1:]), 0)
        return range_of(tensor, self.weights.removed.get(name, ()), total, start, start + size)

    def _added(self) -> list[str]:
        return [name for name, extra in self.weights.added.items() if extra.weight in self.names]

    def _load(self, _: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
        self.weights.put(self.names[_number(shard)], loaded)

    def _load_added(self, name: str, _: nn.Parameter, loaded: Tensor) -> None:
        self.weights.put(name, loaded)

    def _load_bias(self, bias: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
        """Load the part of a bias that belongs to one tensor: what is not removed, and zeros elsewhere."""
        number = _number(shard)
        before = sum(run.stop - run.start for part in self.parts[:number] for run in part)
        name = bias_name(self.names[number])
        tensor = self.weights.plan.biases.get(name)
        for source, start, stop in self.parts[number]:
            target = bias.data[before : before + stop - start]
            before += stop - start
            if source == NOTHING:
                target.zero_()
            elif tensor is None:
                target.copy_(loaded[start:stop])
            else:
                dense = loaded.new_zeros(tensor.size)
                for first, last in tensor.present():
                    at = tensor.reduced_index(first)
                    dense[first:last] = loaded[at : at + last - first]
                target.copy_(dense[start:stop])


def _number(shard: str | int | None) -> int:
    return FUSED.index(shard) if isinstance(shard, str) else shard or 0


def _register(layer: Any, name: str, like: Tensor, loader: Any) -> None:
    """Register an empty parameter under the name of a tensor of the checkpoint, which loads by this function."""
    parameter = like if isinstance(like, nn.Parameter) else nn.Parameter(like, requires_grad=False)
    parameter.weight_loader = loader  # type: ignore[attr-defined]
    layer.register_parameter(name, parameter)
