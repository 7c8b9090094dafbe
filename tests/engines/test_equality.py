"""Any layout, the same training: one rank without accumulation is the reference, every other layout must repeat it.

float64: the gradient of every parameter to 1e-9, losses, norms and biases to 1e-8, loads and drops exactly.
float32: losses to 1e-4.
"""

from functools import cache

import numpy as np
import pytest
import torch

from moe_dist.config import build_config, layout_dependence, layout_of
from tests.support.equality import (
    BASE,
    PADDED,
    RECOMPUTED,
    SyntheticData,
    Trace,
    Tree,
    changed,
    differences,
    differing_losses,
    expanded,
    micro_batches_of,
    trace,
)

SGD = {
    "training": {"optimizer": {"name": "sgd", "learning_rate": 0.3, "max_grad_norm": None}},
    "routing": {"losses": {"load_balance": {"scope": "global_batch"}}},
    "model": {"tie_embeddings": False},
}
FLOAT32 = {"training": {"precision": "float32"}}
PACKED = {"routing": {"capacity": {"factor": 0.9, "renormalise": True}}}

PLAIN = {"bias": {"rule": "none"}, "losses": {"load_balance": {"coefficient": 0}}}


def routed(method: str, **routing: object) -> Tree:
    """BASE with another routing method, and no balancing beside it."""
    return changed(BASE, {"routing": {**PLAIN, "method": method}}, {"routing": routing})


# Each routing method, and balancing that counts more than loads.
ROUTED: dict[str, Tree] = {
    "noisy_top_k": routed("noisy_top_k", losses={"importance": {"coefficient": 0.1}, "load": {"coefficient": 0.1}}),
    "jitter": routed("top_k", input_jitter=0.1, bias={"rule": "quantile"}),
    "random drops": routed("top_k", bias={"rule": "momentum"}, capacity={"factor": 0.8, "policy": "random"}),
    "rerouted": routed("top_k", bias={"rule": "proportional"}, capacity={"factor": 1.0, "overflow": "reroute"}),
    "zero experts": routed("top_k", zero_experts={"count": 4, "target": 1.5}, bias={"rule": "proportional"}),
    "load adjustment": routed("top_k", load_adjustment={"strength": 0.5}),
    "expert_choice": routed("expert_choice"),
    "expert_choice, capped": routed("expert_choice", expert_choice={"max_experts": 3}),
    "hash": routed("hash", hash={"weights": "learned"}),
    "sinkhorn": routed("sinkhorn"),
    "sinkhorn, global": routed("sinkhorn", group="global"),
    "optimal_transport": routed("optimal_transport"),
    "optimal_transport, global": routed("optimal_transport", group="global"),
    "base": routed("base", top_k=1, renormalise=False),
    "gatepro": routed("gatepro", gatepro={"penalty": "hard"}),
    "gatepro_ot": routed("gatepro_ot", losses={"z": {"coefficient": 0}}),
    "expert_threshold": routed("expert_threshold"),
    "random": routed("random"),
}

# What is trained. AdamW clips; SGD does not, so that a gradient of the wrong size shows in the losses too.
RECIPES: dict[str, Tree] = {
    "adamw": BASE,
    "sgd": changed(BASE, SGD),
    "adamw, packed capacity": changed(BASE, PACKED),
    "adamw, padded capacity": changed(BASE, PADDED),
    "sgd, padded capacity": changed(BASE, SGD, PADDED),
    "adamw, float32": changed(BASE, FLOAT32),
    "sgd, float32": changed(BASE, SGD, FLOAT32),
    **ROUTED,
}


def layout(
    num_ranks: int, expert: int = 1, *changes: Tree, owners: tuple[int, ...] | None = None, slices: int = 1
) -> tuple[int, Tree]:
    """The number of ranks and the keys of a layout."""
    parallel = {"expert": expert, "expert_map": list(owners) if owners else None, "expert_tensor": slices}
    return num_ranks, changed({"parallel": parallel}, *changes)


FULL = {"engine": {"sharding": "full"}}
TWO_NODES = {"parallel": {"dispatch": "hierarchical", "ranks_per_node": 2}}
NODES_OF_ONE = {"parallel": {"dispatch": "hierarchical", "ranks_per_node": 1}}


