"""Where experts live: the expert -> rank map."""

from moe_dist.placement.expert_map import ExpertMap

__all__ = ["ExpertMap"]
