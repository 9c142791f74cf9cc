"""Calibrated commands, and the folder that they run in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXT = ["--calibration", "text", "--calibration-window", "16", "--calibration-tokens", "256"]
BY_OUTPUT = ["share", "model", "out", "--match", "output", "--parts", "qkv", "--refit", *TEXT]
REFIT = ["refit", "shared", *TEXT]
PLAN = ["plan", "model", "-o", "plan.json", "--save", "3%", "--allow", "remove", *TEXT]


def copy_of(folder: Path, out: Path) -> Path:
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    edit(out, lambda entry: entry.update(base_model="model"))
    (out / "headshare.json").unlink()  # its digest of config.json is of the other name
    return out


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def entry_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert isinstance(found, dict)
    return found
