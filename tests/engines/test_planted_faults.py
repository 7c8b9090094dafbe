"""The equality tests see what they are for: each fault that a training stack has had, planted, is reported.

Each is tried where it would happen, for three steps of float64 with SGD and without clipping, or with AdamW where the
fault is one of clipping. The same layout without the fault shows no difference.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moe_dist.engines import native
from moe_dist.engines.batch import Batch
from moe_dist.engines.native import NativeEngine
from moe_dist.engines.optimizer import LocalParameter, squared_norm
from moe_dist.engines.sharding import distribute
from moe_dist.model.names import local_tensor
from moe_dist.routing import Tokens
from tests.engines.test_equality import LAYOUTS, RECIPES
from tests.support.equality import Fault, Trace, changed, differences, trace


def is_expert(name: str) -> bool:
    return ".moe.experts." in name


@contextmanager
def after_accumulate(change: Callable[[NativeEngine], None]) -> Iterator[None]:
    """`change` the gradients as soon as they are reduced."""
    accumulate = NativeEngine.accumulate

    def faulty(self: NativeEngine, *args: Any) -> torch.Tensor:
        loss_sum = accumulate(self, *args)
        change(self)
        return loss_sum

    with patch.object(NativeEngine, "accumulate", faulty):
        yield


def expert_gradients_over_ranks() -> Any:
    """As if expert gradients were averaged over the ranks of the expert-parallel group."""

    def change(engine: NativeEngine) -> None:
        for name, parameter in engine.model.named_parameters():
            if is_expert(name):
                local_tensor(parameter.grad).div_(engine.layout.expert)

    return after_accumulate(change)


def expert_gradients_over_slices() -> Any:
    """As if expert gradients were averaged over the ranks that hold slices of the same experts."""

    def change(engine: NativeEngine) -> None:
        for name, parameter in engine.model.named_parameters():
            if is_expert(name):
                local_tensor(parameter.grad).div_(engine.layout.expert_tensor)

    return after_accumulate(change)


def slices_reduced_as_if_the_same() -> Any:
    """Gradients of different slices of the same experts are added up."""

    def faulty(model: Any, groups: Any, engine: Any) -> Any:
        return distribute(model, dataclasses.replace(groups, expert_data=groups.expert), engine)

    return patch.object(native, "distribute", faulty)


def dense_gradients_reduced_twice() -> Any:
    """A second sum over ranks that have the sum already."""

    def change(engine: NativeEngine) -> None:
        for name, parameter in engine.model.named_parameters():
            if not is_expert(name):
                local_tensor(parameter.grad).mul_(engine.layout.data)

    return after_accumulate(change)


def expert_reduction_skipped() -> Any:
    """As if no two ranks held the same experts."""

    def faulty(model: Any, groups: Any, engine: Any) -> Any:
        alone = SimpleNamespace(size=lambda: 1)
        return distribute(model, dataclasses.replace(groups, expert_data=alone), engine)

    return patch.object(native, "distribute", faulty)


def auxiliary_loss_counted_per_rank() -> Any:
    """Each rank takes the mean over its own tokens for the whole."""
    tokens = Batch.tokens

    def faulty(self: Batch, share: float = 1.0, step: int = 0) -> Tokens:
        return tokens(self, share * dist.get_world_size(), step)

    return patch.object(Batch, "tokens", faulty)


def norm_counts_experts_on_every_rank() -> Any:
    """The experts' part of the squared norm is summed over ranks that each hold all of it: twice on two."""

    def faulty(parameters: list[LocalParameter]) -> torch.Tensor:
        experts = [p for p in parameters if is_expert(p.name)]
        return squared_norm(parameters) + squared_norm(experts)

    return patch.object(native, "squared_norm", faulty)


def load_counted_in_recomputation() -> Any:
    return patch("moe_dist.routing.balance.is_recomputation", lambda: False)


def loss_over_own_targets() -> Any:
    """Each rank takes the mean over its own targets, and then the mean over ranks is taken."""
    accumulate = NativeEngine.accumulate

    def faulty(self: NativeEngine, batches: list[Batch], num_targets: int, num_tokens: int, step: int) -> torch.Tensor:
        own = sum(batch.num_targets() for batch in batches)
        return accumulate(self, batches, own * dist.get_world_size(), num_tokens, step)

    return patch.object(NativeEngine, "accumulate", faulty)


