"""Fingerprints: digests that tell one checkpoint from another."""

import hashlib
import json
import os
import re

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.contents import used_files
from headshare.checkpoint.entry import Origin
from headshare.errors import CheckpointError

# what is read of a large tensor to know it again: pieces at equal distances, the last one at its end
PIECES = 16
PIECE_BYTES = 4096
# the most that is read of a model, apart from one piece of each tensor
MOST_BYTES = 64 * 2**20
# how a command is told to take any dense model
ANY_BASE = "pass --any-base"


def fingerprint(checkpoint: Checkpoint) -> str:
    """The digest of a checkpoint's names and shapes, and of the sizes and times of its files. No weight is read.

    All other files that a model is loaded from count too, such as those of its tokenizer.
    """
    checkpoint.check_unchanged()
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    stored = sorted(checkpoint.stored, key=lambda info: info.name)
    for info in stored:
        digest.update(f"{info.name} {info.dtype} {info.shape} {info.file}\n".encode())
    for file in sorted({*(info.file for info in stored), *used_files(checkpoint.path)}):
        status = os.stat(checkpoint.path / file)  # noqa: PTH116 - a path that is certainly there
        digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def content_digest(checkpoint: Checkpoint) -> str:
    """The digest of a checkpoint's tensors: names, types, shapes, and a sample of their numbers.

    It is the same wherever the folder lies and however its tensors are spread over files. Tensors of up to 64 KiB are
    read whole. Of a larger one 16 pieces of 4 KiB are read, and fewer in models of more than a thousand tensors. So it
    takes moments, and tells models apart that differ all over, as revisions of one model do.
    """
    digest = hashlib.sha256()
    pieces = max(1, min(PIECES, MOST_BYTES // (PIECE_BYTES * max(1, len(checkpoint.stored)))))
    for info in sorted(checkpoint.stored, key=lambda info: info.name):
        digest.update(f"{info.name} {info.dtype} {info.shape}\n".encode())
        if info.nbytes <= pieces * PIECE_BYTES:
            places = [(0, info.nbytes)]
        else:
            last = info.nbytes - PIECE_BYTES
            places = [(last * nth // max(1, pieces - 1), PIECE_BYTES) for nth in range(pieces)]
        for offset, size in places:
            buffer = bytearray(size)
            checkpoint.read_into(memoryview(buffer), info, offset)
            digest.update(buffer)
    return digest.hexdigest()


def origin_of(dense: Checkpoint) -> Origin:
    """The record of a dense model, by which it is known later. Its commit is that of the hub's cache, if it lies there.

    Raises:
        CheckpointError: if a file ends early or cannot be read.
    """
    folder = dense.path
    cached = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    return Origin(digest=content_digest(dense), commit=folder.name if cached else None)


def check_origin(shared: Checkpoint, dense: Checkpoint, otherwise: str | None) -> str | None:
    """Refuse a dense model that is not the one that a shared checkpoint came from.

    `otherwise` says how to take it all the same. None takes it. Returns a sentence where the models differ or nothing
    tells whether they do, and None where the dense model is the right one.

    Raises:
        CheckpointError: if it is another model.
    """
    origin = shared.require_sharing().origin
    if origin is None:
        return f"{shared.name} does not say what its dense model held, so {dense.name} was not checked to be that one"
    if content_digest(dense) == origin.digest:
        return None
    difference = f"{dense.name} is not the model that {shared.name} came from: its weights are others"
    if otherwise is None:
        return difference
    commit = "" if origin.commit is None else f" (commit {origin.commit})"
    raise CheckpointError(f"{difference}. Give the right one{commit}, or {otherwise} to take this one all the same.")
