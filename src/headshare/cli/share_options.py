"""Options that several commands share: how units are chosen, and on which text."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headshare.checkpoint.checkpoint import OUTPUT_DTYPES
from headshare.cli.options import CALIBRATE, CHOOSE, WRITE
from headshare.matching.functions import MATCH_FUNCTIONS
from headshare.matching.pairing import MODES
from headshare.plan.units import Sublayer

OUTPUT = "output"
MATCH_NAMES = tuple(name for name, function in MATCH_FUNCTIONS.items() if function.kind is Sublayer.ATTENTION)

# the choices of options: enumerations to typer, which offers their values; words to a type checker
if TYPE_CHECKING:
    MatchName = str
    ShareMatchName = str
    ModeName = str
    DtypeName = str
else:
    MatchName = StrEnum("MatchName", {name: name for name in MATCH_NAMES})
    ShareMatchName = StrEnum("ShareMatchName", {name: name for name in (*MATCH_NAMES, OUTPUT)})
    ModeName = StrEnum("ModeName", {name: name for name in MODES})
    DtypeName = StrEnum("DtypeName", {name: name for name in OUTPUT_DTYPES})

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, or a model id on the hub.")]
SharedArgument = Annotated[str, typer.Argument(metavar="SHARED", help="A folder that `share` wrote, or a hub id.")]

# ---- which units, and how they are chosen

RatioOption = Annotated[
    float,
    typer.Option(
        rich_help_panel=CHOOSE,
        help="Share this fraction of all units: int(ratio x units) of them give up their weights.",
    ),
]
PartsOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=CHOOSE,
        help="Share these parts: qkv (the paper), qk, qkvo (the authors' release), ffn, gateup, or qkvo+ffn.",
    ),
]
CalibratedPartsOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=CHOOSE,
        help="Share these parts. By weights: qkv (default), qk, qkvo, ffn, gateup, or qkvo+ffn. By output: qk, qkv, "
        "qkvo, gateup, low_rank (qkv, and o in low rank), several joined by +, or auto (qkvo+low_rank), the default "
        "with --save and --allow.",
    ),
]
MatchOption = Annotated[
    MatchName,
    typer.Option(
        rich_help_panel=CHOOSE,
        help="Match units by the cosine of these parts; separate matches q, k and v each by itself.",
    ),
]
ModeOption = Annotated[
    ModeName,
    typer.Option(
        rich_help_panel=CHOOSE,
        help="Choose ties in this way. star: donors only among kept units. root: the paper's pairs, with chains "
        "followed. published: as in the authors' release.",
    ),
]
FfnGroupsOption = Annotated[
    int,
    typer.Option(
        rich_help_panel=CHOOSE,
        help="Split the neurons of each layer into this many equal groups, which are the feed-forward's units; 1 "
        "shares whole layers.",
    ),
]
FfnRatioOption = Annotated[
    float | None,
    typer.Option(rich_help_panel=CHOOSE, help="Share this fraction of the feed-forward's units. Default: --ratio."),
]
ProtectOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=CHOOSE,
        help="Take nothing from these layers, such as 1,2,29. Default: none. (Layer 0 shares nothing; it can lose "
        "units.)",
    ),
]
SaveOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=CHOOSE,
        help="Save this much of the whole model (10%, or bytes), where it costs least. Takes the place of --ratio.",
    ),
]
AllowOption = Annotated[
    str | None,
    typer.Option(
        metavar="remove",
        rich_help_panel=CHOOSE,
        help="remove: also allow deleting heads and neurons where that is cheaper than sharing. Default: share only.",
    ),
]

# ---- calibration

_CALIBRATION = typer.Option(
    metavar="FILE|DATASET|self",
    rich_help_panel=CALIBRATE,
    help="Calibrate on this text: a text file, a .jsonl, .json or .csv, hf:NAME[:CONFIG][:SPLIT], or self (the model "
    "writes it).",
)
CalibrationOption = Annotated[str | None, _CALIBRATION]
NeededCalibrationOption = Annotated[str, _CALIBRATION]
CalibrationFieldOption = Annotated[
    str | None,
    typer.Option(
        "--field", rich_help_panel=CALIBRATE, help="Read the text of a row from this field. Default: the one it can be."
    ),
]
CalibrationTokensOption = Annotated[
    int, typer.Option(rich_help_panel=CALIBRATE, help="Use this many tokens of that text, in whole windows.")
]
CalibrationWindowOption = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=CALIBRATE,
        help="Cut that text into windows of this many tokens. Default: 512, or the most that MODEL reads.",
    ),
]
CalibrationSeedOption = Annotated[
    int,
    typer.Option("--seed", rich_help_panel=CALIBRATE, help="Choose the windows, or write the text, by this seed."),
]
RefitFfnOption = Annotated[
    bool, typer.Option(rich_help_panel=CALIBRATE, help="Also refit the feed-forward's output projection.")
]
ReconstructOption = Annotated[
    int,
    typer.Option(
        metavar="STEPS",
        min=0,
        rich_help_panel=CALIBRATE,
        help="After the refit, take this many gradient steps in each layer. They update the weights of its attention "
        "and feed-forward that it does not share, and pull its output towards the dense layer's. They take several "
        "times as long as the refit.",
    ),
]
MeasureOption = Annotated[
    bool,
    typer.Option(
        rich_help_panel=CALIBRATE,
        help="Also measure the perplexity of both models on held-out windows of the calibration text.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(rich_help_panel=CALIBRATE, help="Calibrate on this device: cpu, cuda, or auto.")
]
ProbeOption = Annotated[
    bool,
    typer.Option(
        rich_help_panel=CALIBRATE,
        help="Rank candidates by the change in the model's predictions (slower, better) instead of each layer's "
        "output error.",
    ),
]

# ---- the output

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")]
DtypeOption = Annotated[
    DtypeName | None,
    typer.Option(rich_help_panel=WRITE, help="Store all weights in this type. Default: as in the model."),
]

# names of parameters, to refuse those that would not be used
CALIBRATING = ("field", "calibration_tokens", "calibration_window", "seed", "device", "restart", "probe", "measure")
CHOOSING = ("ratio", "match", "parts", "mode", "ffn_groups", "ffn_ratio", "protect", "save", "allow")
