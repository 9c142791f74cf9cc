"""AA-SVD's objective: each matrix at a rank, its output on compressed inputs close to the dense one on dense inputs.

Sinha and Fleuret, "AA-SVD: anchored and adaptive SVD for large language model compression", 2026, without the
refinement of blocks that follows there.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from headshare.calibration.layerwise.observed import Batch
from headshare.experiments.peers.matrices import Matrix, Remade
from headshare.experiments.peers.peer import Bench, Peer, Stage
from headshare.experiments.peers.svd import ranks_of, root_of, truncated
from headshare.plan.units import Part
from headshare.precision import full_float32


def aa_svd(bench: Bench, asked: int, *, pivoted: bool = False) -> Peer:
    """AA-SVD's closed form, all matrices at one ratio."""
    ranks, saved = ranks_of(bench, asked, 1, pivoted=pivoted)

    def make(stage: Stage) -> Remade:
        assert stage.look is not None
        matrices = bench.matrices
        readout = matrices.readout(stage.kind)
        # matrices that read the hidden states first: what the readout reads depends on them
        weights = _anchored(stage, matrices.inner(stage.kind), ranks)
        stage.look.put(stage.kind, Remade(weights))
        weights |= _anchored(stage, (readout,), ranks)
        return Remade(weights, rank=ranks[readout])

    stored = "stored pivoted" if pivoted else "r(m + n) numbers for rank r"
    return Peer(make, saved, f"{stored}, without refinement of blocks", follows=True)


def _anchored(stage: Stage, parts: Sequence[Part], ranks: dict[Part, int]) -> dict[Part, Matrix]:
    """Matrices of parts that read the same inputs."""
    assert stage.look is not None
    gram, cross = products(stage.look.inputs(parts[0]))
    root = root_of(gram)
    return {part: anchored(stage.bench.matrices.read(part, stage.layer), root, cross, ranks[part]) for part in parts}


def products(
    batches: Iterator[tuple[Batch, Batch]],
) -> tuple[Float[Tensor, "inputs inputs"], Float[Tensor, "inputs inputs"]]:
    """Sums over tokens of x' x'^T and of x x'^T, for dense inputs x and compressed ones x'."""
    gram: Tensor | None = None
    cross: Tensor | None = None
    for dense, own in batches:
        x, compressed = dense.flatten(0, -2), own.flatten(0, -2)
        finite = (x + compressed).isfinite().all(dim=1)
        x, compressed = x[finite], compressed[finite]
        with full_float32():
            both = compressed.T @ compressed, x.T @ compressed
        gram = both[0].double() if gram is None else gram + both[0]
        cross = both[1].double() if cross is None else cross + both[1]
    assert gram is not None
    assert cross is not None
    return gram.cpu(), cross.cpu()


def anchored(
    weight: Matrix, root: Float[Tensor, "inputs inputs"], cross: Float[Tensor, "inputs inputs"], rank: int
) -> Matrix:
    """The matrix W' of this rank that minimises |W X - W' X'|: W X X'^T (X' X'^T)^-1, truncated in the metric of X'."""
    whole = torch.cholesky_solve((weight.double() @ cross).T, root).T
    return truncated(whole, root, rank)
