"""Megatron-Core's process groups: global in its `parallel_state`, so put in place for the time of each call only.

Its rank order is tp-cp-ep-dp-pp. Inside a pipeline stage the experts fold over all ranks, expert tensor parallelism fastest, then
expert parallelism, then the replicas: the groups of moe_dist.config.Layout.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.config import Config, ConfigError
from moe_dist.engines.cuda_on_cpu import cuda_on_cpu
from moe_dist.engines.megatron_fused import has_transformer_engine


def check_megatron(config: Config, device: torch.device) -> None:
    """Raise ConfigError if there is no CUDA device and none is to be emulated, or the reverse, or TransformerEngine is needed."""
    emulate, name, context = config.engine.emulate_cuda, config.engine.name, config.parallel.context
    if emulate and device.type == "cuda":
        raise ConfigError("engine.emulate_cuda: true is for machines without CUDA, and this one has it; leave it out")
    if not emulate and device.type != "cuda":
        tensor = f" with parallel.tensor: {config.parallel.tensor}" if name == "deepspeed" else ""
        raise ConfigError(
            f"engine.name: {name}{tensor} needs CUDA devices, and there is none for each rank; set engine.emulate_cuda: true "
            "to try it on CPUs, or use engine.name: native"
        )
    if context > 1 and emulate:
        raise ConfigError(
            f"parallel.context: {context} is not offered with engine.emulate_cuda: true, because attention over split sequences "
            "is TransformerEngine's, which needs CUDA; use 1"
        )
    if context > 1 and not has_transformer_engine():
        raise ConfigError(
            f"parallel.context: {context} needs TransformerEngine, which is not installed: Megatron-Core has no other attention "
            "over split sequences; install it by `pip install --no-build-isolation transformer-engine[pytorch]`, or use 1"
        )
    if emulate and name == "megatron" and config.training.precision == "bfloat16":
        raise ConfigError("training.precision: bfloat16 is not offered with engine.emulate_cuda: true; use float32")


def megatron_context(config: Config) -> Callable[[], AbstractContextManager[None]]:
    """Collective. Makes the groups of a config; what is returned puts them in place for a `with` block.

    Groups are made once for each layout: every gloo group costs threads that wake up a hundred times a second.
    """
    parallel = config.parallel
    emulation = cuda_on_cpu if config.engine.emulate_cuda else _nothing
    with emulation():
        sizes = (parallel.tensor, parallel.context, parallel.pipeline, parallel.expert, parallel.expert_tensor)
        inside = _build_groups(dist.group.WORLD, config.engine.emulate_cuda, *sizes)

    @contextmanager
    def context() -> Iterator[None]:
        from megatron.core import parallel_state

        with ExitStack() as stack:
            stack.enter_context(emulation())
            if config.engine.emulate_cuda:  # of what is slow or missing on CPUs, which nobody runs for its speed
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            outside = _globals()
            stack.callback(vars(parallel_state).update, outside)
            vars(parallel_state).update(inside)
            chunks = parallel.pipeline_interleaving
            parallel_state.set_virtual_pipeline_model_parallel_world_size(chunks if chunks > 1 else None)
            yield
            inside.update(_globals())  # what is made at first use

    return context


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@lru_cache
def _build_groups(
    world: dist.ProcessGroup | None,
    emulated: bool,
    tensor: int,
    context: int,
    pipeline: int,
    expert: int,
    expert_tensor: int,
) -> dict[str, Any]:
    from megatron.core import parallel_state

    outside, create_group = _globals(), parallel_state.create_group
    if emulated:
        parallel_state.create_group = _shared(create_group)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        create_gloo_process_groups=False,
    )
    inside = _globals()
    parallel_state.create_group = create_group
    vars(parallel_state).update(outside)
    return inside


def _shared(create_group: Callable[..., Any]) -> Callable[..., Any]:
    """Of gloo groups one is enough for the same ranks: calls come in the same order on all of them."""
    made: dict[tuple[int, ...], Any] = {}

    def create(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        key = tuple(ranks)
        if key not in made:
            made[key] = create_group(ranks, *args, **kwargs)
        return made[key]

    return create


def _globals() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name.isupper()}


@contextmanager
def quiet_import() -> Iterator[None]:
    """Megatron-Core warns at its import of each fused part that is missing; megatron_fused says it in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # "Unknown MLP type" of every layer
