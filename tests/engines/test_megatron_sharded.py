"""A checkpoint by Megatron's dist_checkpointing, with our layers in the model: layouts change in between, nothing else."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines.test_megatron import FLOAT32, LAYOUTS, MEGATRON
from tests.support.continuation import State, differing
from tests.support.distributed import run_ranks
from tests.support.equality import Tree, build_engine, changed, train_step, whole

pytest.importorskip("megatron.core")

ALIKE = changed(FLOAT32, {"model": {"num_dense_layers": 0}})
"""All layers have experts, so that Megatron saves one tensor of all layers."""
STEPS = 2


def sharded(engine: Any, is_loading: bool) -> dict[str, Any]:
    """What a script of one's own hands to Megatron."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "non_homogeneous_layers": engine.config.model.num_dense_layers > 0,
    }
    model = engine.models[0].sharded_state_dict(metadata=dict(metadata))
    optimizer = engine.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


@contextmanager
def with_children() -> Iterator[None]:
    """Megatron writes in processes of its own, which ranks of the tests may not have; none is left afterwards."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    process: Any = multiprocessing.current_process()
    process._config["daemon"] = False
    yield
    process._config["daemon"] = True
    filesystem_async._results_queue = None


@contextmanager
def as_fused_adam() -> Iterator[None]:
    """Fused Adams count steps once. PyTorch's does for each parameter, where Megatron 0.16.1 loads one for all of them."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, place = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        state["step"] = state["step"].clone()
        original(self, model_param, {"step": state["step"], **tensors})

    original = DistributedOptimizer._set_main_param_and_optimizer_states
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    yield
    DistributedOptimizer._set_main_param_and_optimizer_states = original


def save(tree: Tree, folder: Path) -> tuple[State, list[float]]:
    """Two steps, a checkpoint, and the next two losses; what this rank has of the state in between."""
    engine, data = build_engine(tree)
    for step in range(STEPS):
        train_step(engine, data, step)
    with engine.inside():
        from megatron.core import dist_checkpointing

        with with_children():
            dist_checkpointing.save(sharded(engine, False), str(folder))
    assert not any(hasattr(module, "expert_bias") for module in engine.models[0].modules()), (
        "Megatron would take it for its own"
    )
    state = whole(engine.state())
    return state, [train_step(engine, data, step).loss for step in range(STEPS, 2 * STEPS)]


def load(tree: Tree, folder: Path) -> tuple[State, list[float]]:
    """The state of the checkpoint, and the next two losses."""
    engine, data = build_engine(tree)
    with engine.inside():
        from megatron.core import dist_checkpointing

        state = dist_checkpointing.load(sharded(engine, True), str(folder))
        engine.models[0].load_state_dict(state["model"])
        with as_fused_adam():
            engine.optimizer.load_state_dict(state["optimizer"])
    return whole(engine.state()), [train_step(engine, data, step).loss for step in range(STEPS, 2 * STEPS)]


@pytest.mark.parametrize(
    ("recipe", "writer", "readers"),
    [
        (ALIKE, "2 ranks, expert 2", ["2 ranks, data", "2 ranks, slices 2", "2 ranks, pipeline 2"]),
        (FLOAT32, "2 ranks, slices 2", ["1 rank, accumulated, recomputed", "2 ranks, expert 2, unequal"]),
        (FLOAT32, "4 ranks, tensor 2, expert 2, whole", ["2 ranks, slices 2, whole"]),
    ],
)
def test_layouts_change_in_between(tmp_path: Path, recipe: Tree, writer: str, readers: list[str]) -> None:
    num_ranks, changes = LAYOUTS[writer]
    results = run_ranks(num_ranks, save, changed(recipe, changes, MEGATRON), tmp_path)
    written = {name: value for state, _ in results for name, value in state.items()}
    for reader in readers:
        num_ranks, changes = LAYOUTS[reader]
        loaded = run_ranks(num_ranks, load, changed(recipe, changes, MEGATRON), tmp_path)
        read = {name: value for state, _ in loaded for name, value in state.items()}
        assert differing(read, written) == []
        assert np.allclose(loaded[0][1], results[0][1], rtol=0, atol=1e-4)