@dataclasses.dataclass(frozen=True)
class Plant:
    """A fault, where it is planted, what one of the reports must say, and what none may say."""

    fault: Fault
    layout: str
    says: str
    spares: str = "never"
    recipe: str = "sgd"


EXPERT_GRADIENT = r"step 0: gradient of layers\.\d\.experts\.\d\.w_gate "
DENSE_GRADIENT = r"step 0: gradient of embedding\.weight "
ANY_GRADIENT = r"step 0: gradient of"

PLANTS = {
    "experts scaled by 1/EP": Plant(
        expert_gradients_over_ranks, "2 ranks, expert 2", EXPERT_GRADIENT + "is off by", spares=DENSE_GRADIENT
    ),
    "experts scaled by 1/EP, with data parallelism": Plant(
        expert_gradients_over_ranks, "4 ranks, expert 2", EXPERT_GRADIENT + "is off by", spares=DENSE_GRADIENT
    ),
    "expert reduction skipped": Plant(
        expert_reduction_skipped,
        "4 ranks, expert 2",
        EXPERT_GRADIENT + "on rank 2 is not that of other ranks",
        spares=DENSE_GRADIENT,
    ),
    "experts scaled by 1 / slices": Plant(
        expert_gradients_over_slices, "2 ranks, slices 2", EXPERT_GRADIENT + "is off by", spares=DENSE_GRADIENT
    ),
    "slices reduced as if they were the same": Plant(
        slices_reduced_as_if_the_same, "2 ranks, slices 2", EXPERT_GRADIENT + "is off by", spares=DENSE_GRADIENT
    ),
    "dense reduced twice": Plant(
        dense_gradients_reduced_twice, "2 ranks, expert 2", DENSE_GRADIENT, spares=EXPERT_GRADIENT
    ),
    "dense reduced twice, sharded": Plant(
        dense_gradients_reduced_twice, "2 ranks, data, sharded", DENSE_GRADIENT, spares=EXPERT_GRADIENT
    ),
    "auxiliary loss counted per rank": Plant(
        auxiliary_loss_counted_per_rank, "2 ranks, expert 2", DENSE_GRADIENT, spares="step 0: loss"
    ),
    "clip norm counts experts EP times": Plant(
        norm_counts_experts_on_every_rank,
        "2 ranks, expert 2",
        "step 0: gradient norm",
        spares=ANY_GRADIENT,
        recipe="adamw",
    ),
    "clip norm counts each slice as a whole": Plant(
        norm_counts_experts_on_every_rank,
        "2 ranks, slices 2",
        "step 0: gradient norm",
        spares=ANY_GRADIENT,
        recipe="adamw",
    ),
    "load counted twice in recomputation": Plant(
        load_counted_in_recomputation, "2 ranks, expert 2, recomputed", "step 0: loads", spares=ANY_GRADIENT
    ),
    "loss over own targets": Plant(loss_over_own_targets, "2 ranks, data", DENSE_GRADIENT, spares="step 0: loss"),
    "loss over own targets, expert parallel": Plant(
        loss_over_own_targets, "2 ranks, expert 2", EXPERT_GRADIENT + "is off by", spares="step 0: loss"
    ),
}


@cache
def run(recipe: str, layout: str, fault: Fault = nullcontext) -> Trace:
    num_ranks, changes = LAYOUTS[layout]
    return trace(changed(RECIPES[recipe], changes), num_ranks, 3, (0, 2), fault)


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_reported(name: str) -> None:
    plant = PLANTS[name]
    assert differences(run(plant.recipe, plant.layout), run(plant.recipe, "1 rank")) == []
    reports = differences(run(plant.recipe, plant.layout, plant.fault), run(plant.recipe, "1 rank"))
    assert any(re.match(plant.says, report) for report in reports), reports
    assert not [report for report in reports if re.match(plant.spares, report)]


@pytest.mark.parametrize("name", [name for name in PLANTS if not name.startswith("load")])
def test_a_planted_fault_shows_in_the_losses_of_later_steps(name: str) -> None:
    """So that whole runs can be compared by their losses alone. A load counted twice turns no sign of the bias."""
    plant = PLANTS[name]
    losses = run(plant.recipe, plant.layout, plant.fault).losses
    assert abs(losses[-1] - run(plant.recipe, "1 rank").losses[-1]) > 1e-7
