"""Targets: formats that keep only some of what a plan can do, and what a budget may do for them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import gcd

from headshare.calibration.costs.actions import REMOVE, SUBLAYERS
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.defaults import GGUF
from headshare.errors import OptionError
from headshare.integrations.gguf.number_types import BLOCK
from headshare.integrations.gguf.shape import check_family


@dataclass(frozen=True)
class Target:
    """A format that a model is to be written in afterwards.

    Attributes:
        kept: names of the actions whose saving it keeps; none of them shares.
        block: neurons that it stores together.
        check: raises ArchitectureError for a model that cannot be written in it.
    """

    kept: tuple[str, ...]
    block: int
    check: Callable[[Checkpoint], object]

    def multiple(self, dense: Checkpoint) -> int:
        """The neurons that layers of this model lose together: a block, or as much of it as divides them."""
        neurons = dense.layouts.neurons
        return self.block if neurons is None else gcd(neurons.groups, self.block)


TARGETS: Mapping[str, Target] = {GGUF: Target((REMOVE.name, SUBLAYERS.name), BLOCK, check_family)}


def target_of(name: str, dense: Checkpoint, *, allow: Collection[str] | None, shares: bool) -> Target:
    """The target of this name, for a budget that may use these actions (None: all that are kept), or shares besides.

    Raises:
        OptionError: if there is no such target, or the budget is to use what is not kept there.
        ArchitectureError: if this model cannot be written in the format.
    """
    if name not in TARGETS:
        raise OptionError(f"there is no target '{name}'. There are: {', '.join(TARGETS)}.")
    target = TARGETS[name]
    kept = ", ".join(target.kept)
    lost = [word for word in allow or () if word not in target.kept]
    if shares or lost:
        what = "what is shared" if shares else f"'{lost[0]}'"
        raise OptionError(f"{what} saves nothing in {name}, which keeps {kept}. Leave it out, or leave out --target.")
    target.check(dense)
    return target
