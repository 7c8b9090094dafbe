"""engine.name: megatron trains as engine.name: native does, on CPU ranks with CUDA emulated.

float32: the gradient of every parameter to 1e-5, losses and norms of the first steps to 1e-5, all 20 losses to 1e-4. What is
routed must be the same in the first steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest

from moe_dist.config import build_config, layout_dependence, layout_of
from tests.support.distributed import run_ranks
from tests.support.equality import (
    BASE,
    PADDED,
    RECOMPUTED,
    Trace,
    Tree,
    build_engine,
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


SEQUENCE = {"engine": {"sequence_parallel": True}}
INTERLEAVED = parallel(pipeline=2, pipeline_interleaving=2)

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
    "2 ranks, tensor 2, sequence": (2, changed(parallel(tensor=2), SEQUENCE)),
    "2 ranks, tensor 2, sequence, whole": (2, changed(parallel(tensor=2), SEQUENCE, WHOLE)),
    "2 ranks, tensor 2, expert 2, sequence": (2, changed(parallel(tensor=2, expert=2), SEQUENCE, RECOMPUTED)),
    "2 ranks, pipeline 2": (2, changed(parallel(pipeline=2), micro_batches_of(2))),
    "2 ranks, pipeline 2, whole, recomputed": (
        2,
        changed(parallel(pipeline=2), WHOLE, micro_batches_of(2), RECOMPUTED),
    ),
    "2 ranks, interleaved": (2, INTERLEAVED),
    "2 ranks, interleaved, whole, recomputed": (2, changed(INTERLEAVED, WHOLE, micro_batches_of(2), RECOMPUTED)),
    "4 ranks, interleaved, expert 2": (4, changed(INTERLEAVED, parallel(expert=2), micro_batches_of(1))),
    "4 ranks, interleaved, tensor 2, sequence": (4, changed(INTERLEAVED, parallel(tensor=2), SEQUENCE)),
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
    "4 ranks, tensor 2, expert 2, sequence": (
        4,
        changed(parallel(tensor=2, expert=2), SEQUENCE, micro_batches_of(2)),
    ),
    "4 ranks, tensor 2, slices 2, sequence": (4, changed(parallel(tensor=2, expert_tensor=2), SEQUENCE, WHOLE)),
    "4 ranks, tensor 2, expert 4, sequence, hierarchical": (
        4,
        changed(parallel(tensor=2, expert=4, dispatch="hierarchical", ranks_per_node=2), SEQUENCE),
    ),
    "4 ranks, expert 2, slices 2": (4, parallel(expert=2, expert_tensor=2)),
    "4 ranks, pipeline 2, expert 2": (4, changed(parallel(pipeline=2, expert=2), micro_batches_of(1))),
}

CASES: dict[str, dict[str, int]] = {
    "adamw": dict.fromkeys(LAYOUTS, 3)
    | dict.fromkeys(
        [
            "2 ranks, expert 2",
            "4 ranks, tensor 2, expert 2",
            "4 ranks, tensor 2, expert 2, whole",
            "4 ranks, tensor 2, expert 2, sequence",
        ],
        20,
    ),
    "sgd": {
        "2 ranks, data, whole": 3,
        "2 ranks, expert 2, whole, accumulated": 20,
        "2 ranks, slices 2, whole": 3,
        "2 ranks, tensor 2, whole": 20,
        "2 ranks, tensor 2, sequence, whole": 20,
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
            "2 ranks, tensor 2, expert 2, sequence",
            "2 ranks, pipeline 2",
            "4 ranks, tensor 2, expert 2, whole",
            "4 ranks, expert 2, slices 2",
        ],
        3,
    ),
    "adamw, warm-up and cosine": {"2 ranks, expert 2": 20, "2 ranks, tensor 2, whole": 20},
}


@contextmanager
def unmarked() -> Iterator[None]:
    """On each rank: weights of MoE layers without the mark by which Megatron sums the gradients of parts of sequences."""
    from moe_dist.engines import megatron_layer

    layer = megatron_layer.MegatronMoELayer
    set_layer_number = layer.set_layer_number

    def unmark(self: Any, number: int) -> None:
        set_layer_number(self, number)
        for parameter in self.moe.parameters():
            parameter.sequence_parallel = False  # type: ignore[attr-defined]

    layer.set_layer_number = unmark  # type: ignore[method-assign]
    try:
        yield
    finally:
        layer.set_layer_number = set_layer_number  # type: ignore[method-assign]


def test_gradients_that_are_not_summed_over_parts_of_sequences_are_found() -> None:
    num_ranks, changes = LAYOUTS["2 ranks, tensor 2, sequence"]
    result = trace(changed(FLOAT32, changes, MEGATRON), num_ranks, 1, (0,), unmarked)
    found = " ".join(differences(result, reference("adamw").part(0, 1), 1e-5, 1e-5))
    assert "layers.1.moe.router.weight" in found
    assert "layers.1.moe.shared.w_gate" in found
    assert "layers.0." not in found


EVALUATED = ("2 ranks, tensor 2, expert 2, sequence", "2 ranks, pipeline 2", "4 ranks, interleaved, tensor 2, sequence")


def evaluate(tree: Tree) -> tuple[float, int, list[list[int]], str, str]:
    """Loss, targets and loads of a batch, and what is found where nothing, and where a weight of layer 2, is not finite."""
    engine, data = build_engine(tree)
    batches = data.micro_batches(0, engine.data_rank, engine.layout)
    loss, num_targets, load_NE = engine.evaluate(batches)
    nothing = engine.first_nonfinite(batches)
    for name, weight in engine.state().items():
        if name == "model.layers.2.moe.router.weight":
            weight[0] = float("nan")  # a view
    return loss, num_targets, load_NE.tolist(), nothing, engine.first_nonfinite(batches)


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_gives_what_native_gives(name: str) -> None:
    num_ranks, changes = LAYOUTS[name]
    ((loss, *expected),) = run_ranks(1, evaluate, FLOAT32)
    for of_rank, *found in run_ranks(num_ranks, evaluate, changed(FLOAT32, changes, MEGATRON)):
        assert abs(of_rank - loss) < 1e-4
        assert found == expected
    assert expected[-1] == "the output of layers.2.moe"


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
