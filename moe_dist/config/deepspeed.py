"""DeepSpeed's own configuration, generated from a Config; what a user adds to it in `engine.deepspeed`, and what contradicts.

Keys: https://www.deepspeed.ai/docs/config-json.
"""

from collections.abc import Iterator
from typing import Any

from moe_dist.config.errors import show
from moe_dist.config.layout import Layout, layout_of, moe_layers
from moe_dist.config.schema import Config
from moe_dist.config.size import size_of

Tree = dict[str, Any]

LARGEST_BUCKET = 500_000_000

SAID_BY = {
    # a key of DeepSpeed's                  the key of ours that says the same
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "gradient_clipping": "training.optimizer.max_grad_norm",
    "bf16.enabled": "training.precision",
    "fp16": "training.precision",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "data_types": "training.precision",
    "optimizer": "training.optimizer",
    "scheduler": "training.schedule",
    "activation_checkpointing": "model.activation_checkpointing",
    "expert_parallel": "parallel.expert",
    "use_data_before_expert_parallelism": "parallel.expert",
    "tensor_parallel": "parallel.tensor",
    "pipeline": "parallel.pipeline",
    "zero_optimization.stage": "engine.zero_stage",
}
FIXED = {
    "gradient_allreduce_op": "the loss is scaled for the mean",
    "zero_optimization.compute_grad_norm": "the norm decides whether a step is skipped",
    "zero_optimization.zenflow": "it updates weights at its own times",
}
"""What must stay as it is, and why."""
PASSED_ON = (
    "aio",
    "bf16",
    "checkpoint",
    "communication_data_type",
    "comms_logger",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_optimization",
)
"""What DeepSpeed is given as it is. DeepSpeed itself says nothing of an unknown key at this level."""


def deepspeed_tree(config: Config, layout: Layout, bfloat16: bool) -> Tree:
    """What deepspeed.initialize is given.

    Args:
        config: has passed the checks.
        bfloat16: what training.precision means on this device.
    """
    return _merged(_generated(config, layout, bfloat16), config.engine.deepspeed)


def deepspeed_problems(config: Config) -> Iterator[str]:
    """In words, what of a config for engine.name: deepspeed it cannot do, or says twice in different ways."""
    yield from _layout_problems(config)
    if config.parallel.tensor > 1:
        yield from _tensor_problems(config)
    yield from _precision_problems(config)
    user = config.engine.deepspeed
    for key in user:
        if key not in PASSED_ON and key not in SAID_BY and key not in FIXED:
            yield (
                f"engine.deepspeed.{key}: is not among the keys that are passed to DeepSpeed; "
                f"valid are {', '.join(PASSED_ON)}"
            )
    for key, reason in FIXED.items():
        if (value := _find(user, key)) is not None:
            yield f"engine.deepspeed.{key}: {show(value)} is not possible here ({reason}); leave it out"
    offload = _find(user, "zero_optimization.offload_optimizer")
    if config.engine.zero_stage == 0 and offload is not None:
        yield "engine.deepspeed.zero_optimization.offload_optimizer: needs engine.zero_stage: 1, 2 or 3, not 0"


def contradictions(config: Config, num_ranks: int) -> Iterator[str]:
    """In words, each key of engine.deepspeed that says something else than the key of ours it stands for.

    Args:
        config: has passed the checks that come before the number of ranks.
    """
    ours = _generated(config, layout_of(config, num_ranks), config.training.precision == "bfloat16")
    for key, said_by in SAID_BY.items():
        value, own = _find(config.engine.deepspeed, key), _find(ours, key)
        auto = key == "bf16.enabled" and config.training.precision == "auto"
        if value is not None and (auto or value != own):
            which = "" if own is None or auto else f", by which it is {show(own)}"
            yield f"engine.deepspeed.{key}: {show(value)} contradicts {said_by}{which}; leave it out, or change {said_by}"


