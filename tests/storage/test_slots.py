"""Where rows stand in a bank says the same as what a plan means for each tensor: worked out here row by row."""

from math import gcd

from hypothesis import given, settings
from hypothesis import strategies as st

from headshare.plan.tensors import TensorPlan
from headshare.storage.pooled.slots import BlockLayout, racks_of
from support.examples import Example, examples

Row = tuple[str, int]  # a dense tensor's name, and an index along the axis in which units lie


def rows_that_stand_in(rack: BlockLayout, tensors: dict[str, TensorPlan]) -> list[Row | None]:
    """Every row of the bank, after each tensor has put what it stores at its own slots."""
    bank: list[Row | None] = [None] * (rack.slots * rack.height)
    for name, placed in rack.placed.items():
        kept = [index for start, stop in tensors[name].kept() for index in range(start, stop)]
        assert len(kept) == placed.count * rack.height
        for offset, index in enumerate(kept):
            assert bank[placed.first * rack.height + offset] is None, "two tensors stand on one row"
            bank[placed.first * rack.height + offset] = (name, index)
    return bank


def rows_of_the_whole(example: Example, name: str, tensor: TensorPlan) -> list[Row]:
    """The dense row that stands at each index after sharing, from the plan's own words."""
    rows: list[Row] = [(name, index) for index in range(tensor.shape[tensor.axis])]
    for selection in example.selections:
        for place in selection["layout"]["parts"].values():
            for layer, group, donor_layer, donor_group in selection["ties"]:
                if place["tensor"].replace("{layer}", str(layer)) == name:
                    donor = place["tensor"].replace("{layer}", str(donor_layer))
                    for row in range(place["rows"]):
                        into, taken = (place["start"] + number * place["step"] + row for number in (group, donor_group))
                        rows[into] = (donor, taken)
    return rows


@settings(max_examples=100, deadline=None)
@given(examples())
def test_the_table_of_a_whole_weight_names_the_rows_that_filling_the_gaps_would_put_there(example: Example) -> None:
    tensors = example.plan.tensors
    racks = racks_of(tensors)
    assert sorted(name for rack in racks for name in rack.placed) == sorted(tensors)
    for rack in racks:
        bank = rows_that_stand_in(rack, tensors)
        for name, placed in rack.placed.items():
            found = [bank[slot * rack.height + row] for slot in rack.table(name) for row in range(rack.height)]
            assert found == rows_of_the_whole(example, name, tensors[name])
            assert placed.size * rack.height == tensors[name].size


@settings(max_examples=100, deadline=None)
@given(examples())
def test_a_bank_has_as_many_slots_as_kept_rows_need_and_each_is_used(example: Example) -> None:
    tensors = example.plan.tensors
    for rack in racks_of(tensors):
        stored = sum(tensors[name].stored_shape[tensors[name].axis] for name in rack.placed)
        assert rack.slots * rack.height == stored
        assert None not in rows_that_stand_in(rack, tensors)
        assert {slot for name in rack.placed for slot in rack.table(name)} == set(range(rack.slots))


@settings(max_examples=100, deadline=None)
@given(examples())
def test_slots_are_no_lower_than_the_plans_boundaries_make_them(example: Example) -> None:
    tensors = example.plan.tensors
    for rack in racks_of(tensors):
        edges: list[int] = []
        for name in rack.placed:
            tensor = tensors[name]
            dense = [index for start, stop in tensor.kept() for index in range(start, stop)]
            before = {index: position for position, index in enumerate(dense)}
            edges += [tensor.size, len(dense)]
            for gap in tensor.gaps:
                edges += [gap.stop - gap.start, gap.start, gap.stop]
                donor = [index for start, stop in tensors[gap.donor].kept() for index in range(start, stop)]
                edges.append(donor.index(gap.donor_start))
            edges += [before[start] for start, _ in tensor.kept()]
        assert rack.height % (gcd(*edges) or 1) == 0, "slots are smaller than they need be"


@settings(max_examples=100, deadline=None)
@given(examples())
def test_runs_follow_each_other_and_only_a_tensor_that_gives_something_up_borrows(example: Example) -> None:
    tensors = example.plan.tensors
    for rack in racks_of(tensors):
        for name, placed in rack.placed.items():
            assert placed.borrows == bool(tensors[name].gaps)
            position = 0
            for run in placed.runs:
                assert run.position == position
                assert run.slots > 0
                position += run.slots


@settings(max_examples=50, deadline=None)
@given(examples(), st.randoms(use_true_random=False))
def test_the_order_in_which_tensors_are_listed_does_not_change_what_a_table_means(example: Example, chance) -> None:
    tensors = example.plan.tensors
    names = list(tensors)
    chance.shuffle(names)
    shuffled = {name: tensors[name] for name in names}
    for one in (tensors, shuffled):
        for rack in racks_of(one):
            bank = rows_that_stand_in(rack, one)
            for name in rack.placed:
                found = [bank[slot * rack.height + row] for slot in rack.table(name) for row in range(rack.height)]
                assert found == rows_of_the_whole(example, name, one[name])
