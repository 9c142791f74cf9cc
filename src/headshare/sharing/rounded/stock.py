"""Rounded matrices as stock tools load them: compressed-tensors' `pack-quantized`, of 8 and of 4 bits.

vLLM knows weights of 8 bits beside activations of 16 in this format alone. A word of `weight_packed`, (rows, words),
holds four or eight whole numbers, each made positive, from the lowest bits up; `weight_scale` is (rows, groups), and
`weight_shape` the shape of the matrix.

What this format cannot hold is written as an ordinary matrix, in the type of its scales: embeddings, matrices of
families with linear modules of their own, those beside experts, and output projections that are more than their own
stored columns, which have scales of several matrices or none.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from headshare.architecture.config import text_config
from headshare.architecture.families import TIED_OUTPUTS, Linear, family_of, is_embedding, names_elsewhere
from headshare.checkpoint.header import Parts
from headshare.checkpoint.rounding.numbers import Rounded, groups_of, halves
from headshare.plan.tensors import NOTHING
from headshare.sharing.assembly import Assembly
from headshare.sharing.expanded import LazyTensors
from headshare.sharing.fits import SharedFiles

WEIGHT = ".weight"
PACKED = "weight_packed"
SCALE = "weight_scale"
SHAPE = "weight_shape"


class StockMatrices:
    """The rounded matrices of a shared checkpoint that stock tools can load rounded, in their dense shapes."""

    def __init__(self, files: SharedFiles) -> None:
        self._files = files
        self._tensors = files.checkpoint.tensors
        self._family = family_of(str(text_config(files.checkpoint.config).get("model_type")))
        # compressed-tensors knows torch's own linear modules, and transformers loads no mixture of experts through it
        # of which only attention is rounded
        known = (self._family is None or self._family.linear == Linear()) and files.checkpoint.layouts.ffn is not None
        self.names = frozenset(name for name in self._tensors if known and self._is_stock(name))

    def _is_stock(self, name: str) -> bool:
        parts = self._tensors[name].parts
        if parts is None or parts.in_out or is_embedding(name) or not name.endswith(WEIGHT):
            return False
        tensor = self._files.tensors.get(name)
        if tensor is None:
            return not self._cut(parts, max(parts.guard.shape))
        if tensor.made or tensor.scaled or self._cut(parts, tensor.shape[1]):
            return False
        if tensor.axis == 1:  # scales go along rows, so what else a row reads would need scales of its own
            return not tensor.gaps and (parts.group is None or not tensor.removed)
        return all(self._is_alike(parts, gap.donor) for gap in tensor.gaps)

    def _is_alike(self, parts: Parts, donor: str) -> bool:
        other = self._tensors[donor].parts
        return other is not None and (other.bits, other.group) == (parts.bits, parts.group)

    @staticmethod
    def _cut(parts: Parts, inputs: int) -> bool:
        return parts.group is not None and inputs % parts.group > 0

    def assemblies(self) -> list[Assembly]:
        """The assemblies of their parts."""
        found = []
        for name in sorted(self.names):
            info = self._tensors[name]
            assert info.parts is not None
            rows, inputs = self._shape(name)
            shapes = {
                PACKED: ("I32", (rows, -(-inputs * info.parts.bits // 32))),
                SCALE: (info.dtype, (rows, groups_of(inputs, info.parts.group))),
                SHAPE: ("I64", (2,)),
            }
            stem = name.removesuffix("weight")
            found += [Assembly(stem + part, code, shape, info.file, 0, ()) for part, (code, shape) in shapes.items()]
        return found

    def tensors(self) -> LazyTensors:
        """Their parts by name, each made when it is asked for."""
        of = {name.removesuffix("weight") + part: name for name in self.names for part in (PACKED, SCALE, SHAPE)}

        def part(name: str) -> Tensor:
            matrix = of[name]
            if name.endswith(SHAPE):
                return torch.tensor(self._shape(matrix))
            numbers, scale = self.whole(matrix)
            parts = self._tensors[matrix].parts
            assert parts is not None
            return scale if name.endswith(SCALE) else packed(numbers, parts.bits)

        return LazyTensors(of, part)

    def config(self) -> dict[str, Any]:
        """The entry of config.json, in compressed-tensors' words."""
        schemes: dict[tuple[int, int | None], list[str]] = {}
        for name in sorted(self.names):
            parts = self._tensors[name].parts
            assert parts is not None
            schemes.setdefault((parts.bits, parts.group), []).append(name.removesuffix(WEIGHT))
        several = len(schemes) > 1
        groups = {
            f"group_{number}": {"targets": names if several else ["Linear"], "weights": _scheme(*scheme)}
            for number, (scheme, names) in enumerate(sorted(schemes.items(), reverse=True))
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": self._ignored(),
        }

    def _ignored(self) -> list[str]:
        """The modules that may be linear ones, and have ordinary weights; also a head that is the embedding."""
        added = self._files.added
        heads = TIED_OUTPUTS if self._family is None else self._family.tied_outputs
        plain = [name for name, info in self._tensors.items() if len(info.shape) == 2 and name not in added]
        names = [name for name in (*plain, *heads) if name.endswith(WEIGHT) and name not in self.names]
        # a model of another release may have a module under the name that older checkpoints have, or the reverse
        names += [other for name in names for other in names_elsewhere(name)]
        return sorted({name.removesuffix(WEIGHT) for name in names})

    def _shape(self, name: str) -> tuple[int, ...]:
        tensor = self._files.tensors.get(name)
        return self._tensors[name].shape if tensor is None else tensor.shape

    def whole(self, name: str) -> Rounded:
        """The numbers of one of them in its dense shape, with donors' rows in place and zeros for those removed."""
        checkpoint = self._files.checkpoint
        tensor = self._files.tensors.get(name)
        if tensor is None:
            return checkpoint.read_rounded(name)
        if tensor.axis == 1:
            stored = checkpoint.read_rounded(name)
            whole = torch.zeros(tensor.shape, dtype=torch.int8)
            for start, stop in tensor.kept():
                whole[:, start:stop] = stored.numbers.narrow(1, tensor.stored_index(start), stop - start)
            return Rounded(whole, stored.scale)
        pieces = [self._rows(name, *run) for run in tensor.whole()]
        return Rounded(torch.cat([piece.numbers for piece in pieces]), torch.cat([piece.scale for piece in pieces]))

    def _rows(self, name: str, source: str, start: int, stop: int) -> Rounded:
        info = self._tensors[name]
        if source == NOTHING:
            assert info.parts is not None
            inputs = self._shape(name)[1]
            scale = torch.ones(stop - start, groups_of(inputs, info.parts.group), dtype=info.torch_dtype)
            return Rounded(torch.zeros(stop - start, inputs, dtype=torch.int8), scale)
        first = self._files.tensors[source].stored_index(start)
        return self._files.checkpoint.read_rounded(source, first, first + stop - start)


def _scheme(bits: int, group: int | None) -> Mapping[str, Any]:
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    return {"num_bits": bits, "type": "int", "symmetric": True, **strategy}


def packed(numbers: Int[Tensor, "rows inputs"], bits: int) -> Int[Tensor, "rows words"]:
    """The words that hold these numbers, each made positive by half of what its bits can count."""
    stored = (numbers.to(torch.int16) + 128).to(torch.uint8) if bits == 8 else halves(numbers)
    return pad(stored, (0, -stored.shape[1] % 4)).contiguous().view(torch.int32)
