"""Output projections with low-rank columns: their inputs go through two small factors, one after the other.

Such a module needs no storage: low-rank units lend nothing and borrow nothing in this matrix. So it stands beside the
modules of every storage, with ordinary parameters.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from headshare.errors import PlanError
from headshare.plan.spans import Span, Spans, joined
from headshare.plan.tensors import TensorPlan, total_rank
from headshare.sharing.factors import join_columns
from headshare.storage.matrix import Weight
from headshare.storage.projection import SharedProjection


class LowRankProjection(SharedProjection):
    """A projection whose `weight` holds the kept columns only; the low-rank columns are the product of two factors.

    The columns of each low-rank unit are `factor_out @ factor_in`, with that unit's rows and columns of the factors.
    It trains like any module. Its result equals, up to rounding, that of the dense module with the products written in.
    """

    def __init__(self, dense: nn.Module, tensor: TensorPlan) -> None:
        super().__init__(dense, tensor)
        if tensor.axis != (0 if self.in_out else 1):
            raise PlanError(f"the plan stores rows of {tensor.name} as products; only a readout's columns can be.")
        ranks = total_rank(tensor)
        channels = tensor.factored[0].stop - tensor.factored[0].start
        self.factor_in = nn.Parameter(self.weight.new_empty(ranks, channels))
        self.factor_out = nn.Parameter(self.weight.new_empty(self.out_features, ranks))
        self._kept: Spans = tuple(tensor.kept())
        self._spans = tuple(Span(unit.start, unit.stop) for unit in tensor.factored)
        self._ranks = [unit.rank for unit in tensor.factored]
        self._read = joined(self._spans)

    def forward(self, x: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens outputs"]:
        """The projection of x: a product with the kept columns, and two narrow ones for the low-rank columns."""
        flat = x if x.ndim == 2 else x.reshape(-1, self.in_features)
        weight = self.weight.T if self.in_out else self.weight
        kept = linear(_channels(flat, self._kept), weight, self.bias)
        out = torch.addmm(kept, self._through_factors(flat), self.factor_out.T)
        return out if x.ndim == 2 else out.view(*x.shape[:-1], self.out_features)

    def _through_factors(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens ranks"]:
        """The products of each low-rank unit's channels with its rows of `factor_in`, side by side.

        All units are multiplied at once where their ranks are equal.
        """
        units = len(self._ranks)
        factor_in = self.factor_in
        if units == 1:
            return linear(_channels(x, self._read), factor_in)
        if len(set(self._ranks)) > 1:
            rows = zip(self._spans, torch.split(factor_in, self._ranks), strict=True)
            return torch.cat([linear(_channels(x, (span,)), factor) for span, factor in rows], dim=1)
        of_units = _channels(x, self._read).view(len(x), units, factor_in.shape[1]).transpose(0, 1)
        by_unit = factor_in.view(units, self._ranks[0], factor_in.shape[1])
        return torch.bmm(of_units, by_unit.mT).transpose(0, 1).flatten(1)

    def whole_weight(self) -> Weight:
        """The dense weight, with products multiplied out and rounded, in the stock module's orientation."""
        rows = torch.split(self.factor_in, self._ranks)
        columns = torch.split(self.factor_out, self._ranks, dim=1)
        products = [join_columns(*pair).to(self.weight.dtype) for pair in zip(rows, columns, strict=True)]
        pieces = dict(zip(self._spans, [part.T if self.axis == 0 else part for part in products], strict=True))
        if self._kept:
            kept = torch.split(self.weight, [stop - start for start, stop in self._kept], dim=self.axis)
            pieces |= dict(zip(self._kept, kept, strict=True))
        return torch.cat([pieces[span] for span in sorted(pieces)], dim=self.axis)

    def extra_repr(self) -> str:
        """The text that prints show beside the class's name."""
        return f"{super().extra_repr()}, ranks={','.join(map(str, self._ranks))}"


def _channels(x: Float[Tensor, "tokens channels"], runs: Spans) -> Float[Tensor, "tokens some"]:
    """The channels of these runs, side by side: a view where there is a single run, else a copy."""
    pieces = [x.narrow(1, start, stop - start) for start, stop in runs]
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces, dim=1) if pieces else x.narrow(1, 0, 0)
