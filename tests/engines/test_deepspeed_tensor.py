"""Tensor parallelism on the deepspeed engine trains what the native engine trains, in float32, with CUDA emulated."""

import os
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest

from tests.engines.test_deepspeed import OFFLOADED, RECOMPUTED, on_deepspeed
from tests.engines.test_equality import RECIPES, micro_batches_of
from tests.support.distributed import run_ranks
from tests.support.equality import Trace, Tree, changed, differences, trace

if find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

HEADS = {"model": {"num_heads": 4, "num_kv_heads": 2}}


def cut(stage: int, tensor: int, expert: int, *changes: Tree) -> Tree:
    tensor_parallel = {"parallel": {"tensor": tensor}, "engine": {"emulate_cuda": True}}
    return changed(on_deepspeed(stage, expert), tensor_parallel, *changes)


LAYOUTS: dict[str, tuple[int, Tree]] = {
    **{f"2 ranks, tensor 2, ZeRO {stage}": (2, cut(stage, 2, 1)) for stage in (0, 1, 2)},
    "2 ranks, tensor 2, expert 2, ZeRO 0, accumulated": (2, cut(0, 2, 2, micro_batches_of(2))),
    "2 ranks, tensor 2, expert 2, ZeRO 2, recomputed": (2, cut(2, 2, 2, RECOMPUTED)),
    **{f"4 ranks, tensor 2, expert 2, ZeRO {stage}": (4, cut(stage, 2, 2)) for stage in (0, 1, 2)},
    "4 ranks, tensor 2, ZeRO 1, accumulated": (4, cut(1, 2, 1, micro_batches_of(1))),
    "4 ranks, tensor 2, expert 4, ZeRO 2, offloaded": (4, cut(2, 2, 4, OFFLOADED, micro_batches_of(2))),
}
CASES: dict[str, dict[str, int]] = {
    "adamw, float32": dict.fromkeys(LAYOUTS, 3)
    | {"2 ranks, tensor 2, ZeRO 1": 20, "4 ranks, tensor 2, expert 2, ZeRO 0": 20}
    | {"4 ranks, tensor 2, expert 2, ZeRO 1": 20, "4 ranks, tensor 2, expert 2, ZeRO 2": 20},
    "sgd, float32": {"2 ranks, tensor 2, ZeRO 0": 20, "4 ranks, tensor 2, expert 2, ZeRO 1": 20},
}


@cache
def reference(recipe: str) -> Trace:
    """The native engine on one rank."""
    return trace(changed(RECIPES[recipe], HEADS), 1, 20, (0,))


@pytest.mark.parametrize(
    ("recipe", "name", "num_steps"),
    [(recipe, name, num_steps) for recipe, layouts in CASES.items() for name, num_steps in layouts.items()],
)
def test_a_cut_model_trains_the_same(recipe: str, name: str, num_steps: int) -> None:
    num_ranks, changes = LAYOUTS[name]
    result = trace(changed(RECIPES[recipe], HEADS, changes), num_ranks, num_steps, (0,))
    assert differences(result, reference(recipe), tolerance=1e-4, gradient=1e-5) == []
    assert abs(result.losses[0] - reference(recipe).losses[0]) < 1e-6
