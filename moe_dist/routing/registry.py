"""Routers by name: a new method is a new file and a line here."""

from collections.abc import Callable

import torch.distributed as dist

from moe_dist.config.schema import RoutingConfig
from moe_dist.routing.router import Router
from moe_dist.routing.top_k import TopKRouter

ROUTERS: dict[str, Callable[..., Router]] = {
    "top_k": TopKRouter,
}


def build_router(
    hidden_size: int,
    num_experts: int,
    routing: RoutingConfig,
    data_parallel_group: dist.ProcessGroup | None = None,
) -> Router:
    """The router that `routing.method` names: `router(hidden_TH, tokens) -> Routing`.

    Args:
        data_parallel_group: all ranks that hold different tokens; None for this rank alone.
    """
    return ROUTERS[routing.method](hidden_size, num_experts, routing, data_parallel_group)
