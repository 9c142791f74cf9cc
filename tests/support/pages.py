"""The pages of this process: what is mapped at a tensor's address, and which files are open."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from headshare.architecture.modules import module_path
from headshare.plan.plan import SharePlan
from headshare.storage.projection import shared_projections


class Mapping(NamedTuple):
    """A line of /proc/self/maps: addresses, device and inode of a file, what may be done there, and the offset."""

    start: int
    stop: int
    file: bytes
    mode: bytes
    offset: int


def mappings() -> list[Mapping]:
    found = []
    for line in Path("/proc/self/maps").read_bytes().rstrip(b"\n").split(b"\n"):
        bounds, mode, offset, device, inode, *_ = line.split(maxsplit=5)
        start, stop = (int(bound, 16) for bound in bounds.split(b"-"))
        found.append(Mapping(start, stop, device + b":" + inode, mode, int(offset, 16)))
    return found


def mapping_of(tensor: Tensor, among: list[Mapping] | None = None) -> Mapping:
    """What is mapped at a tensor's address, now or when these were read."""
    address = tensor.data_ptr()
    for one in mappings() if among is None else among:
        if one.start <= address < one.stop:
            return one
    raise AssertionError("no mapping there")


def in_memory(tensor: Tensor, among: list[Mapping] | None = None) -> tuple[bytes, int]:
    """Which bytes stand at a tensor's address: device and inode of the file that is mapped there, and the offset."""
    one = mapping_of(tensor, among)
    return one.file, one.offset + tensor.data_ptr() - one.start


def assert_rows_are_the_donors_own(model: nn.Module, plan: SharePlan) -> None:
    """First and last row (or column) of every gap: the recipient's address and the donor's show the same bytes."""
    tensors, modules, seen = plan.tensors, dict(shared_projections(model)), 0
    wholes = {name: modules[module_path(model, name)].whole_weight() for name in tensors}
    now = mappings()  # while all of them are there
    for name, tensor in tensors.items():
        for start, stop, donor, donor_start in tensor.gaps:
            lent, first = modules[module_path(model, donor)].weight, tensors[donor].stored_index(donor_start)
            for row in (0, stop - start - 1):
                ours = wholes[name].select(tensor.axis, start + row)
                theirs = lent.select(tensor.axis, first + row)
                assert in_memory(ours, now) == in_memory(theirs, now), (name, start + row)
                assert in_memory(ours, now)[0] != b"00:00:0", "anonymous memory"
                seen += 1
    assert seen > 0


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
