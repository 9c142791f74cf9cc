"""Cost curves kept on disk, so that a run that was stopped can go on with them."""

from collections.abc import Iterator, MutableMapping

from headshare.calibration.costs.curves import CostCurve, curves_from_json, curves_to_json
from headshare.errors import PlanError
from headshare.files.state_files import Workspace


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
