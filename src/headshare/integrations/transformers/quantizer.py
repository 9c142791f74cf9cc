"""The quantizer that loads and saves shared checkpoints in transformers, by `from_pretrained` as for any model.

To transformers, sharing is a quantisation method: config.json names it, and its quantizer replaces the modules that
the plan touches while the model is still on the meta device. Weights then load under their own names.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from headshare.architecture.modules import ModuleMap, module_path, replace_module
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.entry import METHOD, SharingEntry
from headshare.checkpoint.header import read_whole_header
from headshare.checkpoint.int4 import Packing, check_types, guards, packed_tensors
from headshare.checkpoint.rounding.tensors import joined_parts
from headshare.errors import CheckpointError, PlanError, StorageError
from headshare.integrations.transformers.absent import AbsentAttention
from headshare.integrations.transformers.copied import CopiedWeights
from headshare.integrations.transformers.placing import device_of, device_types
from headshare.integrations.transformers.rounded import RoundedWeights
from headshare.integrations.transformers.shrinking import check_attention, regrow, shrink, shrunk_of, stock_copies
from headshare.integrations.transformers.sized import check_numbers, shape_mismatch
from headshare.plan.placement import held_again
from headshare.sharing.fits import open_shared
from headshare.storage.changes import change_modules, changed_paths, changed_tensors, stock_modules
from headshare.storage.int4 import PackedLinear, install_packed, unpacked
from headshare.storage.pooled.bank import HOW_TO_TRAIN
from headshare.storage.pooled.frozen import read_banks
from headshare.storage.projection import SharedProjection, is_loaded, stored_dtypes
from headshare.storage.registry import STORAGES, TRAINABLE, choose_storage
from headshare.storage.rounded import is_rounded, stored_parts

LOGGER = logging.getLogger("headshare")


@register_quantizer(METHOD)
class HeadshareQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not typed
    """The quantizer that builds shared modules before weights load, and dense ones on `model.dequantize()`."""

    requires_calibration = False
    _frozen = False
    _model: nn.Module | None = None
    _gathered: Mapping[str, Any] | None = None
    _mapped: frozenset[str] = frozenset()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._guarded: set[str] = set()
        self._shapes: dict[str, torch.Size] = {}
        self._rounded = RoundedWeights()
        self._copies: CopiedWeights | None = None
        self._checkpoint: Checkpoint | None = None

    def _process_model_before_weight_loading(
        self, model: nn.Module, device_map: Any = None, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Replace the modules that the plan touches: take removed units out, add low-rank modules, then share.

        The files must hold what the plan says, or a missing tensor would be left as memory happens to be. A device map
        that is still to be worked out is worked out on the storage that trains, whose parameters have the sizes of all
        stored tensors.
        """
        entry = self.quantization_config.sharing
        plan = entry.plan
        if checkpoint_files:
            self._check_files(model, [Path(file) for file in checkpoint_files])
        elif entry.rounding is not None:
            raise StorageError("a model with rounded matrices is loaded from its files. Give their folder.")
        # Matrices that were rounded before there was a record have modules of their own; their plans only share rows.
        if isinstance(entry.packing, Packing):
            tensors = plan.tensors
            packed_tensors(tensors, entry.packing)  # refuses a plan that does more than share rows
            install_packed(model, entry.packing, tensors, ModuleMap.of(model, tensors), guarded=self._guarded)
            self._shapes = _shapes_of(model)
            return
        # From here on tensors count without removed units, so these must be gone before anything else is placed.
        check_attention(model.config, plan)
        removed = shrunk_of(plan)
        if removed:
            shrink(model, plan, ModuleMap.of(model, removed))
        change_modules(model, plan, ModuleMap.of(model, changed_tensors(plan)))
        self._copies = CopiedWeights(model, plan.copies, self._checkpoint) if plan.copies else None
        self._tensors = plan.reduced_tensors
        self._modules = ModuleMap.of(model, self._tensors)
        self._stock = {path: model.get_submodule(path) for path in self._modules.paths().values()}
        self._model = model
        # transformers measures modules to make a map of a name like "auto": a second call then installs for good
        if isinstance(device_map, str):
            STORAGES[TRAINABLE]({}).install(model, self._tensors, self._modules)
            self._hold_others(model)
        else:
            self._install(model, device_map)

    def _check_files(self, model: Any, files: Sequence[Path]) -> None:
        """Hold the plan and the model's size against the files that are about to be loaded.

        The files are opened, unless headshare has done so: then these are the ones that it opened.
        """
        opened = self.quantization_config.opened
        if opened is None or {opened.path / file for file in opened.metadata} != set(files):
            opened = _opened(model, self.quantization_config.sharing, files)
        self._checkpoint = opened
        check_numbers(opened, model)
        for guard in guards(opened.tensors):
            with suppress(PlanError):  # a bare model lacks what stands in the head
                self._guarded.add(module_path(model, guard))
        check_types((info.name, info.dtype) for info in opened.tensors.values())
        self._rounded = RoundedWeights.of(opened)
        # a model is being built without memory, and here numbers are read
        with torch.device("cpu"), opened:
            open_shared(opened)

    def update_weight_conversions(self, weight_conversions: Any, *rest: Any) -> Any:
        """The conversions of weights as they load, in which copies among experts are read from what they are."""
        conversions = super().update_weight_conversions(weight_conversions, *rest)
        return conversions if self._copies is None else self._copies.converters(conversions)

    def update_parallel_plan(self, *_: Any) -> None:
        """Leave plans for several devices as they are: parameters keep their names. transformers would read each."""

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Install anew once transformers has worked a device map out: it then calls this for a second time."""
        if self._model is not None and isinstance(device_map, dict):
            _put_back(self._model, self._stock)
            self._install(self._model, device_map)

    def _install(self, model: nn.Module, device_map: Any) -> None:
        dtypes = stored_dtypes(self._stock.values())
        asked = self.quantization_config.storage
        packs = self.quantization_config.sharing.rounding is not None
        name = choose_storage(asked, self._tensors, dtypes, device_types(device_map), packs=packs)
        paths = self._modules.paths()
        devices = {tensor: device_of(path, device_map) for tensor, path in paths.items()}
        storage = STORAGES[name](devices)
        storage.install(model, self._tensors, self._modules)
        if storage.replicates and len(set(devices.values())) > 1:
            self._say_what_is_held_again(devices)
        if storage.brings_memory:
            self._mapped = frozenset(f"{path}.weight" for path in paths.values())
        self._hold_others(model)
        self._shapes = _shapes_of(model)

    def _hold_others(self, model: nn.Module) -> None:
        """Make room for rounded matrices, and none for tensors that are others."""
        self._rounded.hold_all(model)
        if self._copies is not None:
            self._copies.empty(model)

    def _say_what_is_held_again(self, devices: Mapping[str, str]) -> None:
        paths = self._modules.paths()
        itemsizes = {name: next(self._stock[path].parameters()).itemsize for name, path in paths.items()}
        pairs = held_again(self.quantization_config.sharing.plan, devices, itemsizes)
        units = sum(pair.units for pair in pairs)
        nbytes = sum(pair.nbytes for pair in pairs)
        LOGGER.info("%d units, %d bytes, are held more than once: on each device that uses them", units, nbytes)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> int:  # noqa: ARG002
        """Bytes per number that transformers reserves before it loads. Mapped weights bring their own memory."""
        return 0 if param_name in self._mapped else param.element_size()

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        self._check_shapes(model)
        self.quantization_config.opened = None
        self._checkpoint = None
        self._model = None
        self._stock = {}
        self._tensors = {}
        for path, module in model.named_modules():
            if isinstance(module, SharedProjection | PackedLinear):
                _check_loaded(path, chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)))
            if is_rounded(module):
                _check_loaded(path, stored_parts(module))
            if isinstance(module, PackedLinear):
                module.check(path)
            if isinstance(module, AbsentAttention):
                module.freeze()
        self._rounded.stand_in(model)
        if self._copies is not None:
            self._copies.join(model)
        self._frozen = read_banks(model)
        return model

    def _check_shapes(self, model: Any) -> None:
        """Refuse a model that was given tensors of other shapes than config.json describes.

        Newer releases of transformers report them. Older ones, 5.20 among them, take any shape from a quantizer.

        Raises:
            CheckpointError: naming the first such tensor and both shapes.
        """
        for name, loaded in _shapes_of(model).items():
            if loaded != self._shapes.get(name, loaded):
                raise shape_mismatch(model.config.name_or_path or "the checkpoint", name, loaded, self._shapes[name])
        self._shapes = {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        plan = self.quantization_config.sharing.plan
        if isinstance(self.quantization_config.sharing.packing, Packing):
            number: Any = model.dtype
            packed = [(path, module) for path, module in model.named_modules() if isinstance(module, PackedLinear)]
            _put_back(model, {path: unpacked(module, number) for path, module in packed})
            return _converted(model, dtype)
        if plan.no_stock_equivalent is not None:
            raise StorageError(f"no stock model computes the same as this one: {plan.no_stock_equivalent}.")
        self._rounded.unround(model)
        if self._copies is not None:
            self._copies.part(model)
            self._copies = None
        # in the reverse of the order on loading: shared modules become dense, then removed units come back as zeros
        removed = ModuleMap.of(model, shrunk_of(plan))
        stock = stock_copies(model, {*changed_paths(model), *removed.paths().values()})
        _put_back(model, stock_modules(model, stock))
        regrow(model, plan, stock, removed)
        return _converted(model, dtype)

    @contextmanager
    def saving(self, state_dict: Mapping[str, Any] | None) -> Iterator[None]:
        """Let `save_pretrained` save these tensors, within this context.

        An engine that keeps parameters in parts has put them together. transformers would ignore them for a model with
        a quantizer.
        """
        self._gathered = state_dict
        try:
            yield
        finally:
            self._gathered = None

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Mapping[str, Any] | None, dict[str, str]]:
        """Tensors and metadata for transformers to save; None stands for the model's own tensors.

        No seal is among the metadata: safetensors writes several keys in another order each time.
        """
        if self._copies is None:
            return self._gathered, {}
        return self._copies.saved(model.state_dict() if self._gathered is None else self._gathered), {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """True: a shared model is saved as it was loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether every stored number is an ordinary parameter.

        Raises:
            StorageError: if shared weights are read-only or rounded. The Trainer asks, and would otherwise
                train only the others.
        """
        if self.quantization_config.sharing.packing is not None:
            raise StorageError("this model's matrices are rounded, and those are not trained. Train it before.")
        if self._copies is not None:
            self._copies.check_kept("trained")
        if self._frozen:
            raise StorageError(f"this model's shared weights are read-only. {HOW_TO_TRAIN}")
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: the Trainer, which asks before it trains a quantised model in full, may do so."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: torch.compile sees plain tensor operations."""
        return True


def _opened(model: Any, entry: SharingEntry, files: Sequence[Path]) -> Checkpoint:
    """The checkpoint of the files that transformers is about to load into this model."""
    headers = {file.name: read_whole_header(file) for file in files}
    tensors = {info.name: info for header in headers.values() for info in header.tensors}
    tensors = joined_parts(tensors, entry.rounding)
    metadata = {name: header.metadata for name, header in headers.items()}
    config = {**model.config.to_dict(), "quantization_config": entry}
    return Checkpoint("the checkpoint", config, tensors, files[0].parent, metadata)


def _check_loaded(path: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse a module with tensors that no file held: their memory holds anything. Those left on disk have none.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, tensor in tensors:
        if not tensor.is_meta and not is_loaded(tensor):
            raise CheckpointError(
                f"nothing was loaded into {path}.{name}, which the plan or the packing needs: the checkpoint does not "
                "hold it under a name that the model has. Download it again, or share again."
            )


def _converted(model: nn.Module, dtype: Any) -> nn.Module:
    """The model with its weights in this type of number.

    Buffers keep their type: frequencies of rotary embeddings are in float32, whatever the weights are.
    """
    if isinstance(dtype, torch.dtype):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model


def _shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _put_back(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        replace_module(model, path, module)
