"""The bench: speed, loading time and memory of a shared model on this machine, beside its dense model.

Each ratio compares two values measured in one run. Loading and memory are measured in fresh processes, by turns. Speed
is measured in one process that holds all models, which take turns repeat by repeat.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

from headshare.bench.memory import forget_cached, give_back_freed, pss_bytes
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.fingerprint import ANY_BASE, check_origin
from headshare.checkpoint.opening import open_checkpoint
from headshare.errors import EvaluationError, OptionError
from headshare.files.scratch import scratch_folder
from headshare.integrations.transformers.caches import cache_argument
from headshare.integrations.transformers.loading import load_model, unique_parameter_bytes
from headshare.matching.pairing import make_plan
from headshare.matching.similarity import score_units
from headshare.progress import say, track
from headshare.sharing.expand import expand
from headshare.sharing.fits import fit_plan
from headshare.sharing.share import share
from headshare.text.windows import longest_window

DENSE = "dense"
CONTEXT = 64
DECODE_STEPS = 8
TOKENS = (1, 16, 512)


@dataclass(frozen=True)
class Subject:
    """A model to measure: its name in tables, its folder, and how it holds its weights."""

    name: str
    folder: Path
    storage: str = "auto"


@dataclass(frozen=True)
class Ratio:
    """The median of a figure, and its ratio to the dense model's figure.

    The ratio is the median over pairs measured in turn; `low` and `high` are its quartiles.
    """

    median: float
    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], dense: Sequence[float]) -> "Ratio":
        """The ratio of two lists with one value a repeat, in the order measured."""
        ratios = [value / other for value, other in zip(values, dense, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return cls(statistics.median(values), middle, low, high)


@dataclass(frozen=True)
class Loaded:
    """The result of one load: its seconds, the seconds until the first token is out, and the memory of the model."""

    load_s: float
    first_token_s: float
    pss_bytes: int | None
    parameter_bytes: int


@dataclass(frozen=True)
class Memory:
    """The memory of a model: its PSS and its parameters.

    `saved_of_ideal` is the saving in PSS as a fraction of the bytes that sharing takes from the parameters.
    """

    pss_bytes: int | None
    parameter_bytes: int
    saved_of_ideal: float | None


@dataclass(frozen=True)
class Bench:
    """All results of one bench, by subject: seconds of each task, seconds of loading, memory."""

    tasks: dict[str, dict[str, Ratio]]
    loading: dict[str, dict[str, Ratio]]
    memory: dict[str, Memory]
    repeats: int
    loads: int
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """The results under the names that `--json` prints."""
        return asdict(self)


def bench(
    subjects: Sequence[Subject],
    *,
    tokens: Sequence[int] | None = None,
    repeats: int = 10,
    loads: int = 3,
    cold: bool = False,
    **options: Any,
) -> Bench:
    """Measure these models, of which the first is the dense one. `options` go to `from_pretrained`.

    `tokens` are the lengths of a pass; by default those of 1, 16 and 512 that the model has room for. With `cold`, the
    model is loaded from the disk and not from the system's cache.

    Raises:
        EvaluationError: if a model has no room for that many tokens, or nothing is to be repeated.
    """
    if min(repeats, loads, *(tokens or (1,))) < 1:
        raise EvaluationError("tokens, repeats and loads must each be at least 1.")
    times = measure_speed(subjects, tokens, repeats, options)
    loaded = measure_loading(subjects, loads, options, cold=cold)
    first = subjects[0].name
    return Bench(
        tasks={task: {n: Ratio.of(v, values[first]) for n, v in values.items()} for task, values in times.items()},
        loading={what: _ratios(loaded, first, what) for what in ("load_s", "first_token_s")},
        memory={name: _memory(many, loaded[first]) for name, many in loaded.items()},
        repeats=repeats,
        loads=loads,
        threads=torch.get_num_threads(),
    )


@contextmanager
def dense_and_shared(
    model: Checkpoint, against: Checkpoint | None, *, ratio: float, parts: str, any_base: bool = False
) -> Iterator[tuple[Path, Path]]:
    """The folders of a dense model and of a shared one.

    The missing one of the two is made in a temporary folder: a dense model is shared, a shared model is expanded. With
    `any_base` the dense model may be another than the one that the shared model came from.

    Raises:
        OptionError: if `against` is given for a dense model.
        PlanError, CheckpointError: if it is not the dense model of a shared one.
    """
    if against is not None and model.plan is None:
        raise OptionError(f"{model.name} is dense itself: leave --against out, and it is shared for the time.")
    if against is not None:
        fit_plan(model.require_sharing().plan, against.named_as(model))
        if note := check_origin(model, against, None if any_base else ANY_BASE):
            say(note)
    with scratch_folder(Path(gettempdir()), mode=0o700) as scratch:
        made = scratch / "made"
        if model.plan is None:
            plan = make_plan(score_units(model, parts=parts), ratio, parts=parts)
            yield model.path, share(model, plan).save(made)
        elif against is not None:
            yield against.path, model.path
        else:
            yield expand(model, made, unpacked=True), model.path


def measure_speed(
    subjects: Sequence[Subject], tokens: Sequence[int] | None, repeats: int, options: Mapping[str, Any]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each task and subject, one value a repeat: {task: {subject: seconds}}.

    Tasks: `prefill N`, one pass over N tokens; `decode`, one token after a context, where the model can generate.

    Raises:
        EvaluationError: if a model has no room for that many tokens.
    """
    models = {subject.name: _load(subject, options) for subject in subjects}
    first = next(iter(models.values()))
    # the lengths of a pass: never more than the model can read
    longest = longest_window(first.config.to_dict())
    if tokens is None:
        tokens = [count for count in TOKENS if longest is None or count <= longest]
    if longest is not None and max(tokens) > longest:
        raise EvaluationError(f"the model reads at most {longest} tokens at once; {max(tokens)} were asked for.")
    tasks: dict[str, Callable[[Any], float]] = {f"prefill {count}": _prefill(count) for count in tokens}
    if first.can_generate():
        tasks["decode"] = _decode
    names = list(models)
    times: dict[str, dict[str, list[float]]] = {task: {name: [] for name in names} for task in tasks}
    with torch.inference_mode():
        for task, run in tasks.items():
            for name in names:
                run(models[name])  # once unmeasured: the first pass sets up caches and kernels
            # each repeat begins with another model, so that none is always measured first
            for repeat in track(range(repeats), task, repeats):
                for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                    times[task][name].append(run(models[name]))
    return times


