"""The commands inspect, verify and attention."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headshare.cli.options import (
    CHECK,
    NEXT,
    RUN,
    SHOW,
    TEXT,
    WRITE,
    AnyBaseOption,
    FieldOption,
    JsonOption,
    OverwriteOption,
    RevisionOption,
    print_result,
)
from headshare.cli.share_options import ModelArgument, SharedArgument
from headshare.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from headshare.checkpoint.checkpoint import Checkpoint
else:
    Checkpoint = Any  # it imports torch, which only a command that runs has the time for


def describe_split(checkpoint: Checkpoint, devices: int) -> dict[str, Any]:
    """Count what is held more than once when the layers are split evenly over devices: by pair, by device, in all.

    `ranks` has what each of as many tensor-parallel ranks holds, if they can have as many units each.

    Raises:
        CheckpointError: if the checkpoint is dense, rounded, or lacks a tensor that its plan shares.
        OptionError: if it has fewer layers than there are devices.
    """
    from headshare.plan.placement import held_again, shares_of_ranks, split_evenly

    entry = checkpoint.require_sharing()
    if entry.packing is not None:
        raise CheckpointError(
            "what devices hold again is not counted for rounded matrices: give the checkpoint before."
        )
    places = split_evenly(entry.plan, devices)
    missing = sorted(set(places) - set(checkpoint.tensors))
    if missing:
        raise CheckpointError(f"the plan in {checkpoint.name} shares {missing[0]}, which is not among its tensors.")
    itemsizes = {name: checkpoint.tensors[name].torch_dtype.itemsize for name in places}
    pairs = held_again(entry.plan, places, itemsizes)
    by_device = [[pair for pair in pairs if pair.device == f"device {number}"] for number in range(devices)]
    even = all(selection.layout.groups % devices == 0 for selection in entry.plan.selections)
    return {
        "ranks": [share._asdict() for share in shares_of_ranks(entry.plan, devices, itemsizes)] if even else None,
        "pairs": [
            {"home": pair.home, "device": pair.device, "units": pair.units, "bytes": pair.nbytes} for pair in pairs
        ],
        "devices": [
            {"device": f"device {number}", "units": sum(p.units for p in held), "bytes": sum(p.nbytes for p in held)}
            for number, held in enumerate(by_device)
        ],
        "units": sum(pair.units for pair in pairs),
        "bytes": sum(pair.nbytes for pair in pairs),
    }


def picture_split(split: dict[str, Any]) -> str:
    """The split in words: the sum, a line for each pair of devices, and a line for each tensor-parallel rank."""
    lines = [
        f"  {pair['device']} also holds {pair['units']} units of {pair['home']}: {pair['bytes']:,} bytes"
        for pair in split["pairs"]
    ]
    lines += [
        f"  rank {rank['rank']} of {len(split['ranks'])}, with its part of layers, stores {rank['stored']:,} bytes, "
        f"saves {rank['borrowed']:,} by ties, and copies {rank['copied']:,} from other ranks"
        for rank in split["ranks"] or ()
    ]
    title = f"layers split over {len(split['devices'])} devices: {split['units']} units held more than once"
    return "\n".join([f"{title}, {split['bytes']:,} bytes", *lines]) + "\n"


def inspect(
    shared: Annotated[str, typer.Argument(metavar="SHARED", help="A shared checkpoint, or a share_plan.json.")],
    split: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=SHOW,
            help="Also count what is held more than once when layers, or each layer's units, are split over this many "
            "devices.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=SHOW, help="Also draw layers by heads, and bytes by layer, on a page: this HTML file."
        ),
    ] = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint or a plan shares, removes and narrows, layer by layer.

    Checkpoints are written by `headshare shrink` or `headshare share`.
    """
    from headshare.plan.describe import describe, picture
    from headshare.plan.plan import SharePlan

    if shared.endswith(".json"):
        if split is not None:
            raise typer.BadParameter("--split counts bytes, which a plan does not know: give it a shared checkpoint")
        plan = SharePlan.load(shared)
        _draw(html, Path(shared).name, plan)
        print_result(describe(plan), f"{picture(plan)}\n{NEXT}", as_json, written=html)
        return
    from headshare.checkpoint.opening import open_checkpoint

    checkpoint = open_checkpoint(shared, revision=revision, weights=False)
    entry = checkpoint.require_sharing()
    _draw(html, Path(shared).absolute().name, entry.plan, entry, checkpoint.tensors)
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    record = entry.refit
    data = {
        **describe(entry.plan),
        "stored_bytes": stored,
        "refit": None if record is None else {**record.model_dump(mode="json"), "tensors": len(record.tensors)},
        "base_model": entry.base_model,
        "origin": None if entry.origin is None else entry.origin.to_dict(),
        "quantization_config": None if entry.packing is None else entry.packing.to_dict(),
    }
    words = f"{picture(entry.plan)}\n{stored:,} bytes of weights stored in {shared}"
    words += "" if entry.packing is None else f"\n{entry.packing.in_words()}"
    words += "" if record is None else f"\n{record.in_words()}"
    if split is not None:
        data["split"] = describe_split(checkpoint, split)
        words += f"\n{picture_split(data['split'])}"
    print_result(data, words, as_json, written=html)


