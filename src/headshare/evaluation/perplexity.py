"""Perplexity of a text in windows, and for encoders the agreement of their hidden states with the dense model's."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from headshare.architecture.config import text_config
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import EvaluationError
from headshare.integrations.transformers.loading import load_model, load_tokenizer, quiet
from headshare.progress import track

WINDOW = 512
TOGETHER = 2048
"""How many tokens are run at once: fewer leave a device idle, and more take memory for their logits."""

KEPT_BYTES = 4 * 2**30
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "mpnet", "camembert")


@dataclass(frozen=True)
class Windows:
    """A text's tokens in equal windows, and whether each is opened by the beginning-of-text token."""

    tokens: Int[Tensor, "windows window"]
    bos: bool

    @property
    def length(self) -> int:
        """Tokens in one window."""
        return self.tokens.shape[1]


def finite_or_null(data: dict[str, Any]) -> dict[str, Any]:
    """The same with None for every number that JSON cannot hold."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in data.items()
    }


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per predicted token, over windows that do not overlap."""

    perplexity: float
    tokens: int
    window: int
    bos: bool

    def to_dict(self) -> dict[str, Any]:
        """The same under the names that `--json` prints; a perplexity past any float is null."""
        return finite_or_null(asdict(self))


@dataclass(frozen=True)
class Agreement:
    """How an encoder compares with its dense model, over the windows of a text, by mean-pooled last hidden states.

    `cosine` is the mean one between the two models' embeddings of each window. `retrieved` is the share of windows
    whose first half finds its own second half, which is nearer to it by cosine than all others' second halves; and
    `dense_retrieved` the same of the dense model.
    """

    cosine: float
    retrieved: float
    dense_retrieved: float
    tokens: int
    window: int

    def to_dict(self) -> dict[str, Any]:
        """The same under the names that `--json` prints."""
        return asdict(self)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        EvaluationError: if it is missing, empty or not text.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise EvaluationError(f"{path} is empty; there is nothing to measure.")
    return text


def windows_of(
    tokenizer: Any, text: str, *, window: int = WINDOW, limit: int | None = None, bos: bool | None = None
) -> Windows:
    """The text's tokens cut into equal windows, each opened by the beginning-of-text token where the model has one.

    The last, shorter piece is left out. `limit` bounds the tokens of text; `bos` overrides that.

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
    """The text's tokens, none added."""
    with quiet():
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def opening_token(tokenizer: Any, bos: bool | None) -> int | None:
    """The beginning-of-text token that is to open each window; None where none is. `bos` None: if the model has one.

    Raises:
        EvaluationError: if one is asked for and absent.
    """
    first: int | None = tokenizer.bos_token_id
    if bos and first is None:
        raise EvaluationError("this tokenizer has no beginning-of-text token; run without it.")
    return None if bos is False else first


