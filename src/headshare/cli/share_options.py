"""Options that several commands share: how units are chosen, and on which text."""

from enum import StrEnum
from typing import Annotated

import typer


class MatchName(StrEnum):
    """The match functions for attention, as the command line offers them."""

    QK = "qk"
    Q = "q"
    K = "k"
    V = "v"
    QKV = "qkv"
    SEPARATE = "separate"


class ShareMatchName(StrEnum):
    """The same, and `output`: what each unit does to its layer's output on calibration text."""

    QK = "qk"
    Q = "q"
    K = "k"
    V = "v"
    QKV = "qkv"
    SEPARATE = "separate"
    OUTPUT = "output"


class ModeName(StrEnum):
    """The ways to choose ties."""

    STAR = "star"
    ROOT = "root"
    PUBLISHED = "published"


class DtypeName(StrEnum):
    """The types weights can be stored as."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, or a model id on the hub.")]
SharedArgument = Annotated[str, typer.Argument(metavar="SHARED", help="A folder that `share` wrote, or a hub id.")]
RatioOption = Annotated[
    float, typer.Option(help="Share of all units that give up their weights; int(ratio x units) of them.")
]
PartsOption = Annotated[
    str,
    typer.Option(help="What is shared: qkv (the paper), qk, qkvo (the authors' release), ffn, gateup, or qkvo+ffn."),
]
CalibratedPartsOption = Annotated[
    str | None,
    typer.Option(
        help="What is shared: qkv (default), qk, qkvo, ffn, gateup, or qkvo+ffn. By output: qk, qkv, qkvo, gateup, "
        "low_rank (qkv, and o stored as a product), several joined by +, or auto (qkvo+low_rank), the default with "
        "--save and --allow."
    ),
]
RefitFfnOption = Annotated[bool, typer.Option(help="Refit the feed-forward's readout too, not the attention's alone.")]
ReconstructOption = Annotated[
    int,
    typer.Option(
        metavar="STEPS",
        min=0,
        help="After the refit, so many gradient steps for each layer, on the weights of its attention and feed-forward "
        "that it does not share, towards what the dense layer gives. They take several times as long as the refit.",
    ),
]
MeasureOption = Annotated[
    bool,
    typer.Option(help="Also measure the perplexity of both models on the windows held out of the calibration text."),
]
MatchOption = Annotated[
    MatchName, typer.Option(help="Match function: cosine of these parts; separate matches each by itself.")
]
ModeOption = Annotated[
    ModeName,
    typer.Option(
        help="star: donors only among kept units. root: the paper's pairs, chains followed. published: as released."
    ),
]
FfnGroupsOption = Annotated[
    int, typer.Option(help="Feed-forward units a layer: 1 shares whole layers, G equal groups of neurons.")
]
FfnRatioOption = Annotated[
    float | None, typer.Option(help="The feed-forward's own ratio, where it differs from --ratio.")
]
ProtectOption = Annotated[
    str | None,
    typer.Option(help="Layers that give nothing up, such as 1,2,29. (Layer 0 shares nothing; it can lose units.)"),
]
_CALIBRATION = typer.Option(
    metavar="FILE|DATASET|self",
    help="Text to calibrate on: a text file, a .jsonl, hf:NAME[:CONFIG][:SPLIT], or self (the model writes it).",
)
CalibrationOption = Annotated[str | None, _CALIBRATION]
NeededCalibrationOption = Annotated[str, _CALIBRATION]
CalibrationTokensOption = Annotated[int, typer.Option(help="Tokens of that text to use, in whole windows.")]
CalibrationWindowOption = Annotated[int, typer.Option(help="Tokens in a calibration window.")]
CalibrationSeedOption = Annotated[
    int, typer.Option("--seed", help="Seed that chooses the windows, or writes the text.")
]
SaveOption = Annotated[
    str | None,
    typer.Option(help="Instead of --ratio: save this much of the whole model (10%, or bytes), where it costs least."),
]
AllowOption = Annotated[
    str | None,
    typer.Option(
        metavar="remove", help="remove: the plan may also delete units and neurons outright, where that costs less."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="Where to calibrate: cpu, cuda, or auto.")]
ProbeOption = Annotated[
    bool, typer.Option(help="Price what is given up by the measured predictions of the model, not of its layer alone.")
]
DtypeOption = Annotated[DtypeName | None, typer.Option(help="Store all weights as this type. Default: as they are.")]
CALIBRATING = ("calibration_tokens", "calibration_window", "seed", "device", "restart", "probe", "measure")
CHOOSING = ("ratio", "match", "parts", "mode", "ffn_groups", "ffn_ratio", "protect", "save", "allow")
