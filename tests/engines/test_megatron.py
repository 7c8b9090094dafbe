"""engine.name: megatron trains as engine.name: native does, on CPU ranks with CUDA emulated.

float32: the gradient of every parameter to 1e-5, losses and norms of the first steps to 1e-5, all 20 losses to 1e-4. What is
routed must be the same in the first steps.
"""

from functools import cache

import pytest

from moe_dist.config import build_config, layout_dependence, layout_of
from tests.support.equality import (
    BASE,
    PADDED,
    RECOMPUTED,
    Trace,
    Tree,
    changed,
    differences,
    differing_losses,
    expanded,
    micro_batches_of,
    trace,
)

pytest.importorskip("megatron.core")

MEGATRON = {"engine": {"name": "megatron", "emulate_cuda": True, "sharding": "full"}}
WHOLE = {"engine": {"distributed_optimizer": False}}
FLOAT32 = changed(
    BASE, {"training": {"precision": "float32"}, "model": {"num_layers": 4, "num_heads": 4, "num_kv_heads": 2}}
)
SGD = {
    "training": {"optimizer": {"name": "sgd", "learning_rate": 0.3, "max_grad_norm": None, "momentum": 0.5}},
    "model": {"tie_embeddings": False},
}

SCHEDULED = {"training": {"steps": 20, "schedule": {"name": "cosine", "warmup_steps": 3, "final_fraction": 0.1}}}

RECIPES: dict[str, Tree] = {
    "adamw": FLOAT32,
    "sgd": changed(FLOAT32, SGD),  # with WHOLE: Megatron distributes Adam only
    "adamw, padded capacity": changed(FLOAT32, PADDED),
    "adamw, warm-up and cosine": changed(FLOAT32, SCHEDULED),
}


def parallel(**sizes: object) -> Tree:
    return {"parallel": sizes}


LAYOUTS: dict[str, tuple[int, Tree]] = {
    "1 rank, accumulated, recomputed": (1, changed(micro_batches_of(2), RECOMPUTED)),
    "2 ranks, data": (2, {}),
    "2 ranks, data, whole": (2, WHOLE),
    "2 ranks, expert 2": (2, parallel(expert=2)),
    "2 ranks, expert 2, whole, accumulated": (2, changed(parallel(expert=2), WHOLE, micro_batches_of(1))),
    "2 ranks, expert 2, unequal": (2, parallel(expert=2, expert_map=[1, 0, 0, 1, 1, 1, 0, 1])),
    "2 ranks, slices 2": (2, parallel(expert_tensor=2)),
    "2 ranks, slices 2, whole": (2, changed(parallel(expert_tensor=2), WHOLE)),
    "2 ranks, tensor 2": (2, parallel(tensor=2)),
    "2 ranks, tensor 2, whole": (2, changed(parallel(tensor=2), WHOLE)),
    "2 ranks, tensor 2, expert 2": (2, changed(parallel(tensor=2, expert=2), RECOMPUTED)),
    "2 ranks, pipeline 2": (2, changed(parallel(pipeline=2), micro_batches_of(2))),
    "2 ranks, pipeline 2, whole, recomputed": (
        2,
        changed(parallel(pipeline=2), WHOLE, micro_batches_of(2), RECOMPUTED),
    ),
    "4 ranks, tensor 2, expert 2": (4, parallel(tensor=2, expert=2)),
    "4 ranks, tensor 2, expert 2, whole": (4, changed(parallel(tensor=2, expert=2), WHOLE)),
    "4 ranks, data, whole": (4, WHOLE),
    "4 ranks, expert 2, whole": (4, changed(parallel(expert=2), WHOLE)),
    "4 ranks, expert 4, whole": (4, changed(parallel(expert=4), WHOLE, micro_batches_of(1))),
    "4 ranks, expert 2, slices 2, whole": (4, changed(parallel(expert=2, expert_tensor=2), WHOLE)),
    "4 ranks, tensor 2, slices 2, whole": (4, changed(parallel(tensor=2, expert_tensor=2), WHOLE)),
    "4 ranks, pipeline 2, tensor 2, whole": (
        4,
        changed(parallel(pipeline=2, tensor=2, expert=2), WHOLE, micro_batches_of(2)),
    ),
    "4 ranks, tensor 2, expert 4": (4, changed(parallel(tensor=2, expert=4), micro_batches_of(1))),
    "4 ranks, expert 2, slices 2": (4, parallel(expert=2, expert_tensor=2)),
    "4 ranks, pipeline 2, expert 2": (4, changed(parallel(pipeline=2, expert=2), micro_batches_of(1))),
}

CASES: dict[str, dict[str, int]] = {
    "adamw": dict.fromkeys(LAYOUTS, 3)
    | dict.fromkeys(["2 ranks, expert 2", "4 ranks, tensor 2, expert 2", "4 ranks, tensor 2, expert 2, whole"], 20),
    "sgd": {
        "2 ranks, data, whole": 3,
        "2 ranks, expert 2, whole, accumulated": 20,
        "2 ranks, slices 2, whole": 3,
        "2 ranks, tensor 2, whole": 20,
        "2 ranks, pipeline 2, whole, recomputed": 20,
        "4 ranks, tensor 2, expert 2, whole": 20,
        "4 ranks, expert 2, slices 2, whole": 3,
    },
    "adamw, padded capacity": dict.fromkeys(
        [
            "2 ranks, data",
            "2 ranks, expert 2",
            "2 ranks, expert 2, whole, accumulated",
            "2 ranks, slices 2",
            "2 ranks, tensor 2, expert 2",
            "2 ranks, pipeline 2",
            "4 ranks, tensor 2, expert 2, whole",
            "4 ranks, expert 2, slices 2",
        ],
        3,
    ),
    "adamw, warm-up and cosine": {"2 ranks, expert 2": 20, "2 ranks, tensor 2, whole": 20},
}


@cache
def reference(recipe: str) -> Trace:
    """The native engine on one rank, the whole batch in one forward."""
    return trace(RECIPES[recipe], 1, 20, (0,))


@pytest.mark.parametrize(("recipe", "name", "num_steps"), expanded(CASES))
def test_every_layout_trains_as_native_does(recipe: str, name: str, num_steps: int) -> None:
    num_ranks, changes = LAYOUTS[name]
    config = build_config(changed(RECIPES[recipe], changes, MEGATRON), num_ranks)
    assert layout_dependence(config, layout_of(config, num_ranks)) == []
    result, expected = trace(changed(RECIPES[recipe], changes, MEGATRON), num_ranks, num_steps, (0,)), reference(recipe)
    assert abs(result.losses[0] - expected.losses[0]) < 1e-6
    if num_steps == 3:
        assert differences(result, expected, 1e-5, 1e-5) == []
    else:
        assert result.disagreements == []
        assert differing_losses(result, expected, 1e-4) == []
