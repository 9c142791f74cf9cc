"""Requests to shrink a model: how small, and what else its owner wants of the result."""

from collections.abc import Collection
from dataclasses import dataclass
from math import ceil

from headshare.calibration.amounts import Amount, in_units
from headshare.calibration.bits.joint import bytes_left
from headshare.calibration.budget import Budget
from headshare.calibration.refit.refinement import Refinement
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import OptionError
from headshare.sharing.size import dtype_code, parameter_bytes
from headshare.text.documents import MIX, SELF


@dataclass(frozen=True)
class ShrinkRequest:
    """How small a model is to be, and how it is to be made so.

    `save` is the amount that it is to lose, `to` the amount that is to be left, each of the bytes of its weights in the
    type in which they are written; exactly one of them is given. `refine` names the gradient steps that follow the
    refit. Layers in `protect` give nothing up. A layer keeps a multiple of `multiple` neurons. `dtype` is the type of
    the weights that are written; None leaves it. `target` is a format that the model is to be written in afterwards.
    `bits` is a key of `WIDTHS`: below 16, matrices are rounded too.
    """

    save: str | None = None
    to: str | None = None
    refine: str | int | Refinement | None = None
    protect: Collection[int] = ()
    multiple: int = 1
    dtype: str | None = None
    target: str | None = None
    bits: str = "16"

    def __post_init__(self) -> None:
        if (self.save is None) == (self.to is None):
            raise OptionError(
                f"{'neither' if self.save is None else 'both'} of --save and --to is given. Give one: --save 20% for "
                "what the model is to lose, or --to 4GB for what is to be left."
            )
        Amount.parse(self.save or self.to or "", "to save" if self.to is None else "to shrink to")
        Refinement.of(self.refine)
        dtype_code(self.dtype)

    def budget(self, dense: Checkpoint) -> Budget:
        """The budget that meets the request, with everything allowed that `share --save` allows.

        Raises:
            OptionError: if the model is as small as that already.
            PlanError: if it cannot be made so small.
        """
        before = parameter_bytes(dense)
        whole = bytes_left(dense, self.dtype)
        if self.to is not None:
            left = Amount.parse(self.to, "to shrink to").of(whole)
            if left >= whole:
                stored = f"{in_units(whole)}{f' in {self.dtype}' if self.dtype else ''}"
                raise OptionError(
                    f"--to {self.to} leaves nothing to do: the model's weights have {stored} ({whole:,} bytes). "
                    "Ask for less."
                )
            saved = whole - left
        else:
            saved = Amount.parse(self.save or "", "to save").of(whole)
        if self.bits != "16":
            return Budget.parse(
                dense,
                save=str(ceil(saved)),
                bits=self.bits,
                dtype=self.dtype,
                protect=self.protect,
                multiple=self.multiple,
                target=self.target,
            )
        # plans count bytes as the model stores them, whatever the type that is written
        asked = max(1, ceil(saved * before / whole)) if saved else 0
        return Budget.parse(dense, save=str(asked), protect=self.protect, multiple=self.multiple, target=self.target)


def calibration_text(given: str | None, dense: Checkpoint) -> str:
    """The text that a model is calibrated on: the one that was given.

    Where none was, it is text that the model writes, or, if it writes none, the mix of texts that comes with headshare.
    What it writes itself repairs it better, on texts of every kind that was measured (docs/calibration.md).
    """
    if given is not None:
        return given
    return SELF if dense.predicts_next else MIX
