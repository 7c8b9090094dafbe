"""DeepSpeed's configuration is generated; what contradicts it, or what it cannot do, ends before any process starts."""

import re
from typing import Any

import pytest

from moe_dist.config import ConfigError, build_config, layout_of, support
from moe_dist.config.deepspeed import deepspeed_tree
from tests.support.equality import Tree, changed

MESSAGES: list[tuple[Tree, str]] = [
    # what is changed, the whole message as a regular expression; on 2 ranks
    (
        {"engine": {"sharding": "replicate"}},
        r"engine\.sharding: 'replicate' has no effect with engine.name: deepspeed; leave it out .*",
    ),
    (
        {"engine": {"name": "native", "zero_stage": 2}},
        r"engine\.zero_stage: 2 has no effect with engine.name: native; .*",
    ),
    (
        {"engine": {"name": "native", "deepspeed": {"steps_per_print": 1}}},
        r"engine\.deepspeed: \{'steps_per_print': 1\} has no effect with engine.name: native; .*",
    ),
    ({"engine": {"zero_stage": 4}}, r"engine\.zero_stage: 4 is not valid; it should be an integer .* at most 3"),
    ({"engine": {"deepspeed": 3}}, r"engine\.deepspeed: 3 is not valid; it should be a section"),
    (
        {"engine": {"zero_stage": 3}, "parallel": {"expert": 2}},
        r"engine\.zero_stage: 3 shards experts .* no parallel.expert: 2 .*; use engine.zero_stage: 2, or parallel.expert: 1",
    ),
    (
        {"engine": {"zero_stage": 3}, "model": {"compile": True}},
        r"model\.compile: true does not go with engine.zero_stage: 3, .*",
    ),
    (
        {"parallel": {"expert": 2, "expert_map": [1, 0, 0, 1, 1, 0, 0, 1]}},
        r"parallel\.expert_map: \[1, 0, .*\] is not carried by engine.name: deepspeed, .*; leave it out, or use .* native",
    ),
    (
        {"engine": {"zero_stage": 3}, "parallel": {"tensor": 2}},
        r"engine\.zero_stage: 3 takes no parallel.tensor: 2 \(.*\); use engine.zero_stage: 2, or parallel.tensor: 1",
    ),
    (
        {"model": {"num_kv_heads": 1}, "parallel": {"tensor": 2}},
        r"parallel\.tensor: 2 does not divide the 1 key-value heads; use a divisor",
    ),
    (
        {"model": {"num_dense_layers": 1, "ffn_size": 31}, "parallel": {"tensor": 2}},
        r"parallel\.tensor: 2 does not divide model.ffn_size = 31; use a divisor",
    ),
    (
        {"moe": {"num_shared_experts": 1, "ffn_size": 15}, "parallel": {"tensor": 2}},
        r"parallel\.tensor: 2 does not divide moe.num_shared_experts x moe.ffn_size = 15; use a divisor",
    ),
    (
        {"model": {"qk_norm": "width"}, "parallel": {"tensor": 2}},
        r"model\.qk_norm: 'width' is not offered with parallel.tensor: 2, .*; use head or none",
    ),
    (
        {"model": {"compile": True}, "parallel": {"tensor": 2}},
        r"model\.compile: true is not offered with parallel.tensor: 2, .*; use false",
    ),
    (
        {"parallel": {"tensor": 2, "expert": 2, "dispatch": "hierarchical"}},
        r"parallel\.dispatch: 'hierarchical' is not offered with parallel.tensor: 2, .*; use flat",
    ),
    (
        {"parallel": {"tensor": 2, "expert": 2, "overlap_chunks": "auto"}},
        r"parallel\.overlap_chunks: 'auto' is not offered with parallel.tensor: 2, .*; use a number",
    ),
    (
        {"training": {"sequence_length": 15, "micro_batch_size": 1}, "parallel": {"tensor": 2}},
        r"parallel\.tensor: 2 does not divide the 15 tokens of a micro-batch .*",
    ),
    (
        {"engine": {"emulate_cuda": True}},
        r"engine\.emulate_cuda: true has no effect with parallel.tensor: 1; .*, or change parallel.tensor",
    ),
    ({"parallel": {"pipeline": 2}}, r"parallel\.pipeline: 2 is not offered by engine.name: deepspeed .*"),
    ({"parallel": {"expert_tensor": 2}}, r"parallel\.expert_tensor: 2 is not offered by engine.name: deepspeed .*"),
    ({"training": {"precision": "float64"}}, r"training\.precision: float64 is not kept by DeepSpeed, .*"),
    (
        {"training": {"precision": "bfloat16"}, "engine": {"zero_stage": 0}},
        r"training\.precision: bfloat16 needs engine.zero_stage: 1, 2 or 3, not 0 .*",
    ),
]

