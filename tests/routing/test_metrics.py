"""Balance metrics against plain Python."""

import math
import statistics

import pytest
import torch

from moe_dist.routing.metrics import coefficient_of_variation, dead_experts, drop_rate, max_vio, noise_floor

LOADS = [[10, 2, 6, 6], [6, 6, 6, 6], [24, 0, 0, 0], [1, 0, 0, 2**40]]


@pytest.mark.parametrize("load", LOADS)
def test_formulas(load: list[int]) -> None:
    mean, load_E = sum(load) / len(load), torch.tensor(load)
    assert max_vio(load_E).item() == pytest.approx((max(load) - mean) / mean, rel=1e-12)
    assert coefficient_of_variation(load_E).item() == pytest.approx(statistics.pstdev(load) / mean, rel=1e-12)
    assert dead_experts(load_E).item() == load.count(0)


def test_values_by_hand() -> None:
    assert max_vio(torch.tensor([10, 2, 6, 6])).item() == pytest.approx(2 / 3)
    assert max_vio(torch.tensor([6, 6, 6, 6])).item() == 0
    assert max_vio(torch.tensor([24, 0, 0, 0])).item() == 3  # E - 1: the most there is
    assert drop_rate(torch.tensor([6, 2]), torch.tensor([2, 0])).item() == 0.25


def test_layers_are_measured_each_on_its_own() -> None:
    load_NE, dropped_NE = torch.tensor(LOADS), torch.ones(4, 4, dtype=torch.int64)
    for metric in (max_vio, coefficient_of_variation, dead_experts):
        torch.testing.assert_close(metric(load_NE), torch.stack([metric(load_E) for load_E in load_NE]))
    torch.testing.assert_close(drop_rate(load_NE, dropped_NE), 4 / load_NE.sum(1))


def test_no_load_is_no_imbalance() -> None:
    load_E = torch.zeros(4, dtype=torch.int64)
    assert [metric(load_E).item() for metric in (max_vio, coefficient_of_variation)] == [0, 0]
    assert drop_rate(load_E, load_E).item() == 0
    assert dead_experts(load_E).item() == 4


def test_noise_floor_is_what_random_routing_gives() -> None:
    """routing.md: T = 8192, E = 64, k = 6 gives about 0.09 to 0.11."""
    torch.manual_seed(0)
    draws = torch.stack([torch.randint(0, 64, (8192 * 6,)).bincount(minlength=64) for _ in range(20)])
    assert noise_floor(64, 8192 * 6) == pytest.approx(0.104, abs=0.001)
    assert max_vio(draws).mean().item() == pytest.approx(noise_floor(64, 8192 * 6), rel=0.25)
    assert noise_floor(64, 0) == math.inf
