"""Tensor parallelism on the deepspeed engine trains what the native engine trains, in float32, with CUDA emulated."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from moe_dist.config import ConfigError, build_config, layout_of
from moe_dist.config.support import require_package
from moe_dist.engines import registry
from tests.engines.test_deepspeed import (
    OFFLOADED,
    RECOMPUTED,
    blame,
    evaluated,
    losses_and_dtypes,
    on_deepspeed,
    with_a_skipped_step,
)
from tests.engines.test_deepspeed_checkpoints import saved_by_deepspeed
from tests.engines.test_equality import RECIPES as BASE_RECIPES
from tests.support.continuation import check_chain
from tests.support.distributed import run_ranks
from tests.support.equality import Trace, Tree, build_engine, changed, differences, micro_batches_of, trace

if find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

MODEL = {"model": {"num_layers": 4, "num_heads": 4, "num_kv_heads": 2}}
RECIPES = {name: changed(BASE_RECIPES[f"{name}, float32"], MODEL) for name in ("adamw", "sgd")}


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
    "adamw": dict.fromkeys(LAYOUTS, 3)
    | {"2 ranks, tensor 2, ZeRO 1": 20}
    | {f"4 ranks, tensor 2, expert 2, ZeRO {stage}": 20 for stage in (0, 1, 2)},
    "sgd": {"2 ranks, tensor 2, ZeRO 0": 20, "4 ranks, tensor 2, expert 2, ZeRO 1": 20},
}


@cache
def reference(recipe: str) -> Trace:
    """The native engine on one rank."""
    return trace(RECIPES[recipe], 1, 20, (0,))


@pytest.mark.parametrize(
    ("recipe", "name", "num_steps"),
    [(recipe, name, num_steps) for recipe, layouts in CASES.items() for name, num_steps in layouts.items()],
)
def test_a_cut_model_trains_the_same(recipe: str, name: str, num_steps: int) -> None:
    num_ranks, changes = LAYOUTS[name]
    result, expected = trace(changed(RECIPES[recipe], changes), num_ranks, num_steps, (0,)), reference(recipe)
    assert differences(result, expected, tolerance=1e-4, gradient=1e-5) == []
    assert abs(result.losses[0] - expected.losses[0]) < 1e-6
    assert expected.losses[0] - expected.losses[-1] > 1


# Faults that it can have, each planted and seen.


def input_gradients_not_summed() -> Any:
    from moe_dist.engines.deepspeed_tensor import _Copy

    return patch.object(_Copy, "backward", staticmethod(lambda ctx, gradient: (gradient, None)))


@contextmanager
def experts_not_marked_for_the_norm() -> Iterator[None]:
    from moe_dist.engines.deepspeed_tensor import TensorParallel

    split = TensorParallel.split

    def faulty(self: Any, model: Any) -> None:
        split(self, model)
        for layer in model.moe_layers.values():
            for parameter in layer.experts.parameters():
                parameter.tensor_model_parallel = False

    with patch.object(TensorParallel, "split", faulty):
        yield


@contextmanager
def whole_weights_of_a_cut_part_not_summed() -> Iterator[None]:
    from moe_dist.engines import deepspeed_tensor

    with patch.object(deepspeed_tensor, "partial", lambda function, group: lambda gradient: gradient):
        yield


def loss_counted_by_every_rank() -> Any:
    from moe_dist.engines.deepspeed import DeepSpeedEngine

    return patch.object(DeepSpeedEngine, "_once", lambda self, loss: loss)


FAULTS = {
    "input gradients not summed": (input_gradients_not_summed, "step 0: gradient of embedding.weight"),
    "experts not marked for the norm": (experts_not_marked_for_the_norm, "step 0: gradient norm"),
    "norms of heads not summed": (
        whole_weights_of_a_cut_part_not_summed,
        "step 0: gradient of layers.0.attention.query_norm.weight",
    ),
    "loss counted by every rank": (loss_counted_by_every_rank, "step 0: loss"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_reported(name: str) -> None:
    fault, says = FAULTS[name]
    num_ranks, changes = LAYOUTS["2 ranks, tensor 2, ZeRO 1"]
    result = trace(changed(RECIPES["adamw"], changes), num_ranks, 2, (0,), fault)
    reports = differences(result, reference("adamw"), tolerance=1e-4, gradient=1e-5)
    assert any(report.startswith(says) for report in reports), reports


# What else a run does.


@pytest.mark.parametrize(
    "name", ["2 ranks, tensor 2, expert 2, ZeRO 0, accumulated", "4 ranks, tensor 2, expert 2, ZeRO 2"]
)
def test_a_step_that_is_not_finite_did_not_happen(name: str) -> None:
    num_ranks, changes = LAYOUTS[name]
    tree = changed(RECIPES["adamw"], changes)
    expected = trace(tree, num_ranks, 4).losses
    for losses, changes_found, skipped in run_ranks(num_ranks, with_a_skipped_step, tree, "gradient"):
        assert skipped
        assert changes_found == []
        assert losses == expected


def test_evaluation_counts_each_token_once() -> None:
    num_ranks, changes = LAYOUTS["4 ranks, tensor 2, expert 2, ZeRO 2"]
    ((loss_sum, num_targets, load_NE, losses),) = run_ranks(1, evaluated, RECIPES["adamw"])
    for found in run_ranks(num_ranks, evaluated, changed(RECIPES["adamw"], changes)):
        assert found[0] == pytest.approx(loss_sum, rel=1e-5)
        assert found[1:3] == (num_targets, load_NE)
        assert found[3] == pytest.approx(losses, abs=1e-5)


def test_the_first_part_that_is_not_finite_is_named() -> None:
    num_ranks, changes = LAYOUTS["2 ranks, tensor 2, ZeRO 2"]
    said = run_ranks(num_ranks, blame, changed(RECIPES["adamw"], changes))
    assert said == ["the output of layers.1.moe"] * 2


def test_bfloat16_has_float32_master_weights() -> None:
    tree = changed(RECIPES["adamw"], cut(2, 2, 2), {"training": {"precision": "bfloat16"}})
    for losses, on_device, in_checkpoint, changed_by_writing in run_ranks(2, losses_and_dtypes, tree):
        assert (on_device, in_checkpoint, changed_by_writing) == ({"torch.bfloat16"}, {"torch.float32"}, [])
        assert np.abs(np.array(losses) - reference("adamw").losses).max() < 0.3  # of losses from 3.1 to 0.3
        assert losses[-1] < losses[0] - 1


# Checkpoints.

CHAIN = [
    (1, {}),
    LAYOUTS["4 ranks, tensor 2, expert 2, ZeRO 1"],
    LAYOUTS["2 ranks, tensor 2, ZeRO 0"],
    (2, {"parallel": {"expert": 2}}),
]


def test_a_run_goes_on_with_a_cut_model_and_back(tmp_path: Path) -> None:
    check_chain(RECIPES["adamw"], CHAIN, 3, tmp_path)


@pytest.mark.parametrize("name", ["2 ranks, tensor 2, expert 2, ZeRO 2, recomputed"])
def test_deepspeeds_own_checkpoint(name: str, tmp_path: Path) -> None:
    num_ranks, changes = LAYOUTS[name]
    tree = changed(RECIPES["adamw"], changes)
    for losses, changes_found, again in run_ranks(num_ranks, saved_by_deepspeed, tree, tmp_path):
        assert changes_found == []
        assert again == losses
    files = {path.name for path in tmp_path.rglob("layer_*")}
    of_experts = {(layer, expert, expert // 4) for layer in range(3) for expert in range(8)}
    assert files == {f"layer_{i}_expert_{e}_mp_rank_{rank:02}_model_states.pt" for i, e, rank in of_experts}


# What is told before.


def test_megatron_core_is_asked_for() -> None:
    with patch("moe_dist.config.support.find_spec", lambda name: None if "megatron" in name else object()):
        require_package("deepspeed")
        with pytest.raises(ConfigError) as caught:
            require_package("deepspeed", 2)
    assert str(caught.value) == (
        "engine.name: deepspeed with parallel.tensor: 2 needs the package megatron-core, which is not installed; "
        "install it by `pip install megatron-core`, or use parallel.tensor: 1"
    )


def told(tree: Tree) -> str:
    """What building the engine prints on this rank."""
    printed = io.StringIO()
    with redirect_stderr(printed):
        build_engine(tree)
    return printed.getvalue()


def test_emulation_is_told_once() -> None:
    num_ranks, changes = LAYOUTS["2 ranks, tensor 2, ZeRO 0"]
    first, second = run_ranks(num_ranks, told, changed(RECIPES["adamw"], changes))
    line = "engine.emulate_cuda: Megatron-Core's part runs on the CPU, for trying and testing only\n"
    assert line in first
    assert line not in second


def test_a_cpu_must_be_asked_for() -> None:
    tree = changed(RECIPES["adamw"], LAYOUTS["2 ranks, tensor 2, ZeRO 1"][1], {"engine": {"emulate_cuda": False}})
    config = build_config(tree, 2)
    with pytest.raises(ConfigError, match=r"deepspeed with parallel.tensor: 2 needs CUDA devices.*engine.emulate_cuda"):
        registry.build_engine(config, layout_of(config, 2), torch.device("cpu"), 13)
