"""Sections of a plan: the interface that ties, removals, low-rank units and kinds registered elsewhere implement.

A section says which indices of which tensors it changes, which tensors it adds, which modules of a loaded model it
replaces, and whether a stock model computes the same. Sharing, expansion, loading and verification ask these questions
of all sections alike. A section of a new kind is a subclass of `Section`, registered by `section_kind`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from headshare.defaults import MAX_NAME
from headshare.errors import PlanError
from headshare.plan.layout import Layout
from headshare.plan.units import HeadUnit
from headshare.short import short

# signs of a picture that several kinds of section use
KEPT = "■"
LENDS = "◆"


class Borrowed(NamedTuple):
    """Dense indices [start, stop) that are borrowed: as many, from `donor_start` on, of the tensor `donor`."""

    start: int
    stop: int
    donor: str
    donor_start: int


class Scaled(NamedTuple):
    """Borrowed indices [start, stop) of an output projection that carry one scale each."""

    start: int
    stop: int


class Removed(NamedTuple):
    """Dense indices [start, stop) that are removed."""

    start: int
    stop: int


@runtime_checkable
class Made(Protocol):
    """Dense indices [start, stop) that are made from tensors which the section adds.

    `maker` is a key of `headshare.sharing.makers.MAKERS`. That maker computes the indices from the added tensors and,
    on sharing, the added tensors from the indices.
    """

    @property
    def start(self) -> int:
        """The first index."""

    @property
    def stop(self) -> int:
        """The index one past the last."""

    @property
    def maker(self) -> str:
        """The name of the maker of these numbers."""

    def moved_to(self, start: int) -> "Made":
        """The range of the same kind and length that begins at this index."""


Range = Borrowed | Scaled | Removed | Made


class Touched(NamedTuple):
    """The range of a tensor that a section changes, or a tensor that only lends, without a range.

    `shape` is the dense shape, and `axis` the axis that indices count along. With `outputs`, the indices are the
    module's outputs, so that a bias beside the weight has them too.
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    range: Range | None = None
    outputs: bool = False


class AddedTensor(NamedTuple):
    """A tensor that a section adds and the dense model does not have.

    It belongs to the tensor `weight` and is stored in that weight's type. `fill` is the number that fills it where
    nothing was fitted; None where a maker computes it. With `same_type`, a checkpoint in which its type is another than
    the weight's is refused.
    """

    weight: str
    shape: tuple[int, ...]
    fill: float | None = None
    same_type: bool = True


class ModuleChange(NamedTuple):
    """A module to replace when a model loads: the one that holds `tensor`, or one that is `above` steps over it.

    `kind` names the function that builds the new module: a key of `headshare.storage.changes.MODULE_CHANGES`.
    """

    tensor: str
    kind: str
    above: int = 0


class Choice(BaseModel):
    """The way in which units were chosen. It is for people and for reproduction; no code reads it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: Annotated[str, Field(max_length=MAX_NAME)] = "given"
    mode: Annotated[str, Field(max_length=MAX_NAME)] = "given"
    ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    scores_digest: Annotated[str, Field(max_length=MAX_NAME)] | None = None


class Section(BaseModel, ABC):
    """A section of a plan: units of one grid, and what is done to them. A wrong section cannot be constructed.

    Subclasses have the fields `layout` (the grid of units) and `chosen` (how they were chosen).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # the key of a plan's JSON under which sections of this kind are listed
    key: ClassVar[str]
    # whether all layers must store the section's parts in one type of number
    one_type: ClassVar[bool] = True
    # the sign of such a unit in a picture, and what the legend says of it
    sign: ClassVar[str] = "?"
    legend: ClassVar[str] = ""
    # whether nothing is left of a unit that this section lists
    takes_whole: ClassVar[bool] = False

    def __repr__(self) -> str:
        return short(self, self.told())

    __str__ = __repr__

    if TYPE_CHECKING:  # subclasses declare them where their JSON has them
        layout: Layout
        chosen: Choice

    @abstractmethod
    def touched(self) -> Iterator[Touched]:
        """The ranges of tensors that this section changes, and the tensors that lend to it."""

    def added(self) -> Iterator[tuple[str, AddedTensor]]:
        """The tensors that this section adds, by name."""
        return iter(())

    def copies(self) -> Iterator[tuple[str, str]]:
        """Tensors that are other tensors whole, each with that one: a loaded model has one parameter for both."""
        return iter(())

    def rewritten(self) -> Iterator[str]:
        """The weights whose kept numbers are not the dense model's; biases beside them may be rewritten too."""
        return iter(())

    def modules(self) -> Iterator[ModuleChange]:
        """The modules that a loaded model replaces; none where a storage of weights replaces them."""
        return iter(())

    @property
    def no_stock_equivalent(self) -> str | None:
        """The reason, in words, why no stock model computes the same; None where one does, and `expand` writes it."""
        return None

    @property
    def rounding(self) -> str | None:
        """The reason why a shared model's logits may differ from a stock model's in their last bits, or None."""
        return None

    @property
    def approximate(self) -> str | None:
        """The numbers that only approximate the dense model's and so are not compared with it, in words, or None."""
        return None

    def conflict(self, other: "Section") -> str | None:
        """The reason why this section and another cannot be in one plan, or None. It is asked of both."""
        del other
        return None

    def bars(self, unit: HeadUnit, layout: Layout) -> bool:
        """True if a unit of this other grid can neither lend nor borrow the parts of that grid."""
        del unit, layout
        return False

    @abstractmethod
    def units_given(self) -> Collection[HeadUnit]:
        """The units of this section's own grid that no longer have all of their own weights."""

    def first_layer(self) -> int | None:
        """The first layer that computes something else than the dense model's; None where none does."""
        return min((unit.layer for unit in self.units_given()), default=None)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Counts and units as plain data, as `inspect --json` prints them."""

    @abstractmethod
    def picture(self, others: Collection["Section"]) -> str:
        """A title, and a line for each layer with a sign for each unit. `others` are all sections of the plan."""

    def told(self) -> str:
        """What this section does, to how many units, without how it was chosen."""
        what, asked, _ = self.picture((self,)).splitlines()[0].partition("; asked")
        return f"{what})" if asked else what

    def title(self, what: str, count: int, done: str) -> str:
        """The first line of a picture, such as "attention, parts q,k: 3 of 12 units given up (25 %; ...)"."""
        share = count / self.layout.units
        return (
            f"{what}: {count} of {self.layout.units} {done} ({share:.1%}; asked {self.chosen.ratio:.1%}), "
            f"match {self.chosen.match}, mode {self.chosen.mode}"
        )


Kind_ = TypeVar("Kind_", bound=type[Section])

# every kind of section, by the key of a plan's JSON
SECTION_KINDS: dict[str, type[Section]] = {}


def section_kind(kind: Kind_) -> Kind_:
    """Register a kind of section, so that plans can hold it and read it from JSON.

    Raises:
        PlanError: if its key is taken.
    """
    if kind.key in SECTION_KINDS:
        raise PlanError(f"there are sections under the key {kind.key!r} already.")
    SECTION_KINDS[kind.key] = kind
    return kind
