"""The command push, against an imitation of the hub on this machine."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from headshare.integrations import hub as ours
from support.command_line import Run, assert_one_error_line
from support.hub import TOKEN, Hub, imitated


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with imitated() as hub:
        monkeypatch.setattr(ours, "HfApi", lambda: HfApi(endpoint=hub.address, token=TOKEN))
        monkeypatch.setattr(ours, "get_token", lambda: TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture
def licensed(shared: Path) -> Path:
    """A shared folder whose card names a base model and a licence, and beside whose files a private note lies."""
    card = shared / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: apache-2.0\nbase_model: someone/dense\n", 1))
    (shared / "notes.txt").write_text("mine")
    return shared


def test_push_uploads_what_headshare_wrote_and_nothing_else(licensed: Path, hub: Hub, run: Run) -> None:
    done = run("push", licensed, "someone/small", "--private")
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1] == f"Pushed: {hub.address}/someone/small"
    assert "base model someone/dense, licence apache-2.0" in done.out
    assert [(one["name"], one["organization"], one["visibility"]) for one in hub.made] == [
        ("small", "someone", "private")
    ]
    assert hub.commits == ["Upload with headshare on main"]
    there = {path.name: path.read_bytes() for path in licensed.iterdir() if path.name != "notes.txt"}
    assert hub.files == there
    assert b"tags: [headshare]" in hub.files["README.md"]


def test_public_or_private_is_the_hubs_to_say_unless_told(licensed: Path, hub: Hub, run: Run) -> None:
    assert run("push", licensed, "someone/small", "--json").data["license"] == "apache-2.0"
    assert not {"private", "visibility"} & hub.made[0].keys()


def test_a_dry_run_reaches_nobody(licensed: Path, hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "get_token", lambda: None)
    data = run("push", licensed, "someone/small", "--dry-run", "--json").data
    assert data["address"] is None
    assert data["bytes"] == sum((licensed / name).stat().st_size for name in data["files"])
    assert "notes.txt" not in data["files"]
    assert hub.made == []


def test_what_cannot_be_pushed_is_one_line(
    licensed: Path, hub: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(said: str, *words: object) -> None:
        found = run("push", *words)
        assert_one_error_line(found)
        assert said in found.err, found.err
        assert hub.files == {}

    refused("nothing can be pushed to 'a/b/c'", licensed, "a/b/c")
    refused("403", licensed, "nobody/small")
    refused("has no headshare.json", tmp_path, "someone/small")
    with monkeypatch.context() as patch:
        patch.setattr(ours, "get_token", lambda: None)
        refused("hf auth login", licensed, "someone/small")
    with monkeypatch.context() as patch:
        patch.setattr(ours, "HfApi", lambda: HfApi(endpoint=hub.address, token="hf_wrong"))
        refused("401", licensed, "someone/small")
    card = licensed / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0\n", ""))
    refused("names no licence", licensed, "someone/small")
    weights = licensed / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    refused("is not as it was written", licensed, "someone/small")
