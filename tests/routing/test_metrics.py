"""Balance metrics against plain Python, numpy and scipy.

Shape letters: B micro-batches, N layers, E experts, R ranks.
"""

import itertools
import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.routing.metrics import (
    avg_vio,
    coefficient_of_variation,
    dead_experts,
    drop_rate,
    effective_experts,
    gini,
    load_entropy,
    max_over_mean,
    max_vio,
    max_vio_by_batch_size,
    min_vio,
    noise_floor,
    normalised_load_entropy,
    pad_rate,
    rank_load,
    relative_max_vio,
)

Metric = Callable[[torch.Tensor], torch.Tensor]

LOADS = [[10, 2, 6, 6], [6, 6, 6, 6], [24, 0, 0, 0], [1, 0, 0, 2**40]]
UNEVENNESS: list[Metric] = [max_vio, min_vio, avg_vio, coefficient_of_variation, gini]
"""0 is perfect balance."""
SHAPE_ONLY: list[Metric] = [*UNEVENNESS, max_over_mean, load_entropy, normalised_load_entropy, effective_experts]
"""Functions of the shares of the load, not of its amount."""
ALL: list[Metric] = [*SHAPE_ONLY, relative_max_vio, dead_experts]

loads = st.lists(st.integers(0, 10**6), min_size=1, max_size=9).filter(any)


def random_loads(num_experts: int, pairs: int, draws: int) -> torch.Tensor:
    """int64 [draws, E]: pairs that choose experts uniformly at random."""
    draw = np.random.default_rng(0).multinomial(pairs, np.full(num_experts, 1 / num_experts), size=draws)
    return torch.from_numpy(draw)


# Loads.


@pytest.mark.parametrize("load", LOADS)
def test_formulas(load: list[int]) -> None:
    mean, load_E = sum(load) / len(load), torch.tensor(load)
    assert max_vio(load_E).item() == pytest.approx((max(load) - mean) / mean, rel=1e-12)
    assert min_vio(load_E).item() == pytest.approx(1 - min(load) / mean, rel=1e-12)
    assert avg_vio(load_E).item() == pytest.approx(sum(abs(c - mean) for c in load) / len(load) / mean, rel=1e-12)
    assert max_over_mean(load_E).item() == pytest.approx(max(load) / mean, rel=1e-12)
    assert coefficient_of_variation(load_E).item() == pytest.approx(statistics.pstdev(load) / mean, rel=1e-12)
    assert dead_experts(load_E).item() == load.count(0)


@given(loads)
@settings(max_examples=50, deadline=None)
def test_entropy_and_gini_against_scipy_and_the_double_sum(load: list[int]) -> None:
    load_E, num_experts = torch.tensor(load), len(load)
    assert load_entropy(load_E).item() == pytest.approx(scipy.stats.entropy(load), rel=1e-9, abs=1e-12)
    assert effective_experts(load_E).item() == pytest.approx(math.exp(scipy.stats.entropy(load)), rel=1e-9)
    if num_experts > 1:
        in_base_e = scipy.stats.entropy(load, base=num_experts)
        assert normalised_load_entropy(load_E).item() == pytest.approx(in_base_e, rel=1e-9, abs=1e-12)
    differences = sum(abs(a - b) for a, b in itertools.product(load, repeat=2))
    assert gini(load_E).item() == pytest.approx(differences / (2 * num_experts * sum(load)), rel=1e-12)


def test_values_by_hand() -> None:
    some_E, equal_E, one_E = torch.tensor([10, 2, 6, 6]), torch.tensor([6, 6, 6, 6]), torch.tensor([24, 0, 0, 0])
    assert [metric(equal_E).item() for metric in UNEVENNESS] == [0] * 5
    assert [metric(one_E).item() for metric in UNEVENNESS] == pytest.approx([3, 1, 1.5, math.sqrt(3), 0.75])  # the most
    assert [metric(some_E).item() for metric in (max_vio, min_vio, avg_vio)] == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert gini(some_E).item() == pytest.approx((-3 * 2 - 6 + 6 + 3 * 10) / (4 * 24))
    assert effective_experts(torch.tensor([5, 0, 5, 0])).item() == pytest.approx(2)
    assert normalised_load_entropy(torch.tensor([5, 0, 5, 0])).item() == pytest.approx(0.5)


