"""The commands quantize, repeat, expand and export."""

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headshare.cli.bundles import with_bundles
from headshare.cli.options import (
    CHOOSE,
    WRITE,
    BitsName,
    CommonOptions,
    Context,
    EmbeddingBits,
    GroupOption,
    JsonOption,
    OverwriteOption,
    RevisionOption,
    print_result,
    print_written,
    refuse_unused,
)
from headshare.cli.share_options import (
    CalibrationOption,
    CalibrationOptions,
    DtypeOption,
    ModelArgument,
    OutArgument,
    SharedArgument,
)
from headshare.errors import OptionError
from headshare.integrations.gguf.number_types import NUMBER_TYPES

if TYPE_CHECKING:
    FileTypeName = str
else:
    FileTypeName = StrEnum("FileTypeName", {name: name for name in NUMBER_TYPES})


@with_bundles
def quantize(
    context: Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A shared checkpoint, or a dense one.")],
    out: OutArgument,
    bits: Annotated[
        BitsName | None,
        typer.Option(
            rich_help_panel=WRITE,
            help="Round to this many bits: 8, or 4 (default with --calibration).",
        ),
    ] = None,
    calibration: CalibrationOption = None,
    group: GroupOption = None,
    embeddings: Annotated[
        EmbeddingBits,
        typer.Option(
            metavar="BITS",
            rich_help_panel=WRITE,
            help="Give the input and output embeddings 8 bits, or leave them at 16.",
        ),
    ] = "8",
    *,
    windows: CalibrationOptions,
    common: CommonOptions,
) -> None:
    """Round all matrices to 8 bits, or the layers' to 4, under any plan, each shared unit once.

    8 bits are the nearest numbers: half the bytes at next to no loss. 4 bits are found by GPTQ (gptqmodel) on the
    inputs of all users of a unit where a text is given, and are the nearest numbers else. The result loads like any
    shared checkpoint.
    """
    begun = time.monotonic()
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.files.folder import check_output, check_vacant

    check_vacant(out, overwrite=common.overwrite)
    if bits is None and calibration is None:
        raise OptionError("say how to round: --bits 8, or 4 bits by GPTQ on a text: --calibration FILE.")
    number = int(bits or "4")
    with open_checkpoint(model, revision=common.revision) as source:
        check_output(out, source.path, overwrite=common.overwrite)
        eight = str(embeddings) == "8"
        if calibration is None:
            refuse_unused(context, "the nearest numbers need no text", _OF_A_TEXT)
            from headshare.sharing.rounded.write import round_to_nearest

            rounded = round_to_nearest(source, bits=number, group=group, embeddings=eight)
        else:
            if number == 8:
                refuse_unused(context, "8 bits are the nearest numbers, and need no text", ("calibration",))
            from headshare.calibration.gptq import round_by_gptq

            settings = windows.settings(calibration)
            text = settings.load(source)
            rounded = round_by_gptq(source, text, group=group, embeddings=eight, device=settings.device_name)
        rounded.save(out, overwrite=common.overwrite)
        count = len(rounded.bits.of)
        size = rounded.bits.groups[number]
        of = "a row" if size is None else f"{size} inputs"
        before = sum(info.nbytes for info in source.tensors.values())
    after = sum(info.nbytes for info in open_checkpoint(out).tensors.values())
    seconds = time.monotonic() - begun
    data = {
        "matrices": count, "bits": number, "group": size, "bytes_before": before, "bytes": after,
        "seconds": seconds, "out": str(out),
    }  # fmt: skip
    words = (
        f"{count} matrices rounded to {number} bits, a scale for {of}: {before:,} bytes of weights before, "
        f"{after:,} now ({1 - after / before:.1%} less)"
    )
    print_written(data, words, out, seconds, as_json=common.as_json)


# parameters that only rounding on a text uses
_OF_A_TEXT = ("field", "calibration_tokens", "calibration_window", "seed", "device")


@with_bundles
def repeat(
    model: ModelArgument,
    out: OutArgument,
    layers: Annotated[
        str,
        typer.Option(
            metavar="LAYERS",
            rich_help_panel=CHOOSE,
            help="Repeat these layers, counted from 0: 10-16 is a block whose last layer is 16, and 10-16,20 are two "
            "blocks, each repeated by itself.",
        ),
    ],
    times: Annotated[int, typer.Option(rich_help_panel=CHOOSE, help="Run each block so many times in a row.")] = 2,
    dtype: DtypeOption = None,
    *,
    common: CommonOptions,
) -> None:
    """Make a deeper model whose blocks of layers run several times in a row, and store and hold each weight once.

    It computes what a self-merge of the same layers does, bit for bit. `headshare expand` writes that one.
    """
    begun = time.monotonic()
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.files.folder import check_output, check_vacant
    from headshare.matching.exact.repeat import repeat_layers

    check_vacant(out, overwrite=common.overwrite)
    with open_checkpoint(model, revision=common.revision) as dense:
        check_output(out, dense.path, overwrite=common.overwrite)
        repeated = repeat_layers(dense, layers, times=times, dtype=dtype)
        repeated.save(out, overwrite=common.overwrite)
        estimate = repeated.estimate
        before = dense.layouts.attention.layers
        now = repeated.dense.layouts.attention.layers
    seconds = time.monotonic() - begun
    words = (
        f"{now} layers of {before}: {estimate.shared_bytes:,} bytes of weights are stored and held. With a copy for "
        f"each layer they would be {estimate.dense_bytes:,}."
    )
    data = {
        **estimate.to_dict(), "layers_before": before, "layers": now, "plan_digest": repeated.plan.digest,
        "seconds": seconds, "out": str(out),
    }  # fmt: skip
    print_written(data, words, out, seconds, as_json=common.as_json)


def expand(
    shared: SharedArgument,
    dense: Annotated[Path, typer.Argument(metavar="DENSE", help="The folder to write; it must not exist.")],
    unpack: Annotated[
        bool,
        typer.Option(
            "--unpack",
            rich_help_panel=WRITE,
            help="Write rounded matrices as ordinary ones. Default: as compressed-tensors.",
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
