"""`moe-dist verify` sees the faults that training on Megatron-Core can have, under AdamW: each, planted, is reported."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moe_dist.engines.batch import Batch
from moe_dist.training.comparison import judge
from tests.engines.test_megatron import LAYOUTS, MEGATRON, RECIPES, reference
from tests.engines.test_planted_faults import (
    ANY_GRADIENT,
    DENSE_GRADIENT,
    EXPERT_GRADIENT,
    Plant,
    auxiliary_loss_counted_per_rank,
    load_counted_in_recomputation,
)
from tests.support.equality import changed, trace

pytest.importorskip("megatron.core")

# Imports of the engine stand inside the faults, which run on the ranks.


@contextmanager
def gradients_times(factor: Callable[[Any], float], experts: bool) -> Iterator[None]:
    """Gradients of the experts, or of all others, are multiplied once they are reduced."""
    from moe_dist.engines import megatron

    reduce = megatron._without_division

    def faulty(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
        reduce(chunks, *args, **kwargs)
        sizes = {"expert": dist.get_world_size(), "data": dist.get_world_size()}
        for parameter in chunks[0].parameters():
            if getattr(parameter, "allreduce", True) != experts:
                parameter.main_grad.mul_(factor(sizes))

    with patch.object(megatron, "_without_division", faulty):
        yield


def expert_gradients_over_ranks() -> Any:
    """As Megatron scales them if it takes the loss for a mean over the ranks of the expert-parallel group."""
    return gradients_times(lambda sizes: 1 / sizes["expert"], experts=True)


def dense_gradients_reduced_twice() -> Any:
    return gradients_times(lambda sizes: sizes["data"], experts=False)


@contextmanager
def experts_not_marked() -> Iterator[None]:
    """Without `allreduce = False` Megatron takes experts for dense weights, and adds up different ones."""
    from moe_dist.engines.megatron_layer import MegatronMoELayer

    build = MegatronMoELayer.__init__

    def faulty(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        for parameter in self.moe.experts.parameters():
            parameter.allreduce = True

    with patch.object(MegatronMoELayer, "__init__", faulty):
        yield


@contextmanager
def expert_reduction_skipped() -> Iterator[None]:
    """As if no two ranks held the same experts."""
    from megatron.core.distributed import DistributedDataParallel

    reduce = DistributedDataParallel.finish_grad_sync

    def faulty(self: Any, *args: Any, **kwargs: Any) -> None:
        with patch.object(self, "expert_parallel_bucket_groups", []):
            reduce(self, *args, **kwargs)

    with patch.object(DistributedDataParallel, "finish_grad_sync", faulty):
        yield


@contextmanager
def norm_counts_experts_twice() -> Iterator[None]:
    from megatron.core.optimizer import ChainedOptimizer

    get = ChainedOptimizer.get_grad_norm

    def faulty(self: Any) -> float:
        experts = [part for part in self.chained_optimizers if part.param_groups[0]["is_expert_parallel"]]
        squares = [part.get_grad_norm() ** 2 for part in experts]
        assert squares
        return (get(self) ** 2 + sum(squares)) ** 0.5

    with patch.object(ChainedOptimizer, "get_grad_norm", faulty):
        yield


@contextmanager
def loss_over_own_targets() -> Iterator[None]:
    """Each rank takes the mean over its own targets, and then the mean over ranks is taken."""
    from moe_dist.engines.megatron import MegatronEngine

    accumulate = MegatronEngine.accumulate

    def faulty(self: Any, batches: list[Batch], num_targets: int, *args: Any) -> torch.Tensor:
        own = sum(batch.num_targets() for batch in batches)
        return accumulate(self, batches, own * dist.get_world_size(), *args)

    with patch.object(MegatronEngine, "accumulate", faulty):
        yield


PLANTS = {
    "experts scaled by 1/EP": Plant(
        expert_gradients_over_ranks, "2 ranks, expert 2", EXPERT_GRADIENT + "is off by", spares=DENSE_GRADIENT
    ),
    "dense reduced twice": Plant(
        dense_gradients_reduced_twice, "2 ranks, expert 2", DENSE_GRADIENT, spares=EXPERT_GRADIENT
    ),
    "experts reduced over all ranks": Plant(
        experts_not_marked, "2 ranks, expert 2, whole, accumulated", EXPERT_GRADIENT, spares=DENSE_GRADIENT
    ),
    "expert reduction skipped": Plant(
        expert_reduction_skipped, "4 ranks, expert 2, whole", EXPERT_GRADIENT, spares=DENSE_GRADIENT
    ),
    "auxiliary loss counted per rank": Plant(
        auxiliary_loss_counted_per_rank, "2 ranks, expert 2", DENSE_GRADIENT, spares="step 0: loss"
    ),
    "clip norm counts experts EP times": Plant(
        norm_counts_experts_twice, "2 ranks, expert 2", "step 0: gradient norm", spares=ANY_GRADIENT
    ),
    "load counted twice in recomputation": Plant(
        load_counted_in_recomputation, "2 ranks, tensor 2, expert 2", "step 0: loads", spares=ANY_GRADIENT
    ),
    "loss over own targets": Plant(loss_over_own_targets, "2 ranks, data", DENSE_GRADIENT, spares="step 0: loss"),
}
PLANTS = {name: dataclasses.replace(plant, recipe="adamw") for name, plant in PLANTS.items()}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_reported(name: str) -> None:
    """test_megatron.py shows that there is nothing to report of the same layouts without it."""
    plant = PLANTS[name]
    num_ranks, changes = LAYOUTS[plant.layout]
    run = trace(changed(RECIPES[plant.recipe], changes, MEGATRON), num_ranks, 3, (0,), plant.fault)
    reports = judge(run, [], reference(plant.recipe), "float32").failures
    assert any(re.match(plant.says, report) for report in reports), reports
    assert not [report for report in reports if re.match(plant.spares, report)]
