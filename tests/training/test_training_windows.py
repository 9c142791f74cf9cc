"""Windows to train on and windows held out, from files and from streams."""

import json
from itertools import islice
from pathlib import Path as Folder

import pytest
import torch

import headshare as hs
from headshare.training import train
from headshare.training.windows import Packed, training_windows
from support import tiny
from support.texts import a_text
from support.trainings import settings


def test_windows_are_the_text_and_what_is_held_out_is_its_end(model: Folder, text: Folder) -> None:
    checkpoint = hs.open_checkpoint(model)
    kept, held = training_windows(checkpoint, settings(text).text)
    assert isinstance(kept, Packed)
    words = text.read_text().split()
    together = torch.cat([kept.tokens, held.tokens])
    assert (together[:, 0] == 1).all()
    assert [f"w{token}" for token in together[:, 1:].flatten().tolist()] == words[: together[:, 1:].numel()]
    assert (len(kept), len(held)) == (36, 4)


def test_rows_are_packed_with_an_end_after_each(model: Folder, tmp_path: Folder) -> None:
    rows = [{"text": "w5 w6 w7"}, {"text": "w8"}] * 40
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept, held = training_windows(hs.open_checkpoint(model), settings(tmp_path / "rows.jsonl").text)
    together = torch.cat([kept.tokens, held.tokens])[:, 1:].flatten()  # type: ignore[union-attr]
    assert together.tolist() == ([5, 6, 7, 2, 8, 2] * 40)[: together.numel()]


def test_a_stream_gives_what_the_file_gives_less_its_beginning(model: Folder, text: Folder) -> None:
    checkpoint = hs.open_checkpoint(model)
    whole, end = training_windows(checkpoint, settings(text).text)
    streamed, first = training_windows(checkpoint, settings(text, text={"stream": True, "limit": 20}).text)
    every = torch.cat([whole.tokens, end.tokens])  # type: ignore[union-attr]
    assert first.tokens.equal(every[:4])
    found = torch.stack([one["input_ids"] for one in islice(streamed, 50)])
    assert found.equal(torch.cat([every[4:24]] * 3)[:50].long())


@pytest.mark.parametrize("held", [False, True])
def test_a_limit_is_kept(held: bool, model: Folder, text: Folder, tmp_path: Folder) -> None:
    other = {"held_out_data": str(a_text(tmp_path / "other.txt", words=100, seed=1))} if held else {}
    checkpoint = hs.open_checkpoint(model)
    kept, apart = training_windows(checkpoint, settings(text, text={"limit": 5, "held_out": 20, **other}).text)
    every, _ = training_windows(checkpoint, settings(text).text)
    assert isinstance(kept, Packed)
    assert isinstance(every, Packed)
    assert len(kept) == 5
    assert kept.tokens.equal(every.tokens[:5])
    assert len(apart) == (6 if held else 3)


def test_a_stream_is_trained_on(model: Folder, text: Folder, tmp_path: Folder) -> None:
    """Over and over: it has 36 windows, and 64 are taken."""
    found = train(model, tmp_path / "out", settings(text, text={"stream": True}, arguments={"max_steps": 8}))
    assert found.steps == 8
    assert hs.load(tmp_path / "out")(input_ids=tiny.tokens()).logits.isfinite().all()
