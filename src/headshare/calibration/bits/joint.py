"""Bits and structure under one budget of bytes: a width for each matrix, and what its sublayer gives up.

A sublayer has as many choices as there are ways to follow a cost curve, times ways to round its matrices. A row that is
removed saves what it has in the width of its matrix, so structure is worth less the fewer bits there are. What a
removal costs predictions does not depend on widths, nor the other way round, to first order; so costs add up. No
weight is looked at.

The ways to round a sublayer are those that are best at some exchange rate of cost for bytes: at such a rate each matrix
has a best width by itself (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from headshare.calibration.allocate import Choices, cheapest_saving, going_together
from headshare.calibration.bits.costs import GROUPS, MatrixCosts
from headshare.calibration.costs.actions import Action, Output
from headshare.calibration.costs.curves import CostCurve, CostCurves
from headshare.calibration.costs.to_plan import Budgeted, budgeted
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.header import DTYPES
from headshare.checkpoint.rounding.tensors import scale_type
from headshare.defaults import WIDTH_NAMES
from headshare.errors import CheckpointError, PlanError
from headshare.plan.bits import PlannedBits
from headshare.plan.plan import SharePlan
from headshare.plan.units import Part, Sublayer
from headshare.sharing.rounded.matrices import Roundable, estimate_planned, groups_fitting, once, roundable
from headshare.sharing.size import dtype_code, item_size, parameter_bytes, parameter_infos, stored_bytes

# Widths under each word of --bits, in bits of a number. 16 stands for numbers as they are.
WIDTHS: Mapping[str, tuple[int, ...]] = dict(zip(WIDTH_NAMES, ((16,), (8,), (4,), (16, 8, 4)), strict=True))
# How often the exact bytes of a plan may turn out to be too many.
TRIES = 16


@dataclass(frozen=True)
class ByteBudget:
    """The bytes that may be left of a model whose numbers are stored as `dtype` (None: as they are), and the widths
    that its matrices may have."""

    left: int
    widths: tuple[int, ...]
    dtype: str | None = None

    def is_met_by_bits(self, dense: Checkpoint) -> bool:
        """True if the widest of the allowed widths below 16 leaves no more than this, with nothing given up."""
        below = max(bits for bits in self.widths if bits < 16)
        groups = groups_fitting(dense, GROUPS) if below == 4 else [None]
        return any(
            _Model(dense, (), self, group).left(dict.fromkeys(dense_matrices(dense), below)) <= self.left
            for group in groups
        )


def dense_matrices(dense: Checkpoint) -> dict[str, Roundable]:
    """The matrices of a dense checkpoint's layers that can be rounded, by name."""
    return {name: matrix for name, matrix in roundable(dense, {}).items() if not matrix.embedding}


def plan_with_bits(dense: Checkpoint, prices: CostCurves, costs: Sequence[MatrixCosts], budget: ByteBudget) -> Budgeted:
    """The plan, with the bits of each matrix, that leaves no more than these bytes, at the least cost that is found.

    Embeddings have 8 bits. Matrices in 4 bits have groups of one size, which is the cheapest of those that were
    measured.

    Raises:
        PlanError: if what was priced does not reach so few bytes.
        CheckpointError: if matrices must have 4 bits, and no group divides the inputs of all of them.
    """
    groups: list[int | None] = [*groups_fitting(dense, GROUPS)] if 4 in budget.widths else [None]
    if not groups:
        if budget.widths == (4,):
            raise CheckpointError(
                f"groups of {GROUPS[-1]} inputs do not divide all matrices of {dense.name}. Use 8 bits."
            )
        budget = replace(budget, widths=tuple(bits for bits in budget.widths if bits != 4))
        groups = [None]
    plans = []
    refused: PlanError | None = None
    for group in groups:
        for curves in going_together(prices.curves):
            try:
                plans.append(_Model(dense, costs, budget, group).plan(replace(prices, curves=tuple(curves))))
            except PlanError as error:
                refused = error
    if not plans:
        assert refused is not None
        raise refused
    return min(plans, key=lambda plan: plan.price)


@dataclass(frozen=True)
class _Form:
    """Widths of the matrices of a sublayer, in their order, with the cost of rounding, and the bytes of each matrix."""

    widths: tuple[int, ...]
    price: float
    sizes: tuple[int, ...]


