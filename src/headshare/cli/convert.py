"""The commands quantize and expand."""

import time
from pathlib import Path
from typing import Annotated

import typer

from headshare.calibration.gptq import round_by_gptq
from headshare.calibration.run import device_named
from headshare.checkpoint.opening import open_checkpoint
from headshare.cli.options import WRITE, JsonOption, OverwriteOption, RevisionOption, print_result
from headshare.cli.share_options import (
    CalibrationFieldOption,
    CalibrationSeedOption,
    CalibrationTokensOption,
    CalibrationWindowOption,
    DeviceOption,
    NeededCalibrationOption,
    OutArgument,
    SharedArgument,
)
from headshare.files.folder import check_output, check_vacant
from headshare.sharing.expand import expand as expand_checkpoint
from headshare.text.tokens import TOKENS as CALIBRATION_TOKENS
from headshare.text.tokens import Calibration


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
    field: CalibrationFieldOption = None,
    calibration_tokens: CalibrationTokensOption = CALIBRATION_TOKENS,
    calibration_window: CalibrationWindowOption = None,
    seed: CalibrationSeedOption = 0,
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Round the layers' matrices to 4 bits by GPTQ (gptqmodel), each shared unit once, on the inputs of all its users.

    Ties must be of q, k and v (or of gate and up). The result loads like any shared checkpoint.
    """
    begun = time.monotonic()
    check_vacant(out, overwrite=overwrite)
    with open_checkpoint(model, revision=revision) as source:
        check_output(out, source.path, overwrite=overwrite)
        text = Calibration.load(
            calibration,
            source,
            tokens=calibration_tokens,
            window=calibration_window,
            field=field,
            seed=seed,
            device=device_named(device),
        )
        rounded = round_by_gptq(source, text, group=group, device=device_named(device))
        rounded.save(out, overwrite=overwrite)
        before = sum(info.nbytes for info in source.tensors.values())
    after = sum(info.nbytes for info in open_checkpoint(out).tensors.values())
    seconds = time.monotonic() - begun
    data = {
        "matrices": len(rounded.matrices), "group": rounded.packing.group, "bytes_before": before, "bytes": after,
        "seconds": seconds, "out": str(out),
    }  # fmt: skip
    words = (
        f"{len(rounded.matrices)} matrices rounded to 4 bits in groups of {rounded.packing.group}: {before:,} bytes of "
        f"weights before, {after:,} now ({1 - after / before:.1%} less)\nWritten and checked in {seconds:.1f} s: {out}"
    )
    print_result(data, words, as_json, written=out)


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
    check_vacant(dense, overwrite=overwrite)
    with open_checkpoint(shared, revision=revision) as checkpoint:
        expand_checkpoint(checkpoint, dense, overwrite=overwrite, unpacked=unpack)
    size = sum(info.nbytes for info in open_checkpoint(dense).tensors.values())
    words = f"{size:,} bytes of weights in {dense}"
    print_result({"out": str(dense), "bytes": size}, words, as_json, written=dense)
