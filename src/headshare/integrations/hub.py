"""The hub: a folder that headshare wrote, uploaded as it is, with its card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from headshare.errors import OptionError, OutputError
from headshare.files.folder import MANIFEST
from headshare.files.model_files import CARD
from headshare.files.untrusted import read_json
from headshare.sharing.card import front_matter


@dataclass(frozen=True)
class Upload:
    """What would be uploaded from a folder, and what its card says of it."""

    folder: Path
    repository: str
    files: tuple[str, ...]
    bytes: int
    base_model: str | None
    licence: str | None

    @classmethod
    def of(cls, folder: Path, repository: str) -> "Upload":
        """The upload of a folder: the files that its manifest lists, and no others that lie there.

        Raises:
            OptionError: if no repository can have this name.
            OutputError: if the folder has no manifest or no card.
        """
        check_name(repository)
        if not (folder / MANIFEST).is_file():
            raise OutputError(
                f"{folder} has no {MANIFEST}, so headshare did not write it. Run: hf upload NAME {folder}"
            )
        if not (folder / CARD).is_file():
            raise OutputError(f"{folder} has no card ({CARD}). Write one, with the base model and its licence.")
        listed = read_json(folder / MANIFEST)
        names = {*listed.get("files", {}), *listed.get("beside", {}), MANIFEST, CARD}
        files = tuple(sorted(name for name in names if (folder / name).is_file()))
        front = front_matter(folder)
        size = sum((folder / name).stat().st_size for name in files)
        return cls(folder, repository, files, size, front.get("base_model"), front.get("license"))

    def push(self, *, private: bool | None, revision: str | None = None) -> str:
        """Make the repository if it is not there, and upload the files in one commit. Returns its address.

        Raises:
            OutputError: if nobody is logged in, or the hub refuses; what is there stays as it was.
        """
        if get_token() is None:
            raise OutputError("nobody is logged in to the hub. Run: hf auth login, or set HF_TOKEN.")
        try:
            address = upload(
                self.folder,
                self.repository,
                private=private,
                revision=revision,
                message="Upload with headshare",
                files=list(self.files),
            )
        except OutputError as error:
            raise OutputError(f"{self.folder} was not pushed to {self.repository}: {error}") from error
        return str(address)

    def to_dict(self) -> dict[str, Any]:
        """What is uploaded, under the names that `--json` prints."""
        return {
            "repository": self.repository,
            "files": list(self.files),
            "bytes": self.bytes,
            "base_model": self.base_model,
            "license": self.licence,
        }


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool | None,
    revision: str | None,
    message: str,
    files: list[str] | None = None,
) -> Any:
    """Make the repository if it is not there, and upload a folder, or these files of it, in one commit.

    Returns the hub's address of the repository, a `RepoUrl`.

    Raises:
        OutputError: with the hub's reason, if it refuses; what is there stays as it was.
    """
    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            revision=revision,
            allow_patterns=files,
            commit_message=message,
        )
    except Exception as error:  # the hub's library lets through what the one below it raises
        raise OutputError(f"{' '.join(str(error).split()):.300}") from error
    return address


def check_name(repository: str) -> None:
    """Refuse a name that no repository can have.

    Raises:
        OptionError: naming it.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OptionError(f"nothing can be pushed to {repository!r:.100}: {error}") from None
