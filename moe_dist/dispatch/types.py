"""The records of the dispatch contract.

Shape letters: T tokens on this rank, P pairs, W slots in the send buffer, R rows received.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Segments:
    """Consecutive blocks of the received rows, in arrival order; each belongs to one expert of this rank."""

    sizes: list[int]
    """Rows of each segment; the sum is R."""
    experts: list[int]
    """For each segment the place of its expert in this rank's weight stack."""


@dataclass(frozen=True)
class Plan:
    """Where the rows of this rank's pairs stand in the send buffer."""

    num_tokens: int
    token_P: torch.Tensor
    """int64: the token of each pair, in token order."""
    slot_P: torch.Tensor
    """int64: its place in the send buffer."""
    token_W: torch.Tensor
    """int64: the token whose row stands at each slot (any token where the slot is empty)."""
    empty_W: torch.Tensor | None = None
    """bool: slots without a pair; None if there are none."""


@dataclass(frozen=True)
class Ticket:
    """What `combine` needs to bring the rows of one `dispatch` back."""

    plan: Plan
    weight_P: torch.Tensor | None
    """Weights for the output; None if they were applied to the input."""
    send: list[int]
    """Slots for each rank of the group."""
    receive: list[int]
    """Rows from each rank of the group."""
    group: dist.ProcessGroup | None
