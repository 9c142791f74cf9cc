"""The check that rounded numbers are the nearest to a dense model's."""

import torch

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.rounding.numbers import nearest_for
from headshare.checkpoint.rounding.tensors import scale_type
from headshare.plan.tensors import TensorPlan
from headshare.sharing.assembly import copied, kept_only, stream


def is_nearest(shared: Checkpoint, dense: Checkpoint, name: str, tensor: TensorPlan | None) -> bool:
    """True if a rounded matrix is what the kept indices of the dense one round to, for the scales that it has.

    Numbers that GPTQ found are further away on purpose, and are not compared.
    """
    info = shared.tensors[name]
    parts = info.parts
    assert parts is not None, name
    rounding = shared.require_sharing().rounding
    assert rounding is not None
    if not rounding.is_to_nearest(parts.bits):
        return True
    own = dense.tensors[name]
    # a matrix had the type of its scales before, or a longer one where scales are shorter
    dtype = own.dtype if scale_type(parts.bits, own.dtype) == info.dtype else info.dtype
    meant = copied(own, dtype) if tensor is None else kept_only(own, tensor, dtype)
    kept = torch.cat([piece.view(-1, *meant.shape[1:]) for piece in stream(meant, dense)])
    numbers, scale = shared.read_rounded(name)
    return torch.equal(numbers, nearest_for(kept.T if parts.in_out else kept, scale, parts.bits, parts.group))
