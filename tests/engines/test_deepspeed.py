"""The deepspeed engine trains what the native engine trains: losses, gradients, norms, loads and biases, in float32."""

import math
import os
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from tests.engines.test_equality import RECIPES
from tests.support.continuation import differing
from tests.support.distributed import run_ranks
from tests.support.equality import (
    RECOMPUTED,
    Trace,
    Tree,
    build_engine,
    changed,
    differences,
    expanded,
    micro_batches_of,
    trace,
    train_step,
    whole,
)

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported: by the ranks, which takes seconds
if find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

OFFLOADED = {"engine": {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}}
NODES_OF_ONE = {"parallel": {"dispatch": "hierarchical", "ranks_per_node": 1}}
CHUNKED = {"parallel": {"overlap_chunks": 2}}
NOTHING_KEPT = {"engine": {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}}
"""ZeRO 3 otherwise leaves parameters whole that are as small as all of these."""


def on_deepspeed(stage: int, expert: int, *changes: Tree) -> Tree:
    engine = {"name": "deepspeed", "sharding": "full", "zero_stage": stage}
    return changed({"engine": engine, "parallel": {"expert": expert}}, *changes)


LAYOUTS: dict[str, tuple[int, Tree]] = {
    "1 rank, ZeRO 0": (1, on_deepspeed(0, 1)),
    "1 rank, ZeRO 2, accumulated": (1, on_deepspeed(2, 1, micro_batches_of(2))),
    **{f"2 ranks, ZeRO {stage}": (2, on_deepspeed(stage, 1)) for stage in (0, 1, 2)},
    **{f"2 ranks, ZeRO {stage}, expert 2": (2, on_deepspeed(stage, 2)) for stage in (0, 1, 2)},
    **{
        f"2 ranks, ZeRO {stage}, expert 2, accumulated": (2, on_deepspeed(stage, 2, micro_batches_of(1)))
        for stage in (0, 1, 2)
    },
    "2 ranks, ZeRO 1, expert 2, recomputed": (2, on_deepspeed(1, 2, RECOMPUTED)),
    "2 ranks, ZeRO 2, expert 2, offloaded": (2, on_deepspeed(2, 2, OFFLOADED)),
    "2 ranks, ZeRO 1, expert 2, offloaded, accumulated": (2, on_deepspeed(1, 2, OFFLOADED, micro_batches_of(2))),
    "2 ranks, ZeRO 3": (2, on_deepspeed(3, 1, NOTHING_KEPT)),
    "2 ranks, ZeRO 3, recomputed, accumulated": (2, on_deepspeed(3, 1, RECOMPUTED, micro_batches_of(2), NOTHING_KEPT)),
    "2 ranks, ZeRO 3, offloaded": (2, on_deepspeed(3, 1, OFFLOADED)),
    "4 ranks, ZeRO 0, expert 2": (4, on_deepspeed(0, 2)),
    "4 ranks, ZeRO 1, expert 2, accumulated": (4, on_deepspeed(1, 2, micro_batches_of(1))),
    "4 ranks, ZeRO 2, expert 2": (4, on_deepspeed(2, 2)),
    "4 ranks, ZeRO 2, expert 4, chunked": (4, on_deepspeed(2, 4, CHUNKED)),
    "4 ranks, ZeRO 1, expert 2, 2 nodes": (4, on_deepspeed(1, 2, NODES_OF_ONE)),
}

