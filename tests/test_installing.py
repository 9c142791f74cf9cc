"""The command in messages installs an extra, in the way in which headshare was installed."""

import json
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

import headshare as hs
from headshare import installing
from headshare.files import lock
from headshare.integrations.transformers.loading import load_model

CHECKOUT = Path(installing.__file__).parents[2]


@pytest.mark.parametrize(
    ("written", "command"),
    [
        (None, 'pip install "headshare[eval]"'),
        ("no JSON", 'pip install "headshare[eval]"'),
        ({"url": "file:///a%20b", "dir_info": {"editable": True}}, 'pip install -e "/a b[eval]"'),
        ({"url": "file:///a", "dir_info": {}}, 'pip install "/a[eval]"'),
        ({"url": "https://h/r", "vcs_info": {"vcs": "git"}}, 'pip install "headshare[eval] @ git+https://h/r"'),
        ({"url": "https://h/w.whl", "archive_info": {}}, 'pip install "headshare[eval] @ https://h/w.whl"'),
    ],
)
def test_an_extra_is_installed_from_where_headshare_came(
    written: Any, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return json.dumps(written) if isinstance(written, dict) else written

    monkeypatch.setattr(installing, "distribution", lambda _: Installed())
    assert installing.install("eval") == command


def test_sources_that_nobody_installed_are_installed_from_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installing, "distribution", missing)
    monkeypatch.chdir("/")
    assert installing.install("eval") == f'pip install -e "{CHECKOUT}[eval]"'
    monkeypatch.chdir(CHECKOUT)
    assert installing.install("eval") == 'pip install -e ".[eval]"'


def test_nothing_asks_for_fcntl_when_it_is_imported() -> None:
    source = Path(installing.__file__).parent
    assert not [
        path for path in source.rglob("*.py") if re.search(r"^ {0,4}(import|from) fcntl", path.read_text(), re.M)
    ]


def test_a_model_is_shared_verified_and_loaded_where_files_cannot_be_locked(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    monkeypatch.setattr(lock, "HAS_LOCKS", False)
    with hs.open_checkpoint(llama) as dense:
        out = hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5)).save(tmp_path / "out")
    assert hs.verify(hs.open_checkpoint(out)).ok
    assert load_model(hs.open_checkpoint(out), storage="owner").config.num_hidden_layers == 4
    with lock.claimed(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
