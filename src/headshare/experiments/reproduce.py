"""The paper's tables and figures on any one model: the recipes that fit it, each compared, and one report of all.

A recipe is run as it was published on the model that it names, and on any other model in a small form: fewer questions,
tokens and steps of training, and the model's own type. A stopped run goes on, as each comparison keeps its cells.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import headshare
from headshare.attention.analysis import attention
from headshare.attention.page import Attended
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import EvaluationError, HeadshareError, OptionError
from headshare.evaluation.harness import named
from headshare.evaluation.task_files import TASKS
from headshare.experiments.grid import compare
from headshare.experiments.recipe import Recipe
from headshare.experiments.report.content import Report, report_of
from headshare.experiments.report.sources import Comparison, Published, published
from headshare.files.atomic import write_whole
from headshare.integrations.transformers.loading import load_tokenizer
from headshare.progress import say
from headshare.text.windows import opening_token, window_for
from headshare.text.written import first_tokens, written_after

# each recipe, and the one that is the same comparison where it is not the model that matters
RECIPES = {
    "rivals": "",
    "table-1": "",
    "table-2": "",
    "table-3": "figure-5",
    "table-4": "",
    "table-5": "",
    "table-6": "",
    "table-7": "table-1",
    "table-8": "table-2",
    "table-9": "table-4",
    "table-10": "figure-5",
    "table-12": "",
    "figure-5": "",
    "figure-6": "",
    "figure-7": "",
}
# figures and tables that others have the numbers of
OF = {"figure-3": "table-12", "figure-4": "table-4", "table-11": "figure-7"}
EXAMS = ("ceval", "mmlu")
EXAMS_TOO = "-exams"
RATIOS = (0.1, 0.2, 0.3)  # of table 12 in its small form, which has eight
TEXTS = "texts"
HELD_OUT = 32
WRITTEN_TOGETHER = 64  # windows: more at once are written faster
BATCH = 8
MAPS = "figure-1"
MAPS_TITLE = "Figure 1 of the paper: attention maps"
MAP_TOKENS = 4096


@dataclass(frozen=True)
class Wanted:
    """What a reproduction is asked for.

    `limit` questions of each task, `tokens` of the text in windows of `window`, and `steps` of training are the small
    form's; `only` names the recipes to run. `text` is measured on and `calibration` chosen, refitted and trained on;
    where neither is given the model writes both.
    """

    out: Path
    data_dir: Path | None = None
    text: Path | None = None
    calibration: Path | None = None
    limit: int = 50
    tokens: int = 16384
    steps: int = 60
    window: int | None = None
    dtype: str = "auto"
    device: str = "cpu"
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [name for name in self.only if name not in (*RECIPES, *OF, MAPS)]:
            known = ", ".join((*RECIPES, *OF, MAPS))
            raise OptionError(f"there is no {unknown[0]!r:.60} to reproduce. There are: {known}.")
        if (self.text is None) != (self.calibration is None):
            raise OptionError("--text and --calibration go together: one text to measure on, another to choose on.")

    @property
    def maps(self) -> bool:
        """Whether figure 1 is to be drawn."""
        return not self.only or MAPS in self.only


@dataclass(frozen=True)
class Step:
    """One comparison: what is run, or why it is not; and what is left out of it."""

    name: str
    title: str
    recipe: Recipe | None = None
    why: str = ""
    left_out: tuple[str, ...] = field(default=())

    @property
    def in_words(self) -> str:
        """A line of `--dry-run`."""
        if self.recipe is None:
            return f"{self.name}: not run: {self.why}"
        asked = f"{len(self.recipe.methods)} methods at {', '.join(f'{ratio:g}' for ratio in self.recipe.ratios)}"
        measured = [f"{len(self.recipe.tasks)} tasks"] if self.recipe.tasks else []
        measured += ["a text"] if self.recipe.text else []
        without = f"; without {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.name}: {asked}, on {' and '.join(measured)}{without}"


def recipes_folder() -> Path:
    """The folder of the recipes: in the installed package, or in a checkout.

    Raises:
        EvaluationError: if there is none.
    """
    package = Path(headshare.__file__).parent
    found = next((at for at in (package / "recipes", package.parents[1] / "recipes") if at.is_dir()), None)
    if found is None:
        raise EvaluationError("the recipes of the paper's tables are not installed. Install headshare again.")
    return found


def papers_tables() -> list[Published]:
    """The figures that the paper published."""
    return published(recipes_folder() / "published" / "2402.11819.yaml")


def steps_for(dense: Checkpoint, wanted: Wanted) -> list[Step]:
    """What would be run on this model, in order, and why the rest is not."""
    name = Path(dense.name).name
    papers = {table.model.casefold() for table in papers_tables()}
    asked = [OF.get(each, each) for each in wanted.only if each != MAPS] if wanted.only else list(RECIPES)
    own = name.casefold() in papers
    if wanted.only and not own:
        asked = [RECIPES[recipe] or recipe for recipe in asked]
    steps: list[Step] = []
    for recipe in dict.fromkeys(asked):
        loaded = Recipe.load(recipes_folder() / f"{recipe}.yaml", {})
        if own:
            steps.append(_as_published(recipe, loaded, name, wanted, dense))
        elif same := RECIPES[recipe]:
            steps.append(Step(recipe, loaded.title, why=f"on any one model it is {same}"))
        else:
            steps += _small(recipe, loaded, wanted, dense)
    return steps


def _as_published(recipe: str, loaded: Recipe, name: str, wanted: Wanted, dense: Checkpoint) -> Step:
    """The recipe as it is, on a model of the paper's."""
    of = Path(loaded.model or "").name
    if of and of.partition("-")[0] != name.partition("-")[0]:
        return Step(recipe, loaded.title, why=f"it is of {of}")
    if recipe == "table-6":
        return Step(recipe, loaded.title, why=_TRANSLATION)
    given = {"model": str(dense.path), "device": wanted.device, "data_dir": wanted.data_dir, "text": wanted.text}
    return Step(recipe, loaded.title, loaded.model_copy(update=given))


