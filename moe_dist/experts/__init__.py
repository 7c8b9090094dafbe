"""Compute: the experts of this rank, and the shared expert."""

from moe_dist.experts.experts import Experts, FeedForward

__all__ = ["Experts", "FeedForward"]