CASES: dict[str, dict[str, int]] = {
    "adamw, float32": {
        "1 rank, ZeRO 0": 3,
        "1 rank, ZeRO 2, accumulated": 3,
        "2 ranks, ZeRO 0": 3,
        "2 ranks, ZeRO 1": 3,
        "2 ranks, ZeRO 2": 3,
        "2 ranks, ZeRO 0, expert 2": 20,
        "2 ranks, ZeRO 1, expert 2": 20,
        "2 ranks, ZeRO 2, expert 2": 20,
        "2 ranks, ZeRO 0, expert 2, accumulated": 3,
        "2 ranks, ZeRO 1, expert 2, accumulated": 3,
        "2 ranks, ZeRO 2, expert 2, accumulated": 20,
        "2 ranks, ZeRO 1, expert 2, recomputed": 3,
        "2 ranks, ZeRO 2, expert 2, offloaded": 20,
        "2 ranks, ZeRO 1, expert 2, offloaded, accumulated": 3,
        "2 ranks, ZeRO 3": 20,
        "2 ranks, ZeRO 3, recomputed, accumulated": 3,
        "2 ranks, ZeRO 3, offloaded": 3,
        "4 ranks, ZeRO 0, expert 2": 3,
        "4 ranks, ZeRO 1, expert 2, accumulated": 3,
        "4 ranks, ZeRO 2, expert 2": 20,
        "4 ranks, ZeRO 2, expert 4, chunked": 3,
        "4 ranks, ZeRO 1, expert 2, 2 nodes": 3,
    },
    "sgd, float32": {
        "2 ranks, ZeRO 0, expert 2": 20,
        "2 ranks, ZeRO 1, expert 2": 20,
        "2 ranks, ZeRO 2, expert 2": 20,
        "2 ranks, ZeRO 3": 20,
        "4 ranks, ZeRO 2, expert 2": 3,
    },
}


@cache
def reference(recipe: str) -> Trace:
    """The native engine on one rank."""
    return trace(RECIPES[recipe], 1, 20, (0,))


@pytest.mark.parametrize(("recipe", "name", "num_steps"), expanded(CASES))
def test_deepspeed_trains_the_same(recipe: str, name: str, num_steps: int) -> None:
    num_ranks, changes = LAYOUTS[name]
    result = trace(changed(RECIPES[recipe], changes), num_ranks, num_steps, (0,))
    assert differences(result, reference(recipe), tolerance=1e-4, gradient=1e-5) == []
    assert abs(result.losses[0] - reference(recipe).losses[0]) < 1e-6


# Steps that are skipped.


def with_a_skipped_step(tree: Tree, spoilt: str) -> tuple[list[float], list[str], bool]:
    """Two good steps, one whose loss or gradient is not finite on the last rank, the same again without the fault."""
    engine, data = build_engine(tree)
    losses = [train_step(engine, data, step).loss for step in range(2)]
    before = whole(engine.state())
    handle = None
    if engine.data_rank == engine.layout.data - 1:
        norm = engine.parts()["norm"]
        if spoilt == "loss":
            handle = norm.register_forward_hook(lambda module, args, output: output * math.nan)
        else:
            handle = norm.register_forward_pre_hook(lambda module, args: (_with_infinite_gradient(args[0]),))
    result = train_step(engine, data, 2)
    if handle:
        handle.remove()
    changes = differing(whole(engine.state()), before)
    losses += [train_step(engine, data, step).loss for step in (2, 3)]
    return losses, changes, result.skipped


def _with_infinite_gradient(hidden: torch.Tensor) -> torch.Tensor:
    hidden = hidden.view_as(hidden)
    hidden.register_hook(lambda gradient: gradient * math.inf)
    return hidden


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
@pytest.mark.parametrize(
    "name",
    [
        "2 ranks, ZeRO 0, expert 2, accumulated",
        "2 ranks, ZeRO 1, expert 2, accumulated",
        "2 ranks, ZeRO 2, expert 2",
        "2 ranks, ZeRO 2, expert 2, offloaded",
        "2 ranks, ZeRO 3",
        "2 ranks, ZeRO 3, offloaded",
    ],
)
def test_a_step_that_is_not_finite_did_not_happen(name: str, spoilt: str) -> None:
    num_ranks, changes = LAYOUTS[name]
    tree = changed(RECIPES["adamw, float32"], changes)
    expected = trace(tree, num_ranks, 4).losses
    for losses, changes_found, skipped in run_ranks(num_ranks, with_a_skipped_step, tree, spoilt):
        assert skipped
        assert changes_found == []
        assert losses == expected


# bfloat16


