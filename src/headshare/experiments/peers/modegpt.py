"""MoDeGPT: neurons by Nystroem, pairs of channels of q and k by their products, values and W_o by one decomposition.

Lin et al., "MoDeGPT: modular decomposition for large language model compression", 2024. No code of its authors is
public; where the paper leaves a choice (the temperature of its allocation, ridges, grouped queries), it is named here.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headshare.errors import ArchitectureError
from headshare.experiments.peers.matrices import Matrix, Remade
from headshare.experiments.peers.peer import Bench, Peer, Stage
from headshare.experiments.peers.svd import DAMPING, root_of
from headshare.plan.tensors import bias_name
from headshare.plan.units import Part, Sublayer

TEMPERATURE = 0.15  # of the allocation over layers
MOST = 0.8  # the largest part of a layer that is taken
RIDGE = 1e-2  # of leverage scores, in mean diagonals of the Gram matrix


def modegpt(bench: Bench, asked: int) -> Peer:
    """MoDeGPT at this number of bytes.

    Raises:
        ArchitectureError: if attention has norms between q or k and their product, or turns only some channels by
            position.
    """
    _check(bench)
    brought = bench.layers.count * _brought(bench) if asked else 0
    shares = allocated(bench.statistics.influences(), 1 - bench.sizes.share_left(asked + brought))
    saved = sum(_saved(bench, share) for share in shares)

    def make(stage: Stage) -> Remade:
        share = shares[stage.layer]
        return _attention(bench, stage, share) if stage.kind is Sublayer.ATTENTION else _neurons(bench, stage, share)

    words = f"layers keep {min(shares):.0%} to {max(shares):.0%}"
    return Peer(make, bench.sizes.check(saved, asked, "MoDeGPT"), words)


def allocated(influences: list[float], target: float) -> list[float]:
    """The share that each layer keeps: the part taken is layers x target x softmax(-influence / temperature).

    Parts above `MOST` are cut to it, and what they exceed it by is spread over the others (section 3.3).
    """
    taken = torch.softmax(-torch.tensor(influences, dtype=torch.float64) / TEMPERATURE, 0) * len(influences) * target
    while bool((taken > MOST + 1e-9).any()):
        over = taken > MOST
        spare = taken < MOST - 1e-9
        if not bool(spare.any()):
            break
        excess = float((taken[over] - MOST).sum())
        taken[over] = MOST
        taken[spare] += excess * taken[spare] / taken[spare].sum()
    return (1 - taken).tolist()


def _check(bench: Bench) -> None:
    o_path = bench.layers.path(Part.O)
    attention = bench.layers.shell.modules[0].get_submodule(o_path.rpartition(".")[0])
    if any("norm" in type(module).__name__.casefold() for module in attention.children()):
        raise ArchitectureError("MoDeGPT's choice of channels of q and k does not fit attention that norms q and k.")
    rope = bench.dense.config.get("rope_parameters") or bench.dense.config.get("rope_scaling") or {}
    partial = bench.dense.config.get("partial_rotary_factor", bench.dense.config.get("rotary_pct", 1.0))
    nested = rope.get("partial_rotary_factor", partial) if isinstance(rope, dict) else partial
    if nested != 1.0:
        raise ArchitectureError("MoDeGPT's pairs of channels do not fit attention that turns some channels alone.")


def _head_size(bench: Bench) -> int:
    return bench.matrices.layouts[Sublayer.ATTENTION].parts[Part.V].rows


def _widths(bench: Bench, share: float) -> tuple[int, int, int]:
    """What a layer keeps: neurons, channels of each head of q and k (two by two), channels of each head of v."""
    neurons = bench.matrices.inputs(bench.matrices.readout(Sublayer.FFN))
    size = _head_size(bench)
    return max(1, int(neurons * share)), max(1, int(size * share) // 2) * 2, max(1, int(size * share))


def _saved(bench: Bench, share: float) -> int:
    """Bytes that a layer saves which keeps this share. Biases of what it loses are not counted.

    A bias of v goes into W_o's, as attention adds up to one: where W_o has none, it gains one.
    """
    neurons, channels, values = _widths(bench, share)
    size = _head_size(bench)
    left = {Part.Q: channels / size, Part.K: channels / size, Part.V: values / size, Part.O: values / size}
    whole = bench.matrices.inputs(Part.DOWN)
    saved = 0.0
    for kind in Sublayer:
        for part in bench.matrices.parts(kind):
            saved += bench.sizes.numbers(part) * bench.sizes.item(part) * (1 - left.get(part, neurons / whole))
    return int(saved) - (_brought(bench) if values < size else 0)


def _brought(bench: Bench) -> int:
    """Bytes of the bias that W_o gains where v has one and W_o has none."""
    of_v, of_o = (bias_name(bench.layers.tensor(part, 0)) in bench.dense.tensors for part in (Part.V, Part.O))
    return len(bench.matrices.outputs(Part.O)) * bench.sizes.item(Part.O) if of_v and not of_o else 0


# ---- feed-forward: Nystroem


def _neurons(bench: Bench, stage: Stage, share: float) -> Remade:
    count = _widths(bench, share)[0]
    gram = stage.statistics.grams[Part.DOWN].double()
    kept = most_leverage(gram, count)
    weight = nystroem(gram, bench.matrices.read(Part.DOWN, stage.layer), kept)
    mask = torch.zeros(len(gram), dtype=torch.bool)
    mask[kept] = True
    return Remade({Part.DOWN: weight}, kept=mask)


def most_leverage(gram: Float[Tensor, "n n"], count: int) -> Int[Tensor, " kept"]:
    """The inputs of the largest ridge leverage scores, the diagonal of C (C + ridge)^-1 (algorithm 1)."""
    ridge = RIDGE * float(gram.diagonal().mean())
    definite = gram.double().clone()
    definite.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(definite))
    return (1 - ridge * inverse.diagonal()).topk(count).indices.sort().values


def nystroem(gram: Float[Tensor, "n n"], weight: Matrix, kept: Int[Tensor, " kept"]) -> Matrix:
    """The readout whose kept inputs stand for all: W C S (S^T C S)^-1, other columns zero (algorithm 1)."""
    inner = gram[kept[:, None], kept].double()
    inner.diagonal().add_(DAMPING * float(gram.diagonal().mean()))
    right = gram[kept].double() @ weight.double().T
    whole = torch.zeros_like(weight)
    whole[:, kept] = torch.cholesky_solve(right, torch.linalg.cholesky(inner)).T.float()
    return whole


# ---- attention


def _attention(bench: Bench, stage: Stage, share: float) -> Remade:
    _, channels, values = _widths(bench, share)
    fewer = _fewer_channels(bench, stage, channels // 2)
    return Remade({**fewer.weights, Part.V: _fewer_values(bench, stage, values)}, fewer.biases)


def _fewer_channels(bench: Bench, stage: Stage, pairs: int) -> Remade:
    """q and k without the pairs of channels (i, i + half a head) whose products are smallest (algorithm 2).

    A pair of a unit has the mean size of k there, times that of q over all query heads of the unit.
    """
    units, half = bench.matrices.layouts[Sublayer.ATTENTION].groups, _head_size(bench) // 2
    gram = stage.statistics.grams[Part.Q]
    shaped, energies, biases = {}, {}, {}
    for part in (Part.Q, Part.K):
        weight = bench.matrices.read(part, stage.layer)
        square = ((weight @ gram) * weight).sum(dim=1)
        bias = bench.matrices.bias(part, stage.layer)
        if bias is not None:
            square = square + bias * (2 * weight @ stage.statistics.means[Part.Q] + bias)
            biases[part] = bias.reshape(units, -1, 2, half).clone()
        shaped[part] = weight.reshape(units, -1, 2, half, weight.shape[1]).clone()
        energies[part] = square.reshape(units, -1, 2, half).sum(dim=(1, 2))
    dropped = (energies[Part.Q] * energies[Part.K]).topk(half - pairs, largest=False).indices
    for unit, gone in enumerate(dropped):
        for numbers in (*shaped.values(), *biases.values()):
            numbers[unit][:, :, gone] = 0
    weights = {part: weight.reshape(-1, weight.shape[-1]) for part, weight in shaped.items()}
    return Remade(weights, {part: bias.flatten() for part, bias in biases.items()})


def _fewer_values(bench: Bench, stage: Stage, rank: int) -> Matrix:
    """v with each head projected to this many directions, those that matter most to what W_o makes of them.

    With A = L^T W_v^T in the metric L L^T of the inputs and O the unit's columns of W_o, A O^T is cut to its largest
    singular values (algorithm 3; query heads of one unit stand beside each other in O).
    """
    units, size = bench.matrices.layouts[Sublayer.ATTENTION].groups, _head_size(bench)
    root = root_of(stage.statistics.grams[Part.V])
    values = bench.matrices.read(Part.V, stage.layer).double().reshape(units, size, -1)
    outputs = bench.matrices.read(Part.O, stage.layer).double()
    columns = bench.matrices.unit_columns(Sublayer.ATTENTION)
    made = []
    for unit in range(units):
        own = outputs[:, columns[unit]].reshape(len(outputs), -1, size)  # hidden x query heads x size
        made.append(projected_values(values[unit], own, root, rank))
    return torch.cat(made).float()


def projected_values(
    values: Float[Tensor, "size hidden"],
    outputs: Float[Tensor, "hidden heads size"],
    root: Float[Tensor, "hidden hidden"],
    rank: int,
) -> Float[Tensor, "size hidden"]:
    """The values of one unit, projected so that their products with W_o are the best of this rank. In float64."""
    if rank >= len(values):
        return values
    factor = torch.linalg.qr((values @ root).T).R  # A = Q R: the small factor has the singular values
    joint = factor @ outputs.flatten(0, 1).T
    left = torch.linalg.svd(joint, full_matrices=False).U[:, :rank]
    # A P with P = R^-1 U U^T R; the rows of W_v are A's columns
    projection: Tensor = torch.linalg.lstsq(factor, left @ (left.T @ factor)).solution
    return projection.T @ values
