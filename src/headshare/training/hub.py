"""Push the output to the hub: the whole checkpoint, without the Trainer's own files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headshare.errors import OptionError, OutputError, TrainingError
from headshare.integrations.hub import check_name, upload
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
            check_name(name)
        except OptionError as error:
            raise TrainingError(f"{error} Use --hub_model_id.") from None
        return cls(name, *(arguments.get(option) for option in ("hub_private_repo", "hub_revision")))

    def push(self, folder: Path) -> None:
        """Make the repository if it is not there, and upload the folder.

        Raises:
            TrainingError: if that fails; the folder stays.
        """
        try:
            address = upload(
                folder,
                self.repository,
                private=self.private,
                revision=self.revision,
                message="Train with headshare",
            )
        except OutputError as error:
            raise TrainingError(
                f"{folder} is written, but was not pushed to {self.repository}: {error}. Run: hf upload "
                f"{self.repository} {folder}"
            ) from error
        say(f"pushed to {address.repo_id}")
