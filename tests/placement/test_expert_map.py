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
