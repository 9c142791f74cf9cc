"""Layouts of a model as one value: its attention units, and its feed-forward in any number of groups."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from headshare.architecture.recognition import Shapes, attention_layout, ffn_layout
from headshare.errors import ArchitectureError
from headshare.plan.layout import Layout
from headshare.plan.units import Part, Sublayer


@dataclass(frozen=True)
class ModelLayouts:
    """Layouts of a model, found from its (text) configuration and its tensors' dense shapes.

    Each layout is found when it is first asked for: a model whose attention is not known may still have a feed-forward
    that is. The layouts of a checkpoint are `Checkpoint.layouts`.
    """

    config: Mapping[str, Any]
    shapes: Shapes

    @cached_property
    def attention(self) -> Layout:
        """The layout of the attention units, with all their parts.

        Raises:
            ArchitectureError: if the model's layout is not known.
        """
        return attention_layout(self.config, self.shapes)

    @cached_property
    def ffn(self) -> Layout | None:
        """The layout of the feed-forward as one unit a layer; None where it has none, as a mixture of experts."""
        try:
            return self.ffn_in(1)
        except ArchitectureError:
            return None

    @property
    def neurons(self) -> Layout | None:
        """The layout of the feed-forward's single neurons; None where it has none."""
        return None if self.ffn is None else self.ffn_in(self.ffn.parts[Part.DOWN].rows)

    @property
    def all(self) -> tuple[Layout, ...]:
        """The layouts of the attention units and, where it has one, of the feed-forward.

        Raises:
            ArchitectureError: if the model's layout is not known.
        """
        return (self.attention,) if self.ffn is None else (self.attention, self.ffn)

    def vectors(self, layer: int) -> frozenset[str]:
        """The names of a layer's tensors of one axis: its norms and biases.

        Raises:
            ArchitectureError: if the model's layout is not known.
        """
        prefix = self.attention.parts[Part.O].prefix(layer)
        return frozenset(name for name, shape in self.shapes.items() if name.startswith(prefix) and len(shape) == 1)

    def ffn_in(self, groups: int) -> Layout:
        """The layout of the feed-forward in this many groups of neurons a layer.

        Raises:
            ArchitectureError: if it has no layout, saying why.
            PlanError: if the neurons do not divide into that many groups.
        """
        return ffn_layout(self.config, self.shapes, groups)

    def units(self, kind: Sublayer, groups: int) -> Layout:
        """The layout of one sublayer's units; the feed-forward has this many groups a layer.

        Raises:
            ArchitectureError, PlanError: as the others do.
        """
        return self.attention if kind is Sublayer.ATTENTION else self.ffn_in(groups)
