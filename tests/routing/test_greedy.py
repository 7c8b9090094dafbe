"""Greedy matching against the sorted loop that it stands for. Shape letters: G groups, R rows, C columns."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.routing.greedy import assign_greedily


def sorted_loop(value: torch.Tensor, per_row: int, capacity: int) -> torch.Tensor:
    """The pairs that a plain loop takes; rows may be left short."""
    rows, columns = value.shape
    chosen = torch.zeros(rows, columns, dtype=torch.bool)
    for place in value.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(place, columns)
        if chosen[row].sum() < per_row and chosen[:, column].sum() < capacity:
            chosen[row, column] = True
    return chosen


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 6),
    data=st.data(),
    ties=st.booleans(),
)
def test_it_takes_what_the_sorted_loop_takes_and_completes_it(
    rows: int, columns: int, data: st.DataObject, ties: bool
) -> None:
    per_row = data.draw(st.integers(1, columns))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    value = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    value = (2 * value).round() if ties else value
    capacity = math.ceil(rows * per_row / columns)
    (chosen,) = assign_greedily(value[None], per_row, capacity)
    assert chosen.sum(1).tolist() == [per_row] * rows
    assert chosen.sum(0).max() <= capacity
    expected = sorted_loop(value, per_row, capacity)
    if expected.sum() == rows * per_row:  # no row was left short, so nothing was swapped
        assert torch.equal(chosen, expected)


def test_groups_and_padding() -> None:
    value = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(0))
    real = torch.arange(12) < torch.tensor([12, 7, 0])[:, None]
    together = assign_greedily(value, 2, 6, real)
    assert together.sum(2).tolist() == (2 * real).tolist()
    for group in range(3):
        assert torch.equal(assign_greedily(value[group : group + 1], 2, 6, real[group : group + 1])[0], together[group])


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_constant_values_are_shared_out_evenly(value: float) -> None:
    chosen = assign_greedily(torch.full((1, 16, 8), value), 2, 4)
    assert chosen.sum(1).tolist() == [[4] * 8]
