"""Where experts live: the expert -> rank map."""

from moe_dist.placement.expert_map import WIDTH_DIMENSION, ExpertMap

__all__ = ["WIDTH_DIMENSION", "ExpertMap"]