def cut(ids: Sequence[int], window: int, first: int | None) -> Int[Tensor, "windows window"]:
    """The tokens in whole windows, in order, each opened by `first` where there is one; the rest is left out."""
    body = window - (first is not None)
    tokens = torch.tensor(ids[: len(ids) // body * body], dtype=torch.long).view(-1, body)
    return tokens if first is None else functional.pad(tokens, (1, 0), value=first)


def check_window(window: int, longest: int | None = None, option: str = "--window") -> None:
    """Refuse windows that predict nothing, or that are longer than the model reads. `option` is what says how long.

    Raises:
        EvaluationError: in these cases.
    """
    if window < 2:
        raise EvaluationError(f"a window of {window} tokens predicts nothing; use {option} 2 or more.")
    if longest is not None and window > longest:
        raise EvaluationError(
            f"windows of {window} tokens are longer than the model's {longest}. Use {option} {longest}."
        )


def check_vocabulary(config: Mapping[str, Any], tokens: Tensor) -> None:
    """Refuse tokens that the model with this config.json does not have.

    Raises:
        EvaluationError: if there is one.
    """
    vocabulary = text_config(config).get("vocab_size")
    if isinstance(vocabulary, int) and tokens.max() >= vocabulary:
        raise EvaluationError(
            f"the tokenizer gives token {tokens.max()}, but the model's vocabulary has {vocabulary}. "
            "The tokenizer belongs to another model."
        )


def perplexity(model: Any, windows: Windows) -> Perplexity:
    """Windowed perplexity: every token after a window's first is predicted from those before it in the window.

    Log-likelihoods are computed in float32 and summed in float64.

    Raises:
        EvaluationError: if the model is not a causal language model, or its logits are not finite.
    """
    losses = window_losses(model, windows)
    mean, tokens = losses.mean().item(), len(losses) * (windows.length - 1)
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, tokens, windows.length, windows.bos)


@torch.inference_mode()
def window_losses(model: Any, windows: Windows) -> Float[Tensor, " windows"]:
    """What the tokens of each window but the first lose on average, nats; all windows predict as many. Two models'
    losses of the same windows can be compared in pairs.

    Raises:
        EvaluationError: as `perplexity` does.
    """
    _check_causal(model)
    found = zip(_logits_of_all(model, windows), windows.tokens, strict=True)
    losses = [_loss(logits.float(), window) for logits, window in found]
    return torch.tensor(losses, dtype=torch.float64)


class Predictions:
    """What the dense model predicts in each of these windows, to hold other models against. What it says of the first
    windows is kept, as far as `room` bytes reach, so that any number of models costs one run of it.

    Raises:
        EvaluationError: if it predicts no next token.
    """

    def __init__(self, dense: Any, windows: Windows, *, room: int = KEPT_BYTES) -> None:
        _check_causal(dense)
        self.windows = windows
        self._dense, self._room = dense, room
        self._kept: dict[int, Tensor] = {}

    @torch.inference_mode()
    def logits(self, window: int) -> Float[Tensor, "predicted words"]:
        """Of one window, as the dense model gives them.

        Raises:
            EvaluationError: if one is NaN or infinite.
        """
        if window in self._kept:
            return self._kept[window]
        found: Tensor = _logits(self._dense, self.windows.tokens[window][None])[0]
        if found.nbytes <= self._room:
            self._room -= found.nbytes
            self._kept[window] = found.cpu()
        return found


@torch.inference_mode()
def losses_and_divergences(
    model: Any, dense: Predictions
) -> tuple[Float[Tensor, " windows"], Float[Tensor, " windows"]]:
    """The model's `window_losses`, and how far its predictions are from the dense model's in each window, nats a token:
    KL(dense | model) of their next-token distributions. Loss says how well a text is predicted; divergence, how much
    of the dense model is left, whatever the text says.

    Raises:
        EvaluationError: as `perplexity` does, for either.
    """
    _check_causal(model)
    losses, divergences = [], []
    for index, logits in enumerate(_logits_of_all(model, dense.windows)):
        found = logits.float()
        losses.append(_loss(found, dense.windows.tokens[index]))
        wanted = dense.logits(index).to(found.device).float().log_softmax(dim=-1)
        apart = functional.kl_div(found.log_softmax(dim=-1), wanted, reduction="none", log_target=True)
        divergences.append(apart.sum(dim=-1).double().mean().item())
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(divergences, dtype=torch.float64)


def _check_causal(model: Any) -> None:
    if not is_causal(model):
        raise EvaluationError(
            f"{type(model).__name__} does not predict the next token, so it has no perplexity. "
            "For an encoder, compare it with its dense model: headshare eval SHARED --against MODEL --text FILE"
        )


def _logits_of_all(model: Any, windows: Windows) -> Iterator[Float[Tensor, "predicted words"]]:
    """Of one window after the other; several are run at once."""
    batches = torch.split(windows.tokens, max(1, TOGETHER // windows.length))
    for batch in track(batches, "batches of windows", len(batches)):
        yield from _logits(model, batch)


def _logits(model: Any, windows: Int[Tensor, "batch window"]) -> Float[Tensor, "batch predicted words"]:
    tokens = windows.to(next(model.parameters()).device)
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    check_finite(logits)
    return logits


def _loss(logits: Float[Tensor, "predicted words"], window: Int[Tensor, " window"]) -> float:
    return functional.cross_entropy(logits, window[1:].to(logits.device), reduction="none").double().mean().item()


def check_finite(logits: Tensor) -> None:
    """Refuse logits that say nothing.

    Raises:
        EvaluationError: if one is NaN or infinite.
    """
    if not torch.isfinite(logits).all():
        raise EvaluationError("the model's logits are NaN or infinite; its weights are damaged or overflow this dtype.")


def is_causal(model: Any) -> bool:
    """Whether the model predicts the next token."""
    return predicts_next(type(model).__name__, model.config.to_dict())


def predicts_next(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a model class of this name, with this config.json, predicts the next token."""
    named = name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    named = named and not config.get("is_encoder_decoder", False)  # these predict a text from another one
    masked = config.get("model_type") in ("bert", "roberta", "xlm-roberta") and not config.get("is_decoder", False)
    return named and not masked


@torch.inference_mode()
def agreement(model: Any, dense: Any, windows: Windows) -> Agreement:
    """How alike two encoders' sentence embeddings (mean over tokens of the last hidden state) are, and how well each
    finds a window's second half by its first.

    Raises:
        EvaluationError: if the embeddings are of different widths, or not finite.
    """
    widths = [text_config(one.config.to_dict())["hidden_size"] for one in (model, dense)]
    if len(set(widths)) > 1:
        raise EvaluationError(f"embeddings of {widths[0]} and of {widths[1]} numbers cannot be compared.")
    half = windows.length // 2
    pieces = slice(None), slice(half), slice(half, None)
    found = [
        [torch.stack([_embedding(one, window[piece]) for one in (model, dense)]) for piece in pieces]
        for window in track(windows.tokens, "windows", len(windows.tokens))
    ]
    whole, first, second = (torch.stack([window[piece] for window in found]).unbind(1) for piece in range(3))
    cosine = functional.cosine_similarity(whole[0], whole[1], dim=-1).double().mean().item()
    retrieved, dense_retrieved = (_retrieved(one, other) for one, other in zip(first, second, strict=True))
    return Agreement(cosine, retrieved, dense_retrieved, windows.tokens.numel(), windows.length)


def _embedding(model: Any, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, " hidden"]:
    found: Tensor = hidden_states(model, tokens[None])[0].float().mean(dim=0).cpu()
    if not torch.isfinite(found).all():
        raise EvaluationError("an embedding is NaN or infinite; the weights are damaged or overflow this dtype.")
    return found


def _retrieved(first: Float[Tensor, "windows hidden"], second: Float[Tensor, "windows hidden"]) -> float:
    """The share of first halves whose nearest second half is their own."""
    alike = functional.normalize(first, dim=-1) @ functional.normalize(second, dim=-1).T
    return (alike.argmax(dim=1) == torch.arange(len(alike))).double().mean().item()


def hidden_states(model: Any, tokens: Int[Tensor, "batch tokens"]) -> Tensor:
    """Last hidden states, whatever head the model carries. Shape: batch x tokens x hidden."""
    out = model(input_ids=tokens.to(next(model.parameters()).device), output_hidden_states=True)
    return out.hidden_states[-1]  # type: ignore[no-any-return]


def evaluate(
    checkpoint: Checkpoint,
    text: str,
    *,
    against: Checkpoint | None = None,
    window: int = WINDOW,
    limit: int | None = None,
    bos: bool | None = None,
    **options: Any,
) -> Perplexity | Agreement:
    """Perplexity of the text, or with `against` (for encoders) the agreement of both models' embeddings. `options`,
    such as `dtype` and `device_map`, go to `from_pretrained`.

    Raises:
        EvaluationError, CheckpointError: if the model, its tokenizer or the text cannot be used.
    """
    windows = windows_of(load_tokenizer(checkpoint), text, window=window, limit=limit, bos=bos)
    for one in (checkpoint, *([] if against is None else [against])):
        check_window(window, longest_window(one.config))
        check_vocabulary(one.config, windows.tokens)
    model = load_model(checkpoint, **options)
    if against is not None:
        return agreement(model, load_model(against, **options), windows)
    return perplexity(model, windows)


def longest_window(config: Mapping[str, Any]) -> int | None:
    """How many tokens the model with this config.json can take at once; None where it does not say."""
    settings = text_config(config)
    positions = settings.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    return positions - ((settings.get("pad_token_id") or 0) + 1 if settings["model_type"] in _OFFSET_POSITIONS else 0)