def _layout_problems(config: Config) -> Iterator[str]:
    stage, parallel = config.engine.zero_stage, config.parallel
    if stage == 3 and parallel.expert > 1:
        yield (
            f"engine.zero_stage: 3 shards experts over all ranks and takes no parallel.expert: {parallel.expert} "
            "(DeepSpeed refuses its MoE layers there); use engine.zero_stage: 2, or parallel.expert: 1"
        )
    owners, num_experts = parallel.expert_map, config.moe.num_experts
    blocks = [expert * parallel.expert // num_experts for expert in range(num_experts)]
    if owners is not None and (num_experts % parallel.expert or owners != blocks):
        yield (
            f"parallel.expert_map: {show(owners)} is not carried by engine.name: deepspeed, which holds equal blocks of "
            "consecutive experts (its checkpoints number them so); leave it out, or use engine.name: native"
        )
    if stage == 3 and config.model.compile:
        yield (
            "model.compile: true does not go with engine.zero_stage: 3, whose hooks gather weights part by part; "
            "use engine.zero_stage: 2, or model.compile: false"
        )


def _tensor_problems(config: Config) -> Iterator[str]:
    model, moe, parallel = config.model, config.moe, config.parallel
    tensor, kv_heads = parallel.tensor, model.num_kv_heads or model.num_heads
    if config.engine.zero_stage == 3:
        yield (
            f"engine.zero_stage: 3 takes no parallel.tensor: {tensor} (its ranks serve shares of the tokens, so DeepSpeed must "
            "take the experts for MoE layers, which it refuses there); use engine.zero_stage: 2, or parallel.tensor: 1"
        )
    if kv_heads % tensor:
        yield f"parallel.tensor: {tensor} does not divide the {kv_heads} key-value heads; use a divisor"
    widths = {
        "model.ffn_size": model.ffn_size if len(moe_layers(config)) < model.num_layers else 0,
        "moe.num_shared_experts x moe.ffn_size": moe.num_shared_experts * moe.ffn_size,
    }
    for key, width in widths.items():
        if width % tensor:
            yield f"parallel.tensor: {tensor} does not divide {key} = {width}; use a divisor"
    for key, value, refused, reason, instead in (
        ("model.qk_norm", model.qk_norm, model.qk_norm == "width", "which is cut", "head or none"),
        ("model.compile", model.compile, model.compile, "whose parts contain collectives then", "false"),
        ("parallel.dispatch", parallel.dispatch, parallel.dispatch != "flat", "whose ranks send shares", "flat"),
        (
            "parallel.overlap_chunks",
            parallel.overlap_chunks,
            parallel.overlap_chunks == "auto",
            "before which it is measured",
            "a number",
        ),
    ):
        if refused:
            yield f"{key}: {show(value)} is not offered with parallel.tensor: {tensor}, {reason}; use {instead}"


def _precision_problems(config: Config) -> Iterator[str]:
    precision = config.training.precision
    if precision == "float64":
        yield (
            "training.precision: float64 is not kept by DeepSpeed, whose master weights are float32; use float32, "
            "or engine.name: native"
        )
    if precision == "bfloat16" and config.engine.zero_stage == 0:
        yield (
            "training.precision: bfloat16 needs engine.zero_stage: 1, 2 or 3, not 0 (without ZeRO, DeepSpeed's bfloat16 "
            "optimiser averages the norms of experts over ranks); change one of them"
        )


def _generated(config: Config, layout: Layout, bfloat16: bool) -> Tree:
    training, stage, size = config.training, config.engine.zero_stage, size_of(config)
    clipping = training.optimizer.max_grad_norm or 0.0
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.accumulation_steps,
        # Without ZeRO, DeepSpeed's own clipping averages the norms of experts over ranks: DeepSpeedEngine does it instead.
        "gradient_clipping": clipping if stage else 0.0,
        "bf16": {"enabled": bfloat16},
        # DeepSpeed makes a buffer of this many values in every step; its default is for large models.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": min(LARGEST_BUCKET, size.experts + size.rest)},
        # Ours are torch's fused optimisers, which ZeRO otherwise wants to be allowed for SGD, and on the host.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _merged(tree: Tree, user: Tree) -> Tree:
    result = dict(tree)
    for key, value in user.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _find(tree: Tree, key: str) -> Any:
    """The value of a dotted key, None where it is not given."""
    found: Any = tree
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found
