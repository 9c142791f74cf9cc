"""The command push."""

from pathlib import Path
from typing import Annotated

import typer

from headshare.cli.options import RUN, WRITE, JsonOption, print_result


def push(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that headshare wrote.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the hub; made if need be.")],
    private: Annotated[
        bool | None,
        typer.Option(
            rich_help_panel=WRITE,
            show_default="public, unless the organisation's are private",
            help="Make a new repository private or public.",
        ),
    ] = None,
    branch: Annotated[
        str | None, typer.Option(rich_help_panel=WRITE, help="Push to this branch. Default: main.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", rich_help_panel=RUN, help="Say what would be pushed, and push nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Push a folder to the Hugging Face hub: its files are verified first, and its card goes along.

    A model whose card names no licence is not pushed to a public repository.
    """
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.errors import OutputError
    from headshare.evaluation.verify import verify
    from headshare.integrations.hub import Upload

    upload = Upload.of(out, repository)
    with open_checkpoint(str(out)) as checkpoint:
        found = verify(checkpoint, logits=False)
    if not found.ok:
        raise OutputError(f"{out} was not pushed, for it is not as it was written: {'; '.join(found.problems):.300}")
    if upload.licence is None and not private:
        raise OutputError(
            f"the card of {out} names no licence. Write that of the base model into README.md, between the lines ---, "
            "as `license: NAME`, or push with --private."
        )
    address = None if dry_run else upload.push(private=private, revision=branch)
    words = f"{len(upload.files)} files, {upload.bytes:,} bytes, base model {upload.base_model or 'not named'}, "
    words += f"licence {upload.licence or 'not named'}"
    words += "\nNothing was pushed: --dry-run." if dry_run else f"\nPushed: {address}"
    print_result({**upload.to_dict(), "address": address}, words, as_json)