def _draw(html: Path | None, *inspected: Any) -> None:
    """Write the page of a plan, and of the checkpoint that it made, if one was asked for.

    `inspected` has the fields of `sharing.picture.page.Inspected`.
    """
    if html is None:
        return
    from headshare.pages.page import write_page
    from headshare.sharing.picture.page import Inspected, plan_page

    write_page(html, plan_page(Inspected(*inspected)))


def verify(
    shared: SharedArgument,
    against: Annotated[
        str | None, typer.Option(rich_help_panel=CHECK, help="Also compare every number with this dense model.")
    ] = None,
    logits: Annotated[
        bool, typer.Option(rich_help_panel=CHECK, help="Also run both models and compare their logits.")
    ] = True,
    any_base: AnyBaseOption = False,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a checkpoint: digests, map, numbers, and logits against a stock model with donors' rows written in."""
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.evaluation.verify import verify as verify_checkpoint

    checkpoint = open_checkpoint(shared, revision=revision)
    dense = None if against is None else open_checkpoint(against)
    report = verify_checkpoint(checkpoint, dense, logits=logits, any_base=any_base)
    lines = [
        f"{'ok' if report.ok else 'NOT ok'}: {report.files_checked} files, {report.parameter_bytes:,} parameter bytes"
    ]
    if report.tensors_checked:
        lines.append(f"{report.tensors_checked} tensors compared with {against}")
    if report.max_logit_diff is not None:
        lines.append(f"largest difference of a logit from the stock model: {report.max_logit_diff}")
    print_result(report.to_dict(), "\n".join([*lines, *report.notes, *report.problems]), as_json)
    if not report.ok:
        raise typer.Exit(1)


def attention(
    model: ModelArgument,
    text: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            rich_help_panel=TEXT,
            help="Compare attention maps on this text, .jsonl, .json or .csv. Give it again for another text.",
        ),
    ],
    tokens: Annotated[
        int, typer.Option(min=1, rich_help_panel=TEXT, help="Use about this many tokens of each.")
    ] = 4096,
    window: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=TEXT,
            help="Cut each into windows of this many tokens. Default: 512, or the most that the model reads.",
        ),
    ] = None,
    field: FieldOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=WRITE,
            help="Draw figures into this folder, and keep the similarities of all heads there for `headshare report`.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WRITE, help="Also write tables and figures to this HTML file, which needs no other."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    seed: Annotated[int, typer.Option(rich_help_panel=RUN, help="Choose the windows of a text by this seed.")] = 0,
    device: Annotated[
        str,
        typer.Option(metavar="DEVICE", rich_help_panel=RUN, help="Run the model on this device: cpu, cuda:0, auto."),
    ] = "cpu",
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare which heads attend alike on a text, and whether their weights tell it.

    Similarities of attention maps stand beside those of weights by every match function, with their rank correlations.
    """
    from headshare.attention.analysis import attention as analyse
    from headshare.attention.figures import figures_of
    from headshare.attention.page import attention_page
    from headshare.attention.result import FILE
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.files.atomic import write_whole
    from headshare.pages.figures import save_figures
    from headshare.pages.page import check_page, write_page

    if html is not None:
        check_page(html)
    if out is not None and (out / FILE).exists() and not overwrite:
        raise OutputError(f"{out / FILE} exists. Choose another folder, or pass --overwrite to replace it.")
    with open_checkpoint(model, revision=revision) as dense:
        result = analyse(dense, text, tokens=tokens, window=window, seed=seed, field=field, device=device)
    if out is not None:
        save_figures(figures_of(result), out, "attention")
        write_whole(out / FILE, result.to_bytes())
    if html is not None:
        write_page(html, attention_page(result))
    print_result(result.to_dict(), result.in_words(), as_json, written=out or html)