def measure_loading(
    subjects: Sequence[Subject], loads: int, options: Mapping[str, Any], *, cold: bool = False
) -> dict[str, list[Loaded]]:
    """Load each subject in a process of its own, by turns, and run one token through it."""
    loaded: dict[str, list[Loaded]] = {subject.name: [] for subject in subjects}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in track(range(loads), "loading", loads):
            for subject in subjects:
                arguments = (subject, dict(options), torch.get_num_threads(), cold)
                loaded[subject.name].append(pool.apply(load_once, arguments))
    return loaded


def load_once(subject: Subject, options: dict[str, Any], threads: int, cold: bool = False) -> Loaded:
    """Load a subject twice in this process and measure it.

    The first load measures memory, while the process is fresh and no freed memory is used again. The second load
    measures seconds, without what libraries set up once.
    """
    torch.set_num_threads(threads)
    with torch.inference_mode():
        # memory: before and after the first load
        give_back_freed()
        before = pss_bytes(subject.folder)
        model = _load(subject, options)
        model(input_ids=_tokens(CONTEXT))
        parameter_bytes = unique_parameter_bytes(model)
        give_back_freed()
        after = pss_bytes(subject.folder)
        del model
        give_back_freed()
        # seconds: the second load
        if cold:
            forget_cached(subject.folder)
        begun = time.perf_counter()
        model = _load(subject, options)
        load_s = time.perf_counter() - begun
        model(input_ids=_tokens(1))
        first_token_s = time.perf_counter() - begun
    taken = None if before is None or after is None else after - before
    return Loaded(load_s, first_token_s, taken, parameter_bytes)


def _ratios(loaded: Mapping[str, Sequence[Loaded]], first: str, what: str) -> dict[str, Ratio]:
    values = {name: [getattr(reading, what) for reading in many] for name, many in loaded.items()}
    return {name: Ratio.of(many, values[first]) for name, many in values.items()}


def _memory(loaded: Sequence[Loaded], dense: Sequence[Loaded]) -> Memory:
    parameters = loaded[0].parameter_bytes
    taken = [
        statistics.median([reading.pss_bytes for reading in many if reading.pss_bytes is not None] or [0])
        for many in (loaded, dense)
    ]
    if not all(taken):
        return Memory(None, parameters, None)
    ideal = dense[0].parameter_bytes - parameters
    return Memory(int(taken[0]), parameters, (taken[1] - taken[0]) / ideal if ideal else None)


def _load(subject: Subject, options: Mapping[str, Any]) -> Any:
    with open_checkpoint(subject.folder) as checkpoint:
        return load_model(checkpoint, storage=subject.storage, **options)


def _tokens(count: int) -> torch.Tensor:
    return torch.arange(count)[None] % 50 + 5


def _prefill(count: int) -> Callable[[Any], float]:
    tokens = _tokens(count)

    def run(model: Any) -> float:
        begun = time.perf_counter()
        model(input_ids=tokens)
        return time.perf_counter() - begun

    return run


def _decode(model: Any) -> float:
    """Seconds for each token after a context of CONTEXT tokens."""
    name = str(cache_argument(model))
    state = model(input_ids=_tokens(CONTEXT), use_cache=True)[name]
    begun = time.perf_counter()
    for _ in range(DECODE_STEPS):
        state = model(input_ids=_tokens(1), use_cache=True, **{name: state})[name]
    return (time.perf_counter() - begun) / DECODE_STEPS
