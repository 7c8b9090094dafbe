"""Loss-free bias: the update rule, its arithmetic, and its synchronisation."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moe_dist.config.methods import METHOD_NAMES
from moe_dist.config.routing import RoutingConfig
from moe_dist.routing import Routing, build_router
from moe_dist.routing.balance import BalanceState, sum_over_ranks
from moe_dist.routing.loss_free import update_bias
from tests.support.distributed import run_ranks

RATE = 0.125  # exact in binary
SIGN = RoutingConfig.model_validate({"bias": {"rule": "sign"}})


def make_states(*loads: list[int]) -> list[BalanceState]:
    states = [BalanceState(len(load)) for load in loads]
    for state, load in zip(states, loads, strict=True):
        state.load_E += torch.tensor(load)
    return states


def update(states: list[BalanceState], rate: float = RATE) -> list[list[float]]:
    for state, totals in zip(states, sum_over_ranks(states, None), strict=True):
        update_bias(state, totals, SIGN, rate)
    return [state.bias_E.tolist() for state in states]


def loop_step(bias: list[float], load: list[int], rate: float) -> list[float]:
    mean = sum(load) / len(load)
    bias = [b + rate * ((mean > c) - (mean < c)) for b, c in zip(bias, load, strict=True)]
    return [b - sum(bias) / len(bias) for b in bias]


def test_one_step_by_hand() -> None:
    """Above the mean of 6: down; below: up; at it: stay."""
    assert update(make_states([10, 2, 6, 6])) == [[-RATE, RATE, 0, 0]]


def test_the_bias_is_centred() -> None:
    """Three experts below the mean, one above: +u, +u, +u, -u, less their mean of u/2."""
    assert update(make_states([1, 1, 1, 9])) == [[RATE / 2] * 3 + [-1.5 * RATE]]


def test_many_steps_match_a_plain_loop_and_do_not_drift() -> None:
    generator = torch.Generator().manual_seed(0)
    (state,), expected = make_states([0] * 6), [0.0] * 6
    for _ in range(200):
        load = torch.randint(0, 50, (6,), generator=generator).pow(2)
        state.load_E += load
        update([state], rate=1e-3)
        expected = loop_step(expected, load.tolist(), 1e-3)
    assert state.bias_E.tolist() == pytest.approx(expected, abs=1e-6)
    assert abs(state.bias_E.mean().item()) < 1e-8


@pytest.mark.parametrize("load", [[0, 0, 0, 0], [7, 7, 7, 7]])
def test_perfect_balance_and_no_load_move_nothing(load: list[int]) -> None:
    assert update(make_states(load)) == [[0.0] * 4]


@pytest.mark.parametrize("base", [2**24, 2**31, 2**40])
def test_counts_that_float32_cannot_tell_apart(base: int) -> None:
    """base + 1 is no float32; a rounded comparison would call it equal to the mean, or turn the sign."""
    load = [base + 1, base - 1, base, base]
    assert torch.tensor(load, dtype=torch.float32).unique().numel() < 3
    assert update(make_states(load)) == [[-RATE, RATE, 0, 0]]


def test_layers_are_updated_each_by_its_own_load() -> None:
    states = make_states([10, 2, 6, 6], [2, 10, 6, 6], [6, 6, 6, 6])
    assert update(states) == [[-RATE, RATE, 0, 0], [RATE, -RATE, 0, 0], [0, 0, 0, 0]]


def test_counters_start_anew_after_the_step() -> None:
    (state,) = make_states([1, 2, 3, 4])
    state.dropped_E += torch.tensor([0, 0, 1, 2])
    state.add_batch_load("load_balance", 5)
    state.batch_load("load_balance").add_(5)
    (totals,) = sum_over_ranks([state], None)
    assert (totals["load_E"].tolist(), totals["dropped_E"].tolist()) == ([1, 2, 3, 4], [0, 0, 1, 2])
    assert not any(buffer.any() for name, buffer in state.named_buffers() if name != "bias_E")


def test_counts_are_those_of_the_routing_added_up() -> None:
    state, nothing = BalanceState(3), torch.zeros(0, dtype=torch.int64)
    for dropped_E in (None, torch.tensor([1, 0, 0]), torch.tensor([0, 2, 0])):
        state.count(Routing(nothing, nothing, torch.zeros(0), torch.tensor([5, 6, 7]), dropped_E), num_tokens=9)
    assert (state.load_E.tolist(), state.dropped_E.tolist()) == ([15, 18, 21], [1, 2, 0])
    assert state.tokens.item() == 27


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_values_of_the_checkpoint_have_names_of_their_own(method: str) -> None:
    top_k = 1 if method == "base" else 2
    config = RoutingConfig.model_validate({"method": method, "top_k": top_k, "load_adjustment": {"strength": 1}})
    balance = build_router(4, 8, config, vocab_size=9).balance
    values = dict(balance.values())
    assert len(values) == len(balance.state_dict())
    assert {id(value) for value in values.values()} == {id(getattr(balance, name)) for name in balance.state_dict()}
    assert {"bias", "recent_load"} <= values.keys()


# Several ranks.


def synchronise(loads: list[list[list[int]]], drops: list[list[list[int]]]) -> tuple[Any, ...]:
    """Loads by rank, layer, expert -> (loads, drops, biases, number of all-reduces) as this rank sees them."""
    states = make_states(*loads[dist.get_rank()])
    for state, dropped in zip(states, drops[dist.get_rank()], strict=True):
        state.dropped_E += torch.tensor(dropped)
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        totals_N = sum_over_ranks(states, dist.group.WORLD)
    for state, totals in zip(states, totals_N, strict=True):
        update_bias(state, totals, SIGN, RATE)
    loads, drops = ([totals[name].tolist() for totals in totals_N] for name in ("load_E", "dropped_E"))
    return loads, drops, [state.bias_E.tolist() for state in states], all_reduce.call_count


def test_ranks_agree_on_one_update_by_one_all_reduce() -> None:
    """On neither rank alone would the update be the same as on all."""
    loads = [[[9, 1, 3, 3], [2**24, 0, 1, 1]], [[1, 1, 3, 3], [1, 2**24, 0, 2]]]
    drops = [[[1, 0, 0, 0], [0, 0, 0, 1]], [[0, 0, 0, 2], [0, 0, 0, 3]]]
    first, second = run_ranks(2, synchronise, loads, drops)
    assert first == second
    load, dropped, bias, all_reduces = first
    assert load == [[10, 2, 6, 6], [2**24 + 1, 2**24, 1, 3]]
    assert dropped == [[1, 0, 0, 2], [0, 0, 0, 4]]
    assert bias == [[-RATE, RATE, 0, 0], [-RATE, -RATE, RATE, RATE]]
    assert all_reduces == 1
