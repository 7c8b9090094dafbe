"""The expert -> rank map."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.placement import ExpertMap


def test_contiguous_blocks() -> None:
    assert ExpertMap.contiguous(6, 3).experts_of_rank == ((0, 1), (2, 3), (4, 5))


def test_ranks_must_divide_the_experts() -> None:
    with pytest.raises(ValueError, match="num_experts: 6 is not a multiple of the 4 expert-parallel ranks"):
        ExpertMap.contiguous(6, 4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_slots_are_ordered_by_owner_and_hold_each_expert_once(owners: list[int]) -> None:
    placed = ExpertMap.from_owners(owners)
    assert placed.num_experts == len(owners)
    assert sorted(owners) == [owners[e] for e in placed.expert_of_slot_E.tolist()]
    assert torch.equal(placed.expert_of_slot_E[placed.slot_E], torch.arange(len(owners)))
    assert placed.num_experts_of_rank == [owners.count(rank) for rank in range(max(owners) + 1)]


def test_slices_by_hand() -> None:
    """Expert 1 on rank 0, experts 0 and 2 on rank 1; each rank becomes two."""
    sliced = ExpertMap(((1,), (2, 0))).sliced(2)
    assert sliced.experts_of_rank == ((2,), (3,), (4, 0), (5, 1))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20).map(ExpertMap.from_owners), st.integers(1, 4))
def test_each_slice_is_on_its_own_rank_of_those_of_its_expert(placed: ExpertMap, slices: int) -> None:
    sliced = placed.sliced(slices).experts_of_rank
    assert len(sliced) == slices * len(placed.experts_of_rank)
    for rank, numbers in enumerate(sliced):
        assert tuple(number // slices for number in numbers) == placed.experts_of_rank[rank // slices]
        assert {number % slices for number in numbers} <= {rank % slices}
    assert placed.sliced(1) == placed
