"""Options that several commands share: how units are chosen, and on which text."""

from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headshare.cli.options import CALIBRATE, CHOOSE, SIZE, WRITE, Context, RanksOption, RestartOption, refuse_unused
from headshare.cli.shrinking.size import MultipleOption, PlanBitsOption, TargetOption
from headshare.defaults import OUTPUT_DTYPES, TOKENS
from headshare.matching.functions import MATCH_FUNCTIONS
from headshare.matching.modes import MODES
from headshare.plan.units import Sublayer

OUTPUT = "output"
# what stands several times bit for bit: the name that `matching.exact` has for it, which imports torch
EXACT = "exact"
MATCH_NAMES = tuple(name for name, function in MATCH_FUNCTIONS.items() if function.kind is Sublayer.ATTENTION)

# the choices of options: enumerations to typer, which offers their values; words to a type checker
if TYPE_CHECKING:
    from headshare.calibration.budget import Budget
    from headshare.calibration.settings import CalibrationSettings
    from headshare.checkpoint.checkpoint import Checkpoint
    from headshare.matching.scores import Scores
    from headshare.plan.plan import SharePlan

    MatchName = str
    ShareMatchName = str
    EstimateMatchName = str
    ModeName = str
    DtypeName = str
else:
    # all of them import torch, which only a command that runs has the time for
    Budget = CalibrationSettings = Checkpoint = Scores = SharePlan = Any

    MatchName = StrEnum("MatchName", {name: name for name in MATCH_NAMES})
    ShareMatchName = StrEnum("ShareMatchName", {name: name for name in (*MATCH_NAMES, OUTPUT, EXACT)})
    EstimateMatchName = StrEnum("EstimateMatchName", {name: name for name in (*MATCH_NAMES, EXACT)})
    ModeName = StrEnum("ModeName", {name: name for name in MODES})
    DtypeName = StrEnum("DtypeName", {name: name for name in OUTPUT_DTYPES})

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, or a model id on the hub.")]
ModeOption = Annotated[
    ModeName,
    typer.Option(
        rich_help_panel=CHOOSE,
        help="Choose ties in this way. star: donors only among kept units. root: the paper's pairs, with chains "
        "followed. published: as in the authors' release.",
    ),
]
SharedArgument = Annotated[
    str, typer.Argument(metavar="SHARED", help="A folder that `shrink` or `share` wrote, or a hub id.")
]

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
        metavar="PARTS",
        rich_help_panel=CHOOSE,
        help="Share these parts: qkv (the paper), qk, qkvo (the authors' release), ffn, gateup, or qkvo+ffn.",
    ),
]
MatchOption = Annotated[
    MatchName,
    typer.Option(
        rich_help_panel=CHOOSE,
        help="Match units by the cosine of these parts; separate matches q, k and v each by itself, and circuit by "
        "W_q^T W_k, which says where a head looks.",
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
CALIBRATED_PARTS = (
    "Share these parts. By weights: qkv (default), qk, qkvo, ffn, gateup, or qkvo+ffn. By output: qk, qkv, qkvo, "
    "gateup, low_rank (qkv, and o in low rank), several joined by +, auto (qkvo+low_rank), or none. Default: none with "
    "--save, auto with --allow."
)


@dataclass(frozen=True)
class ChoiceOptions:
    """How many units are shared, and how they are chosen: by weights, or by output under a budget."""

    ratio: RatioOption = 0.3
    parts: Annotated[str | None, typer.Option(metavar="PARTS", rich_help_panel=CHOOSE, help=CALIBRATED_PARTS)] = None
    mode: ModeOption = "star"
    ffn_groups: FfnGroupsOption = 1
    ffn_ratio: FfnRatioOption = None
    ranks: RanksOption = 1
    protect: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS",
            rich_help_panel=CHOOSE,
            help="Take nothing from these layers, such as 1,2,29. Default: none. (Layer 0 shares nothing; it can lose "
            "units.)",
        ),
    ] = None
    save: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            rich_help_panel=SIZE,
            help="Save this much of the whole model (10%, or bytes), where it costs least. Takes the place of --ratio.",
        ),
    ] = None
    to: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            rich_help_panel=SIZE,
            help="Leave this much of the whole model (40%, 120MB), where it costs least. The other way to say --save.",
        ),
    ] = None
    bits: PlanBitsOption = "16"
    allow: Annotated[
        str | None,
        typer.Option(
            metavar="WORDS",
            rich_help_panel=SIZE,
            help="Also give these up where that costs less, joined by commas: heads and neurons (remove), a layer's "
            "whole attention or feed-forward (sublayers), dimensions of values (narrow_values). none: share only. "
            "Default: all with --save, none with --parts.",
        ),
    ] = None
    multiple: MultipleOption = 1
    target: TargetOption = None

    @property
    def weight_parts(self) -> str:
        """The parts that are shared where units are chosen by their weights."""
        return self.parts or "qkv"

    @property
    def asks_for_output(self) -> bool:
        """True if an option is given that only a plan by output has."""
        return (
            any(option is not None for option in (self.save, self.to, self.allow, self.target))
            or str(self.bits) != "16"
        )

    def plan_from(self, scores: Scores) -> SharePlan:
        """The plan by weights that the options ask for."""
        from headshare.matching.pairing import make_plan

        return make_plan(
            scores,
            self.ratio,
            parts=self.weight_parts,
            mode=self.mode,
            ffn_ratio=self.ffn_ratio,
            protect=whole_numbers(self.protect),
            ranks=self.ranks,
        )

    def budget(self, context: Context, dense: Checkpoint, dtype: str | None = None) -> Budget:
        """The budget by output that the options ask for. Options that do not apply to it are refused."""
        from headshare.calibration.budget import NOTHING, Budget

        budget = Budget.parse(
            dense,
            ratio=self.ratio,
            save=self.save,
            to=self.to,
            bits=str(self.bits),
            dtype=dtype,
            parts=self.parts or (None if self.save or self.to or self.allow or self.target else "qkv"),
            allow=None if self.allow is None else [word for word in self.allow.split(",") if word != NOTHING],
            ffn_groups=self.ffn_groups,
            protect=whole_numbers(self.protect),
            multiple=self.multiple,
            target=self.target,
        )
        refuse_unused(context, "units are chosen by output, on the calibration text", ["mode", "ffn_ratio", "ranks"])
        if self.save or self.to:
            refuse_unused(context, "--save and --to say how much is given up", ["ratio"])
        if not any(action.sublayer is Sublayer.FFN for action in budget.actions):
            refuse_unused(context, "no groups of neurons are shared; add gateup to --parts", ["ffn_groups"])
        return budget


