"""The measured number of chunks: the same on all ranks, and the layer is as it was."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moe_dist import MoELayer
from moe_dist.config.routing import RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.engines import overlap
from moe_dist.engines.overlap import CANDIDATES, choose_num_chunks
from tests.support.distributed import run_ranks

H, E = 8, 8


def make_layer() -> MoELayer:
    moe = MoEConfig(num_experts=E, ffn_size=16, num_shared_experts=1)
    losses = {"load_balance": {"coefficient": 0.1, "scope": "global_batch"}}
    routing = {"top_k": 2, "score": "sigmoid", "bias": {"rule": "sign"}, "losses": losses}
    return MoELayer(H, moe, RoutingConfig.model_validate(routing), dist.group.WORLD)


def state_of(layer: MoELayer) -> dict[str, Any]:
    """All that a measurement might move: weights, counters, gradients, modes, random numbers."""
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {
        "tensors": {name: x.detach().clone() for name, x in tensors.items() if not name.startswith("dispatcher.")},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in layer.named_parameters()},
        "training": {name: module.training for name, module in layer.named_modules()},
        "random": torch.get_rng_state(),
    }


def measure(autocast: bool) -> tuple[int, list[int]]:
    """The choice of this rank, and the numbers that it tried."""
    layer, tried = make_layer(), []
    layer.experts.w_down.grad = torch.ones_like(layer.experts.w_down)
    before, set_num_chunks = state_of(layer), layer.set_num_chunks

    def noted(number: int) -> None:
        tried.append(number)
        set_num_chunks(number)

    with patch.object(layer, "set_num_chunks", noted):
        chosen = choose_num_chunks(layer, 2, 6, 50, autocast)
    torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)
    return chosen, tried


@pytest.mark.parametrize("autocast", [False, True])
def test_the_layer_is_as_it_was_and_all_ranks_agree(autocast: bool) -> None:
    (first, tried), (second, _) = run_ranks(2, measure, autocast)
    assert first == second
    assert first in CANDIDATES
    assert set(tried) == set(CANDIDATES)


def choose(seconds_of_rank: list[dict[int, float]]) -> int:
    """With seconds for each number of chunks in place of a clock; the first round is a slow one."""
    rounds = {
        number: iter([9.0, *[seconds] * overlap.ROUNDS]) for number, seconds in seconds_of_rank[dist.get_rank()].items()
    }

    def time(layer: MoELayer, *_: Any) -> float:
        return next(rounds[len(layer.dispatcher.own_chunks)])

    with patch.object(overlap, "_time", time):
        return choose_num_chunks(make_layer(), 2, 6, 50, False)


@pytest.mark.parametrize(
    ("first", "second", "chosen"),
    [
        ({1: 1.0, 2: 0.5, 4: 0.8}, {1: 1.0, 2: 0.5, 4: 0.8}, 2),
        ({1: 1.0, 2: 0.9, 4: 0.5}, {1: 1.0, 2: 0.9, 4: 0.5}, 4),
        ({1: 1.0, 2: 0.99, 4: 0.98}, {1: 1.0, 2: 0.99, 4: 0.98}, 1),  # not worth it
        ({1: 1.0, 2: 0.1, 4: 0.8}, {1: 1.0, 2: 3.0, 4: 0.9}, 4),  # the slowest rank counts
        ({1: 0.1, 2: 0.1, 4: 0.1}, {1: 1.0, 2: 0.5, 4: 0.8}, 2),
    ],
)
def test_the_fastest_by_a_margin_is_chosen(first: dict[int, float], second: dict[int, float], chosen: int) -> None:
    assert run_ranks(2, choose, [first, second]) == [chosen] * 2
