"""Digests of files: the algorithms by which a manifest lists them, and the one that is written today."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from headshare.errors import CheckpointError

SHA256 = "sha256"
# cryptographic, as files come from strangers, and four times as fast as SHA-256 on one core
BLAKE3 = "blake3"
_ALGORITHMS: Mapping[str, Callable[[], Any]] = {SHA256: hashlib.sha256, BLAKE3: blake3}


def file_digest(path: Path, algorithm: str) -> str:
    """The digest of a file in hexadecimal digits, by one of these algorithms."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, _ALGORITHMS[algorithm]).hexdigest()


def algorithm_of(listed: Mapping[str, Any], what: str) -> str:
    """The algorithm by which a manifest's digests were made. Those from before it was named are SHA-256.

    Raises:
        CheckpointError: if it is one that is not known here. `what` is the manifest.
    """
    named = listed.get("digest", SHA256)
    if not isinstance(named, str) or named not in _ALGORITHMS:
        raise CheckpointError(
            f"{what} lists digests by {named!r:.40}, which headshare does not know; it knows {', '.join(_ALGORITHMS)}. "
            "Install a newer headshare, or share again."
        )
    return named
