"""What is overwritten is what we wrote: nothing of anybody else's is lost, whatever fails in between."""

import errno
import os
from pathlib import Path

import pytest

import headshare as hs
from headshare.errors import OutputError
from headshare.files.folder import check_output, not_written_by_us, whole_folder
from headshare.files.lock import locked
from headshare.files.model_files import SETTINGS, TOKENIZER
from support import tiny
from support.command_line import Run
from support.folders import MANIFEST, contents, left_behind, nothing_changes
from support.processes import in_child
from support.shares import share


@pytest.fixture
def shared(llama: Path, tmp_path: Path) -> Path:
    """An output as `share` writes it, with what was copied beside the weights."""
    (llama / "README.md").write_text("the dense model's card")
    (llama / "modules.json").write_text('[{"path": "1_Pooling"}]')
    (llama / "1_Pooling").mkdir()
    (llama / "1_Pooling" / "config.json").write_text("{}")
    return share(llama, tmp_path / "out")


# ---- what somebody else put into the folder


def test_where_no_manifest_is_what_a_model_is_loaded_from_may_be_replaced_and_nothing_else(tmp_path: Path) -> None:
    model = ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "training.json")
    named = [name.replace("*", "x") for name in (*TOKENIZER, *SETTINGS)]
    others = {"LICENSE", "own.py", "1_Notes/notes.txt", "sub/tokenizer.json"}
    for name in (*model, *named, "1_Pooling/config.json", "2_Dense/model.safetensors", *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert set(not_written_by_us(tmp_path)) == others


@pytest.mark.parametrize("name", ["notes.txt", ".git/HEAD", "plan.json", "sub/model.safetensors"])
@pytest.mark.parametrize("written_by", ["headshare", "transformers"])
def test_overwriting_refuses_to_remove_what_was_not_written_there(
    name: str, written_by: str, llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if written_by == "headshare":
        share(llama, out)
    else:
        tiny.make_llama(out, seed=4)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("months of work")
    with nothing_changes(tmp_path), pytest.raises(OutputError, match=f"also holds {name}, which is not as"):
        share(llama, out, overwrite=True)


def test_overwriting_refuses_to_remove_a_copied_file_that_was_changed_since(
    shared: Path, llama: Path, run: Run
) -> None:
    card = (shared / "README.md").read_text()
    (shared / "README.md").write_text("my own card")
    with nothing_changes(shared):
        done = run("share", llama, shared, "--overwrite")
    assert done.status == 1
    assert "README.md" in done.err
    (shared / "README.md").write_text(card)
    assert run("share", llama, shared, "--overwrite").status == 0


def test_overwriting_refuses_a_file_that_is_now_a_link(shared: Path, llama: Path, tmp_path: Path) -> None:
    (shared / "README.md").rename(tmp_path / "elsewhere")
    (shared / "README.md").symlink_to(tmp_path / "elsewhere")
    with nothing_changes(tmp_path), pytest.raises(OutputError, match=r"README\.md"):
        share(llama, shared, overwrite=True)


@pytest.mark.parametrize("manifest", ["", "[]", '{"files": 3, "beside": []}', "{}"])
def test_a_folder_whose_manifest_lists_nothing_may_hold_what_checkpoints_hold(
    manifest: str, shared: Path, llama: Path
) -> None:
    (shared / MANIFEST).write_text(manifest)
    (shared / "README.md").unlink()
    share(llama, shared, overwrite=True)
    (shared / MANIFEST).write_text(manifest)
    with pytest.raises(OutputError, match=r"README\.md"):
        share(llama, shared, overwrite=True)


def test_a_model_whose_files_are_links_into_the_output_is_not_shared_over_them(
    llama: Path, tmp_path: Path, run: Run
) -> None:
    """A folder of links, as a cache is, into the folder that would be replaced."""
    links = tmp_path / "links"
    links.mkdir()
    for path in llama.iterdir():
        (links / path.name).symlink_to(path)
    with nothing_changes(tmp_path):
        done = run("share", links, llama, "--overwrite")
    assert done.status == 1
    assert "is a link into the output" in done.err


def test_one_folder_in_two_places_is_one_folder(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder can be mounted a second time: its inode tells, and its name does not."""
    inode = llama.stat()
    here = os.stat

    def mounted(place: object, **more: object) -> os.stat_result:
        return inode if str(place) == "/mnt/again" else here(place, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", mounted)
    with pytest.raises(OutputError, match="inside the input"):
        check_output(Path("/mnt/again/out"), llama, overwrite=False)


# ---- where folders cannot be exchanged


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system such as NFS."""
    monkeypatch.setattr("headshare.files.folder._exchange", lambda *_: False)


def replaced(out: Path) -> Path:
    """The old output under the name that a run gives it which is killed before the new one is in its place."""

    def killed() -> None:
        rename = Path.rename

        def once(self: Path, target: Path) -> Path:
            moved = rename(self, target)
            os._exit(7)
            return moved

        Path.rename = once  # type: ignore[method-assign]
        with whole_folder(out, overwrite=True, expected_bytes=0) as folder:
            (folder / "config.json").write_text("{}")

    assert in_child(killed) == 7
    assert not out.exists()
    (old,) = out.parent.glob(".*replaced*")
    return old


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("failure", [OSError(errno.EIO, os.strerror(errno.EIO)), KeyboardInterrupt()])
def test_a_second_rename_that_fails_leaves_the_old_output_in_its_place(
    failure: BaseException, shared: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == shared and "partial" in self.name:
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    expected = OutputError if isinstance(failure, OSError) else type(failure)
    with nothing_changes(tmp_path), pytest.raises(expected):
        share(llama, shared, 0.25, overwrite=True)


@pytest.mark.usefixtures("no_exchange")
def test_an_output_that_a_killed_run_took_out_of_its_place_is_put_back_by_whoever_needs_it(
    shared: Path, llama: Path, run: Run
) -> None:
    whole = contents(shared)
    for words in (["verify", shared, "--no-logits"], ["share", llama, shared]):
        replaced(shared)
        run(*words)
        assert contents(shared) == whole
        assert left_behind(shared.parent) == []
    replaced(shared)
    assert run("share", llama, shared, "--overwrite", "--ratio", "0.25").status == 0
    assert contents(shared) != whole
    assert left_behind(shared.parent) == []


@pytest.mark.usefixtures("no_exchange")
def test_what_came_into_the_place_meanwhile_and_the_old_output_are_both_kept(shared: Path, llama: Path) -> None:
    whole = contents(shared)
    old = replaced(shared)
    tiny.make_llama(shared, seed=9)
    with nothing_changes(shared), pytest.raises(OutputError, match="something else is there now"):
        share(llama, shared, overwrite=True)
    assert contents(old) == whole


@pytest.mark.usefixtures("no_exchange")
def test_an_output_that_another_run_is_replacing_is_not_put_back(shared: Path) -> None:
    old = replaced(shared)
    with locked(old):
        with pytest.raises(hs.HeadshareError, match="there is no folder"):
            hs.open_checkpoint(shared)
        assert old.is_dir()
    hs.open_checkpoint(shared)
    assert left_behind(shared.parent) == []


@pytest.mark.usefixtures("no_exchange")
def test_a_long_name_is_put_back_to_no_other(llama: Path, tmp_path: Path) -> None:
    one, other = (tmp_path / ("x" * 150 + end) for end in "ab")
    share(llama, one)
    old = replaced(one)
    with pytest.raises(hs.HeadshareError, match="there is no folder"):
        hs.open_checkpoint(other)
    assert old.is_dir()
    hs.open_checkpoint(one)
