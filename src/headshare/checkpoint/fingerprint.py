"""Fingerprints: digests that tell one checkpoint from another."""

import hashlib
import json
import os

from headshare.checkpoint.checkpoint import Checkpoint

_BESIDE = (".json", ".model", ".tiktoken", ".txt")


def fingerprint(checkpoint: Checkpoint) -> str:
    """The digest of a checkpoint's names and shapes, and of the sizes and times of its files. No weight is read.

    The files of the tokenizer and of the generation settings count too.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        digest.update(f"{name} {info.dtype} {info.shape} {info.file}\n".encode())
    beside = (path.name for path in checkpoint.path.iterdir() if path.suffix in _BESIDE and path.is_file())
    for file in sorted({info.file for info in checkpoint.tensors.values()} | (set(beside) - {"config.json"})):
        status = os.stat(checkpoint.path / file)  # noqa: PTH116 - a path that is certainly there
        digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
