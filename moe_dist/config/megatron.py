"""What engine.name: megatron does not do, and why."""

from collections.abc import Iterator

from moe_dist.config.schema import Config


def megatron_problems(config: Config) -> Iterator[str]:
    """Problems of a config on its own, one a line."""
    model, parallel, precision = config.model, config.parallel, config.training.precision
    tensor, kv_heads = parallel.tensor, model.num_kv_heads or model.num_heads
    instead = "or engine.name: native"
    if precision == "float64":
        yield f"training.precision: float64 is not offered by engine.name: megatron; use float32 or bfloat16, {instead}"
    if model.qk_norm == "width":
        yield f"model.qk_norm: width is not offered by engine.name: megatron, which knows head and none; use one, {instead}"
    if config.training.optimizer.name == "sgd" and config.engine.distributed_optimizer:
        yield (
            "engine.distributed_optimizer: true is not offered with training.optimizer.name: sgd (Megatron-Core's takes Adam "
            "only); use false, or adamw"
        )
    if model.compile:
        yield f"model.compile: true is not offered by engine.name: megatron; use false, {instead}"
    if parallel.overlap_chunks == "auto":
        yield f"parallel.overlap_chunks: auto is not offered by engine.name: megatron; give a number, {instead}"
    if parallel.dispatch != "flat" and tensor > 1 and not config.engine.sequence_parallel:
        yield (
            f"parallel.dispatch: {parallel.dispatch} is not offered with parallel.tensor = {tensor}, whose ranks each send a "
            "share of the same tokens; use flat, engine.sequence_parallel: true, or parallel.tensor: 1"
        )
    if parallel.context > 1 and config.data.separate_documents:
        yield (
            f"data.separate_documents: true is not offered with parallel.context = {parallel.context}, for which "
            "TransformerEngine's attention takes no mask; use false, or parallel.context: 1"
        )
    if kv_heads % tensor:
        yield f"parallel.tensor: {tensor} does not divide the {kv_heads} key-value heads; use a divisor"
    if model.num_dense_layers + model.moe_every > 1 and model.ffn_size % tensor:
        yield f"parallel.tensor: {tensor} does not divide model.ffn_size = {model.ffn_size}; use a divisor"
    if model.num_layers % parallel.pipeline:
        yield f"parallel.pipeline: {parallel.pipeline} does not divide model.num_layers = {model.num_layers}; use a divisor"
    elif (layers := model.num_layers // parallel.pipeline) % parallel.pipeline_interleaving:
        yield (
            f"parallel.pipeline_interleaving: {parallel.pipeline_interleaving} does not divide the {layers} layers of each of "
            f"{parallel.pipeline} pipeline stages; use a divisor"
        )


def megatron_batch_problems(config: Config, micro_batch_size: int, accumulation_steps: int) -> Iterator[str]:
    """Problems of the micro-batch."""
    length, parallel = config.training.sequence_length, config.parallel
    stages, chunks = parallel.pipeline, parallel.pipeline_interleaving
    if chunks > 1 and accumulation_steps % stages:
        yield (
            f"parallel.pipeline_interleaving: {chunks} needs as many micro-batches as there are pipeline stages ({stages}), or "
            f"a multiple, and a rank has {accumulation_steps} in a step; change training.micro_batch_size or "
            "training.global_batch_size"
        )
    tensor, context = parallel.tensor, parallel.context
    parts = 2 * context * (tensor if config.engine.sequence_parallel else 1)
    tokens = micro_batch_size * length // context
    if context > 1 and length % parts:
        yield (
            f"parallel.context: {context} cuts sequences into {parts} parts, which do not divide training.sequence_length = "
            f"{length}; use a multiple of {parts}"
        )
    elif config.engine.sequence_parallel and length % tensor:
        yield (
            f"engine.sequence_parallel: parallel.tensor = {tensor} does not divide training.sequence_length = {length}, of "
            "which each tensor-parallel rank holds a part; change one of them, or use false"
        )
    elif tokens % tensor:
        yield (
            f"parallel.tensor: {tensor} does not divide the {tokens} tokens of a micro-batch (training.micro_batch_size x "
            "training.sequence_length), of which each tensor-parallel rank sends a share; change one of them"
        )
