"""Exact sizes of a checkpoint under a plan, computed before any weight is read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod

from headshare.architecture.config import text_config
from headshare.architecture.families import BUFFERS, INPUT_EMBEDDINGS, MASKS, TIED_OUTPUTS
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.header import DTYPES, TensorInfo
from headshare.defaults import OUTPUT_DTYPES
from headshare.errors import OptionError
from headshare.plan.plan import SharePlan
from headshare.plan.tensors import TensorPlan
from headshare.plan.units import Sublayer
from headshare.short import short

# fractions of the model below which a saving is called little, and the chosen parts small
LITTLE = 0.02
SMALL_PARTS = 0.15


@dataclass(frozen=True)
class Estimate:
    """Bytes that a plan saves. They are of parameters, as the model holds them in memory and the checkpoint on disk.

    `units` and `recipients` are summed over the grids that share: attention, feed-forward, or each part when parts are
    matched separately. `removed_units` counts attention units, `narrow_layers` layers with narrow values, and
    `identical_tensors` tensors that are not stored because an equal one is.
    `saved_fraction` is the saved part of the whole model, and `parts_fraction` the part of it that the chosen parts
    have.
    """

    units: int
    recipients: int
    dense_bytes: int
    shared_bytes: int
    saved_bytes: int
    saved_fraction: float
    parts_fraction: float
    removed_units: int = 0
    removed_neurons: int = 0
    narrow_layers: int = 0
    identical_tensors: int = 0

    def __repr__(self) -> str:
        given = f"{self.recipients} of {self.units} units shared" if self.recipients else ""
        given = f"{self.identical_tensors} tensors stand elsewhere" if self.identical_tensors else given
        return short(
            self,
            given,
            f"{self.dense_bytes:,} bytes before, {self.shared_bytes:,} after ({self.saved_fraction:.1%} less)",
        )

    def to_dict(self) -> dict[str, int | float]:
        """The fields under the names that `--json` prints."""
        return asdict(self)

    def in_words(self) -> str:
        """The estimate in one or two sentences, which also say where little can be saved."""
        gone = [f"{self.removed_units} attention units"] * bool(self.removed_units)
        gone += [f"{self.removed_neurons} neurons"] * bool(self.removed_neurons)
        removed = f", {' and '.join(gone)} removed" if gone else ""
        if self.narrow_layers:
            removed += f", narrow values in {self.narrow_layers} layer{'s'[: self.narrow_layers != 1]}"
        if self.identical_tensors:
            return self.lossless()
        text = f"{self.recipients} of {self.units} units shared{removed}: {self._becomes()}"
        if self.parts_fraction < SMALL_PARTS:
            text += f" The chosen parts are only {self.parts_fraction:.1%} of this model; no ratio can save more."
        if self.recipients and self.saved_fraction < LITTLE:
            small = "more parts (--parts qkvo or qkvo+ffn)" if self.parts_fraction < SMALL_PARTS else "a higher ratio"
            text += f" That is little: consider {small}."
        return text

    def lossless(self) -> str:
        """The estimate of a plan that stores once what stands several times, in words."""
        found = [f"{self.identical_tensors} tensors"] * bool(self.identical_tensors)
        found += [f"{self.recipients} parts of units"] * bool(self.recipients)
        return f"{' and '.join(found)} stand elsewhere too, bit for bit: {self._becomes()} Nothing is lost."

    def _becomes(self) -> str:
        return f"{_mib(self.dense_bytes)} becomes {_mib(self.shared_bytes)}, {self.saved_fraction:.1%} less."


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def estimate_plan(checkpoint: Checkpoint, plan: SharePlan, *, dtype: str | None = None) -> Estimate:
    """The estimate for this plan and checkpoint, stored as `dtype` or as it is.

    Raises:
        OptionError: if there is no such type.
    """
    code = dtype_code(dtype)
    parameters = parameter_infos(checkpoint)
    dense = sum(stored_bytes(info, code) for info in parameters.values())
    # indices that are not stored, of weights and of biases that are there
    tensors = {**plan.tensors, **plan.biases}
    present = {name: tensor for name, tensor in tensors.items() if name in checkpoint.tensors}
    saved = sum(absent_numbers(tensor) * item_size(checkpoint.tensors[name], code) for name, tensor in present.items())
    # bytes of all units in the plan's parts: no ratio can save more
    places = {part: (layout, place) for layout in plan.layouts for part, place in layout.parts.items()}
    at_stake = sum(
        layout.units * place.numel * item_size(checkpoint.tensors[place.name(0)], code)
        for layout, place in places.values()
    )
    # scales and factors take some bytes back
    for extra in plan.added_tensors.values():
        saved -= prod(extra.shape) * item_size(checkpoint.tensors[extra.weight], code)
    return Estimate(
        units=sum(selection.layout.units for selection in plan.selections),
        recipients=plan.ties,
        dense_bytes=dense,
        shared_bytes=dense - saved,
        saved_bytes=saved,
        saved_fraction=saved / dense,
        parts_fraction=at_stake / dense,
        removed_units=plan.removed(Sublayer.ATTENTION),
        removed_neurons=plan.removed(Sublayer.FFN),
        narrow_layers=len(plan.narrow_values.widths) if plan.narrow_values else 0,
        identical_tensors=len(plan.copies),
    )


def absent_numbers(tensor: TensorPlan) -> int:
    """The count of a tensor's numbers that a plan does not store."""
    return prod(tensor.shape) - prod(tensor.stored_shape)


def dtype_code(dtype: str | None) -> str | None:
    """The name that safetensors has for this type; None for None.

    Raises:
        OptionError: naming those that weights can be stored as.
    """
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise OptionError(f"the dtype '{dtype}' is not one of {', '.join(OUTPUT_DTYPES)}.")
    return None if dtype is None else OUTPUT_DTYPES[dtype]


def parameter_infos(checkpoint: Checkpoint) -> Mapping[str, TensorInfo]:
    """Entries of the stored tensors that are parameters: no rotary tables, masks or second tied embedding."""
    infos = {name: info for name, info in checkpoint.tensors.items() if not _is_buffer(info)}
    if not text_config(checkpoint.config).get("tie_word_embeddings"):
        return infos
    inputs = {info.shape for name, info in infos.items() if name.endswith(INPUT_EMBEDDINGS)}
    outputs = [name for name in TIED_OUTPUTS if name in infos]
    repeated = {_module(name) for name in outputs if infos[name].shape in inputs}
    for name in outputs:
        if _module(name) in repeated:
            infos.pop(name)
    return infos


def parameter_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all parameters that a checkpoint stores."""
    return sum(info.nbytes for info in parameter_infos(checkpoint).values())


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _is_buffer(info: TensorInfo) -> bool:
    return info.name.endswith(BUFFERS) or (len(info.shape) == 4 and info.name.endswith(MASKS))


def stored_bytes(info: TensorInfo, dtype: str | None) -> int:
    """Bytes of this tensor if floating-point weights are stored as `dtype` (None: as they are)."""
    return info.nbytes // DTYPES[info.dtype].itemsize * item_size(info, dtype)


def item_size(info: TensorInfo, dtype: str | None) -> int:
    """Bytes of one of this tensor's numbers, stored as `dtype` if it is a floating-point weight."""
    convert = dtype is not None and info.torch_dtype.is_floating_point
    return DTYPES[dtype].itemsize if convert and dtype is not None else DTYPES[info.dtype].itemsize
