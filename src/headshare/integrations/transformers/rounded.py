"""The rounded matrices of a checkpoint in a model that transformers loads: where each goes, and what is tied to it."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from headshare.architecture.families import names_elsewhere
from headshare.architecture.modules import module_path
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.header import TensorInfo
from headshare.errors import PlanError
from headshare.storage.rounded import held_by, hold, is_rounded, rounded_modules, stand_in, tie, unrounded, untied


@dataclass
class RoundedWeights:
    """The rounded matrices of a checkpoint by name, and the pairs of tied tensors that transformers must not tie.

    `weights` names, for a matrix that a plan adds, the weight beside which it stands.
    """

    matrices: Mapping[str, TensorInfo] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    pairs: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "RoundedWeights":
        """Those of a checkpoint that is about to be loaded."""
        plan = checkpoint.plan
        added = {} if plan is None else plan.added_tensors
        matrices = {name: info for name, info in checkpoint.tensors.items() if info.parts is not None}
        return cls(matrices, {name: added[name].weight for name in matrices if name in added})

    def hold_all(self, model: Any) -> None:
        """Make room for the stored parts in the modules that are to hold them, before anything is loaded.

        A tied head reads its embedding's. What a bare model lacks, such as a head, is left out.
        """
        for name, info in self.matrices.items():
            path = _path_of(model, self.weights.get(name, name))
            if path is not None:
                module = model.get_submodule(path)
                parameter = name.rpartition(".")[2]
                if parameter not in held_by(module):
                    hold(module, parameter, info)
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        for target, source in list(tied.items()):
            modules = [_module_of(model, name) for name in (target, source)]
            if any(map(is_rounded, modules)):
                self.pairs[target] = tied.pop(target)
                without = [module for module in modules if not is_rounded(module)]
                for module in without:
                    tie(module, next(each for each in modules if each is not module))

    def stand_in(self, model: nn.Module) -> None:
        """Let the loaded parts be the weights of their modules."""
        for module in rounded_modules(model).values():
            stand_in(module)

    def unround(self, model: Any) -> None:
        """Give all modules ordinary weights again, and tie those that were tied."""
        for module in rounded_modules(model).values():
            unrounded(module)
        for target, source in self.pairs.items():
            for name in (target, source):
                untied(_module_of(model, name))
        if self.pairs:
            model.all_tied_weights_keys.update(self.pairs)


def _path_of(model: nn.Module, name: str) -> str | None:
    """The path of the module that a tensor is loaded into, also by the name that it has in other releases, or None."""
    for each in (name, *names_elsewhere(name)):
        with suppress(PlanError):
            return module_path(model, each)
    return None


def _module_of(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])