LAYOUTS: dict[str, tuple[int, Tree]] = {
    "1 rank": layout(1),
    "1 rank, accumulated": layout(1, 1, micro_batches_of(1)),
    "1 rank, accumulated and recomputed": layout(1, 1, micro_batches_of(4), RECOMPUTED),
    "2 ranks, data": layout(2),
    "2 ranks, data, sharded": layout(2, 1, FULL),
    "2 ranks, data, sharded, accumulated": layout(2, 1, FULL, micro_batches_of(2)),
    "2 ranks, expert 2": layout(2, 2),
    "2 ranks, expert 2, recomputed": layout(2, 2, RECOMPUTED),
    "2 ranks, expert 2, accumulated": layout(2, 2, micro_batches_of(1)),
    "2 ranks, expert 2, unequal": layout(2, 2, owners=(1, 0, 0, 1, 1, 1, 0, 1)),
    "2 ranks, expert 2, sharded, recomputed": layout(2, 2, FULL, RECOMPUTED),
    "4 ranks, data": layout(4),
    "4 ranks, expert 2": layout(4, 2),
    "4 ranks, expert 2, sharded": layout(4, 2, FULL),
    "4 ranks, expert 2, shuffled, recomputed": layout(4, 2, RECOMPUTED, owners=(1, 0, 0, 1, 1, 0, 1, 0)),
    "4 ranks, expert 2, unequal, accumulated, sharded": layout(
        4, 2, FULL, micro_batches_of(1), owners=(0, 0, 1, 0, 0, 0, 1, 0)
    ),
    "4 ranks, expert 4": layout(4, 4),
    "4 ranks, expert 4, shuffled, accumulated": layout(4, 4, micro_batches_of(1), owners=(3, 0, 2, 1, 0, 3, 1, 2)),
    "4 ranks, expert 4, sharded": layout(4, 4, FULL),
    "4 ranks, expert 4, 2 nodes": layout(4, 4, TWO_NODES),
    "4 ranks, expert 4, 2 nodes, shuffled, recomputed": layout(
        4, 4, TWO_NODES, FULL, RECOMPUTED, owners=(3, 0, 2, 1, 0, 3, 1, 2)
    ),
    "4 ranks, expert 2, 2 nodes, accumulated": layout(4, 2, NODES_OF_ONE, micro_batches_of(1)),
    "2 ranks, slices 2": layout(2, slices=2),
    "2 ranks, slices 2, sharded, recomputed": layout(2, 1, FULL, RECOMPUTED, slices=2),
    "4 ranks, slices 2, accumulated, sharded": layout(4, 1, FULL, micro_batches_of(1), slices=2),
    "4 ranks, slices 2": layout(4, slices=2),
    "4 ranks, slices 4": layout(4, slices=4),
    "4 ranks, slices 4, 2 nodes": layout(4, 1, TWO_NODES, slices=4),
    "4 ranks, expert 2, slices 2": layout(4, 2, slices=2),
    "4 ranks, expert 2, slices 2, unequal, recomputed": layout(
        4, 2, RECOMPUTED, owners=(1, 0, 0, 0, 1, 0, 1, 0), slices=2
    ),
}

OVER_ALL_TOKENS = ("sinkhorn, global", "optimal_transport, global", "base", "noisy_top_k")
"""What looks at all tokens of a forward, so that accumulation changes it."""

# Of each recipe the layouts and the number of steps: 20, or as many as gradients and the first updates need.
CASES: dict[str, dict[str, int]] = {
    "adamw": {
        "1 rank, accumulated": 20,
        "1 rank, accumulated and recomputed": 3,
        "2 ranks, data": 20,
        "2 ranks, data, sharded, accumulated": 20,
        "2 ranks, expert 2": 20,
        "2 ranks, expert 2, accumulated": 20,
        "2 ranks, expert 2, unequal": 3,
        "4 ranks, data": 20,
        "4 ranks, expert 2": 20,
        "4 ranks, expert 2, shuffled, recomputed": 3,
        "4 ranks, expert 2, unequal, accumulated, sharded": 3,
        "4 ranks, expert 4": 20,
        "4 ranks, expert 4, shuffled, accumulated": 20,
        "4 ranks, expert 4, 2 nodes": 20,
        "4 ranks, expert 4, 2 nodes, shuffled, recomputed": 3,
        "4 ranks, expert 2, 2 nodes, accumulated": 3,
        "2 ranks, slices 2": 20,
        "4 ranks, slices 2, accumulated, sharded": 3,
        "4 ranks, slices 4": 3,
        "4 ranks, slices 4, 2 nodes": 3,
        "4 ranks, expert 2, slices 2, unequal, recomputed": 20,
    },
    "sgd": {
        "2 ranks, data": 20,
        "2 ranks, data, sharded": 20,
        "2 ranks, expert 2, recomputed": 20,
        "2 ranks, expert 2, sharded, recomputed": 3,
        "4 ranks, data": 3,
        "4 ranks, expert 2": 20,
        "4 ranks, expert 2, sharded": 3,
        "4 ranks, expert 4, sharded": 3,
        "2 ranks, slices 2, sharded, recomputed": 3,
        "4 ranks, slices 2": 20,
        "4 ranks, expert 2, slices 2": 3,
    },
    "adamw, packed capacity": {
        "2 ranks, data": 3,
        "2 ranks, expert 2": 20,
        "4 ranks, expert 2, shuffled, recomputed": 3,
        "4 ranks, expert 4, shuffled, accumulated": 20,
        "4 ranks, expert 2, slices 2": 3,
    },
    "adamw, padded capacity": {
        "4 ranks, expert 4, 2 nodes, shuffled, recomputed": 3,
        "1 rank, accumulated and recomputed": 3,
        "2 ranks, expert 2, accumulated": 3,
        "2 ranks, expert 2, unequal": 3,
        "4 ranks, expert 2, shuffled, recomputed": 20,
        "4 ranks, slices 2, accumulated, sharded": 3,
        "4 ranks, expert 2, slices 2, unequal, recomputed": 3,
    },
    "sgd, padded capacity": {
        "2 ranks, expert 2, recomputed": 20,
        "2 ranks, data, sharded": 3,
        "4 ranks, expert 4": 3,
    },
    "adamw, float32": {
        "1 rank, accumulated": 20,
        "2 ranks, data, sharded": 20,
        "4 ranks, expert 4": 20,
    },
    "sgd, float32": {
        "2 ranks, expert 2": 20,
        "4 ranks, expert 2, slices 2": 20,
    },
    **{name: {"2 ranks, expert 2, recomputed": 3, "4 ranks, expert 4": 3} for name in OVER_ALL_TOKENS},
    **{
        name: {"2 ranks, expert 2, recomputed": 3, "4 ranks, expert 2, unequal, accumulated, sharded": 3}
        for name in ROUTED
        if name not in OVER_ALL_TOKENS
    },
}
# Slices are of a routing that is made: what it may have is equal numbers of slots, and weights of identity experts.
for name in ("zero experts", "expert_choice", "optimal_transport", "gatepro_ot"):
    CASES[name]["4 ranks, expert 2, slices 2, unequal, recomputed"] = 3
