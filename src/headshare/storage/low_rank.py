"""A readout some of whose columns are stored as products: its inputs go through the factors, one after the other.

No storage of its own: units that are stored so lend nothing and borrow nothing in this matrix, so that such a module
stands beside those of every storage, with ordinary parameters.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from headshare.errors import PlanError
from headshare.plan.spans import Span, Spans, joined
from headshare.plan.tensors import GappedTensor, total_rank
from headshare.sharing.factors import join_columns
from headshare.storage.projection import SharedProjection


class FactoredProjection(SharedProjection):
    """A projection whose `weight` holds the columns that are no product; for the others there are two factors.

    Unit by unit, the columns are `factor_out @ factor_in`. Trains like any module. The result equals the dense module's
    with the products written in, to a rounding.
    """

    def __init__(self, dense: nn.Module, tensor: GappedTensor) -> None:
        super().__init__(dense, tensor)
        if tensor.axis != (0 if self.in_out else 1):
            raise PlanError(f"the plan stores rows of {tensor.name} as products; only a readout's columns can be.")
        ranks, channels = total_rank(tensor), tensor.factored[0].stop - tensor.factored[0].start
        self.factor_in = nn.Parameter(self.weight.new_empty(ranks, channels))
        self.factor_out = nn.Parameter(self.weight.new_empty(self.out_features, ranks))
        self._kept: Spans = tuple(tensor.kept())
        self._spans = tuple(Span(one.start, one.stop) for one in tensor.factored)
        self._ranks = [one.rank for one in tensor.factored]
        self._read = joined(self._spans)

    def forward(self, x: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens outputs"]:
        """The projection of x: one product for the kept columns, and two narrow ones for the others."""
        flat = x if x.ndim == 2 else x.reshape(-1, self.in_features)
        weight = self.weight.T if self.in_out else self.weight
        kept = linear(_channels(flat, self._kept), weight, self.bias)
        out = torch.addmm(kept, self._through_factors(flat), self.factor_out.T)
        return out if x.ndim == 2 else out.view(*x.shape[:-1], self.out_features)

    def _through_factors(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens ranks"]:
        """Each factored unit's channels through its rows of `factor_in`; all units at once where ranks are equal."""
        units, factor_in = len(self._ranks), self.factor_in
        if units == 1:
            return linear(_channels(x, self._read), factor_in)
        if len(set(self._ranks)) > 1:
            rows = zip(self._spans, torch.split(factor_in, self._ranks), strict=True)
            return torch.cat([linear(_channels(x, (span,)), some) for span, some in rows], dim=1)
        of_units = _channels(x, self._read).view(len(x), units, factor_in.shape[1]).transpose(0, 1)
        by_unit = factor_in.view(units, self._ranks[0], factor_in.shape[1])
        return torch.bmm(of_units, by_unit.mT).transpose(0, 1).flatten(1)

    def whole_weight(self) -> Float[Tensor, "rows columns"]:
        """The dense weight, products multiplied out and rounded, in the stock module's orientation."""
        rows, columns = torch.split(self.factor_in, self._ranks), torch.split(self.factor_out, self._ranks, dim=1)
        products = [join_columns(*pair).to(self.weight.dtype) for pair in zip(rows, columns, strict=True)]
        pieces = dict(zip(self._spans, [part.T if self.axis == 0 else part for part in products], strict=True))
        if self._kept:
            kept = torch.split(self.weight, [stop - start for start, stop in self._kept], dim=self.axis)
            pieces |= dict(zip(self._kept, kept, strict=True))
        return torch.cat([pieces[span] for span in sorted(pieces)], dim=self.axis)

    def extra_repr(self) -> str:
        """What prints show beside the class's name."""
        return f"{super().extra_repr()}, ranks={','.join(map(str, self._ranks))}"


def _channels(x: Float[Tensor, "tokens channels"], runs: Spans) -> Float[Tensor, "tokens some"]:
    """These channels side by side: a view where they are one run, else a copy."""
    pieces = [x.narrow(1, start, stop - start) for start, stop in runs]
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces, dim=1) if pieces else x.narrow(1, 0, 0)