_TRANSLATION = "it needs a model that was fine-tuned to translate: python -m studies.translation makes one and runs it"


def _small(recipe: str, loaded: Recipe, wanted: Wanted, dense: Checkpoint) -> Iterator[Step]:
    """The recipe in its small form, its exams apart, as they have a limit of their own."""
    if recipe == "table-6":
        yield Step(recipe, loaded.title, why=_TRANSLATION)
        return
    tasks = [task for task in loaded.tasks if _is_there(task, wanted.data_dir)]
    absent = [named(task)[0] for task in loaded.tasks if task not in tasks]
    exams = [task for task in tasks if named(task)[0] in EXAMS]
    if loaded.train is not None:  # it would train again for them, and table 4 has them
        tasks = [task for task in tasks if task not in exams]
        exams = []
    rounds = find_spec("gptqmodel") is not None
    methods = tuple(name for name in loaded.methods if rounds or not name.endswith("gptq4"))
    if len(methods) < len(loaded.methods) and recipe == "table-5":
        yield Step(recipe, loaded.title, why="it needs gptqmodel: pip install '.[gptq]' in a checkout")
        return
    text, calibration = _texts(wanted)
    given: dict[str, Any] = {
        "model": str(dense.path), "methods": methods, "ratios": RATIOS if recipe == "table-12" else loaded.ratios,
        "tasks": tuple(task for task in tasks if task not in exams), "data_dir": wanted.data_dir, "limit": wanted.limit,
        "text": text, "tokens": wanted.tokens, "window": wanted.window, "dtype": wanted.dtype, "device": wanted.device,
        "calibration": str(calibration), "calibration_tokens": min(loaded.calibration_tokens, wanted.tokens),
        "calibration_window": wanted.window,
        "train": _training(loaded, calibration, wanted, tasks),
    }  # fmt: skip
    yield Step(recipe, loaded.title, loaded.model_copy(update=given), left_out=tuple(absent))
    if exams:
        few = {**given, "tasks": tuple(exams), "text": None, "limit": max(1, wanted.limit // 25)}
        yield Step(recipe + EXAMS_TOO, f"{loaded.title}: exams", loaded.model_copy(update=few))


def _is_there(task: str, data: Path | None) -> bool:
    name = named(task)[0]
    return data is not None and name in TASKS and any((data / file).exists() for file in TASKS[name].files)


def _training(loaded: Recipe, text: Path, wanted: Wanted, tasks: Sequence[str]) -> dict[str, Any] | None:
    """A short training run on the calibration text in the place of the paper's; the tasks on the way stay."""
    if loaded.train is None:
        return None
    names = [name for name in loaded.train.get("tasks", {}).get("names", ()) if name in tasks]
    arguments = {
        "max_steps": wanted.steps, "eval_steps": max(1, wanted.steps // 4), "per_device_train_batch_size": BATCH,
        "learning_rate": 2e-4, "warmup_steps": max(1, wanted.steps // 10), "lr_scheduler_type": "cosine",
        "use_cpu": wanted.device == "cpu",
    }  # fmt: skip
    measured = {"tasks": {"names": names, "data_dir": str(wanted.data_dir), "limit": wanted.limit}} if names else {}
    return {
        "text": {"data": str(text), "context": wanted.window, "held_out": HELD_OUT},
        "learning": {"arguments": arguments},
        **measured,
    }


# ---- running


def reproduce(dense: Checkpoint, wanted: Wanted) -> Report:
    """Compare by every recipe that fits, and return the report of all.

    What is kept in the folder is not measured again. A comparison that cannot be made is said in the report.

    Raises:
        EvaluationError: if there is nothing to run, or the folder has something else.
    """
    steps = steps_for(dense, wanted)
    todo = [step for step in steps if step.recipe is not None]
    if not todo and not wanted.maps:
        raise EvaluationError(f"nothing of the paper fits: {'; '.join(step.in_words for step in steps)}.")
    if wanted.text is None:
        _write_texts(dense, wanted)
    absent = [(step.title, step.why) for step in steps if step.recipe is None]
    done: list[Comparison] = []
    for number, step in enumerate(todo, 1):
        say(f"{number} of {len(todo)}: {step.in_words}")
        folder = wanted.out / step.name
        assert step.recipe is not None
        try:
            calibration = step.recipe.calibration_on(dense)
            compare(dense, step.recipe.grid(), folder, calibration=calibration, device=wanted.device, title=step.title)
            done.append(Comparison.load(folder))
        except HeadshareError as error:
            absent.append((step.title, " ".join(str(error).split())))
        absent += [(f"{step.title}: {task}", "its file is not in --data-dir") for task in step.left_out]
    attended = []
    if wanted.maps:
        say(f"{MAPS_TITLE}, on both texts")
        try:
            texts = [str(text) for text in dict.fromkeys(_texts(wanted))]
            tokens = min(MAP_TOKENS, wanted.tokens)
            found = attention(dense, texts, tokens=tokens, window=wanted.window, device=wanted.device)
            attended.append(Attended.of(found))
        except HeadshareError as error:
            absent.append((MAPS_TITLE, " ".join(str(error).split())))
    return report_of(done, papers_tables(), attended=attended, absent=absent)


def _texts(wanted: Wanted) -> tuple[Path, Path]:
    """The text to measure on and the text to choose, refit and train on."""
    if wanted.text is not None and wanted.calibration is not None:
        return wanted.text, wanted.calibration
    return wanted.out / TEXTS / "test.txt", wanted.out / TEXTS / "calibration.jsonl"


def _write_texts(dense: Checkpoint, wanted: Wanted) -> None:
    """Have the model write the two texts; those that are there already are kept."""
    window = window_for(wanted.window, dense.config)
    needed = max(wanted.tokens, (wanted.steps * BATCH + HELD_OUT) * window)
    for path, tokens, seed in zip(_texts(wanted), (wanted.tokens + 2 * window, needed), (1, 2), strict=True):
        if path.is_file():
            continue
        say(f"{dense.name} writes {path.name}: {tokens:,} tokens")
        tokenizer = load_tokenizer(dense)
        starts = first_tokens(dense, tokenizer, opening_token(tokenizer, None), tokens // window, seed)
        written = written_after(starts, dense, window, seed, wanted.device, batch=WRITTEN_TOGETHER)
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        write_whole(path, (lines if path.suffix == ".jsonl" else "\n\n".join(texts)).encode())
