"""Windows of tokens cut from a text, and the checks that a model can read them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from headshare.architecture.config import text_config
from headshare.architecture.families import family_of
from headshare.architecture.model_class import predicts_next
from headshare.errors import CalibrationError, EvaluationError
from headshare.files.untrusted import foreign
from headshare.integrations.transformers.loading import quiet
from headshare.text.formats import documents_in

WINDOW = 512


@dataclass(frozen=True)
class Windows:
    """Tokens of a text in equal windows; `bos` is true if each is opened by the beginning-of-text token."""

    tokens: Int[Tensor, "windows window"]
    bos: bool

    @property
    def length(self) -> int:
        """The number of tokens in one window."""
        return self.tokens.shape[1]


def finite_or_null(data: dict[str, Any]) -> dict[str, Any]:
    """A copy of the data with None for every number that JSON cannot hold."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in data.items()
    }


def read_text(path: str | Path, field: str | None = None) -> str:
    """The text of a UTF-8 file; of a file of rows, the documents under `field`, with an empty line between them.

    Raises:
        EvaluationError: if it is missing, empty or not text, or a row has no text.
    """
    try:
        text = "\n\n".join(documents_in(Path(path), field))
    except CalibrationError as error:
        raise EvaluationError(str(error)) from None
    if not text.strip():
        raise EvaluationError(f"{path} is empty; there is nothing to measure.")
    return text


def windows_of(
    tokenizer: Any, text: str, *, window: int = WINDOW, limit: int | None = None, bos: bool | None = None
) -> Windows:
    """The tokens of a text in equal windows, each opened by the beginning-of-text token where the model has one.

    The last, shorter piece is left out. `limit` bounds the tokens of text. `bos` opens the windows, or leaves them as
    they are, whatever the model has.

    Raises:
        EvaluationError: if the text is shorter than one window, or a beginning-of-text token is asked for and absent.
    """
    if limit is not None and limit < 1:
        raise EvaluationError(f"a limit of {limit} tokens leaves nothing to measure; use at least one window's worth.")
    check_window(window)
    first = opening_token(tokenizer, bos)
    ids = ids_of(tokenizer, text)[:limit]
    tokens = cut(ids, window, first)
    if len(tokens) == 0:
        raise EvaluationError(
            f"the text has {len(ids)} tokens, less than one window of {window}. "
            "Use a longer text, a smaller window, or more tokens of it."
        )
    return Windows(tokens, first is not None)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without special tokens."""
    with foreign("the model's tokenizer cannot read a text", EvaluationError, "Its files are damaged."), quiet():
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def opening_token(tokenizer: Any, bos: bool | None) -> int | None:
    """The beginning-of-text token that opens each window, or None.

    With `bos` None, windows are opened if the tokenizer has such a token.

    Raises:
        EvaluationError: if one is asked for and absent.
    """
    first: int | None = tokenizer.bos_token_id
    if bos and first is None:
        raise EvaluationError("this tokenizer has no beginning-of-text token; run without it.")
    return None if bos is False else first


def cut(ids: Sequence[int], window: int, first: int | None) -> Int[Tensor, "windows window"]:
    """The tokens in whole windows, in order, each opened by `first` unless that is None. The rest is left out."""
    body = window - (first is not None)
    tokens = torch.tensor(ids[: len(ids) // body * body], dtype=torch.long).view(-1, body)
    return tokens if first is None else functional.pad(tokens, (1, 0), value=first)


def window_for(given: int | None, *configs: Mapping[str, Any], most: int = WINDOW) -> int:
    """The tokens in a window: those given, or else `most`, but no more than the models with these config.json read."""
    if given is not None:
        return given
    return min([most, *(longest for config in configs if (longest := longest_window(config)) is not None)])


def check_window(window: int, longest: int | None = None, option: str = "--window") -> None:
    """Refuse windows that predict nothing, or that are longer than the model can read.

    `option` is the command line's option for the length, which errors name.

    Raises:
        EvaluationError: if the windows are too short or too long.
    """
    if window < 2:
        raise EvaluationError(f"a window of {window} tokens predicts nothing; use {option} 2 or more.")
    if longest is not None and window > longest:
        raise EvaluationError(
            f"windows of {window} tokens are longer than the model's {longest}. Use {option} {longest}."
        )


def check_vocabulary(config: Mapping[str, Any], tokens: Tensor) -> None:
    """Refuse tokens that are not in the vocabulary of the model with this config.json.

    Raises:
        EvaluationError: if there is such a token.
    """
    vocabulary = text_config(config).get("vocab_size")
    if isinstance(vocabulary, int) and tokens.max() >= vocabulary:
        raise EvaluationError(
            f"the tokenizer gives token {tokens.max()}, but the model's vocabulary has {vocabulary}. "
            "The tokenizer belongs to another model."
        )


def check_finite(logits: Tensor) -> None:
    """Refuse logits that are not finite.

    Raises:
        EvaluationError: if a logit is NaN or infinite.
    """
    if not torch.isfinite(logits).all():
        raise EvaluationError("the model's logits are NaN or infinite; its weights are damaged or overflow this dtype.")


def is_causal(model: Any) -> bool:
    """Whether the model predicts the next token."""
    return predicts_next(type(model).__name__, model.config.to_dict())


def not_causal(model: Any) -> str:
    """The reason why a model predicts no next token, as the beginning of a sentence."""
    name = type(model).__name__
    if lacks_head(model):
        return f"{name} is a model without a head (its checkpoint has no weights for one), and predicts no next token"
    return f"{name} does not predict the next token"


def lacks_head(model: Any) -> bool:
    """Whether a model is the bare one of a family that predicts the next token."""
    family = family_of(str(model.config.to_dict().get("model_type")))
    return family is not None and not family.encoder and type(model).__name__.endswith("Model")


def longest_window(config: Mapping[str, Any]) -> int | None:
    """The number of tokens that the model with this config.json can read at once; None where it does not say."""
    settings = text_config(config)
    positions = settings.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    family = family_of(str(settings.get("model_type")))
    if family is None or not family.offset_positions:
        return positions
    return positions - ((settings.get("pad_token_id") or 0) + 1)
