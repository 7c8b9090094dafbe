"""Checks that look at more than one key. They run before any process starts."""

from collections.abc import Iterator
from functools import reduce
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from moe_dist.config.backends import LIMITS, backend_problem
from moe_dist.config.deepep import deepep_problems, most_choices
from moe_dist.config.deepspeed import contradictions, deepspeed_problems
from moe_dist.config.errors import ConfigError, show
from moe_dist.config.layout import fewest_ranks, layout_of, micro_batch_size_of, moe_layers
from moe_dist.config.megatron import megatron_batch_problems, megatron_problems
from moe_dist.config.methods import METHODS
from moe_dist.config.routing import SequenceGroup
from moe_dist.config.routing_checks import routing_problems
from moe_dist.config.schema import BYTE_VOCABULARY, MOST_EXPERTS, Config, DataConfig
from moe_dist.config.support import SUPPORT, engines_offering


def check(config: Config, num_ranks: int | None = None) -> None:
    """Raise ConfigError with every problem found, one a line."""
    problems = [
        *_engine(config),
        *_model(config),
        *routing_problems(config.routing, config.moe.num_experts),
        *_data(config),
        *_training(config),
        *_profile(config),
        *_backend(config),
        *_dispatch(config),
        *_telemetry(config),
        *(megatron_problems(config) if config.engine.name == "megatron" else ()),
        *_without_effect(config),
    ]
    problems = problems or list(_ranks(config, num_ranks))  # the arithmetic of ranks presumes that the rest is right
    if problems:
        raise ConfigError("\n".join(problems))


def _engine(config: Config) -> Iterator[str]:
    engine = config.engine.name
    for key, reasons in SUPPORT.items():
        value = _value(config.model_dump(), key)
        if value > 1 and reasons[engine]:
            others = " or ".join(f"engine.name: {name}" for name in engines_offering(key))
            yield f"{key}: {value} is not offered by engine.name: {engine} ({reasons[engine]}); use 1, or {others}"
    if engine == "deepspeed":
        yield from deepspeed_problems(config)


