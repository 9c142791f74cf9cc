"""Calibration tokens in equal windows: from a text, from rows of documents, or written by the model itself.

The part of a source that is read is in proportion to the tokens that are asked for, however large the source is: at
most `BYTES_PER_TOKEN` bytes for each token, but whole rows. A larger file is cut into as many equal parts as windows
are asked for, and one stretch at a random place in each part is read. A document that reaches over many parts gives
more of its beginning. A data set, a table and a JSON array are read from their first document on.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.defaults import TOKENS
from headshare.errors import CalibrationError, EvaluationError
from headshare.files.untrusted import is_file
from headshare.integrations.transformers.loading import load_tokenizer
from headshare.short import short, tail
from headshare.text.documents import (
    DATA_SET,
    MIX,
    MIX_FILE,
    SELF,
    SOURCES,
    data_set_rows,
    documents_of,
    json_rows,
    text_of,
)
from headshare.text.formats import Format, check_field, format_of, rows_in
from headshare.text.windows import (
    check_vocabulary,
    check_window,
    cut,
    ids_of,
    longest_window,
    opening_token,
    window_for,
)
from headshare.text.written import AFTER_TEXT, first_tokens, written_after

LOGGER = logging.getLogger("headshare")
# About four times what English takes, so that there are windows to choose from.
BYTES_PER_TOKEN = 16
# A window that the model writes, going on from the text, begins with this part of one of the text's.
PROMPT = 0.125


@dataclass(frozen=True)
class Calibration:
    """Calibration tokens in equal windows, each opened by the beginning-of-text token if `bos` is true.

    `source` describes the text that they came from; `seed` is the one that chose them.
    """

    tokens: Int[Tensor, "windows window"]
    bos: bool
    source: str
    seed: int

    def __repr__(self) -> str:
        count, window = self.tokens.shape
        return short(self, f"{count} windows of {window} tokens", tail(self.source), f"seed {self.seed}")

    @classmethod
    def load(
        cls,
        source: str | Path,
        checkpoint: Checkpoint,
        *,
        tokens: int = TOKENS,
        window: int | None = None,
        seed: int = 0,
        field: str | None = None,
        bos: bool | None = None,
        device: str | None = None,
    ) -> "Calibration":
        """Load the calibration tokens of a source: `tokens // window` windows, or all that it has if there are fewer.

        A window has 512 tokens by default, or as many as the model reads at once if those are fewer.

        Sources:
            a text file in UTF-8;
            a .jsonl file with a document a line, its text under `field` (default: `text`, else the only field that is
                a string); or a .json file with an array of such objects, or a .csv file with a heading;
            `self`: text that the model writes, sampled at temperature 1 from the beginning-of-text token, or from a
                random token where there is none; the model goes on past every end of text, and runs on `device`
                (default: where it loads);
            `mix`: texts of several kinds that come with headshare: prose, speeches, manuals, code, web pages, questions
                and seventeen languages;
            `hf:NAME[:CONFIG][:SPLIT]`: the first documents of a data set (default: of `train`), read through the
                `datasets` library; no code that a data set brings along is run.

        Documents are joined by the end-of-text token, or a line's end where the tokenizer has none. The windows are
        chosen at random among all whole ones, and stay in their order; one seed gives one choice. `bos` opens each with
        the beginning-of-text token (default: if the model has one). A source with fewer windows gives all of them, and
        says so in the log.

        Raises:
            CalibrationError: if there is no such source, it cannot be read, it holds less than one window, or the
                tokenizer, the model or the window do not fit.
            CheckpointError: if the model cannot be loaded to write.
        """
        try:
            # Options that do not fit are refused before the tokenizer or the model is loaded.
            window = window_for(window, checkpoint.config)
            check_window(window, longest_window(checkpoint.config), "--calibration-window")
            if tokens < window:
                raise CalibrationError(
                    f"{tokens} tokens are less than one window of {window}; ask for at least {window}."
                )
            check_field(field, source)
            tokenizer = load_tokenizer(checkpoint)
            first = opening_token(tokenizer, bos)
            # The model writes as many windows as are asked for; of a text, windows are chosen among those it has.
            if source == SELF:
                starts = first_tokens(checkpoint, tokenizer, first, tokens // window, seed)
                windows = written_after(starts, checkpoint, window, seed, device)
                name = f"text written by {checkpoint.name}"
            else:
                runs = _runs(MIX_FILE if source == MIX else source, tokenizer, tokens // window, window, field, seed)
                windows = _chosen(runs, str(source), tokens // window, window, first, seed)
                name = "headshare's mix of texts" if source == MIX else str(source)
            check_vocabulary(checkpoint.config, windows)
        except EvaluationError as error:  # a text that hinders measuring hinders calibrating
            raise CalibrationError(str(error)) from error
        return cls(windows, first is not None, name, seed)

    @property
    def digest(self) -> str:
        """SHA-256 of the shape, of `bos` and of the tokens as 64-bit integers, lowest byte first.

        Equal tokens have equal digests, whatever source they came from.
        """
        digest = hashlib.sha256(f"{tuple(self.tokens.shape)} {self.bos}".encode())
        digest.update(self.tokens.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def mixed(self) -> "Calibration":
        """The calibration with its windows in an order drawn by the seed, so that the first ones represent it all."""
        return replace(self, tokens=self.tokens[_shuffled(len(self.tokens), self.seed)])

    def continued(self, checkpoint: Checkpoint, windows: int, *, device: str | None = None) -> "Calibration":
        """Windows that the model writes, going on from this text: a calibration of another so many.

        Each begins with the last eighth of one of these windows, in turns, and goes on as the model does at temperature
        1. The first token stays the beginning-of-text token, where windows are opened by it.

        Raises:
            CalibrationError: if the model writes no text.
            CheckpointError: if it cannot be loaded.
        """
        window = self.tokens.shape[1]
        length = max(1 + self.bos, int(window * PROMPT))
        begun = self.tokens[torch.arange(windows) % len(self.tokens)]
        starts = torch.cat([begun[:, : int(self.bos)], begun[:, window - length + self.bos :]], dim=1)
        source = f"text that {checkpoint.name} writes after {self.source}"
        written = written_after(starts, checkpoint, window, self.seed, device, AFTER_TEXT)
        return replace(self, tokens=written, source=source)

    def split(self, held_out: float = 0.125) -> tuple["Calibration", "Calibration"]:
        """Two calibrations: the windows to fit on, and the share `held_out` of all windows.

        The seed chooses the windows held out. Both parts are in text order, and neither is empty.

        Raises:
            CalibrationError: if there are fewer than two windows, or the share is not between 0 and 1.
        """
        windows = len(self.tokens)
        if not 0 < held_out < 1:
            raise CalibrationError(f"the share held out is {held_out}; it must lie between 0 and 1, such as 0.125.")
        if windows < 2:
            raise CalibrationError(
                f"{self.source} gave {windows} window, which cannot be split into windows to fit on and windows held "
                "out. Ask for at least two windows' worth of tokens, or for a smaller window."
            )
        held = torch.zeros(windows, dtype=torch.bool)
        held[_choice(min(max(round(windows * held_out), 1), windows - 1), windows, self.seed)] = True
        return replace(self, tokens=self.tokens[~held]), replace(self, tokens=self.tokens[held])


# ---- choosing windows


def _choice(count: int, among: int, seed: int) -> Int[Tensor, " count"]:
    """Different indices, this many of `among`, drawn by the seed and sorted."""
    return _shuffled(among, seed)[:count].sort().values


def _shuffled(count: int, seed: int) -> Int[Tensor, " count"]:
    """The indices from 0 on, in an order that the seed draws."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _chosen(
    runs: Iterable[list[int]], source: str, count: int, window: int, first: int | None, seed: int
) -> Int[Tensor, "windows window"]:
    """Windows chosen at random from these runs of tokens, in order. No window reaches over the end of a run."""
    total = 0
    pieces = []
    for run in runs:
        total += len(run)
        pieces.append(cut(run, window, first))
    windows = torch.cat(pieces)
    if len(windows) == 0:
        raise CalibrationError(
            f"{source} gives {total} tokens, less than one window of {window}. Use a longer text or a smaller window."
        )
    if len(windows) < count:
        LOGGER.warning(
            "%s gives %d windows of %d tokens (%d tokens); %d windows were asked for. All of them are used.",
            *(source, len(windows), window, windows.numel(), count),
        )
        return windows
    return windows[_choice(count, len(windows), seed)]


