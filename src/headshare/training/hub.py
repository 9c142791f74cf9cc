"""Push the output to the hub: the whole checkpoint, without the Trainer's own files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from headshare.errors import TrainingError
from headshare.progress import say

HUB_ARGUMENTS = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision")


@dataclass(frozen=True)
class Hub:
    """The place to push to, as the Trainer's arguments name it."""

    repository: str
    private: bool | None
    revision: str | None

    @classmethod
    def of(cls, arguments: Mapping[str, Any], out: Path) -> "Hub | None":
        """The place to push to, or None without `push_to_hub`.

        The repository has the name of the output unless `hub_model_id` names another.

        Raises:
            TrainingError: if no repository can have this name, or a token is given, which would be written down.
        """
        if arguments.get("hub_token"):
            raise TrainingError("hub_token would be kept with the settings. Log in (hf auth login), or set HF_TOKEN.")
        if not arguments.get("push_to_hub"):
            return None
        name = arguments.get("hub_model_id") or out.resolve().name
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise TrainingError(f"nothing can be pushed to {name!r:.100}: {error} Use --hub_model_id.") from None
        return cls(name, *(arguments.get(option) for option in ("hub_private_repo", "hub_revision")))

    def push(self, folder: Path) -> None:
        """Make the repository if it is not there, and upload the folder.

        Raises:
            TrainingError: if that fails; the folder stays.
        """
        api = HfApi()
        try:
            repository = api.create_repo(self.repository, private=self.private, exist_ok=True).repo_id
            api.upload_folder(
                repo_id=repository, folder_path=folder, revision=self.revision, commit_message="Train with headshare"
            )
        except Exception as error:  # the hub's library lets through what the one below it raises
            reason = " ".join(str(error).split())
            raise TrainingError(
                f"{folder} is written, but was not pushed to {self.repository}: {reason:.300}. Run: hf upload "
                f"{self.repository} {folder}"
            ) from error
        say(f"pushed to {repository}")
