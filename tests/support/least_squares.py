"""A readout's best columns by plain least squares."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headshare.calibration.costs.least_squares import RIDGE


class Direct:
    """A readout's best columns and scales, all solved for at once by torch.linalg.lstsq: nothing is updated.

    They are fitted to the first tokens. A product of small rank is found when its unit is given up, and then stays.
    """

    def __init__(self, inputs: Tensor, weight: Tensor, fitted: int | None = None) -> None:
        self.all, self.weight, self.target = inputs, weight, inputs @ weight.T
        self.fitted = len(inputs) if fitted is None else fitted
        self.ridge = self.ridge_of(inputs)
        self.kept = torch.ones(inputs.shape[1], dtype=torch.bool)
        self.added: list[tuple[Tensor, float]] = []
        self.scaled: list[tuple[Tensor, Tensor]] = []

    def ridge_of(self, features: Tensor) -> float:
        return RIDGE * float(features[: self.fitted].square().sum(0).mean())

    def give_up(self, columns: Tensor, features: Tensor | None = None, donor: Tensor | None = None) -> None:
        self.kept[columns] = False
        if features is not None and donor is not None:
            self.scaled.append((features, donor))
        elif features is not None:
            self.added.append((features, self.ridge_of(features)))

    def factor(self, columns: Tensor, features: Tensor, rank: int) -> None:
        """Give these columns up for the best product of this rank: least squares of what other columns leave of target
        and features, whose fitted values are projected on their first directions (Izenman, 1975)."""
        self.kept[columns] = False
        design, size = self.design(), features.shape[1]
        padded = torch.cat([features[: self.fitted], torch.zeros(design.shape[1], size, dtype=torch.float64)])
        rows, wanted = (right - design @ solved(design, right) for right in (padded, self.start()))
        rows = torch.cat([rows, self.ridge_of(features) ** 0.5 * torch.eye(size, dtype=torch.float64)])
        wanted = torch.cat([wanted, torch.zeros(size, wanted.shape[1], dtype=torch.float64)])
        full = solved(rows, wanted)
        directions = torch.linalg.svd(rows @ full).Vh[:rank]
        self.target = self.target - features @ full @ directions.T @ directions

    def design(self) -> Tensor:
        """What is left, above the roots of its ridges."""
        left = self.left()[: self.fitted]
        ridges = [self.ridge] * int(self.kept.sum()) + [ridge for f, ridge in self.added for _ in range(f.shape[1])]
        return torch.cat([left, torch.tensor(ridges, dtype=torch.float64).sqrt().diag()])

    def left(self) -> Tensor:
        return torch.cat([self.all[:, self.kept], *(features for features, _ in self.added)], dim=1)

    def start(self) -> Tensor:
        """The target, above what columns are pulled to."""
        width = sum(features.shape[1] for features, _ in self.added)
        pulled = torch.cat([self.weight[:, self.kept].T, torch.zeros(width, len(self.weight), dtype=torch.float64)])
        return torch.cat([self.target[: self.fitted], self.roots()[:, None] * pulled])

    def roots(self) -> Tensor:
        return self.design()[self.fitted :].diagonal()

    def error(self) -> float:
        return self.ridge * float(self.weight[:, ~self.kept].square().sum()) + self.solve()[0]

    def error_held_out(self) -> float:
        """What the readout misses on the tokens that it is not fitted to, as if all were such."""
        _, columns, scales = self.solve()
        found = self.left() @ columns
        if self.scaled:
            found = found + sum_of(self.scaled, scales)
        held = (found - self.target)[self.fitted :]
        return float(held.square().sum()) * len(self.all) / len(held)

    def solve(self) -> tuple[float, Tensor, Tensor]:
        """What is missed, the columns and the scales."""
        design, wanted = self.design(), self.start()
        if not self.scaled:
            columns = solved(design, wanted)
            return float((wanted - design @ columns).square().sum()), columns, columns[:0, 0]
        features = torch.cat([features[: self.fitted] for features, _ in self.scaled], dim=1)
        donors = torch.cat([donor for _, donor in self.scaled], dim=1)
        ridge = RIDGE * float((features.square().sum(0) * donors.square().sum(0)).mean())
        return self._with_scales(design, wanted, features, donors, ridge)

    def _with_scales(
        self, design: Tensor, wanted: Tensor, features: Tensor, donors: Tensor, ridge: float
    ) -> tuple[float, Tensor, Tensor]:
        """Columns and scales are unknowns of one system, with a row for each token and output."""
        hidden, count = len(self.weight), features.shape[1]
        padded = torch.cat([features, torch.zeros(len(design) - len(features), count, dtype=torch.float64)])
        made = torch.einsum("tc,hc->htc", padded, donors).reshape(-1, count)
        whole = torch.cat([torch.block_diag(*[design] * hidden), made], dim=1)
        last = torch.zeros(count, whole.shape[1], dtype=torch.float64)
        last[:, -count:] = ridge**0.5 * torch.eye(count, dtype=torch.float64)
        whole = torch.cat([whole, last])
        right = torch.cat([wanted.T.reshape(-1), torch.zeros(count, dtype=torch.float64)])[:, None]
        found = solved(whole, right)
        missed = float((right - whole @ found).square().sum())
        return missed, found[:-count, 0].reshape(hidden, -1).T, found[-count:, 0]


def solved(system: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.lstsq(system, right, driver="gelsd").solution


def sum_of(scaled: Sequence[tuple[Tensor, Tensor]], scales: Tensor) -> Tensor:
    features, donors = (torch.cat([pair[at] for pair in scaled], dim=1) for at in (0, 1))
    return features * scales @ donors.T