def whole_numbers(text: str | None) -> list[int]:
    """The whole numbers in a list such as 1,2,29."""
    try:
        return [int(word) for word in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a list of whole numbers such as 1,2,29") from None


# ---- calibration

_TEXTS = (
    "Calibrate on this text: a text file, a .jsonl, .json or .csv, hf:NAME[:CONFIG][:SPLIT], self (the model writes "
    "it), or mix (texts of several kinds that come with headshare)."
)
CALIBRATION = typer.Option(metavar="FILE", rich_help_panel=CALIBRATE, help=_TEXTS)
CALIBRATION_OR_SELF = typer.Option(
    metavar="FILE",
    rich_help_panel=CALIBRATE,
    help=f"{_TEXTS} Default: self; mix for a model that writes no text.",
)
NeededCalibrationOption = Annotated[str, CALIBRATION]
CalibrationOption = Annotated[str | None, CALIBRATION]


@dataclass(frozen=True)
class CalibrationOptions:
    """The windows of the calibration text, and the device that it is run on."""

    field: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=CALIBRATE, help="Read the text of a row from this field. Default: the one it can be."
        ),
    ] = None
    calibration_tokens: Annotated[
        int, typer.Option(rich_help_panel=CALIBRATE, help="Use this many tokens of that text, in whole windows.")
    ] = TOKENS
    calibration_window: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=CALIBRATE,
            help="Cut that text into windows of this many tokens. Default: 512, or the most that MODEL reads.",
        ),
    ] = None
    seed: Annotated[
        int, typer.Option(rich_help_panel=CALIBRATE, help="Choose the windows, or write the text, by this seed.")
    ] = 0
    device: Annotated[
        str,
        typer.Option(metavar="DEVICE", rich_help_panel=CALIBRATE, help="Calibrate on this device: cpu, cuda, or auto."),
    ] = "auto"

    def settings(self, source: str, *, restart: bool = False, probe: bool = True) -> CalibrationSettings:
        """The settings of calibration on this text."""
        from headshare.calibration.settings import CalibrationSettings

        return CalibrationSettings(
            source,
            self.calibration_tokens,
            self.calibration_window,
            self.seed,
            self.device,
            restart,
            probe,
            self.field,
        )


@dataclass(frozen=True)
class RunOptions(CalibrationOptions):
    """A run that may be calibrated: on which text, and how it goes about it."""

    calibration: CalibrationOption = None
    probe: Annotated[
        bool,
        typer.Option(
            rich_help_panel=CALIBRATE,
            help="Rank candidates by the change in the model's predictions (slower, better) instead of each layer's "
            "output error.",
        ),
    ] = True
    prices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=CALIBRATE,
            help="Keep the cost curves in this file, and read them there the next time: one pricing serves every "
            "budget and every --protect of the same model and text.",
        ),
    ] = None
    restart: RestartOption = False

    def settings_on(self, source: str) -> CalibrationSettings:
        """The settings of a calibrated run on this text."""
        return replace(self.settings(source, restart=self.restart, probe=self.probe), prices=self.prices)


# ---- the output

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")]
DtypeOption = Annotated[
    DtypeName | None,
    typer.Option(rich_help_panel=WRITE, help="Store all weights in this type. Default: as in the model."),
]

# names of parameters, to refuse those that would not be used
_TEXT = ("field", "calibration_tokens", "calibration_window", "seed", "device")
CALIBRATING = (*_TEXT, "restart", "probe", "prices", "measure")
CHOOSING = ("match", *(option.name for option in fields(ChoiceOptions)))