# Between nodes travels what the routing says: numbers of experts that vary by token, and padded slots.
for name in ("expert_threshold", "optimal_transport"):
    CASES[name]["4 ranks, expert 4, 2 nodes"] = 3
CASES["optimal_transport"]["4 ranks, slices 4, 2 nodes"] = 3

GRADIENTS_AT = (0, 2, 19)


@cache
def reference(recipe: str) -> Trace:
    """One rank, the whole batch in one forward."""
    return trace(RECIPES[recipe], 1, 3 if recipe in ROUTED else 20, GRADIENTS_AT)


@pytest.mark.parametrize(("recipe", "name", "num_steps"), expanded(CASES))
def test_every_layout_trains_the_same(recipe: str, name: str, num_steps: int) -> None:
    num_ranks, changes = LAYOUTS[name]
    tree, exact = changed(RECIPES[recipe], changes), "float32" not in recipe
    config = build_config(tree, num_ranks)
    assert layout_dependence(config, layout_of(config, num_ranks)) == []
    result = trace(tree, num_ranks, num_steps, GRADIENTS_AT if exact else ())
    if exact:
        assert differences(result, reference(recipe)) == []
    else:
        assert result.disagreements == []
        assert differing_losses(result, reference(recipe), 1e-4) == []


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe not in ROUTED])
def test_the_reference_learns_with_everything_on(recipe: str) -> None:
    """Or equality would say little: the loss falls, every parameter has a gradient, and capacity drops pairs."""
    result = reference(recipe)
    assert min(result.losses[-3:]) < result.losses[0] - 1
    assert len(result.losses) == 20
    for name in result.gradients[0]:
        assert any(gradients[name].any() for gradients in result.gradients.values()), f"no gradient of {name}"
    for layer in range(2):
        assert (sum(drops[layer].sum() for drops in result.drops) > 0) == ("capacity" in recipe)
        assert all(load[layer].sum() == result.loads[step][1].sum() for step, load in enumerate(result.loads))
    assert all(np.ptp(bias) > 0.02 for bias in result.biases.values())


def test_the_data_are_ragged_and_do_not_depend_on_the_layout() -> None:
    data = SyntheticData(build_config(BASE))
    finest = layout_of(build_config(changed(BASE, micro_batches_of(1)), 4), 4)
    for step in range(20):
        batches = [batch for rank in range(4) for batch in data.micro_batches(step, rank, finest)]
        targets = [batch.num_targets() for batch in batches]
        assert targets.count(0) >= 2
        assert len(set(targets)) >= 4, targets
        assert any(batch.padding_BS is not None for batch in batches)
        assert any(batch.padding_BS is None for batch in batches)
        (together,) = data.micro_batches(step, 0, layout_of(build_config(BASE)))
        for name in ("input_BS", "target_BS", "sequence_B"):
            apart = torch.cat([getattr(batch, name) for batch in batches])
            assert torch.equal(apart, getattr(together, name)), name
    rank_2 = data.micro_batches(0, 2, layout_of(build_config(BASE, 4), 4))
    assert [batch.num_targets() for batch in rank_2] == [0]