class _Taken(NamedTuple):
    """What a sublayer takes: widths, a curve with a number of steps, and the bytes that both save."""

    form: _Form
    curve: CostCurve | None
    steps: int
    saved: int


@dataclass(frozen=True)
class _Model:
    """A model whose matrices are to be rounded, those in 4 bits in groups of one size."""

    dense: Checkpoint
    costs: Sequence[MatrixCosts]
    budget: ByteBudget
    group: int | None

    def plan(self, prices: CostCurves) -> Budgeted:
        """The cheapest plan with these curves.

        Raises:
            PlanError: if they do not save enough.
        """
        sublayers = [self._sublayer(*each) for each in self._by_sublayer(prices.curves)]
        first = [choices.ends[0].form for choices in sublayers]
        wanted = self.left(self._widths(first)) - self.budget.left
        most = sum(int(choices.saved[-1]) for choices in sublayers)
        for _ in range(TRIES):
            if wanted > most:
                break
            taken = cheapest_saving(sublayers, max(0, wanted))
            chosen = self._budgeted(prices, taken)
            estimate = estimate_planned(self.dense, chosen.plan, dtype=self.budget.dtype)
            over = estimate.shared_bytes - self.budget.left
            if over <= 0:
                return replace(chosen, saved_bytes=estimate.saved_bytes)
            wanted = sum(each.saved for each in taken) + over  # bytes of choices are nearly exact
        raise PlanError(
            f"{self.budget.left:,} bytes cannot be reached; what was priced leaves at least "
            f"{self.budget.left + wanted - most:,}. Ask for less, or allow more."
        )

    def left(self, widths: Mapping[str, int]) -> int:
        """The bytes of the model with its matrices in these widths, embeddings in 8, and nothing given up."""
        plan = SharePlan(bits=self._bits(widths))
        return estimate_planned(self.dense, plan, dtype=self.budget.dtype).shared_bytes

    def _budgeted(self, prices: CostCurves, taken: Sequence[_Taken]) -> Budgeted:
        chosen = budgeted(prices, [(each.curve, each.steps) for each in taken if each.curve is not None], None)
        rounding = sum(each.form.price for each in taken)
        bits = self._bits(self._widths([each.form for each in taken]))
        plan = chosen.plan.model_copy(update={"bits": bits})
        return replace(chosen, plan=plan, price=chosen.price + rounding, rounding=rounding)

    def _widths(self, forms: Sequence[_Form]) -> dict[str, int]:
        """The width of each matrix, where sublayers take these forms."""
        found: dict[str, int] = {}
        for (matrices, _), form in zip(self._by_sublayer(()), forms, strict=True):
            found |= {matrix.name: bits for matrix, bits in zip(matrices, form.widths, strict=True)}
        return found

    def _bits(self, widths: Mapping[str, int]) -> PlannedBits:
        four = tuple(name for name, bits in widths.items() if bits == 4)
        eight = tuple(name for name, bits in widths.items() if bits == 8)
        return PlannedBits(int8=self._embeddings + eight, int4=four, group=self.group if four else None)

    @cached_property
    def _embeddings(self) -> tuple[str, ...]:
        matrices = roundable(self.dense, {})
        return tuple(name for name, matrix in once(self.dense, matrices).items() if matrix.embedding)

    def _by_sublayer(self, curves: Collection[CostCurve]) -> list[tuple[list[MatrixCosts], list[CostCurve]]]:
        """The matrices of each sublayer with its curves. All sublayers are rounded, and some may give nothing up."""
        found: dict[tuple[int, Sublayer], tuple[list[MatrixCosts], list[CostCurve]]] = {}
        for matrix in self.costs:
            found.setdefault((matrix.layer, matrix.kind), ([], []))[0].append(matrix)
        for curve in curves:
            found[curve.layer, curve.kind][1].append(curve)
        return list(found.values())

    def _sublayer(self, matrices: Sequence[MatrixCosts], curves: Sequence[CostCurve]) -> Choices[_Taken]:
        """All choices of a sublayer, with the bytes that each saves over the widest form."""
        choices: list[tuple[int, float, _Taken]] = []
        forms = list(self._forms(matrices))
        for form in forms:
            base = sum(forms[0].sizes) - sum(form.sizes)
            choices.append((base, form.price, _Taken(form, None, 0, base)))
            for curve in curves:
                shares = {action: self._share(action, matrices, form) for action in curve.actions}
                price = form.price
                saved = float(base)
                for end, step in enumerate(curve.steps, 1):
                    price += step.price
                    saved += step.saved_bytes * shares[step.action]
                    choices.append((int(saved), price, _Taken(form, curve, end, int(saved))))
        return Choices.of(choices)

    def _share(self, action: Action, matrices: Sequence[MatrixCosts], form: _Form) -> float:
        """The bytes that this action saves where matrices have this form, over those that it saves in the dense model.

        Rows or columns of all parts that the action takes go together, so it is the mean over these parts.
        """
        before = after = 0.0
        for matrix, size in zip(matrices, form.sizes, strict=True):
            for part in matrix.parts:
                if _takes(action, part):
                    numbers = matrix.outputs * matrix.inputs / len(matrix.parts)
                    before += numbers * self.dense.tensors[matrix.name].torch_dtype.itemsize
                    after += size / len(matrix.parts)
        return after / before

    def _forms(self, matrices: Sequence[MatrixCosts]) -> Iterator[_Form]:
        """The ways to round a sublayer's matrices that are best at some exchange rate, the widest first."""
        options = [self._options(matrix) for matrix in matrices]
        at = [0] * len(matrices)
        while True:
            now = [each[number] for each, number in zip(options, at, strict=True)]
            yield _Form(
                tuple(bits for bits, _, _ in now), sum(price for _, price, _ in now), tuple(size for *_, size in now)
            )
            # the matrix whose next width costs least for the bytes that it saves
            rates = [
                ((each[number + 1][1] - each[number][1]) / (each[number][2] - each[number + 1][2]), which)
                for which, (each, number) in enumerate(zip(options, at, strict=True))
                if number + 1 < len(each)
            ]
            if not rates:
                return
            at[min(rates)[1]] += 1

    def _options(self, matrix: MatrixCosts) -> list[tuple[int, float, int]]:
        """The widths of a matrix, their costs and bytes, from the widest on; without those that are never best."""
        hull: list[tuple[int, float, int]] = []
        for bits in sorted(self.budget.widths, reverse=True):
            option = (bits, matrix.cost(bits, self.group if bits == 4 else None), self._size(matrix, bits))
            while hull and (option[1] <= hull[-1][1] or (len(hull) > 1 and _is_above(hull[-2], hull[-1], option))):
                hull.pop()
            hull.append(option)
        return hull

    def _size(self, matrix: MatrixCosts, bits: int) -> int:
        """The bytes of a matrix in so many bits."""
        info = self.dense.tensors[matrix.name]
        code = dtype_code(self.budget.dtype)
        if bits > 8:
            return matrix.outputs * matrix.inputs * item_size(info, code)
        scale = DTYPES[scale_type(bits, code or info.dtype)].itemsize
        shape = Roundable(matrix.name, matrix.outputs, matrix.inputs)
        return shape.nbytes(bits, self.group if bits == 4 else None, scale)


def _is_above(first: tuple[int, float, int], middle: tuple[int, float, int], last: tuple[int, float, int]) -> bool:
    """True if the middle one of three options lies above the line between the others: it is best at no rate."""
    rate = (last[1] - first[1]) / (first[2] - last[2])
    return middle[1] - first[1] >= rate * (first[2] - middle[2])


def _takes(action: Action, part: Part) -> bool:
    """True if the action takes rows or columns of this part away."""
    if action.removes:
        return True
    if action.narrows:
        return part in (Part.V, Part.O)
    return part in action.shares or (action.output is Output.LOW_RANK and part is Part.O)


def bytes_left(dense: Checkpoint, dtype: str | None) -> int:
    """The bytes of a dense model whose numbers are stored as this type (None: as they are)."""
    code = dtype_code(dtype)
    if code is None:
        return parameter_bytes(dense)
    return sum(stored_bytes(info, code) for info in parameter_infos(dense).values())
