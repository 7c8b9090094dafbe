"""From all ranks to rank 0."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_dist.parallel.groups import telemetry_group
from moe_dist.telemetry.collect import gather_records, sum_over_ranks
from tests.support.distributed import run_ranks


def collected() -> tuple[dict[str, list[Any]], list[dict[str, Any]] | None]:
    group, rank = telemetry_group(), dist.get_rank()
    parts = {
        "counts": torch.tensor([[2**51 + rank, 1], [0, rank]]),
        "nothing": torch.zeros(0, 3),
        "loss": torch.tensor(0.5 * rank, dtype=torch.float64),
    }
    totals = sum_over_ranks(parts, group)
    record = {"rank": rank, "value": [math.nan, 0.1 + rank], "name": "é" * (1 + rank)}
    return {name: total.tolist() for name, total in totals.items()}, gather_records(record, 100, group)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_sums_are_exact_and_records_come_whole(num_ranks: int) -> None:
    results = run_ranks(num_ranks, collected)
    ranks = range(num_ranks)
    for totals, _ in results:
        assert totals["counts"] == [[num_ranks * 2**51 + sum(ranks), num_ranks], [0, sum(ranks)]]
        assert totals["nothing"] == []
        assert totals["loss"] == 0.5 * sum(ranks)
    records = [{"rank": rank, "value": [None, 0.1 + rank], "name": "é" * (1 + rank)} for rank in ranks]
    assert [gathered for _, gathered in results] == [records, *[None] * (num_ranks - 1)]


def test_the_group_is_made_once() -> None:
    assert run_ranks(2, same_group) == [True, True]


def same_group() -> bool:
    return telemetry_group() is telemetry_group()
