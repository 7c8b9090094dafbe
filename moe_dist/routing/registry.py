"""Routers by name: a new method is a new file, a line here, and a row in moe_dist/config/methods.py."""

import torch.distributed as dist

from moe_dist.config.routing import RoutingConfig
from moe_dist.routing.base import BaseRouter
from moe_dist.routing.expert_choice import ExpertChoiceRouter
from moe_dist.routing.expert_threshold import ExpertThresholdRouter
from moe_dist.routing.forced import ForcedBalancedRouter, RandomRouter
from moe_dist.routing.gatepro import GateProRouter
from moe_dist.routing.gatepro_ot import GateProOTRouter
from moe_dist.routing.hash import HashRouter
from moe_dist.routing.noisy_top_k import NoisyTopKRouter
from moe_dist.routing.optimal_transport import OptimalTransportRouter
from moe_dist.routing.router import Router
from moe_dist.routing.sinkhorn import SinkhornRouter

ROUTERS: dict[str, type[Router]] = {
    "top_k": Router,
    "noisy_top_k": NoisyTopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "sinkhorn": SinkhornRouter,
    "optimal_transport": OptimalTransportRouter,
    "base": BaseRouter,
    "gatepro": GateProRouter,
    "gatepro_ot": GateProOTRouter,
    "expert_threshold": ExpertThresholdRouter,
    "force_balanced": ForcedBalancedRouter,
    "random": RandomRouter,
}


def build_router(
    hidden_size: int,
    num_experts: int,
    routing: RoutingConfig,
    data_parallel_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Router:
    """The router that `routing.method` names: `router(hidden_TH, tokens) -> Routing`.

    Args:
        data_parallel_group: all ranks that hold different tokens; None for this rank alone.
        vocab_size: token ids are 0 to this less 1; only `hash` needs it.
    """
    return ROUTERS[routing.method](hidden_size, num_experts, routing, data_parallel_group, vocab_size)