@given(loads, st.integers(1, 1000), st.data())
@settings(max_examples=50, deadline=None)
def test_neither_order_nor_amount_matters_and_bounds_hold(load: list[int], factor: int, data: st.DataObject) -> None:
    load_E, num_experts = torch.tensor(load), len(load)
    shuffled = data.draw(st.permutations(load))
    for metric in SHAPE_ONLY:
        assert metric(torch.tensor(shuffled)).item() == pytest.approx(metric(load_E).item(), rel=1e-9, abs=1e-12)
        assert metric(factor * load_E).item() == pytest.approx(metric(load_E).item(), rel=1e-9, abs=1e-12)
    rounding = 1e-12
    assert 0 <= gini(load_E).item() <= 1 - 1 / num_experts + rounding
    assert 1 - rounding <= effective_experts(load_E).item() <= num_experts + 1e-9
    assert 0 <= max_vio(load_E).item() <= num_experts - 1 + rounding
    assert 0 <= min_vio(load_E).item() <= 1
    assert avg_vio(load_E) <= coefficient_of_variation(load_E) + rounding  # mean |x| <= root mean square of x
    assert -rounding <= normalised_load_entropy(load_E).item() <= 1 + rounding


@pytest.mark.parametrize("metric", ALL)
def test_layers_are_measured_each_on_its_own(metric: Metric) -> None:
    load_NE = torch.tensor(LOADS)
    torch.testing.assert_close(metric(load_NE), torch.stack([metric(load_E) for load_E in load_NE]))
    load_BNE = torch.stack([load_NE, load_NE.flip(0), torch.zeros_like(load_NE)])
    torch.testing.assert_close(metric(load_BNE), torch.stack([metric(load_NE) for load_NE in load_BNE]))


def test_no_load_is_no_imbalance() -> None:
    load_E = torch.zeros(4, dtype=torch.int64)
    assert [metric(load_E).item() for metric in (*UNEVENNESS, relative_max_vio)] == [0] * 6
    assert max_over_mean(load_E).item() == normalised_load_entropy(load_E).item() == 1
    assert effective_experts(load_E).item() == pytest.approx(4)
    assert drop_rate(load_E, load_E).item() == 0
    assert dead_experts(load_E).item() == 4


@pytest.mark.parametrize("load", [0, 7])
def test_one_expert_is_balanced(load: int) -> None:
    load_E = torch.tensor([load])
    assert [metric(load_E).item() for metric in (*UNEVENNESS, relative_max_vio, load_entropy)] == [0] * 7
    assert [metric(load_E).item() for metric in (max_over_mean, normalised_load_entropy, effective_experts)] == [1] * 3


# The noise floor.


def test_noise_floor_is_what_random_routing_gives() -> None:
    """routing.md: T = 8192, E = 64, k = 6 gives about 0.09 to 0.11."""
    torch.manual_seed(0)
    draws = torch.stack([torch.randint(0, 64, (8192 * 6,)).bincount(minlength=64) for _ in range(20)])
    assert noise_floor(64, 8192 * 6) == pytest.approx(0.104, abs=0.001)
    assert max_vio(draws).mean().item() == pytest.approx(noise_floor(64, 8192 * 6), rel=0.25)
    assert noise_floor(64, 0) == math.inf


@pytest.mark.parametrize(
    ("num_experts", "pairs_per_expert", "expected"),
    [(2, 500, 0.48), (8, 500, 0.70), (64, 500, 0.82), (1024, 500, 0.90), (64, 1, 1.01), (1024, 1, 1.20)],
)
def test_relative_max_vio_of_random_routing(num_experts: int, pairs_per_expert: int, expected: float) -> None:
    """The values that the docstring promises; the tolerance is three standard errors of the mean or more."""
    draws = random_loads(num_experts, num_experts * pairs_per_expert, 200)
    relative = relative_max_vio(draws)
    assert relative.mean().item() == pytest.approx(
        expected, rel=3 * (relative.std() / relative.mean()).item() / 200**0.5
    )


@pytest.mark.parametrize("load", LOADS)
def test_relative_max_vio_is_in_units_of_the_floor(load: list[int]) -> None:
    load_E = torch.tensor(load)
    assert relative_max_vio(load_E).item() == pytest.approx(max_vio(load_E).item() / noise_floor(4, sum(load)))
    assert relative_max_vio(100 * load_E).item() == pytest.approx(10 * relative_max_vio(load_E).item())