def _model(config: Config) -> Iterator[str]:
    model = config.model
    kv_heads = model.num_kv_heads or model.num_heads
    if model.num_heads % kv_heads:
        yield f"model.num_kv_heads: {kv_heads} does not divide model.num_heads = {model.num_heads}"
    if model.head_size is None and model.hidden_size % model.num_heads:
        yield (
            f"model.num_heads: {model.num_heads} does not divide model.hidden_size = {model.hidden_size}; "
            "choose a divisor, or set model.head_size"
        )
    elif (head_size := model.head_size or model.hidden_size // model.num_heads) % 2:
        origin = "" if model.head_size else " (model.hidden_size / model.num_heads)"
        yield (
            f"model.head_size: {head_size}{origin} is odd; it must be even, "
            "because rotary position embedding turns pairs of values"
        )
    layers = model.activation_checkpointing
    if isinstance(layers, list) and (wrong := [i for i in layers if i >= model.num_layers]):
        yield (
            f"model.activation_checkpointing: there is no layer {wrong[0]}; "
            f"with model.num_layers = {model.num_layers} the last is {model.num_layers - 1}"
        )
    if not moe_layers(config):
        yield (
            f"model.num_dense_layers: {model.num_dense_layers} leaves no MoE layer; "
            f"it must be less than model.num_layers = {model.num_layers}"
        )


def _data(config: Config) -> Iterator[str]:
    data, vocab_size = config.data, config.model.vocab_size
    if vocab_size is not None and vocab_size < BYTE_VOCABULARY:
        yield f"model.vocab_size: {vocab_size} is too small for bytes; use at least {BYTE_VOCABULARY}, or leave it out"
    if data.source == "files":
        yield from _paths(data)


def _paths(data: DataConfig) -> Iterator[str]:
    if not data.paths:
        yield "data.paths: is empty; name at least one file or folder for data.source: files"
    for name in data.paths:
        path = Path(name)
        if not path.exists():
            yield f"data.paths: there is no file or folder {name!r} in {str(Path.cwd())!r}"
        elif path.is_dir() and not any(file.name.endswith(tuple(data.suffixes)) for file in path.rglob("*")):
            yield f"data.paths: {name!r} holds no file whose name ends as data.suffixes = {show(data.suffixes)} say"


def _profile(config: Config) -> Iterator[str]:
    steps, num_steps = config.telemetry.profile.steps, config.training.steps
    if steps is not None and not steps[0] <= steps[1] <= num_steps:
        yield (
            f"telemetry.profile.steps: {show(list(steps))} is not valid; give the first and the last step to trace, of "
            f"training.steps = {num_steps}"
        )


def _training(config: Config) -> Iterator[str]:
    training, evaluation = config.training, config.training.evaluation
    if evaluation.interval and not config.data.holdout_fraction:
        yield (
            f"training.evaluation.interval: {evaluation.interval} needs held-out files; "
            "set data.holdout_fraction above 0, or use null"
        )
    if evaluation.interval and evaluation.tokens < training.sequence_length:
        yield (
            f"training.evaluation.tokens: {evaluation.tokens} is less than one sequence; "
            f"use at least training.sequence_length = {training.sequence_length}"
        )


def _backend(config: Config) -> Iterator[str]:
    backend, precision, slices = config.moe.backend, config.training.precision, config.parallel.expert_tensor
    if backend == "grouped_mm" and precision == "float64":
        yield "moe.backend: grouped_mm does not compute in training.precision: float64; use auto, cpu or loop"
    if backend in LIMITS and config.moe.ffn_size % slices == 0:
        on_gpu = "bfloat16" if precision == "auto" else precision
        widths = config.model.hidden_size, config.moe.ffn_size // slices
        if problem := backend_problem(backend, on_gpu, config.moe.activation, widths):
            yield f"moe.backend: {backend}: {problem}"
    if config.moe.recompute == "experts" and backend not in ("auto", "cpu", "grouped_mm", "triton"):
        yield (
            f"moe.recompute: experts needs moe.backend: cpu, grouped_mm or triton, not {backend}; use one of them, "
            "or moe.recompute: activation"
        )


def _dispatch(config: Config) -> Iterator[str]:
    parallel, routing, precision = config.parallel, config.routing, config.training.precision
    ranks, size = parallel.expert * parallel.expert_tensor, parallel.ranks_per_node
    if ranks == 1:
        return  # parallel.dispatch has no effect
    if parallel.dispatch == "hierarchical" and size and (ranks % size or ranks == size):
        yield (
            f"parallel.ranks_per_node: {size} does not divide the {ranks} ranks of an expert-parallel group "
            "into two or more nodes; use a smaller divisor, or parallel.dispatch: flat"
        )
    if parallel.dispatch == "deepep":
        yield from deepep_problems(config.model.hidden_size, ranks, most_choices(config))
        if precision in ("float32", "float64"):
            yield f"parallel.dispatch: deepep moves bfloat16, not training.precision: {precision}; use flat or hierarchical"
        padded = routing.capacity is not None and routing.capacity.pad
        if padded or (METHODS[routing.method].exact and routing.method != "base"):  # base packs over several ranks
            cause = "routing.capacity.pad: true" if padded else f"routing.method: {routing.method}"
            yield f"parallel.dispatch: deepep does not carry the padded slots of {cause}; use flat or hierarchical"


def _telemetry(config: Config) -> Iterator[str]:
    prometheus = config.telemetry.prometheus
    if prometheus is not None:
        try:
            ip_address(prometheus.address)
        except ValueError:
            yield (
                f"telemetry.prometheus.address: {show(prometheus.address)} is not valid; it should be an IP address, such as "
                "127.0.0.1 (this machine alone) or 0.0.0.0 (any)"
            )


def _without_effect(config: Config) -> Iterator[str]:
    """Keys that ask for something which will not happen.

    The settings of a part that is switched off (`routing.bias.rate` with rule: none) are no such request: switching it off
    by one override must not mean clearing them too.
    """
    optimizer, engine, parallel = config.training.optimizer.name, config.engine.name, config.parallel
    idle = [
        (f"engine.name: {engine}", engine != "megatron", ["engine.distributed_optimizer", "engine.sequence_parallel"]),
        (f"engine.name: {engine}", engine == "native", ["engine.emulate_cuda"]),
        (
            "parallel.tensor: 1",
            engine == "deepspeed" and parallel.tensor == 1,  # nothing of Megatron-Core is used
            ["engine.emulate_cuda"],
        ),
        ("parallel.tensor: 1", engine == "megatron" and parallel.tensor == 1, ["engine.sequence_parallel"]),
        (
            "parallel.pipeline: 1",
            engine == "megatron" and parallel.pipeline == 1,
            ["parallel.pipeline_interleaving"],
        ),
        (
            "parallel.expert: 1",
            parallel.expert * parallel.expert_tensor == 1,
            ["parallel.dispatch", "parallel.ranks_per_node", "parallel.overlap_chunks"],
        ),
        (f"engine.name: {engine}", engine != "native", ["engine.sharding"]),
        (f"engine.name: {engine}", engine != "deepspeed", ["engine.zero_stage", "engine.deepspeed"]),
        ("moe.num_shared_experts: 0", not config.moe.num_shared_experts, ["moe.shared_gate"]),
        (
            "routing.capacity: null",
            config.routing.capacity is None and not METHODS[config.routing.method].uses_group,
            ["routing.group"],
        ),
        ("data.source: stdlib", config.data.source == "stdlib", ["data.paths"]),
        ("training.optimizer.name: adamw", optimizer == "adamw", ["training.optimizer.momentum"]),
        (
            "training.optimizer.name: sgd",
            optimizer == "sgd",
            ["training.optimizer.betas", "training.optimizer.epsilon"],
        ),
    ]
    values, defaults = config.model_dump(mode="json"), Config().model_dump(mode="json")
    for cause, holds, keys in idle:
        for key in keys:
            value, default = _value(values, key), _value(defaults, key)
            if holds and value != default:
                other, _, _ = cause.partition(":")
                yield (
                    f"{key}: {show(value)} has no effect with {cause}; "
                    f"leave it out ({show(default)} is the default), or change {other}"
                )


def _value(tree: dict[str, Any], key: str) -> Any:
    return reduce(dict.__getitem__, key.split("."), tree)


def _ranks(config: Config, num_ranks: int | None) -> Iterator[str]:
    fewest = fewest_ranks(config)
    num_ranks = fewest if num_ranks is None else num_ranks
    if num_ranks < 1 or num_ranks % fewest:
        names = ("expert", "expert_tensor", "tensor", "context", "pipeline")
        sizes = [f"parallel.{name} = {size}" for name in names if (size := getattr(config.parallel, name)) > 1]
        reason = f", because of {' and '.join(sizes)}" if sizes else ""
        yield f"--ranks: {num_ranks} is not valid; it should be {fewest} or a multiple of it{reason}"
        return
    # The first of these with a problem: each would follow from the one before.
    yield from (
        [*_expert_map(config), *_slices(config)]
        or list(_batch(config, num_ranks))
        or [*_widths(config, num_ranks), *contradictions(config, num_ranks)]
    )


def _expert_map(config: Config) -> Iterator[str]:
    num_experts, ranks, owners = config.moe.num_experts, config.parallel.expert, config.parallel.expert_map
    if owners is None:
        if num_experts % ranks:
            yield (
                f"parallel.expert: {ranks} does not divide moe.num_experts = {num_experts}; "
                "use a divisor, or give parallel.expert_map"
            )
    elif len(owners) != num_experts:
        yield f"parallel.expert_map: has {len(owners)} entries; it needs one rank for each of {num_experts} experts"
    elif set(owners) != set(range(ranks)):
        yield (
            f"parallel.expert_map: has the ranks {', '.join(map(str, sorted(set(owners))))}; with "
            f"parallel.expert = {ranks} it must use each of the ranks 0 to {ranks - 1} and no other"
        )


def _slices(config: Config) -> Iterator[str]:
    num_slices, moe = config.parallel.expert_tensor, config.moe
    if moe.ffn_size % num_slices:
        yield f"parallel.expert_tensor: {num_slices} does not divide moe.ffn_size = {moe.ffn_size}; use a divisor"
    if moe.num_experts * num_slices > MOST_EXPERTS:
        yield (
            f"parallel.expert_tensor: {num_slices} slices of each of moe.num_experts = {moe.num_experts} are more than "
            f"{MOST_EXPERTS} together; use at most {MOST_EXPERTS // moe.num_experts}"
        )


def _batch(config: Config, num_ranks: int) -> Iterator[str]:
    training, parallel, group = config.training, config.parallel, config.routing.group
    data = num_ranks // (parallel.tensor * parallel.context * parallel.pipeline)
    share, rest = divmod(training.global_batch_size, data)
    micro_batch_size = micro_batch_size_of(config, share)
    if rest:
        yield (
            f"training.global_batch_size: {training.global_batch_size} is not a multiple of "
            f"the {data} data-parallel ranks; use {data * (share + 1)} or another multiple"
        )
    elif share % micro_batch_size:
        yield (
            f"training.micro_batch_size: {micro_batch_size} does not divide {share}, the sequences that each of "
            f"{data} data-parallel ranks has of training.global_batch_size = {training.global_batch_size}"
        )
    elif isinstance(group, SequenceGroup) and micro_batch_size % group.sequences:
        yield (
            f"routing.group.sequences: {group.sequences} does not divide the micro-batch of "
            f"{micro_batch_size} sequences that each rank holds; use a divisor, or rank"
        )
    elif config.engine.name != "native":
        yield from megatron_batch_problems(config, micro_batch_size, share // micro_batch_size)


def _widths(config: Config, num_ranks: int) -> Iterator[str]:
    if config.engine.name != "native" or config.engine.sharding != "full":
        return
    layout = layout_of(config, num_ranks)
    shards, slices = layout.expert_data, layout.expert_tensor
    sliced = f" x parallel.expert_tensor = {slices} slices" if slices > 1 else ""
    for key, parts, over in (("model.hidden_size", shards, ""), ("moe.ffn_size", shards * slices, sliced)):
        width = _value(config.model_dump(), key)
        if width % parts:
            yield (
                f"{key}: {width} is not a multiple of the {shards} ranks{over} over which "
                "engine.sharding: full spreads each expert; change it, or use engine.sharding: replicate"
            )