def losses_and_dtypes(tree: Tree) -> tuple[list[float], set[str], set[str], list[str]]:
    """Twenty steps; the types of weights on the device and in a checkpoint, and what changes by writing it back."""
    engine, data = build_engine(tree)
    results = [train_step(engine, data, step) for step in range(20)]
    assert not any(result.skipped for result in results)
    state = engine.state()
    before = whole(state)
    engine.take_state(state)
    return (
        [result.loss for result in results],
        {str(parameter.dtype) for parameter in engine.model.parameters()},
        {str(value.dtype) for name, value in state.items() if name.startswith(("model.", "optimizer."))},
        differing(whole(engine.state()), before),
    )


@pytest.mark.parametrize(("stage", "expert"), [(1, 2), (2, 2), (3, 1)])
def test_bfloat16_has_float32_master_weights(stage: int, expert: int) -> None:
    tree = changed(RECIPES["adamw, float32"], on_deepspeed(stage, expert), {"training": {"precision": "bfloat16"}})
    exact = reference("adamw, float32").losses
    for losses, on_device, in_checkpoint, changed_by_writing in run_ranks(2, losses_and_dtypes, tree):
        assert on_device == {"torch.bfloat16"}
        assert in_checkpoint == {"torch.float32"}
        assert changed_by_writing == []
        assert np.abs(np.array(losses) - exact).max() < 0.2  # of losses from 3.1 to 0.04
        assert losses[-1] < losses[0] - 1


def skipped_in_bfloat16(tree: Tree) -> tuple[list[float], list[str], bool]:
    return with_a_skipped_step(tree, "gradient")


@pytest.mark.parametrize(("stage", "expert"), [(2, 2), (3, 1)])
def test_a_step_is_skipped_in_bfloat16_too(stage: int, expert: int) -> None:
    tree = changed(RECIPES["adamw, float32"], on_deepspeed(stage, expert), {"training": {"precision": "bfloat16"}})
    for _, changes, skipped in run_ranks(2, skipped_in_bfloat16, tree):
        assert skipped
        assert changes == []


# Evaluation and what is not finite.


def evaluated(tree: Tree) -> tuple[float, int, list[list[int]], list[float]]:
    engine, data = build_engine(tree)
    losses = [train_step(engine, data, 0).loss]
    loss_sum, num_targets, load_NE = engine.evaluate(data.micro_batches(100, engine.data_rank, engine.layout))
    losses.append(train_step(engine, data, 1).loss)
    return loss_sum, num_targets, load_NE.tolist(), losses


@pytest.mark.parametrize("name", ["2 ranks, ZeRO 0, expert 2", "2 ranks, ZeRO 2, expert 2", "2 ranks, ZeRO 3"])
def test_evaluation_is_the_native_one_and_leaves_no_trace(name: str) -> None:
    recipe = "adamw, float32"
    ((loss_sum, num_targets, load_NE, losses),) = run_ranks(1, evaluated, RECIPES[recipe])
    num_ranks, changes = LAYOUTS[name]
    for found in run_ranks(num_ranks, evaluated, changed(RECIPES[recipe], changes)):
        assert found[0] == pytest.approx(loss_sum, rel=1e-5)
        assert found[1:3] == (num_targets, load_NE)
        assert found[3] == pytest.approx(losses, abs=1e-5)


def blame(tree: Tree) -> str:
    engine, data = build_engine(tree)
    batches = data.micro_batches(0, engine.data_rank, engine.layout)
    handle = engine.parts()["layers.1.moe"].register_forward_hook(lambda module, args, output: output * math.nan)
    said = engine.first_nonfinite(batches)
    handle.remove()
    return said


@pytest.mark.parametrize("name", ["2 ranks, ZeRO 2, expert 2", "2 ranks, ZeRO 3"])
def test_the_first_part_that_is_not_finite_is_named(name: str) -> None:
    num_ranks, changes = LAYOUTS[name]
    assert (
        run_ranks(num_ranks, blame, changed(RECIPES["adamw, float32"], changes)) == ["the output of layers.1.moe"] * 2
    )
