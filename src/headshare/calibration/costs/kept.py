"""Cost curves on disk: those of a run, to go on with, and those kept in a file that serves every budget.

A file that a person keeps says which model and which text its curves are of. Those of another one are refused.
"""

import json
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headshare.calibration.costs.actions import Action
from headshare.calibration.costs.curves import CostCurve, checked_curves, curves_from_json, curves_to_json
from headshare.errors import CalibrationError, PlanError
from headshare.files.atomic import write_whole
from headshare.files.state_files import Workspace
from headshare.files.untrusted import MAX_JSON_BYTES, first_error, is_file, parse_json, read_bytes

FORMAT = 1
# values of a file: 80 layers of 64 steps that remove 448 neurons each have 2.3 million
MAX_VALUES = 20_000_000


class _Document(BaseModel):
    """The file: what the curves are of, the actions that were priced, the curves, and what rounding costs.

    Where only rounding was priced there are no actions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    headshare_prices: int
    of: dict[str, str] = Field(max_length=50)
    actions: list[str] = Field(max_length=1000)
    curves: Any
    rounding: Any = None


@dataclass(frozen=True)
class KeptCurves:
    """A file of cost curves, and what they must be of: the model, the text and all else that decides them."""

    path: Path
    of: Mapping[str, str]

    def read(self, actions: Collection[Action]) -> list[CostCurve] | None:
        """The curves of these actions, of all layers; None if no such file has curves yet.

        Raises:
            CalibrationError: if the file is not one of cost curves, or they are of something else.
        """
        document = self._own()
        if document is None or not document.actions:
            return None
        missing = sorted({str(action) for action in actions} - set(document.actions))
        if missing:
            raise self._refusal(f"it has no costs of {', '.join(missing)}")
        try:
            return checked_curves(document.curves)
        except PlanError as error:
            raise self._refusal(str(error)) from None

    def read_rounding(self) -> Any | None:
        """What rounding costs, unchecked; None if no such file has it yet.

        Raises:
            CalibrationError: as `read` does.
        """
        document = self._own()
        return None if document is None else document.rounding

    def write(self, actions: Collection[Action], curves: Sequence[CostCurve]) -> None:
        """Write the curves, whole or not at all.

        Raises:
            OutputError: if they cannot be written.
        """
        self._write(sorted(map(str, actions)), curves_to_json(curves), self.read_rounding())

    def write_rounding(self, costs: Sequence[Any]) -> None:
        """Write what rounding costs, as JSON data, beside the curves that are there.

        Raises:
            OutputError: if it cannot be written.
        """
        document = self._own()
        curves = "[]" if document is None else json.dumps(document.curves)
        self._write([] if document is None else document.actions, curves, costs)

    def _write(self, actions: list[str], curves: str, rounding: Any) -> None:
        document = _Document(headshare_prices=FORMAT, of=dict(self.of), actions=actions, curves=[], rounding=rounding)
        head = document.model_dump_json(exclude={"curves"}, exclude_none=True)
        write_whole(self.path, (f'{head.removesuffix("}")},"curves":{curves}}}\n').encode())

    def _own(self) -> _Document | None:
        """What the file holds, if there is one, and it is of the right model and text."""
        if not is_file(self.path):
            return None
        document = self._document()
        for what, value in self.of.items():
            if document.of.get(what) != value:
                raise self._refusal(
                    f"it is of another {what}: {document.of.get(what, 'unknown')[:20]}, not {value[:20]}"
                )
        return document

    def _document(self) -> _Document:
        data = parse_json(
            read_bytes(self.path, MAX_JSON_BYTES, CalibrationError), self.path, CalibrationError, MAX_VALUES
        )
        if not isinstance(data, dict) or "headshare_prices" not in data:
            raise self._refusal("it is no file of cost curves")
        if data["headshare_prices"] != FORMAT:
            raise self._refusal(f"its format is {data['headshare_prices']!r:.20}, and this headshare reads {FORMAT}")
        try:
            return _Document.model_validate(data)
        except ValidationError as error:
            raise self._refusal(": ".join(first_error(error))) from None

    def _refusal(self, why: str) -> CalibrationError:
        return CalibrationError(f"{self.path} cannot be used: {why}. Give another file for --prices, or remove it.")


class SavedCurves(MutableMapping[int, list[CostCurve]]):
    """The cost curves of the layers done so far, a file for each layer."""

    def __init__(self, work: Workspace, key: str) -> None:
        self._work = work
        self._prefix = f"prices-{key}-"

    def _file(self, layer: int) -> str:
        return f"{self._prefix}{layer}.json"

    def __getitem__(self, layer: int) -> list[CostCurve]:
        saved = self._work.read(self._file(layer))
        if saved is None:
            raise KeyError(layer)
        try:
            return curves_from_json(saved)
        except PlanError as error:
            raise self._work.damaged(self._file(layer), str(error)) from None

    def __setitem__(self, layer: int, given: list[CostCurve]) -> None:
        self._work.write(self._file(layer), curves_to_json(given).encode())

    def __delitem__(self, layer: int) -> None:
        self._work.delete(self._file(layer))

    def __iter__(self) -> Iterator[int]:
        names = (path.name for path in self._work.folder.glob(f"{self._prefix}*.json"))
        return iter(sorted(int(name.removeprefix(self._prefix).removesuffix(".json")) for name in names))

    def __len__(self) -> int:
        return sum(1 for _ in self)
