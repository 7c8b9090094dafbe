"""Configurations whose keys are right one by one, and wrong together, end before any process starts."""

import re

import pytest

from moe_dist.config import ConfigError, load_config

MESSAGES = [
    # overrides, number of ranks, the whole message as a regular expression
    # Engines
    (
        ["parallel.tensor=2"],
        None,
        r"parallel\.tensor: 2 is not offered by engine.name: native \(.*\); use 1, or engine.name: deepspeed or .*: megatron",
    ),
    (["parallel.pipeline=2"], None, r"parallel\.pipeline: 2 .* use 1, or engine.name: megatron"),
    (
        ["engine.name=megatron", "model.qk_norm=width", "training.precision=float32"],
        None,
        r"model\.qk_norm: width is not offered by engine.name: megatron.*use one, or engine.name: native",
    ),
    (
        ["engine.name=megatron", "training.precision=float64"],
        None,
        r"training\.precision: float64 is not offered by engine.name: megatron; use float32 or .*",
    ),
    (
        ["engine.name=megatron", "parallel.tensor=3"],
        None,
        r"parallel\.tensor: 3 does not divide the 4 key-value heads.*",
    ),
    (
        ["engine.name=megatron", "parallel.pipeline=3"],
        None,
        r"parallel\.pipeline: 3 does not divide .* = 4; use a divisor",
    ),
    (
        ["engine.name=megatron", "parallel={pipeline: 2, pipeline_interleaving: 3}"],
        None,
        r"parallel\.pipeline_interleaving: 3 does not divide the 2 layers of each of 2 pipeline stages; use a divisor",
    ),
    (
        ["engine.name=megatron", "parallel={pipeline: 2, pipeline_interleaving: 2}", "training.micro_batch_size=16"],
        2,
        r"parallel\.pipeline_interleaving: 2 needs as many micro-batches as there are pipeline stages \(2\), or a multiple, "
        r"and a rank has 1 in a step; change training.micro_batch_size or training.global_batch_size",
    ),
    (
        ["parallel.context=2"],
        None,
        r"parallel\.context: 2 is not offered by engine.name: native .*; use 1, or .* megatron",
    ),
    (
        ["engine.name=megatron", "parallel.context=2", "data.separate_documents=true"],
        None,
        r"data\.separate_documents: true is not offered with parallel.context = 2, .*; use false, or parallel.context: 1",
    ),
    (
        [
            "engine={name: megatron, sequence_parallel: true}",
            "parallel={context: 2, tensor: 2}",
            "training.sequence_length=36",
        ],
        None,
        r"parallel\.context: 2 cuts sequences into 8 parts, which do not divide training.sequence_length = 36; use a .* of 8",
    ),
    (
        ["engine.name=megatron", "parallel={context: 2, tensor: 2}"],
        6,
        r"--ranks: 6 is not valid; .* 4 or a multiple of it, because of parallel.tensor = 2 and parallel.context = 2",
    ),
    (
        ["engine.name=megatron", "parallel.pipeline_interleaving=2"],
        None,
        r"parallel\.pipeline_interleaving: 2 has no effect with parallel.pipeline: 1; .*",
    ),
    (
        ["parallel.pipeline_interleaving=2"],
        None,
        r"parallel\.pipeline_interleaving: 2 is not offered by engine.name: native .*; use 1, or engine.name: megatron",
    ),
    (
        ["engine.name=megatron", "engine.sequence_parallel=true"],
        None,
        r"engine\.sequence_parallel: true has no effect with parallel.tensor: 1; .*",
    ),
    (["engine.sequence_parallel=true"], None, r"engine\.sequence_parallel: true has no effect with .* native; .*"),
    (
        ["engine={name: megatron, sequence_parallel: true}", "parallel.tensor=2", "training.sequence_length=33"],
        2,
        r"engine\.sequence_parallel: parallel.tensor = 2 does not divide training.sequence_length = 33, .*, or use false",
    ),
    (
        ["engine.name=megatron", "parallel={tensor: 2, expert: 2, dispatch: hierarchical}"],
        2,
        r"parallel\.dispatch: hierarchical is not offered with parallel.tensor = 2, .*; use flat, "
        r"engine.sequence_parallel: true, or parallel.tensor: 1",
    ),
    (
        ["engine.name=megatron", "training.optimizer.name=sgd"],
        None,
        r"engine\.distributed_optimizer: true is not offered with .* sgd .*; use false, or adamw",
    ),
    (
        ["engine.name=megatron", "engine.sharding=replicate"],
        None,
        r"engine\.sharding: 'replicate' has no effect with .*",
    ),
    (["engine.emulate_cuda=true"], None, r"engine\.emulate_cuda: true has no effect with engine.name: native; .*"),
    # Model
    (["model.num_heads=3"], None, r"model\.num_heads: 3 does not divide model.hidden_size = 256; choose a divisor, .*"),
    (["model.num_kv_heads=3"], None, r"model\.num_kv_heads: 3 does not divide model.num_heads = 4"),
    (["model.head_size=33"], None, r"model\.head_size: 33 is odd; it must be even, .*"),
    (["model.num_heads=256"], None, r"model\.head_size: 1 \(model.hidden_size / model.num_heads\) is odd; .*"),
    (["model.num_dense_layers=4"], None, r"model\.num_dense_layers: 4 leaves no MoE .* less than model.num_layers = 4"),
    (["model.activation_checkpointing=[3,4]"], None, r"model\.activation_checkpointing: there is no layer 4; .* is 3"),
    (["model.vocab_size=256"], None, r"model\.vocab_size: 256 is too small for bytes; use at least 257, .*"),
    # Routing
    (["routing.top_k=9"], None, r"routing\.top_k: 9 is more than moe.num_experts = 8; use at most that"),
    (["routing.top_k=9", "routing.capacity={factor: 1.25}"], None, r"routing\.top_k: 9 is more than .*"),
    (["routing.top_k=1", "routing.renormalise=true"], None, r"routing\.renormalise: true .* no gradient; use false"),
    (
        ["routing.top_k=1", "routing.score=softmax_top_k"],
        None,
        r"routing\.score: softmax_top_k .* no gradient; use softmax",
    ),
    (
        ["routing.top_k=1", "routing.score=softmax_top_k", "routing.renormalise=true"],
        None,
        r"routing\.score: softmax_top_k with .*",
    ),
    (["routing.score=softmax_top_k", "routing.renormalise=true"], None, r"routing\.renormalise: true has no effect .*"),
    (
        ["routing.top_k=1", "routing.capacity={factor: 1.25, renormalise: true, policy: weight}"],
        None,
        r"routing\.capacity\.renormalise: true has no effect with routing.top_k = 1, .*; use false",
    ),
    (
        ["routing.top_k=1", "routing.capacity={factor: 1.25, policy: choice}"],
        None,
        r"routing\.capacity\.policy: choice has no effect with routing.top_k = 1, .*; use position",
    ),
    # Data
    (["data.source=files"], None, r"data\.paths: is empty; name at least one file or folder for data.source: files"),
    (["data.source=files", "data.paths=[nowhere]"], None, r"data\.paths: there is no file or folder 'nowhere' in '.*'"),
    (
        ["data.source=files", "data.paths=[.]"],
        None,
        r"data\.paths: '\.' holds no file whose name ends as data.suffixes = .*",
    ),
    # Training
    (
        ["training.evaluation.interval=5", "data.holdout_fraction=0"],
        None,
        r"training\.evaluation\.interval: 5 needs held-.*",
    ),
    (["training.evaluation={interval: 5, tokens: 9}"], None, r"training\.evaluation\.tokens: 9 is less .* = 256"),
    (
        ["moe.backend=grouped_mm", "training.precision=float64"],
        None,
        r"moe\.backend: grouped_mm .*; use auto, cpu or loop",
    ),
    (
        ["moe.backend=loop", "moe.recompute=experts"],
        None,
        r"moe\.recompute: experts needs moe.backend: cpu, grouped_mm or triton, not loop; .*, or moe.recompute: activation",
    ),
    # Dispatch
    (
        ["parallel.dispatch=hierarchical"],
        None,
        r"parallel\.dispatch: 'hierarchical' has no effect with parallel.expert: 1; .*",
    ),
    (["parallel.ranks_per_node=2"], None, r"parallel\.ranks_per_node: 2 has no effect with parallel.expert: 1; .*"),
    (
        ["parallel={expert: 4, dispatch: hierarchical, ranks_per_node: 3}"],
        None,
        r"parallel\.ranks_per_node: 3 does not divide the 4 ranks of an expert-parallel group into two or more nodes; "
        r"use a smaller divisor, or parallel.dispatch: flat",
    ),
    (
        ["parallel={expert: 2, expert_tensor: 2, dispatch: hierarchical, ranks_per_node: 4}"],
        None,
        r"parallel\.ranks_per_node: 4 does not divide the 4 ranks .*",
    ),
    (
        ["parallel={expert: 4, dispatch: deepep}", "model.hidden_size=264", "training.precision=float32"],
        None,
        r"parallel\.dispatch: deepep needs a multiple of 16 .*, not 264; use flat or hierarchical\n"
        r"parallel\.dispatch: deepep moves bfloat16, not training.precision: float32; use flat or hierarchical",
    ),
    (
        ["parallel={expert: 4, dispatch: deepep}", "routing.capacity={factor: 1.0, pad: true}"],
        None,
        r"parallel\.dispatch: deepep does not carry the padded slots of routing.capacity.pad: true; .*",
    ),
    (
        ["parallel={expert: 4, dispatch: deepep}", "routing.method=expert_choice"],
        None,
        r"parallel\.dispatch: deepep does not carry the padded slots of routing.method: expert_choice; .*",
    ),
    (
        ["parallel={expert: 4, dispatch: deepep}", "routing.method=expert_threshold", "moe.num_experts=64"],
        None,
        r"parallel\.dispatch: deepep sends a token to at most 32 experts, and here one may have 64; .*",
    ),
    (
        ["parallel={expert: 6, dispatch: deepep}", "moe.num_experts=12"],
        None,
        r"parallel\.dispatch: deepep has no settings for expert-parallel groups of 6 ranks; use one of 2, 4, 8, .*",
    ),
    # Ranks
    ([], 0, r"--ranks: 0 is not valid; it should be 1 or a multiple of it"),
    (["parallel.expert=2"], 3, r"--ranks: 3 is not valid; .* 2 or a multiple of it, because of parallel.expert = 2"),
    (
        ["parallel.expert=3"],
        None,
        r"parallel\.expert: 3 does not divide moe.num_experts = 8; use a divisor, or give .*",
    ),
    (
        ["parallel.expert_map=[0,1]"],
        None,
        r"parallel\.expert_map: has 2 entries; it needs one rank for each of 8 experts",
    ),
    (
        ["parallel.expert=2", "parallel.expert_tensor=2"],
        2,
        r"--ranks: 2 is not valid; .* 4 or a multiple of it, because of parallel.expert = 2 and parallel.expert_tensor = 2",
    ),
    (
        ["parallel.expert_tensor=3"],
        3,
        r"parallel\.expert_tensor: 3 does not divide moe.ffn_size = 704; use a divisor",
    ),
    (
        ["parallel.expert_tensor=4", "moe.num_experts=10000"],
        4,
        r"parallel\.expert_tensor: 4 slices of each of moe.num_experts = 10000 are more than 32767 together; use at most 3",
    ),
    (
        ["parallel.expert_tensor=2", "moe.ffn_size=6"],
        4,
        r"moe\.ffn_size: 6 is not a multiple of the 2 ranks x parallel.expert_tensor = 2 slices over which .*",
    ),
    (
        ["parallel.expert=2", "parallel.expert_map=[0,0,0,0,2,2,2,2]"],
        None,
        r"parallel\.expert_map: has the ranks 0, 2; with parallel.expert = 2 it must use each of the ranks 0 to 1 .*",
    ),
    ([], 3, r"training\.global_batch_size: 16 is not a multiple of the 3 data-parallel ranks; use 18 or .*"),
    (["training.global_batch_size=2"], 4, r"training\.global_batch_size: 2 .* the 4 data-parallel ranks; use 4 or .*"),
    (
        ["training.micro_batch_size=3"],
        2,
        r"training\.micro_batch_size: 3 does not divide 8, the sequences that each .*",
    ),
    (["training.micro_batch_size=32"], 2, r"training\.micro_batch_size: 32 does not divide 8, .*"),
    (
        ["routing.group.sequences=3", "routing.capacity={factor: 1.25}"],
        2,
        r"routing\.group\.sequences: 3 does not divide the micro-batch of 8 .*",
    ),
    (["moe.ffn_size=7"], 2, r"moe\.ffn_size: 7 is not a multiple of the 2 ranks .* engine.sharding: replicate"),
    # Keys without effect
    (["moe.shared_gate=true"], None, r"moe\.shared_gate: true has no effect with moe.num_shared_experts: 0; .*"),
    (["routing.group=rank"], None, r"routing\.group: 'rank' has no effect with routing.capacity: null; .*"),
    (
        ["data.paths=[x]"],
        None,
        r"data\.paths: \['x'\] has no effect with data.source: stdlib; .* or change data.source",
    ),
    (["training.optimizer.momentum=0.9"], None, r"training\.optimizer\.momentum: 0.9 has no effect .*name: adamw; .*"),
    (
        ["training.optimizer={name: sgd, betas: [0.9, 0.99], epsilon: 1.0e-6}"],
        None,
        r"training\.optimizer\.betas: \[0.9, 0.99\] has no effect with training.optimizer.name: sgd; .*\n"
        r"training\.optimizer\.epsilon: 1e-06 has no effect with training.optimizer.name: sgd; .*",
    ),
]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads the defaults with some overrides, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").touch()
    return lambda overrides, num_ranks=None: load_config("config.yaml", overrides, num_ranks)


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "message"), MESSAGES, ids=lambda part: str(part) if isinstance(part, list) else ""
)
def test_message(load, overrides, num_ranks, message):
    with pytest.raises(ConfigError) as caught:
        load(overrides, num_ranks)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "num_ranks"),
    [
        ([], None),
        ([], 16),
        (["parallel.expert=4"], 8),
        (["parallel={expert: 4, dispatch: hierarchical}"], 8),
        (["parallel={expert: 4, dispatch: hierarchical, ranks_per_node: 2}"], 8),
        (["parallel={expert: 8, ranks_per_node: 8}"], None),
        (["parallel={expert: 8, dispatch: deepep}", "training.precision=bfloat16"], None),
        (
            [
                "parallel.expert=2",
                "moe.num_experts=3",
                "parallel.expert_map=[1,0,1]",
                "routing.capacity={factor: 1.0, pad: true}",
            ],
            4,
        ),
        (["model.head_size=6", "model.num_heads=7", "model.num_kv_heads=1"], None),
        (["model.num_dense_layers=1", "model.ffn_size=8"], None),
        (["model.moe_every=2", "model.ffn_size=8"], None),
        (["moe.num_experts=1", "routing.top_k=1"], None),
        (["routing.capacity={factor: 4.0}", "routing.group={sequences: 2}", "training.micro_batch_size=4"], 4),
        (["routing.capacity={factor: 0.1}", "routing.group=rank"], 2),
        (["routing.bias={rule: sign, rate: 0.005, final_rate: 0.001}"], None),
        (["moe.ffn_size=7", "engine.sharding=replicate"], 2),
        (["parallel.expert=2", "parallel.expert_tensor=2", "parallel.expert_map=[0,0,0,0,0,0,0,1]"], 8),
        (["parallel.expert_tensor=2", "moe.ffn_size=6", "engine.sharding=replicate"], 4),
        (["data.source=files", "data.paths=[config.yaml]"], None),
        (["data.source=files", "data.paths=[.]", "data.suffixes=[.yaml]"], None),
        (["training.optimizer={name: sgd, momentum: 0.9, max_grad_norm: null}"], None),
        (["training.schedule={name: cosine, warmup_steps: 100, final_fraction: 0}"], None),
    ],
)
def test_right_configs_pass(load, overrides, num_ranks):
    load(overrides, num_ranks)


def test_independent_problems_are_told_together(load):
    with pytest.raises(ConfigError) as caught:
        load(["model.num_heads=3", "routing.top_k=9", "moe.shared_gate=true"])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "model.num_heads",
        "routing.top_k",
        "moe.shared_gate",
    ]
