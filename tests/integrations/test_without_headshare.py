"""Without headshare, transformers refuses a shared folder of every kind, and never goes on with weights of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import headshare as hs
from headshare.checkpoint.int4 import Packing
from support.packed import PackedMatrix, pack, write_packed
from support.shares import share

FORMAT = Path(__file__).parents[1] / "sharing" / "format"
WHOLE = ("ties", "scaled", "factored", "removed", "everything")
GROUP = 16
LOADS = """
import json, sys
import transformers
transformers.utils.logging.set_verbosity_error()
loaded = []
for folder in sys.argv[1:]:
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        try:
            kind.from_pretrained(folder)
        except Exception:
            continue
        loaded.append(folder)
assert "headshare" not in sys.modules
print(json.dumps(loaded))
"""


def packed(source: Path, out: Path) -> Path:
    """This checkpoint, dense or shared, with any numbers of 4 bits for the matrices of its layers."""
    checkpoint = hs.open_checkpoint(source)
    shapes = {name: shape for name, shape in checkpoint.dense_shapes.items() if name.endswith("_proj.weight")}
    matrices = {
        name: PackedMatrix(pack(torch.zeros(shape)), torch.ones(shape[0], shape[1] // GROUP, dtype=torch.float16))
        for name, shape in shapes.items()
    }
    return write_packed(checkpoint, matrices, Packing(group=GROUP, ignore=("lm_head",)), out)


def loaded_without_headshare(*folders: Path) -> list[str]:
    """Those of these folders that a process which never imports headshare loads."""
    words = [sys.executable, "-c", LOADS, *map(str, folders)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_no_shared_folder_loads_without_headshare(llama: Path, tmp_path: Path) -> None:
    """Those written once, those written today, and those that transformers saved again."""
    shared = [share(llama, tmp_path / "shared"), share(llama, tmp_path / "all but one", 0.75)]
    int4 = [packed(source, tmp_path / f"packed {n}") for n, source in enumerate((llama, *shared))]
    folders = [*(FORMAT / name for name in WHOLE), *shared, *int4]
    for folder in folders:
        hs.load(folder).save_pretrained(tmp_path / "again" / folder.name)
    again = list((tmp_path / "again").iterdir())
    assert len(again) == len(folders) == 10
    assert loaded_without_headshare(*folders, *again, llama) == [str(llama)] * 2


def test_a_guard_of_packed_matrices_holds_nothing_and_is_gone_when_they_are_expanded(
    llama: Path, tmp_path: Path
) -> None:
    folder = packed(share(llama, tmp_path / "shared"), tmp_path / "packed")
    guard = hs.open_checkpoint(folder).tensors["model.layers.0.mlp.up_proj.weight"]
    assert (guard.shape, guard.nbytes) == ((0,), 0)
    expanded = hs.expand(hs.open_checkpoint(folder), tmp_path / "expanded")
    assert guard.name not in hs.open_checkpoint(expanded).tensors
    unpacked = hs.expand(hs.open_checkpoint(folder), tmp_path / "unpacked", unpacked=True)
    assert hs.open_checkpoint(unpacked).shapes == hs.open_checkpoint(llama).shapes


@pytest.mark.parametrize("shape", [(1,), (48, 32)])
def test_a_guard_that_holds_numbers_is_refused(shape: tuple[int, ...], llama: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from support.folders import WEIGHTS

    folder = packed(llama, tmp_path / "packed")
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(shape, dtype=torch.int32)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    with pytest.raises(hs.HeadshareError, match=r"up_proj.weight should have shape \(0,\)"):
        hs.load(folder)
