"""A decoder-only transformer around MoELayer."""

from moe_dist.model.transformer import Transformer

__all__ = ["Transformer"]
