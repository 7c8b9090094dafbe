"""The records of the dispatch contract.

Shape letters: T tokens on this rank, P pairs, W slots in the send buffer, R rows received.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Segments:
    """Consecutive blocks of the received rows, in arrival order; each belongs to one expert of this rank."""

    sizes: list[int]
    """Rows of each segment; the sum is R."""
    experts: list[int]
    """For each segment the place of its expert in this rank's weight stack."""

    equal: bool = False
    """All have equally many rows whatever the routing, as those of static routings. Equal by chance is not meant: how
    experts are computed must not hang on chance."""

    def starts(self) -> list[int]:
        """The first row of each segment."""
        return [0, *accumulate(self.sizes)][:-1]


@dataclass(frozen=True)
class Chunk:
    """What one all-to-all each way moves: the rows of some of each rank's experts."""

    send: list[int]
    """Slots for each rank of the group, consecutive in the send buffer."""
    receive: list[int]
    """Rows from each rank of the group."""
    segments: Segments


@dataclass(frozen=True)
class Plan:
    """Where the rows of this rank's pairs stand in the send buffer."""

    num_tokens: int
    token_P: torch.Tensor
    """int64: the token of each pair, in token order."""
    slot_P: torch.Tensor
    """int64: its place in the send buffer; 0 for vacant pairs."""
    token_W: torch.Tensor
    """int64: the token whose row stands at each slot (any token where the slot is empty)."""
    empty_W: torch.Tensor | None = None
    """bool: slots without a pair; None if there are none."""
    vacant_P: torch.Tensor | None = None
    """bool: vacant pairs; None if there are none."""


@dataclass(frozen=True)
class Hop:
    """How many rows moved between this rank and each of a group, on their way to the experts."""

    group: dist.ProcessGroup | None
    """None: this rank alone."""
    send: list[int]
    receive: list[int]


@dataclass(frozen=True)
class Journey:
    """A plan, and which of its slots go to which rank."""

    plan: Plan
    group: dist.ProcessGroup | None
    """None: all experts are here."""
    finish: Callable[[], list[Chunk]]
    """Waits until the other ranks have told how many rows they send."""
    equal: bool
    """Whether all segments have equally many rows, known without waiting (static routings)."""

    @property
    def chunks(self) -> list[Chunk]:
        """In the order of the send buffer. The first use waits for the counts of the other ranks."""
        return self.finish()

    @property
    def send(self) -> list[int]:
        """Slots for each rank of the group."""
        return _total([chunk.send for chunk in self.chunks])

    @property
    def receive(self) -> list[int]:
        """Rows from each rank of the group."""
        return _total([chunk.receive for chunk in self.chunks])

    @property
    def hop(self) -> Hop:
        """What moves: slots, empty ones too."""
        return Hop(self.group, self.send, self.receive)

    @property
    def segments(self) -> Segments:
        """Of all chunks."""
        parts = [chunk.segments for chunk in self.chunks]
        sizes, experts = [n for part in parts for n in part.sizes], [e for part in parts for e in part.experts]
        return Segments(sizes, experts, self.equal)


@dataclass(frozen=True)
class Ticket:
    """What `combine` needs to bring the rows of one `dispatch` back."""

    journey: Journey
    weight_P: torch.Tensor | None
    """Weights for the output; None if they were applied to the input."""


def _total(rows: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]
