"""The manifest, headshare.json: digests of a folder's files as they were written, and of the plan."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.entry import SharingEntry
from headshare.checkpoint.seal import is_sealed
from headshare.files.atomic import write_whole
from headshare.files.digests import BLAKE3, algorithm_of, file_digest
from headshare.files.folder import MANIFEST, json_text, write_json
from headshare.files.untrusted import is_file, read_json
from headshare.plan.plan import FORMAT
from headshare.progress import track


def write_manifest(folder: Path, digests: Mapping[str, str], entry: SharingEntry | None) -> None:
    """List the files as they were written. `verify` looks at `files`, and --overwrite removes nothing but these.

    `digests` are those of the files of weights, by BLAKE3.
    """
    written = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    others = {name: file_digest(path, BLAKE3) for name, path in written.items() if name not in digests}
    model = {**digests, "config.json": others.pop("config.json")}
    files = {name: {"bytes": written[name].stat().st_size, BLAKE3: digest} for name, digest in model.items()}
    plan = {} if entry is None else {"plan": entry.plan.digest}
    about = {"format": FORMAT, "headshare": version("headshare"), "digest": BLAKE3, **plan}
    write_json(folder / MANIFEST, {**about, "files": files, "beside": others})


def note_changed(folder: Path, name: str) -> None:
    """List a file anew that goes along with the weights, such as the card, after it was changed on purpose.

    Raises:
        CheckpointError: if the manifest cannot be read.
    """
    manifest = folder / MANIFEST
    listed = read_json(manifest)
    listed["beside"] = {**listed.get("beside", {}), name: file_digest(folder / name, BLAKE3)}
    write_whole(manifest, json_text(listed).encode())


@dataclass
class Listing:
    """What a manifest tells of the files beside it: how many were checked, what is wrong, and what was not checked."""

    checked: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_manifest(shared: Checkpoint) -> Listing:
    """Check the files of a shared checkpoint, and its plan, against its manifest.

    Raises:
        CheckpointError: if the manifest cannot be read, or its digests are of a kind that is not known here.
    """
    listing = Listing()
    manifest = shared.path / MANIFEST
    if not is_file(manifest):
        if is_sealed(shared.metadata) or os.path.lexists(manifest):
            listing.problems.append(
                f"{MANIFEST} is missing, which was written with these weights. Restore it, or share again"
            )
        else:
            listing.notes.append(f"no digests: {MANIFEST} is not there, as after save_pretrained")
        return listing
    listed = read_json(manifest)
    files = listed.get("files")
    if not isinstance(files, dict):
        listing.problems.append(f"{MANIFEST} lists no files")
        return listing
    # all that makes the model must be listed, and the plan be the one that was written
    loaded = {info.file for info in shared.tensors.values()}
    for name in sorted({"config.json", *loaded} - set(files)):
        listing.problems.append(f"{MANIFEST} has no digest of {name}")
    for name in sorted({path.name for path in shared.path.glob("*.safetensors")} - loaded - set(files)):
        listing.notes.append(f"{name} is no part of this checkpoint, and is neither loaded nor checked")
    entry = SharingEntry.from_config(shared.config.get("quantization_config"))
    if entry is not None and listed.get("plan", entry.plan.digest) != entry.plan.digest:
        listing.problems.append(
            f"{MANIFEST} was written with another plan than config.json holds. Restore it, or share again"
        )
    # what is listed must be there as it was
    algorithm = algorithm_of(listed, MANIFEST)
    for name, written in track(files.items(), "digests", len(files)):
        path = shared.path / Path(name).name
        if not is_file(path):
            listing.problems.append(f"{name} is missing")
        elif not isinstance(written, dict) or file_digest(path, algorithm) != written.get(algorithm):
            listing.problems.append(f"{name} is not as it was written: its digest differs. Restore it, or share again")
        listing.checked += 1
    return listing
