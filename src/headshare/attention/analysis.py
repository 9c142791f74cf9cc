"""The analysis of a model's attention on some texts, from the checkpoint to the result."""

from collections.abc import Sequence
from pathlib import Path

from headshare.attention.maps import MAP_BYTES, map_products
from headshare.attention.result import AttentionResult, TextMaps
from headshare.attention.weights import similarities
from headshare.calibration.layerwise.numbers import enough_memory
from headshare.calibration.settings import CalibrationSettings
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import EvaluationError

TOKENS = 4096


def attention(
    checkpoint: Checkpoint,
    texts: Sequence[str | Path],
    *,
    tokens: int = TOKENS,
    window: int | None = None,
    seed: int = 0,
    field: str | None = None,
    device: str = "cpu",
    memory: int = MAP_BYTES,
) -> AttentionResult:
    """How alike the attention maps of a dense model's heads are on each of these texts, and their weights beside them.

    Texts are read as `Calibration.load` reads them, about `tokens` of each in windows of `window`. Maps of about
    `memory` bytes are in memory at a time.

    Raises:
        ArchitectureError: if the model's layout is not known, or its attention does not give its maps.
        CalibrationError: if a text cannot be read, is too short, or there is no such device.
        CheckpointError: if the checkpoint is shared or quantised, or its numbers are not finite.
        EvaluationError: if there is no text, or one is named twice.
    """
    names = [str(text) for text in texts]
    if not names:
        raise EvaluationError("attention is measured on text, and none was given. Give one with --text FILE.")
    if len(set(names)) < len(names):
        raise EvaluationError(f"{max(names, key=names.count)} was given twice. Name each text once.")
    checkpoint.require_dense("compare the heads of")
    measured = []
    for name in names:
        settings = CalibrationSettings(name, tokens=tokens, window=window, seed=seed, field=field, device=device)
        calibration = settings.load(checkpoint)
        with enough_memory(settings.device_name):
            products = map_products(checkpoint, calibration.tokens, device=settings.device_name, memory=memory)
        measured.append(TextMaps.of(_name(name), calibration.tokens.shape[1], products))
    weights = similarities(checkpoint)
    heads = len(measured[0].heads) // checkpoint.layouts.attention.layers
    return AttentionResult(
        _name(checkpoint.name),
        str(checkpoint.config.get("model_type", "unknown")),
        checkpoint.layouts.attention.layers,
        heads,
        tuple(measured),
        weights,
    )


def _name(path: str) -> str:
    """The last step of a path, a hub id, or the name of a data set."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2] or path
