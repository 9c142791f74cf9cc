"""The commands quantize, expand and export."""

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headshare.cli.bundles import with_bundles
from headshare.cli.options import (
    WRITE,
    CommonOptions,
    JsonOption,
    OverwriteOption,
    RevisionOption,
    print_result,
    print_written,
)
from headshare.cli.share_options import CalibrationOptions, NeededCalibrationOption, OutArgument, SharedArgument
from headshare.integrations.gguf.number_types import NUMBER_TYPES

if TYPE_CHECKING:
    FileTypeName = str
else:
    FileTypeName = StrEnum("FileTypeName", {name: name for name in NUMBER_TYPES})


@with_bundles
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A shared checkpoint, or a dense one.")],
    out: OutArgument,
    calibration: NeededCalibrationOption,
    group: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=WRITE,
            help="Give groups of this many inputs one scale. Default: the largest of 128, 64, 32... that fits.",
        ),
    ] = None,
    *,
    windows: CalibrationOptions,
    common: CommonOptions,
) -> None:
    """Round the layers' matrices to 4 bits by GPTQ (gptqmodel), each shared unit once, on the inputs of all its users.

    Ties must be of q, k and v (or of gate and up). The result loads like any shared checkpoint.
    """
    begun = time.monotonic()
    from headshare.calibration.gptq import round_by_gptq
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.files.folder import check_output, check_vacant

    check_vacant(out, overwrite=common.overwrite)
    with open_checkpoint(model, revision=common.revision) as source:
        check_output(out, source.path, overwrite=common.overwrite)
        settings = windows.settings(calibration)
        rounded = round_by_gptq(source, settings.load(source), group=group, device=settings.device_name)
        rounded.save(out, overwrite=common.overwrite)
        before = sum(info.nbytes for info in source.tensors.values())
    after = sum(info.nbytes for info in open_checkpoint(out).tensors.values())
    seconds = time.monotonic() - begun
    data = {
        "matrices": len(rounded.matrices), "group": rounded.packing.group, "bytes_before": before, "bytes": after,
        "seconds": seconds, "out": str(out),
    }  # fmt: skip
    words = (
        f"{len(rounded.matrices)} matrices rounded to 4 bits in groups of {rounded.packing.group}: {before:,} bytes of "
        f"weights before, {after:,} now ({1 - after / before:.1%} less)"
    )
    print_written(data, words, out, seconds, as_json=common.as_json)


def expand(
    shared: SharedArgument,
    dense: Annotated[Path, typer.Argument(metavar="DENSE", help="The folder to write; it must not exist.")],
    unpack: Annotated[
        bool,
        typer.Option(
            "--unpack",
            rich_help_panel=WRITE,
            help="Write matrices of 4 bits as ordinary ones. Default: as compressed-tensors.",
        ),
    ] = False,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a stock folder with donors' rows in place, which any tool loads without headshare."""
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.files.folder import check_vacant
    from headshare.sharing.expand import expand as expand_checkpoint

    check_vacant(dense, overwrite=overwrite)
    with open_checkpoint(shared, revision=revision) as checkpoint:
        expand_checkpoint(checkpoint, dense, overwrite=overwrite, unpacked=unpack)
    size = sum(info.nbytes for info in open_checkpoint(dense).tensors.values())
    words = f"{size:,} bytes of weights in {dense}"
    print_result({"out": str(dense), "bytes": size}, words, as_json, written=dense)


def export(
    model: Annotated[
        str, typer.Argument(metavar="OUT", help="A folder of a shared model or of a dense one, or a hub id.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="The file to write; it must not exist.")],
    dtype: Annotated[
        FileTypeName, typer.Option(rich_help_panel=WRITE, help="Store the matrices as numbers of this type.")
    ] = "f16",
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a GGUF file, which llama.cpp, Ollama and LM Studio run as it is.

    What was removed stays removed. What is shared is written as often as it is used, and the command says what that
    takes.
    """
    begun = time.monotonic()
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.integrations.gguf.export import export_gguf

    with open_checkpoint(model, revision=revision) as checkpoint:
        written = export_gguf(checkpoint, file, dtype=dtype, overwrite=overwrite)
    seconds = time.monotonic() - begun
    words = f"{written.in_words()}\nWritten and checked in {seconds:.1f} s, {written.bytes:,} bytes: {file}"
    print_result({**written.to_dict(), "seconds": seconds}, words, as_json, written=file)
