"""Bytes that this rank gives to all-to-alls, counted where they are called; nothing is counted unless asked.

Nodes are blocks of `ranks_per_node` consecutive ranks of the default group.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch.distributed as dist

Kind = Literal["rows", "headers"]
"""rows: hidden states and their gradients. headers: counts, expert numbers, and weights with their gradients."""


@dataclass(eq=False)
class Traffic:
    """What was given to all-to-alls by this rank, in bytes."""

    ranks_per_node: int
    between_nodes: Counter[Kind] = field(default_factory=Counter)
    """To ranks of other nodes."""
    inside_node: Counter[Kind] = field(default_factory=Counter)
    """To other ranks of this node."""
    own: Counter[Kind] = field(default_factory=Counter)
    """To this rank itself: a copy, or nothing at all."""
    seconds: float = 0.0
    """Time spent on counting."""

    def add(self, kind: Kind, sizes: list[int], item_bytes: int, group: dist.ProcessGroup) -> None:
        """See `count_bytes`."""
        began, own = time.perf_counter(), dist.get_rank()
        for rank, size in zip(dist.get_process_group_ranks(group), sizes, strict=True):
            same_node = rank // self.ranks_per_node == own // self.ranks_per_node
            place = self.own if rank == own else self.inside_node if same_node else self.between_nodes
            place[kind] += size * item_bytes
        self.seconds += time.perf_counter() - began


_counting: list[Traffic] = []


@contextmanager
def counting(ranks_per_node: int) -> Iterator[Traffic]:
    """Count the all-to-alls that are called inside the block, on whatever thread (backward has its own)."""
    traffic = Traffic(ranks_per_node)
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def count_bytes(kind: Kind, sizes: list[int], item_bytes: int, group: dist.ProcessGroup) -> None:
    """Tell all that count of an all-to-all: `sizes` items of `item_bytes` for each rank of the group."""
    for traffic in _counting:
        traffic.add(kind, sizes, item_bytes, group)
