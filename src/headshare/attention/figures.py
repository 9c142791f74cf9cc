"""Figures of an analysis: Figure 1 of the paper (arXiv 2402.11819), and similarity of maps against that of weights."""

from collections.abc import Iterator, Mapping

from jaxtyping import Float
from torch import Tensor

from headshare.attention.ranks import pairs_of_layers
from headshare.attention.result import AttentionResult
from headshare.pages.heat import Sides, density_panel, heat_panel
from headshare.pages.lines import Axes
from headshare.pages.svg import Figure, Panel

# the head of the last layer that the paper's figure takes, counted from 0
PAPERS_HEAD = 5


def figures_of(result: AttentionResult) -> list[Figure]:
    """The figures of this analysis."""
    head = (result.layers - 1) * result.heads + min(PAPERS_HEAD, result.heads - 1)
    return [
        Figure(
            "maps",
            "Figure 1 of the paper: who attends alike",
            f"Cosines of attention maps. A tick in the first panel is the layer most alike to the last; in the others, "
            f"the {result.heads} heads most alike by maps to head {result.named(head)}, whose own layer is left out. A "
            "ring is one of those that weights put among their first as well.",
            list(_figure_1(result, head)),
        ),
        Figure(
            "scatter",
            "Whether weights tell which heads attend alike",
            "All pairs of heads of different layers; the darker a place, the more pairs.",
            list(_scatter(result)),
        ),
    ]


def _figure_1(result: AttentionResult, head: int) -> Iterator[Panel]:
    last = result.layers - 1
    by_layer = result.by_layer.tolist()
    for layer in range(result.layers):
        by_layer[layer][layer] = None
    before = by_layer[last][:last]
    ticks = {(last, before.index(max(before))): "tick"} if before else {}
    yield heat_panel("Layers, by attention maps", by_layer, Sides("layer", "layer "), ticks)
    nearest = result.nearest(head, result.maps)
    ticks = {divmod(other, result.heads): "tick" for other in nearest}
    yield heat_panel(
        f"Heads beside {result.named(head)}, by attention maps", _beside(result, result.maps, head), _HEADS, ticks
    )
    for name, scores in result.weights.items():
        if name in _SHOWN:
            both = {*nearest} & {*result.nearest(head, scores)}
            marks = {divmod(other, result.heads): "both" if other in both else "tick" for other in nearest}
            yield heat_panel(f"The same by {_SHOWN[name]}", _beside(result, scores, head), _HEADS, marks)


_HEADS = Sides("layer", "head")
# match functions that figures show, with the words for them
_SHOWN: Mapping[str, str] = {"qk": "W_q and W_k (the paper)", "circuit": "W_q^T W_k (circuit)"}


def _beside(result: AttentionResult, scores: Float[Tensor, "heads heads"], head: int) -> list[list[float | None]]:
    """The scores of all heads with one, a row for each layer, but for its own layer."""
    rows: list[list[float | None]] = scores[head].view(result.layers, result.heads).tolist()
    rows[head // result.heads] = [None] * result.heads
    return rows


def _scatter(result: AttentionResult) -> Iterator[Panel]:
    first, second = pairs_of_layers(result.layers, result.heads).T
    if not len(first):
        return
    maps = result.maps[first, second].tolist()
    agreements = {each.match: each.pairs for each in result.agreements()}
    for name, scores in result.weights.items():
        if name in _SHOWN:
            correlation = agreements[name]
            note = "" if correlation is None else f"rank correlation {correlation:+.3f}"
            axes = Axes("similarity of weights", "similarity of attention maps")
            yield density_panel(_SHOWN[name], zip(scores[first, second].tolist(), maps, strict=True), axes, note)
