"""Segments in arrival order <-> rows by expert, as grouped products want them.

Shape letters: R rows of this rank's experts, H hidden.
"""

from functools import lru_cache

import torch

from moe_dist.dispatch.types import Segments
from moe_dist.experts.types import Incoming, Rows


def experts_of(segments: Segments) -> slice:
    """The experts of the segments: a chunk has consecutive ones."""
    return slice(min(segments.experts, default=0), max(segments.experts, default=-1) + 1)


def sizes_by_expert(segments: Segments) -> list[int]:
    """Rows of each of `experts_of`."""
    own = experts_of(segments)
    rows = [0] * (own.stop - own.start)
    for size, expert in zip(segments.sizes, segments.experts, strict=True):
        rows[expert - own.start] += size
    return rows


def index_by_expert(rows: Rows, segments: Segments) -> torch.Tensor | None:
    """int64 [R]: the rows of the buffer, by expert; None if they stand there so already."""
    order_R = _order(segments, rows.starts, rows.buffer_UH.device)
    if rows.index_R is None:
        return order_R
    return rows.index_R if order_R is None else rows.index_R[order_R]


def take(rows: Rows, segments: Segments) -> torch.Tensor:
    """[R, H] the rows by expert."""
    index_R = index_by_expert(rows, segments)
    return rows.buffer_UH if index_R is None else rows.buffer_UH.index_select(0, index_R)


def weights_by_expert(incoming: Incoming, segments: Segments, device: torch.device) -> torch.Tensor:
    """[R] the weights of the outputs; float32 ones if there are none."""
    if incoming.weight_R is None:
        return torch.ones(sum(segments.sizes), device=device)
    order_R = _order(segments, incoming.grad.starts, device)
    return incoming.weight_R if order_R is None else incoming.weight_R[order_R]


def place_by_expert(segments: Segments, device: torch.device) -> torch.Tensor | None:
    """int64 [R]: for each row in the order of the segments its place by expert; None if that is the same."""
    return _cached_place(tuple(segments.sizes), tuple(segments.experts), tuple(segments.starts()), device)


def _order(segments: Segments, starts: list[int], device: torch.device) -> torch.Tensor | None:
    """int64 [R]: for the rows by expert their places where segments begin at `starts`; None if they stand so already."""
    return _cached_order(tuple(segments.sizes), tuple(segments.experts), tuple(starts), device)


# The tensors of static routings are made once: a CUDA graph cannot hold a copy from the host.
@lru_cache(maxsize=64)
def _cached_order(
    sizes: tuple[int, ...], experts: tuple[int, ...], starts: tuple[int, ...], device: torch.device
) -> torch.Tensor | None:
    by_expert = sorted(range(len(sizes)), key=experts.__getitem__)
    runs = [torch.arange(starts[s], starts[s] + sizes[s]) for s in by_expert]
    order_R = torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int64)
    if torch.equal(order_R, torch.arange(len(order_R))):
        return None
    return order_R.to(device, non_blocking=True)


@lru_cache(maxsize=64)
def _cached_place(
    sizes: tuple[int, ...], experts: tuple[int, ...], starts: tuple[int, ...], device: torch.device
) -> torch.Tensor | None:
    order_R = _cached_order(sizes, experts, starts, torch.device("cpu"))
    return None if order_R is None else torch.argsort(order_R).to(device, non_blocking=True)
