"""Windows to train on: documents packed end to end. A window has its opening token, as in measuring."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CalibrationError, EvaluationError, TrainingError
from headshare.integrations.transformers.loading import load_tokenizer
from headshare.text.documents import DATA_SET, data_set_rows, documents_of
from headshare.text.formats import Format, check_field, format_of, rows_in
from headshare.text.windows import check_vocabulary, check_window, ids_of, longest_window, opening_token, window_for
from headshare.training.settings import TrainingText

CONTEXT = 1024
PIECE = 2**20  # characters that are tokenized together

Window = Int[Tensor, " context"]


class Packed(Dataset[dict[str, Tensor]]):
    """Windows that lie in memory."""

    def __init__(self, tokens: Int[Tensor, "windows context"]) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return _example(self.tokens[number])


class Streamed(IterableDataset[dict[str, Tensor]]):
    """Windows that are read over and over, in their order, without the first few, which are held out.

    They have no end, so that a run which goes on finds its place by counting. `beginning` has the first windows, by
    which this text is told from others.
    """

    def __init__(
        self,
        windows: Callable[[], Iterator[Window]],
        held_out: int,
        limit: int | None,
        beginning: Int[Tensor, "windows context"],
    ) -> None:
        self.beginning = beginning
        self.windows = windows
        self.first = held_out
        self.last = None if limit is None else held_out + limit

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from map(_example, islice(self.windows(), self.first, self.last))


def _example(window: Window) -> dict[str, Tensor]:
    tokens = window.long()
    return {"input_ids": tokens, "labels": tokens}


def sized_for(checkpoint: Checkpoint, text: TrainingText) -> TrainingText:
    """The text with a length of windows that the model reads, where none was given."""
    return text.model_copy(update={"context": window_for(text.context, checkpoint.config, most=CONTEXT)})


def training_windows(checkpoint: Checkpoint, text: TrainingText) -> tuple[Packed | Streamed, Packed]:
    """Windows to train on, and windows held out.

    Raises:
        TrainingError: if the text is missing, empty, shorter than the windows that are asked for, or not this model's.
    """
    kept: Packed | Streamed
    try:
        text = sized_for(checkpoint, text)
        assert text.context is not None
        check_window(text.context, longest_window(checkpoint.config), "--context")
        check_field(text.field, text.data, text.held_out_data)
        read = _reader(checkpoint, text, text.data)
        # windows are held out from the beginning of a stream, as it has no known end; else from the end
        if text.stream:
            apart = 0 if text.held_out_data else text.held_out
            first = _first(read(), apart + 1, text.data)
            kept = Streamed(read, apart, text.limit, first)
            held_out = first[:apart]
        else:
            more = 0 if text.held_out_data else text.held_out
            tokens = _first(read(), None if text.limit is None else text.limit + more, text.data, least=1)
            apart = 0 if text.held_out_data else _held_out(len(tokens), text)
            kept = Packed(tokens[: len(tokens) - apart][: text.limit])
            held_out = tokens[len(tokens) - apart :]
        if text.held_out_data:
            other = _reader(checkpoint, text, text.held_out_data)
            held_out = _first(other(), text.held_out, text.held_out_data, least=1)
        for tokens in (held_out, kept.beginning if isinstance(kept, Streamed) else kept.tokens):
            check_vocabulary(checkpoint.config, tokens)
    except (EvaluationError, CalibrationError) as error:
        raise TrainingError(str(error)) from error
    return kept, Packed(held_out)


def _held_out(windows: int, text: TrainingText) -> int:
    """The number of windows that are held out: as many as asked, but an eighth at most."""
    if windows < 2:
        raise TrainingError(
            f"{text.data} gives {windows} window of {text.context} tokens; training needs one and another held out. "
            "Use a longer text, a shorter context, or name a text to measure on."
        )
    return min(text.held_out, max(1, windows // 8))


def _first(
    windows: Iterator[Window], most: int | None, source: str, *, least: int | None = None
) -> Int[Tensor, "windows context"]:
    first = list(islice(windows, most))
    needed = most or 1 if least is None else least
    if len(first) < needed:
        raise TrainingError(
            f"{source} gives {len(first)} whole windows, and {needed} are needed at least. Use a longer text or a "
            "shorter context."
        )
    return torch.stack(first)


def _reader(checkpoint: Checkpoint, text: TrainingText, source: str) -> Callable[[], Iterator[Window]]:
    """A function that reads the windows of a source, from its beginning each time."""
    tokenizer = load_tokenizer(checkpoint)
    first = opening_token(tokenizer, None)
    path = None if source.startswith(DATA_SET) else Path(source)
    if path is not None:
        format_of(path)  # there is such a file, of a format that is read
    context = text.context or CONTEXT
    return lambda: _windows(_ids(source, tokenizer, text.field), context, first)


def _windows(pieces: Iterator[list[int]], context: int, first: int | None) -> Iterator[Window]:
    """The whole windows of these tokens, one after the other."""
    opening = [] if first is None else [first]
    body = context - len(opening)
    waiting = list[int]()
    for piece in pieces:
        waiting += piece
        whole = len(waiting) // body * body
        for start in range(0, whole, body):
            yield torch.tensor(opening + waiting[start : start + body], dtype=torch.int32)
        del waiting[:whole]


def _ids(source: str, tokenizer: Any, field: str | None) -> Iterator[list[int]]:
    """Tokens of all documents, each ended by the end-of-text token, or by a line's end where there is none."""
    last = tokenizer.eos_token_id
    end = ids_of(tokenizer, "\n") if last is None else [last]
    if not source.startswith(DATA_SET) and format_of(Path(source)) is Format.TEXT:
        yield from (ids_of(tokenizer, piece) for piece in _pieces(Path(source)))
        return
    rows = data_set_rows(source) if source.startswith(DATA_SET) else rows_in(Path(source))
    yield from (ids_of(tokenizer, text) + end for text in documents_of(rows, field) if text.strip())


def _pieces(path: Path) -> Iterator[str]:
    """Pieces of a text file, which end where lines do."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.read(PIECE):
                yield piece + file.readline(PIECE)
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read as UTF-8 text: {error}") from None
