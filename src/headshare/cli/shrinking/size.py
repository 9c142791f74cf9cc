"""Options of several commands that say how small a model is to be, and what the result must fit."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from headshare.cli.options import SIZE
from headshare.defaults import TARGET_NAMES, WIDTH_NAMES

if TYPE_CHECKING:
    TargetName = str
    WidthsName = str
else:
    TargetName = StrEnum("TargetName", {name: name for name in TARGET_NAMES})
    WidthsName = StrEnum("WidthsName", {name: name for name in WIDTH_NAMES})

MultipleOption = Annotated[
    int,
    typer.Option(
        min=1,
        rich_help_panel=SIZE,
        help="Leave each layer a multiple of this many neurons, as a target may want: 32 or 256 for llama.cpp's "
        "formats, 8 to 128 for GPUs.",
    ),
]
TargetOption = Annotated[
    TargetName | None,
    typer.Option(
        rich_help_panel=SIZE,
        help="Give up only what this format keeps, and neurons in its blocks. gguf: heads, neurons and whole "
        "sublayers, 32 neurons at a time, for `export`.",
    ),
]
PlanBitsOption = Annotated[
    WidthsName,
    typer.Option(
        rich_help_panel=SIZE,
        help="Round matrices too: to 8 bits, to 4, or each to 16, 8 or 4, so that bits and what is given up together "
        "cost least for the size. Embeddings get 8 bits, unless it is 16: nothing is rounded.",
    ),
]