CONTRADICTIONS: list[tuple[Tree, str]] = [
    # engine.deepspeed, the whole message as a regular expression
    (
        {"train_batch_size": 32},
        r"engine\.deepspeed\.train_batch_size: 32 contradicts training.global_batch_size, by which it is 16; leave .*",
    ),
    (
        {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8},
        r"engine\.deepspeed\.train_micro_batch_size_per_gpu: 1 contradicts training.micro_batch_size, .* is 8; .*\n"
        r"engine\.deepspeed\.gradient_accumulation_steps: 8 contradicts training.micro_batch_size, .* is 1; .*",
    ),
    (
        {"gradient_clipping": 0.5},
        r"engine\.deepspeed\.gradient_clipping: 0.5 contradicts training.optimizer.max_grad_norm, by which it is 1.0; .*",
    ),
    ({"bf16": {"enabled": True}}, r"engine\.deepspeed\.bf16\.enabled: true contradicts training.precision; .*"),
    ({"fp16": {"enabled": True}}, r"engine\.deepspeed\.fp16: .* contradicts training.precision; .*"),
    (
        {"optimizer": {"type": "AdamW"}},
        r"engine\.deepspeed\.optimizer: .* contradicts training.optimizer; leave it out, or change training.optimizer",
    ),
    ({"scheduler": {"type": "WarmupLR"}}, r"engine\.deepspeed\.scheduler: .* contradicts training.schedule; .*"),
    (
        {"zero_optimization": {"stage": 2}},
        r"engine\.deepspeed\.zero_optimization\.stage: 2 contradicts engine.zero_stage, by which it is 1; .*",
    ),
    (
        {"zero_optimisation": {}},
        r"engine\.deepspeed\.zero_optimisation: is not among the keys that are passed to DeepSpeed; valid are .*",
    ),
    ({"gradient_allreduce_op": "sum"}, r"engine\.deepspeed\.gradient_allreduce_op: 'sum' is not possible here .*"),
]


def on_deepspeed(*changes: Tree) -> Tree:
    return changed({"engine": {"name": "deepspeed"}}, *changes)


def message_of(tree: Tree) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(tree, 2)
    return str(caught.value)


@pytest.mark.parametrize(("change", "message"), MESSAGES, ids=lambda part: str(part)[:60])
def test_what_it_cannot_do_is_refused(change: Tree, message: str) -> None:
    said = message_of(on_deepspeed(change))
    assert re.fullmatch(message, said), said


@pytest.mark.parametrize(("section", "message"), CONTRADICTIONS, ids=lambda part: str(part)[:60])
def test_a_contradiction_names_both_keys(section: Tree, message: str) -> None:
    said = message_of(on_deepspeed({"engine": {"deepspeed": section}}))
    assert re.fullmatch(message, said), said


def test_offloading_needs_zero() -> None:
    offload = {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}
    said = message_of(on_deepspeed({"engine": {"zero_stage": 0, **offload}}))
    assert said.startswith("engine.deepspeed.zero_optimization.offload_optimizer: needs engine.zero_stage: 1, 2 or 3")


def tree_of(bfloat16: bool = False, **engine: Any) -> Tree:
    training = {"training": {"micro_batch_size": 2, "optimizer": {"max_grad_norm": 0.5}}}
    config = build_config(on_deepspeed({"engine": engine}, training), 2)
    return deepspeed_tree(config, layout_of(config, 2), bfloat16)


def test_the_generated_configuration() -> None:
    tree = tree_of(bfloat16=True, zero_stage=2, deepspeed={"zero_optimization": {"overlap_comm": True}})
    assert (tree["train_batch_size"], tree["train_micro_batch_size_per_gpu"]) == (16, 2)
    assert (tree["gradient_accumulation_steps"], tree["gradient_clipping"]) == (4, 0.5)
    assert tree["bf16"] == {"enabled": True}
    assert tree["zero_optimization"]["stage"] == 2
    assert tree["zero_optimization"]["overlap_comm"] is True


def test_the_same_said_twice_is_no_contradiction() -> None:
    tree = tree_of(zero_stage=2, deepspeed={"zero_optimization": {"stage": 2}, "train_batch_size": 16})
    assert tree["train_batch_size"] == 16


def test_without_zero_deepspeed_does_not_clip() -> None:
    assert tree_of(zero_stage=0)["gradient_clipping"] == 0


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    support.require_package("native")
    with pytest.raises(ConfigError) as caught:
        support.require_package("deepspeed")
    assert str(caught.value) == (
        "engine.name: deepspeed needs the package deepspeed, which is not installed; "
        "install it by `pip install deepspeed`, or use engine.name: native"
    )