# ---- reading


def _runs(
    source: str | Path, tokenizer: Any, count: int, window: int, field: str | None, seed: int
) -> Iterator[list[int]]:
    """Runs of consecutive tokens: one for each stretch of a file, or one for a whole data set."""
    length = window * BYTES_PER_TOKEN
    if str(source).startswith(DATA_SET):
        yield _joined(documents_of(data_set_rows(str(source)), field), tokenizer, count * length)[0]
        return
    path = Path(source)
    try:
        if not is_file(path):
            hint = "" if path.suffix or path.exists() else f" For a data set of that name: {DATA_SET}{source}"
            raise CalibrationError(f"there is no file {str(source)!r:.300}. Calibration takes {SOURCES}.{hint}")
        stretches = _stretches(path.stat().st_size, length, count, seed)
        match format_of(path):
            case Format.TEXT:
                yield from (ids_of(tokenizer, text_of(path, start, stop)) for start, stop in stretches)
            case Format.LINES:
                yield from _runs_of_rows(path, stretches, tokenizer, field)
            case _:  # rows that can only be found one after the other
                yield _joined(documents_of(rows_in(path), field), tokenizer, count * length)[0]
    except OSError as error:
        raise CalibrationError(f"{str(path)!r:.300} cannot be read: {error.strerror or error}.") from None


def _stretches(size: int, length: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Stretches of a file, as (start, stop) in bytes: all of it, or `length` bytes in each of `count` equal parts.

    The first stretch of a larger file is its beginning; the others lie at random places of their parts.
    """
    if size <= length * count:
        return [(0, size)]
    part = size / count
    places = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
    starts = [int(number * part + place * (part - length)) for number, place in enumerate(places)]
    return [(start, start + length) for start in (0, *starts[1:])]


def _runs_of_rows(
    path: Path, stretches: list[tuple[int, int]], tokenizer: Any, field: str | None
) -> Iterator[list[int]]:
    """Runs of the tokens of the documents in each stretch.

    Stretches are read backwards: characters that a stretch inside a long document cannot use are left to the stretch in
    which that document begins.
    """
    runs = []
    limit = 0
    end = path.stat().st_size
    for start, stop in reversed(stretches):
        rows = json_rows(path, start, stop, end)
        run, limit = _joined(documents_of(rows, field), tokenizer, limit + stop - start)
        runs.append(run)
        end = start
    return reversed(runs)


def _joined(documents: Iterable[str], tokenizer: Any, limit: int) -> tuple[list[int], int]:
    """Tokens of the documents up to `limit` characters, joined by the end-of-text token; and the characters left."""
    last = tokenizer.eos_token_id
    separator = ids_of(tokenizer, "\n") if last is None else [last]
    run: list[int] = []
    for document in documents:
        if document.strip():
            run += (separator if run else []) + ids_of(tokenizer, document[:limit])
        limit = max(limit - len(document), 0)
        if limit == 0:
            break
    return run, limit
