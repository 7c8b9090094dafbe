"""Decide: hidden states -> Routing (which experts, what weight)."""

from moe_dist.routing.registry import build_router
from moe_dist.routing.types import Routing, Tokens, real_pairs

__all__ = ["Routing", "Tokens", "build_router", "real_pairs"]
