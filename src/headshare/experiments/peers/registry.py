"""The peers as methods of a comparison: each edits a stock model, with and without our refit."""

from collections.abc import Callable
from functools import partial
from typing import Any

from headshare.calibration.layerwise.numbers import solved
from headshare.experiments.case import Case, Edit, method
from headshare.experiments.peers.aa_svd import aa_svd
from headshare.experiments.peers.depth import replaceme, shortgpt
from headshare.experiments.peers.flap import flap
from headshare.experiments.peers.matrices import Remade
from headshare.experiments.peers.modegpt import modegpt
from headshare.experiments.peers.peer import Bench, Peer
from headshare.experiments.peers.slicegpt import slicegpt
from headshare.experiments.peers.slicing import layer_of, slice_layer
from headshare.experiments.peers.svd import basis_sharing, svd_llm
from headshare.experiments.peers.walk import made_by
from headshare.plan.units import Sublayer

COUNTED = "multiplied out in a stock model; what is saved is counted"

PEERS: dict[str, tuple[str, Callable[[Bench, int], Peer]]] = {
    "flap": ("FLAP: units and neurons that fluctuate least removed, their means added by biases", flap),
    "svd-llm": ("SVD-LLM: every matrix a product of small rank, the best for its dense inputs", svd_llm),
    "svd-llm-pivoted": ("the same, stored in fewer numbers (PIFA), so of larger rank", partial(svd_llm, pivoted=True)),
    "modegpt": ("MoDeGPT: fewer neurons, channels of q and k, and dimensions of v, by layers' influence", modegpt),
    "basis-sharing": ("Basis Sharing: products of small rank, pairs of layers share their bases", basis_sharing),
    "slicegpt": ("SliceGPT: hidden states cut to principal directions", slicegpt),
    "shortgpt": ("ShortGPT: whole layers of least block influence removed", shortgpt),
    "replaceme": ("ReplaceMe: a run of layers replaced by a linear map", replaceme),
    "aa-svd": ("AA-SVD's objective: products of small rank, for inputs of the compressed model", aa_svd),
    "aa-svd-pivoted": ("the same, stored in fewer numbers (PIFA)", partial(aa_svd, pivoted=True)),
}


def edited(bench: Bench, peer: Peer, model: Any, *, refit: bool) -> int:
    """Make a stock model what the peer makes of it. Returns the bytes that it would save."""
    made: dict[Sublayer, Remade] = {}
    with solved():
        for layer, kind, remade in made_by(bench, peer, refit=refit):
            bench.matrices.put_into_model(model, layer, kind, remade)
            made[kind] = remade
            if kind is Sublayer.FFN:
                slice_layer(model, bench.matrices, layer, made)
    if peer.around is not None:
        peer.around(model, layer_of(model, bench.matrices, 0))
    return peer.saved_bytes


def _edit(case: Case, make: Callable[[Bench, int], Peer]) -> Edit:
    bench = case.common.bench
    with solved():
        peer = make(bench, case.saved_bytes)
    plain, refitted = (partial(edited, bench, peer, refit=refit) for refit in (False, True))
    return Edit(plain, f"{peer.note}; {COUNTED}", refitted)


for _name, (_summary, _make) in PEERS.items():
    method(_name, _summary, reads=True)(partial(_edit, make=_make))
