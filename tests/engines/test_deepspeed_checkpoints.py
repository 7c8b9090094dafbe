"""A checkpoint moves between the native and the deepspeed engine, both ways; and DeepSpeed's own checkpoints work."""

from pathlib import Path
from typing import Any

import pytest

from tests.engines.test_deepspeed import LAYOUTS, on_deepspeed
from tests.engines.test_equality import RECIPES, SGD
from tests.support.continuation import State, check_chain, differing
from tests.support.distributed import run_ranks
from tests.support.equality import Tree, build_engine, changed, train_step

ADAMW = RECIPES["adamw, float32"]
MOMENTUM = changed(ADAMW, SGD, {"training": {"optimizer": {"momentum": 0.9, "learning_rate": 0.03}}})


def native(num_ranks: int, expert: int) -> tuple[int, Tree]:
    return num_ranks, {"parallel": {"expert": expert}}


CHAINS: dict[str, tuple[Tree, list[tuple[int, Tree]]]] = {
    "native, ZeRO 1, native": (ADAMW, [native(1, 1), LAYOUTS["2 ranks, ZeRO 1, expert 2"], native(2, 2)]),
    "native, ZeRO 2, ZeRO 0, native": (
        ADAMW,
        [
            native(2, 2),
            LAYOUTS["4 ranks, ZeRO 2, expert 2"],
            LAYOUTS["2 ranks, ZeRO 0, expert 2"],
            native(1, 1),
        ],
    ),
    "ZeRO 3, native, ZeRO 3": (ADAMW, [LAYOUTS["2 ranks, ZeRO 3"], native(2, 2), (2, on_deepspeed(3, 1))]),
    "native, offloaded, native": (ADAMW, [native(1, 1), LAYOUTS["2 ranks, ZeRO 2, expert 2, offloaded"], native(1, 1)]),
    "momentum: native, ZeRO 2, ZeRO 3": (
        MOMENTUM,
        [native(1, 1), LAYOUTS["2 ranks, ZeRO 2, expert 2"], LAYOUTS["2 ranks, ZeRO 3"]],
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_goes_on_from_engine_to_engine(name: str, tmp_path: Path) -> None:
    recipe, links = CHAINS[name]
    check_chain(recipe, links, 4, tmp_path)


# DeepSpeed's own checkpoints.


def of_modules(engine: Any) -> State:
    """Weights and biases of this rank, as its modules hold them. (After DeepSpeed's load it finds its moments no more.)"""
    return {name: value.numpy(force=True).copy() for name, value in engine.deepspeed.module.state_dict().items()}


def saved_by_deepspeed(tree: Tree, folder: Path) -> tuple[list[float], list[str], list[float]]:
    """Two steps, then two more; from the checkpoint between them the same again, in a new engine."""
    engine, data = build_engine(tree)
    for step in range(2):
        train_step(engine, data, step)
    engine.deepspeed.save_checkpoint(str(folder))
    saved = of_modules(engine)
    losses = [train_step(engine, data, step).loss for step in (2, 3)]
    again, data = build_engine(tree)
    again.deepspeed.load_checkpoint(str(folder))
    return losses, differing(of_modules(again), saved), [train_step(again, data, step).loss for step in (2, 3)]


@pytest.mark.parametrize(
    "name",
    [
        "2 ranks, ZeRO 0, expert 2",
        "2 ranks, ZeRO 1, expert 2",
        "4 ranks, ZeRO 2, expert 2",
        "2 ranks, ZeRO 3",
    ],
)
def test_deepspeeds_own_checkpoint(name: str, tmp_path: Path) -> None:
    num_ranks, changes = LAYOUTS[name]
    for losses, changes_found, again in run_ranks(num_ranks, saved_by_deepspeed, changed(ADAMW, changes), tmp_path):
        assert changes_found == []
        assert again == losses
    files = {path.name for path in tmp_path.rglob("*.pt")}
    of_experts = {
        f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt" for layer in range(2) for expert in range(8)
    }
    assert (of_experts <= files) == ("expert" in name)


def keys_of_a_layer(tree: Tree) -> list[str]:
    engine, _ = build_engine(tree)
    return sorted(next(iter(engine.moe_layers.values())).state_dict())


def test_experts_have_the_names_that_deepspeed_looks_for() -> None:
    num_ranks, changes = LAYOUTS["2 ranks, ZeRO 0, expert 2"]
    for keys in run_ranks(num_ranks, keys_of_a_layer, changed(ADAMW, changes)):
        experts = [key for key in keys if "expert" in key]
        names = ("w_down", "w_gate_up")
        assert experts == [f"deepspeed_moe.experts.deepspeed_experts.{i}.{name}" for i in range(4) for name in names]
