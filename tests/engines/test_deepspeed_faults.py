"""The comparison with the native engine sees the faults that training on DeepSpeed can have: each, planted, is reported."""

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
from tests.engines.test_deepspeed import LAYOUTS, reference
from tests.engines.test_equality import RECIPES
from tests.engines.test_planted_faults import (
    ANY_GRADIENT,
    DENSE_GRADIENT,
    EXPERT_GRADIENT,
    Plant,
    auxiliary_loss_counted_per_rank,
    is_expert,
    load_counted_in_recomputation,
)
from tests.support.equality import changed, differences, trace

# Imports of deepspeed stand inside the faults, which run on the ranks: there the accelerator has been chosen.


@contextmanager
def gradients_times(factor: Callable[[Any], float], experts: bool) -> Iterator[None]:
    """Gradients of the experts, or of all others, are multiplied as they arrive."""
    from moe_dist.engines.deepspeed import DeepSpeedEngine

    build = DeepSpeedEngine.__init__

    def faulty(self: Any, *args: Any) -> None:
        build(self, *args)
        for name, parameter in self.model.named_parameters():
            if is_expert(name) == experts:
                parameter.register_hook(lambda gradient: gradient * factor(self.layout))

    with patch.object(DeepSpeedEngine, "__init__", faulty):
        yield


def expert_gradients_over_ranks() -> Any:
    """As if DeepSpeed averaged them over the ranks of the expert-parallel group."""
    return gradients_times(lambda layout: 1 / layout.expert, experts=True)


def dense_gradients_reduced_twice() -> Any:
    return gradients_times(lambda layout: layout.data, experts=False)


def expert_reduction_skipped() -> Any:
    from deepspeed import DeepSpeedEngine

    return patch.object(DeepSpeedEngine, "_reduce_expert_gradients", lambda *_: None)


@contextmanager
def experts_reduced_over_all_ranks() -> Iterator[None]:
    """As if they were no experts: gradients of different ones are added up."""
    from deepspeed import DeepSpeedEngine
    from deepspeed.utils import groups

    reduce = DeepSpeedEngine._reduce_expert_gradients

    def faulty(self: Any, *args: Any) -> None:
        with patch.object(groups, "_get_expert_data_parallel_group", lambda name: dist.group.WORLD):
            reduce(self, *args)

    with patch.object(DeepSpeedEngine, "_reduce_expert_gradients", faulty):
        yield


def auxiliary_losses_not_scaled() -> Any:
    """They are averaged over ranks as the loss is, but not multiplied by their number before."""
    return patch("moe_dist.engines.deepspeed.replace", lambda tokens, **_: tokens)


@contextmanager
def norm_counts_experts_on_every_rank() -> Iterator[None]:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    average = DeepSpeedZeroOptimizer._average_expert_grad_norms

    def faulty(self: Any, norms: list[torch.Tensor]) -> None:
        average(self, norms)
        norms[:] = [norm * (2**0.5 if moe else 1) for norm, moe in zip(norms, self.is_moe_param_group, strict=True)]

    with patch.object(DeepSpeedZeroOptimizer, "_average_expert_grad_norms", faulty):
        yield


@contextmanager
def loss_over_own_targets() -> Iterator[None]:
    from moe_dist.engines.deepspeed import DeepSpeedEngine

    accumulate = DeepSpeedEngine.accumulate

    def faulty(self: Any, batches: list[Batch], num_targets: int, *args: Any) -> torch.Tensor:
        own = sum(batch.num_targets() for batch in batches)
        return accumulate(self, batches, own * dist.get_world_size(), *args)

    with patch.object(DeepSpeedEngine, "accumulate", faulty):
        yield


PLANTS = {
    "experts scaled by 1/EP": Plant(
        expert_gradients_over_ranks, "2 ranks, ZeRO 2, expert 2", EXPERT_GRADIENT + "is off by", spares=DENSE_GRADIENT
    ),
    "dense reduced twice": Plant(
        dense_gradients_reduced_twice, "2 ranks, ZeRO 1, expert 2", DENSE_GRADIENT, spares=EXPERT_GRADIENT
    ),
    "dense reduced twice, weights sharded": Plant(dense_gradients_reduced_twice, "2 ranks, ZeRO 3", DENSE_GRADIENT),
    "expert reduction skipped": Plant(
        expert_reduction_skipped,
        "4 ranks, ZeRO 0, expert 2",
        EXPERT_GRADIENT + "on rank 2 is not that of other ranks",
        spares=DENSE_GRADIENT,
    ),
    "experts reduced over all ranks": Plant(
        experts_reduced_over_all_ranks, "2 ranks, ZeRO 0, expert 2", EXPERT_GRADIENT, spares=DENSE_GRADIENT
    ),
    "auxiliary loss counted per rank": Plant(
        auxiliary_loss_counted_per_rank, "2 ranks, ZeRO 2, expert 2", DENSE_GRADIENT, spares="step 0: loss"
    ),
    "auxiliary losses not scaled": Plant(
        auxiliary_losses_not_scaled, "2 ranks, ZeRO 2, expert 2", DENSE_GRADIENT, spares="step 0: loss"
    ),
    "clip norm counts experts EP times": Plant(
        norm_counts_experts_on_every_rank, "2 ranks, ZeRO 2, expert 2", "step 0: gradient norm", spares=ANY_GRADIENT
    ),
    "load counted twice in recomputation": Plant(
        load_counted_in_recomputation, "2 ranks, ZeRO 1, expert 2, recomputed", "step 0: loads", spares=ANY_GRADIENT
    ),
    "loss over own targets": Plant(loss_over_own_targets, "2 ranks, ZeRO 2", DENSE_GRADIENT, spares="step 0: loss"),
    "loss over own targets, expert parallel": Plant(
        loss_over_own_targets, "2 ranks, ZeRO 0, expert 2", EXPERT_GRADIENT + "is off by", spares="step 0: loss"
    ),
}
PLANTS = {name: dataclasses.replace(plant, recipe="adamw, float32") for name, plant in PLANTS.items()}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_reported(name: str) -> None:
    """test_deepspeed.py shows that there is nothing to report of the same layouts without it."""
    plant = PLANTS[name]
    num_ranks, changes = LAYOUTS[plant.layout]
    result = trace(changed(RECIPES[plant.recipe], changes), num_ranks, 3, (0,), plant.fault)
    reports = differences(result, reference(plant.recipe), tolerance=1e-4, gradient=1e-5)
    assert any(re.match(plant.says, report) for report in reports), reports
    assert not [report for report in reports if re.match(plant.spares, report)]
