"""Hostile inputs of training: its texts, its settings, and the state of a run that was stopped."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from fuzz.mutate import as_json, mutate_bytes, mutate_json, rewrite
from fuzz.run_here import Words, run_here
from headshare.files.resume import HEADER
from headshare.training import run as training_run

TRAIN: Words = (
    "train", "model", "out", "--context", "16", "--held-out", "2", "--max_steps", "3", "--eval_steps", "1", "--use_cpu"
)  # fmt: skip
STATE = ".out.headshare-training"
TEXTS = ("words", "words.jsonl", "words.json", "words.csv", "words.txt")
SETTINGS = "settings.yaml"


class _StoppedError(KeyboardInterrupt):
    """A person who stops a run of training before its last step's output is written."""


def add_training(place: Path) -> None:
    """Texts of all formats, settings, and the state of a run that can be gone on from."""
    lines = (place / "text").read_text().split("w9")
    (place / "words").write_text((place / "text").read_text())
    (place / "words.txt").write_text((place / "text").read_text())
    (place / "words.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    (place / "words.json").write_text(json.dumps([{"text": line} for line in lines]))
    (place / "words.csv").write_text("text,more\n" + "".join(f'"{line}",x\n' for line in lines))
    (place / SETTINGS).write_text(
        "text: {data: words, context: 16, held_out: 2}\nsharing: {ratio: 0.3, match: qk, parts: qkv, mode: star}\n"
        "loss: {gamma: 0.5, lm: 1.0, distance: frobenius, distill: 0.0, temperature: 1.0}\n"
        "learning: {lora: 0, patience: 3, arguments: {max_steps: 2, eval_steps: 1, use_cpu: true, "
        "learning_rate: 1.0e-4, optim: adamw_torch, lr_scheduler_type: linear, warmup_steps: 0, weight_decay: 0.1}}\n"
        "seed: 0\ndtype: float32\nmethod: postshare\n"
    )
    with patch.object(training_run._TrainingRun, "_save", side_effect=_StoppedError):
        run_here((*TRAIN, "--data", "words"), place, status=130)


def training(random: Random, folder: Path) -> Sequence[Words]:
    """Change a text, the settings, or a file of the state that a stopped run left."""
    kind = random.randrange(10)
    if kind < 3:
        name = random.choice(TEXTS)
        rewrite(folder / name, _text(random, folder / name))
        return (
            (*TRAIN, "--data", name), (*TRAIN, "--data", name, "--stream", "--held-out-data", "text"),
            (*TRAIN, "--data", "text", "--held-out-data", name), (*TRAIN, "--data", name, "--field", "text"),
        )  # fmt: skip
    if kind < 5:
        path = folder / SETTINGS
        if random.random() < 0.7:  # JSON is YAML
            import yaml

            changed = as_json(mutate_json(random, yaml.safe_load(path.read_bytes()), LEARNING))
        else:
            changed = mutate_bytes(random, path.read_bytes())
        rewrite(path, changed)
        return (("train", "model", "out", "--config", SETTINGS),)
    _state(random, folder / STATE)
    return ((*TRAIN, "--data", "words"),)


LEARNING: list[tuple[str, Sequence[Any]]] = [
    ("learning", ({}, {"arguments": {"optim": "adafactor", "max_steps": 1, "use_cpu": True}}, {"lora": 10**9})),
    ("text", ({"data": "words"}, {"data": "words", "context": 10**9}, {"data": "words", "held_out": -1})),
    ("tasks", ({"names": ["piqa"], "data_dir": "data", "limit": 1}, {"names": []})),
    ("method", ("dense", "both", "recover", "postshare")),
    ("dtype", ("bfloat16", "float16")),
]


def _text(random: Random, path: Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix in (".jsonl", ".json") and random.random() < 0.6:
        lines = raw.split(b"\n")
        at = random.randrange(len(lines))
        lines[at] = as_json(mutate_json(random, json.loads(lines[at])))
        return b"\n".join(lines)
    return mutate_bytes(random, raw)


def _state(random: Random, state: Path) -> None:
    """Change a file of a state; the header's digest, and often a checkpoint's digests, then agree with the change."""
    files = sorted(path for path in state.rglob("*") if path.is_file())
    for path in files:
        rewrite(path, path.read_bytes())  # a run that goes on writes there, and links would be the good folder's
    path = random.choice([file for file in files if file.stat().st_size])
    raw = path.read_bytes()
    if path.name == HEADER:
        content = as_json(mutate_json(random, json.loads(raw[:-32])))
        path.write_bytes(content + hashlib.sha256(content).digest())
        return
    whole = path.suffix == ".json" and random.random() < 0.8
    path.write_bytes(as_json(mutate_json(random, json.loads(raw))) if whole else mutate_bytes(random, raw))
    listed = path.parent / "digests.json"
    if path != listed and listed.is_file() and random.random() < 0.8:
        digests = json.loads(listed.read_bytes())
        digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        listed.write_bytes(as_json(digests))