def test_larger_batches_by_hand() -> None:
    load_BE = torch.tensor([[4, 0], [0, 4], [3, 1], [2, 2], [0, 4]])
    max_vio_S, floor_S = max_vio_by_batch_size(load_BE, [1, 2, 4, 5])
    # Merged in twos: [4, 4], [5, 3], and one left over; in fours: [9, 7]; all: [9, 11].
    assert max_vio_S.tolist() == pytest.approx([(1 + 1 + 0.5 + 0 + 1) / 5, (0 + 0.25) / 2, 1 / 8, 0.1])
    assert floor_S.tolist() == pytest.approx([noise_floor(2, pairs) for pairs in (4, 8, 16, 20)])


def test_larger_batches_of_random_routing_follow_the_floor_and_others_do_not() -> None:
    sizes, batches = [1, 4, 16, 64], 64 * 8
    fair_BE, lasting_E = random_loads(32, 32 * 8, batches), torch.tensor([8, *[0] * 31])
    fair_S, floor_S = max_vio_by_batch_size(fair_BE, sizes)
    assert floor_S.tolist() == pytest.approx([noise_floor(32, 32 * 8 * size) for size in sizes])
    assert ((fair_S / floor_S > 0.7) & (fair_S / floor_S < 1)).all()
    biased_S, floor_S = max_vio_by_batch_size(fair_BE + lasting_E, sizes)
    assert biased_S[-1] > 0.8
    assert biased_S[-1] / floor_S[-1] > 5


def test_larger_batches_of_each_layer() -> None:
    load_BNE = torch.tensor([LOADS, LOADS[::-1], LOADS])
    max_vio_SN, floor_SN = max_vio_by_batch_size(load_BNE, [1, 3])
    for n in range(4):
        expected_S = max_vio_by_batch_size(load_BNE[:, n], [1, 3])
        torch.testing.assert_close((max_vio_SN[:, n], floor_SN[:, n]), expected_S)


def test_a_batch_without_load_has_no_floor() -> None:
    max_vio_S, floor_S = max_vio_by_batch_size(torch.tensor([[2, 2], [0, 0]]), [1, 2])
    assert max_vio_S.tolist() == [0, 0]
    assert floor_S.tolist() == [math.inf, pytest.approx(noise_floor(2, 4))]


@pytest.mark.parametrize("size", [0, -1, 3])
def test_batch_sizes_are_checked(size: int) -> None:
    with pytest.raises(ValueError, match=f"sizes: {size} is not 1 to 2"):
        max_vio_by_batch_size(torch.ones(2, 4, dtype=torch.int64), [1, size])


# Capacity and ranks.


def test_drop_rate_and_pad_rate_by_hand() -> None:
    load_NE, dropped_NE = torch.tensor([[6, 2], [4, 4], [0, 0]]), torch.tensor([[2, 0], [0, 0], [0, 0]])
    assert drop_rate(load_NE, dropped_NE).tolist() == [0.25, 0, 0]
    assert pad_rate(load_NE - dropped_NE, 4).tolist() == [0.25, 0, 1]  # slots 8; kept 6, 8, 0
    load_NE, dropped_NE = torch.tensor(LOADS), torch.ones(4, 4, dtype=torch.int64)
    torch.testing.assert_close(drop_rate(load_NE, dropped_NE), 4 / load_NE.sum(1))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 100)), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_rank_load_is_the_sum_over_the_experts_of_a_rank(experts: list[tuple[int, int]]) -> None:
    owner_E, load_E = torch.tensor(experts).unbind(1)
    rank_load_R = rank_load(load_E, owner_E, 6)
    assert rank_load_R.dtype == torch.int64
    assert rank_load_R.tolist() == [sum(load for owner, load in experts if owner == rank) for rank in range(6)]


def test_balance_of_ranks() -> None:
    load_NE = torch.tensor([[10, 2, 6, 6], [6, 6, 6, 6], [24, 0, 0, 0]])
    owner_E = torch.tensor([1, 0, 0, 1])
    assert rank_load(load_NE, owner_E, 3).tolist() == [[8, 16, 0], [12, 12, 0], [0, 24, 0]]
    assert max_vio(rank_load(load_NE, owner_E, 2)).tolist() == pytest.approx([1 / 3, 0, 1])
