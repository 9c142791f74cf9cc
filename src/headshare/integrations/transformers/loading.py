"""Loading of a checkpoint, dense or shared, as a transformers model and tokenizer. Runs no code of the checkpoint."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers

import headshare.integrations.transformers.quantizer  # noqa: F401 - it registers the format
from headshare.architecture.families import OPTIONAL
from headshare.architecture.model_class import predicts_next
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.int4 import PARTS
from headshare.checkpoint.opening import open_checkpoint
from headshare.checkpoint.remote_code import LOCAL_ONLY, check_model_code, check_tokenizer_code
from headshare.errors import CheckpointError, EvaluationError
from headshare.files.untrusted import foreign
from headshare.integrations.transformers.config import Opened
from headshare.integrations.transformers.sized import built, check_size, shape_mismatch
from headshare.integrations.transformers.tokenizer import check_vocabulary, leave_unended, unloadable

LOGGER = logging.getLogger("headshare")


def load(model: str | Path, *, storage: str = "auto", **options: Any) -> Any:
    """The transformers model in a folder or under a hub id, dense or shared, in evaluation mode.

    `storage` names the way in which a shared model holds its weights: `auto`, or a name in
    `storage.registry.STORAGES`. `options` go to `from_pretrained`: dtype, device_map and the like.

    Raises:
        CheckpointError: if there is no such checkpoint, or transformers cannot load it.
        StorageError: if there is no such storage, or this machine cannot hold the model so.
    """
    with open_checkpoint(model) as checkpoint:
        return load_model(checkpoint, storage=storage, **options)


def load_model(checkpoint: Checkpoint, *, storage: str = "auto", **options: Any) -> Any:
    """The model of a checkpoint, of the class that `class_name` tells, or the bare model if its head has no weights.

    `storage` names the way in which a shared model holds its weights. `options` go to `from_pretrained`.

    Raises:
        CheckpointError: if transformers has no such class, the model needs code of its own, the weights of the bare
            model are incomplete, there is no such device, or the folder was replaced since it was opened.
    """
    if isinstance(options.get("device_map"), str):
        _check_device(options["device_map"])
    check_model_code(checkpoint)
    if checkpoint.plan is not None:
        options = {**options, "config": _config_with(checkpoint, storage)}
    # A base checkpoint can name a class whose head it has no weights for. Then the bare model is what it holds.
    named = _class_of(checkpoint)
    for model_class in dict.fromkeys((named, transformers.AutoModel)):
        with quiet():
            if checkpoint.plan is None:  # the quantizer holds a shared model's size against its tensors
                check_size(checkpoint, model_class)
            model, report = _from_pretrained(model_class, checkpoint.path, options)
        checkpoint.check_unchanged()  # transformers opened the files by their names
        if not report["missing_keys"]:
            if model_class is not named and predicts_next(named.__name__, checkpoint.config):
                LOGGER.warning(
                    "%s has no weights for the head of %s: it is loaded without, and predicts no next token.",
                    *(checkpoint.name, named.__name__),
                )
            return model.eval()
        if missing := sorted(key for key in report["missing_keys"] if key.endswith(PARTS)):
            raise CheckpointError(
                f"{checkpoint.name} has no {missing[0]}, a matrix of 4 bits by its config.json. Download it again."
            )
    raise CheckpointError(
        f"{checkpoint.name} lacks weights that its model needs: {sorted(report['missing_keys'])[:3]}."
    )


def empty_model(checkpoint: Checkpoint) -> Any:
    """The stock model of a checkpoint, of the class that `class_name` tells, without weights.

    Raises:
        CheckpointError: if transformers has no such class, or the model needs code of its own.
    """
    check_model_code(checkpoint)
    with foreign(f"transformers cannot build {checkpoint.name}"), quiet(), torch.device("meta"):
        return built(checkpoint, _class_of(checkpoint))


def _config_with(checkpoint: Checkpoint, storage: str) -> Any:
    """The model's configuration, with a request for this storage."""
    with foreign(f"transformers cannot read config.json of {checkpoint.name}"):
        config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    config.quantization_config = Opened(checkpoint).request(storage)
    return config


def _class_of(checkpoint: Checkpoint) -> Any:
    """The class of a checkpoint's model, which is that of the bare model where nothing tells of another."""
    name = checkpoint.model_class
    return transformers.AutoModel if name is None else getattr(transformers, name)


def _from_pretrained(model_class: Any, path: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # tensors of other shapes are taken from the report below: transformers' own error names none, but a log
    given = {**LOCAL_ONLY, "ignore_mismatched_sizes": True, **options}
    with foreign(f"transformers cannot load {path}"):
        model, report = model_class.from_pretrained(path, output_loading_info=True, **given)
    if mismatched := sorted(report["mismatched_keys"]):
        raise shape_mismatch(path, *mismatched[0])
    if model_class is transformers.AutoModel:
        missing = report["missing_keys"]
        report["missing_keys"] = {key for key in missing if not any(module in key for module in OPTIONAL)}
    return model, report


def _check_device(name: str) -> None:
    """Refuse a device that torch does not know, or that is not there. `auto` and the like are left to accelerate."""
    try:
        device = torch.device(name)
    except RuntimeError:
        if name in ("auto", "balanced", "sequential"):
            return
        raise CheckpointError(f"there is no device {name!r:.40}. Use cpu, cuda:0 or auto.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CheckpointError(f"there are {torch.cuda.device_count()} GPUs here, and {name} is none. Use cpu.")


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer, which puts nothing behind a text.

    Raises:
        EvaluationError: if the folder has none that transformers can load, or its vocabulary is missing.
        CheckpointError: if it, or the model beside it, needs code of its own.
    """
    check_model_code(checkpoint)
    check_tokenizer_code(checkpoint)
    try:
        with foreign("transformers cannot load a tokenizer", EvaluationError), quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False)
    except EvaluationError as error:
        raise unloadable(error.__cause__ or error, checkpoint.path, checkpoint.name) from None
    checkpoint.check_unchanged()  # so it is of the model that was opened
    with foreign(f"the tokenizer of {checkpoint.name} cannot be used", EvaluationError), quiet():
        check_vocabulary(tokenizer, checkpoint.path, checkpoint.name)
        leave_unended(tokenizer)
    return tokenizer


@contextmanager
def running() -> Iterator[None]:
    """Run a model within this block: what its own code raises becomes one error.

    Its configuration may describe what cannot be computed, such as fewer experts than a token is sent to.

    Raises:
        EvaluationError: with what transformers or torch said.
    """
    with foreign("the model cannot be run as its config.json describes it", EvaluationError):
        yield


def unique_parameter_bytes(model: Any) -> int:
    """Bytes of all parameters, each counted once however many names it has."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and loading reports; errors still come through.

    Blocks of several threads may overlap. The first that begins silences, and the last that ends puts back what it was.
    """
    _SILENCE.begin()
    try:
        yield
    finally:
        _SILENCE.end()


class _Silence:
    """The state of transformers' log and of Python's warnings from before the first of the quiet blocks."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._blocks = 0
        self._before = ExitStack()

    def begin(self) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                logger = transformers.utils.logging
                self._before.callback(logger.set_verbosity, logger.get_verbosity())
                if logger.is_progress_bar_enabled():
                    self._before.callback(logger.enable_progress_bar)
                self._before.enter_context(warnings.catch_warnings())
                logger.set_verbosity(logging.ERROR)
                logger.disable_progress_bar()
                warnings.simplefilter("ignore")

    def end(self) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                self._before.close()


_SILENCE = _Silence()
