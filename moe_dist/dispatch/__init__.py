"""Move: Routing -> tokens grouped by expert on the rank that owns it, and back."""

from moe_dist.dispatch.dispatcher import AllToAllDispatcher
from moe_dist.dispatch.slices import to_slices
from moe_dist.dispatch.types import Segments, Ticket

__all__ = ["AllToAllDispatcher", "Segments", "Ticket", "to_slices"]
