"""Recipes: a comparison as one value, from YAML, from the command line, or both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from headshare.calibration.amounts import Amount
from headshare.calibration.settings import CalibrationSettings
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.defaults import TOKENS
from headshare.errors import EvaluationError, OptionError
from headshare.evaluation.harness import Settings
from headshare.evaluation.measuring import EvalText
from headshare.evaluation.translation import SOURCE, Parallel
from headshare.experiments.case import METHODS, REFIT, ROUNDED, TRAINED, base_of
from headshare.experiments.cells import Asked
from headshare.experiments.methods import TYING
from headshare.files.untrusted import read_yaml
from headshare.matching.modes import MODES
from headshare.text.formats import check_field
from headshare.text.tokens import Calibration
from headshare.training import TrainSettings

STAR = "star"  # DirectShare's mode where nobody asks for another
LIGHT = ("directshare", "random-donors", "mean-unit", "deletion-same", "magnitude", "magnitude-zeros", "int8")


@dataclass(frozen=True)
class Grid:
    """The methods, amounts and measurements of a comparison.

    Amounts are `ratios` of the units, and shares of the model's bytes to `save`. Methods may end in `+refit`. They are
    measured on a text, on tasks, and on the translation of a parallel text. `mode` is that of DirectShare and of all
    that starts from its pairs.
    """

    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    tasks: tuple[str, ...] = ()
    data: Path | None = None
    text: EvalText | None = None
    parallel: Parallel | None = None
    settings: Settings = field(default_factory=Settings)
    seed: int = 0
    training: TrainSettings | None = None
    save: tuple[float, ...] = ()
    mode: str = STAR

    @property
    def asked(self) -> tuple[Asked, ...]:
        """The amounts, ratios first."""
        return (*(Asked(ratio=ratio) for ratio in self.ratios), *(Asked(save=share) for share in self.save))

    def __post_init__(self) -> None:
        for name in self.methods:
            method = METHODS.get(base_of(name))
            if method is None:
                raise OptionError(f"there is no method {name!r:.60}. There are: {', '.join(METHODS)}.")
            if REFIT in name and not method.refits:
                raise EvaluationError(f"{method.name} has no readout that a refit could change. Leave out {REFIT}.")
            if name.endswith(ROUNDED) and method.name not in TYING:
                raise EvaluationError(f"{ROUNDED} is for methods that tie q, k and v alone, as {method.name} does not.")
        if self.training is None and (trained := [name for name in self.methods if name in TRAINED]):
            raise EvaluationError(f"{trained[0]} trains: say on what, with --train FILE or `train` in the recipe.")
        if self.mode not in MODES:
            raise OptionError(f"there is no mode '{self.mode:.40}'. There are: {', '.join(MODES)}.")
        if not self.methods or not self.asked:
            raise EvaluationError("there is nothing to compare: name methods and ratios.")
        if wrong := [amount for amount in (*self.ratios, *self.save) if not 0 < amount < 1]:
            raise EvaluationError(f"a ratio of {wrong[0]} leaves nothing, or nothing to do; use one between 0 and 1.")
        if not self.tasks and self.text is None and self.parallel is None:
            raise EvaluationError("there is nothing to measure by: give --text FILE, or --tasks and --data-dir.")


def _share(given: object) -> object:
    """A share of the bytes, also as in 20%. What is none is left to the check that follows."""
    if not isinstance(given, str) or not given.rstrip().endswith("%"):
        return given
    try:
        return float(Amount.parse(given, "to save").number)
    except OptionError:
        return given


class Recipe(BaseModel):
    """A comparison of methods on a model, as one value.

    `title` says what it is for. `train` holds the settings of `headshare train` for methods that train, without the
    method and the plan. `save` holds shares of the model's bytes, such as 20%. `field` holds the text of a row, in
    files of rows and data sets.
    Windows that are not given have 512 tokens, or as many as the model reads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str = ""
    model: str | None = None
    methods: tuple[str, ...] = LIGHT
    ratios: tuple[float, ...] = (0.1, 0.3)
    save: tuple[Annotated[float, BeforeValidator(_share)], ...] = ()
    text: Path | None = None
    field: str | None = None
    tokens: int | None = None
    window: Annotated[int, Field(ge=2)] | None = None
    source: Path | None = None
    reference: Path | None = None
    prompt: str = SOURCE + "\n"
    language: str | None = None
    tasks: tuple[str, ...] = ()
    data_dir: Path | None = None
    limit: int | None = None
    few_shot: int | None = None
    batch_size: int = 16
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    calibration: str | None = None
    calibration_tokens: int = TOKENS
    calibration_window: int | None = None
    train: dict[str, Any] | None = None
    seed: int = 0
    device: str = "cpu"
    mode: str = STAR

    @classmethod
    def load(cls, path: Path | None, options: Mapping[str, Any]) -> "Recipe":
        """The settings of a YAML file; those of the command line override them.

        Raises:
            EvaluationError: if the file cannot be read, or has an unknown or wrong setting.
        """
        settings = {} if path is None else read_yaml(path, EvaluationError)
        if not isinstance(settings, dict):
            raise EvaluationError(f"{path} holds no settings but {settings!r:.60}. See recipes/ for examples.")
        try:
            return cls.model_validate({**settings, **options})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(step) for step in first["loc"]) or "the top"
            where = path or "the options"
            raise EvaluationError(f"{where}: {first['msg']} at {place}; found {first['input']!r:.100}.") from None

    def grid(self) -> Grid:
        """The grid of cells that the recipe asks for.

        Raises:
            EvaluationError: as `Grid` and `Parallel` do, or if one side of a translation is missing.
            TrainingError: if `train` holds no valid settings of training.
        """
        if (self.source is None) != (self.reference is None):
            raise EvaluationError("a translation needs both a source and a reference.")
        check_field(self.field, self.text, self.source, self.reference, self.calibration)
        return Grid(
            methods=self.methods,
            # the ratios that nobody gave make way for shares that somebody did
            ratios=self.ratios if "ratios" in self.model_fields_set or not self.save else (),
            tasks=self.tasks,
            data=self.data_dir,
            text=None if self.text is None else EvalText(self.text, self.window, self.tokens, None, self.field),
            parallel=None
            if self.source is None or self.reference is None
            else Parallel(
                self.source, self.reference, self.prompt, self.limit, language=self.language, text_field=self.field
            ),
            settings=Settings(self.limit, self.few_shot, self.dtype, self.device, self.batch_size),
            seed=self.seed,
            training=self._training(),
            save=self.save,
            mode=self.mode,
        )

    def _training(self) -> TrainSettings | None:
        if self.train is None:
            return None
        if set_here := sorted({"method", "sharing", "seed"} & self.train.keys()):
            raise EvaluationError(f"{set_here[0]} in `train` would not be used: the comparison sets it. Leave it out.")
        settings = TrainSettings.made({"method": "postshare", **self.train})
        if settings.tasks.names and settings.tasks.data_dir is None:  # those of the comparison
            tasks = settings.tasks.model_copy(update={"data_dir": self.data_dir})
            return settings.model_copy(update={"tasks": tasks})
        return settings

    def calibration_on(self, dense: Checkpoint) -> Calibration | None:
        """The calibration text, if there is one.

        Raises:
            CalibrationError: if the text cannot be read, or there is no such device.
        """
        if self.calibration is None:
            return None
        settings = CalibrationSettings(
            self.calibration,
            self.calibration_tokens,
            self.calibration_window,
            self.seed,
            self.device,
            field=self.field,
        )
        return settings.load(dense)
