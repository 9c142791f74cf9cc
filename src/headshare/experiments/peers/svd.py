"""Products of low rank: SVD-LLM, matrix by matrix, and Basis Sharing, whose pairs of layers have one basis."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from headshare.experiments.peers.matrices import Matrix, Remade
from headshare.experiments.peers.peer import Bench, Peer, Stage
from headshare.experiments.peers.sizes import numbers_of, rank_within
from headshare.plan.units import Part, Sublayer

GROUP = 2  # layers that share a basis
DAMPING = 1e-6
TRIES = 6


# ---- the best matrix of a rank


def root_of(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The lower Cholesky factor, in float64, of a Gram matrix with a little of its mean diagonal added."""
    whole = gram.double().clone()
    added = DAMPING * float(whole.diagonal().mean())
    root: Tensor
    for _ in range(TRIES):  # sums in float32 can be a little below zero in some direction
        whole.diagonal().add_(added or DAMPING)
        root, failed = torch.linalg.cholesky_ex(whole)
        if not bool(failed):
            return root
        added *= 10
    root = torch.linalg.cholesky(whole)
    return root


def truncated(
    weight: Float[Tensor, "outputs inputs"], root: Float[Tensor, "inputs inputs"], rank: int
) -> Float[Tensor, "outputs inputs"]:
    """The matrix W' of this rank that minimises |(W - W') L|, where L L^T is the Gram matrix of its inputs.

    This is SVD-LLM's truncation of the whitened matrix W L (Wang et al., "SVD-LLM: truncation-aware singular value
    decomposition for large language model compression", 2024). In float64; the result is float32.
    """
    if rank >= min(weight.shape):
        return weight.float()
    weight = weight.double()
    white = weight @ root
    if weight.shape[0] <= weight.shape[1]:
        # the left singular vectors are those of a small matrix, and W' = U U^T W
        vectors = torch.linalg.eigh(white @ white.T).eigenvectors[:, -rank:]
        product: Tensor = vectors @ (vectors.T @ weight)
        return product.float()
    vectors = torch.linalg.eigh(white.T @ white).eigenvectors[:, -rank:]
    kept = (white @ vectors) @ vectors.T
    product = torch.linalg.solve_triangular(root, kept, upper=False, left=False)
    return product.float()


# ---- methods


def svd_llm(bench: Bench, asked: int, *, pivoted: bool = False) -> Peer:
    """SVD-LLM (Wang et al., 2024): every matrix truncated in the metric of its dense inputs, all at one ratio."""
    ranks, saved = ranks_of(bench, asked, 1, pivoted=pivoted)

    def make(stage: Stage) -> Remade:
        roots: dict[int, Tensor] = {}
        grams = stage.statistics.grams
        weights = {}
        for part in bench.matrices.parts(stage.kind):
            gram = grams[part]
            if id(gram) not in roots:
                roots[id(gram)] = root_of(gram)
            weights[part] = truncated(bench.matrices.read(part, stage.layer), roots[id(gram)], ranks[part])
        return Remade(weights, rank=ranks[bench.matrices.readout(stage.kind)])

    stored = "stored pivoted, r(m + n - r) numbers for rank r" if pivoted else "r(m + n) numbers for rank r"
    return Peer(make, saved, stored)


def basis_sharing(bench: Bench, asked: int) -> Peer:
    """Basis Sharing (Wang et al., "Basis sharing: cross-layer parameter sharing for large language model compression",
    2024): in pairs of layers, each of q, k, v, gate and up has one basis of inputs; W_o and W_down stand alone."""
    pairs = _Pairs(bench, ranks_of(bench, asked, GROUP)[0])
    saved = ranks_of(bench, asked, GROUP)[1]
    return Peer(pairs.make, saved, "pairs of layers share a basis of inputs")


def ranks_of(bench: Bench, asked: int, group: int, *, pivoted: bool = False) -> tuple[dict[Part, int], int]:
    """The rank of each part at one ratio everywhere, and the bytes that saves; inner parts of `group` layers together.

    A last layer that has no partner has the same ranks, which take less of it.
    """
    share = bench.sizes.share_left(asked)
    count = bench.matrices.layers.count
    ranks: dict[Part, int] = {}
    saved = 0
    for kind in Sublayer:
        readout = bench.matrices.readout(kind)
        for part in bench.matrices.parts(kind):
            outputs, inputs = len(bench.matrices.outputs(part)), bench.matrices.inputs(part)
            together = 1 if part is readout else group
            numbers = outputs * together * inputs
            ranks[part] = rank_within(int(share * numbers), outputs * together, inputs, pivoted=pivoted)
            whole, left = divmod(count, together)
            stored = whole * numbers_of(ranks[part], outputs * together, inputs, pivoted=pivoted)
            stored += left * numbers_of(min(ranks[part], outputs), outputs, inputs, pivoted=pivoted)
            saved += (count * outputs * inputs - stored) * bench.sizes.item(part)
    return ranks, bench.sizes.check(saved, asked, "this method")


@dataclass
class _Pairs:
    """Pairs of layers: the second layer's matrices are made with the first's, and kept until they are asked for."""

    bench: Bench
    ranks: dict[Part, int]
    waiting: dict[tuple[int, Part], Matrix] = field(default_factory=dict)

    def make(self, stage: Stage) -> Remade:
        """A sublayer with its products multiplied out."""
        matrices = self.bench.matrices
        readout = matrices.readout(stage.kind)
        if stage.layer % GROUP == 0:
            self._make_pair(stage)
        weights = {part: self.waiting.pop((stage.layer, part)) for part in matrices.inner(stage.kind)}
        root = root_of(stage.statistics.grams[readout])
        weights[readout] = truncated(matrices.read(readout, stage.layer), root, self.ranks[readout])
        return Remade(weights, rank=self.ranks[readout])

    def _make_pair(self, stage: Stage) -> None:
        matrices = self.bench.matrices
        inner = matrices.inner(stage.kind)
        layers = range(stage.layer, min(stage.layer + GROUP, matrices.layers.count))
        # the metric is that of the inputs of all its layers
        grams = [self.bench.statistics.of(layer).grams[inner[0]] for layer in layers]
        root = root_of(torch.stack(grams).sum(dim=0))
        for part in inner:
            stacked = torch.cat([matrices.read(part, layer) for layer in layers])
            products = truncated(stacked, root, self.ranks[part]).chunk(len(layers))
            self.waiting |= {(layer, part): product for layer, product in zip(layers, products, strict=True)}
