"""From all ranks to rank 0, on the host. Every rank calls these alike: shapes follow from the config, never from data."""

import json
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.telemetry.records import finite


def sum_over_ranks(parts: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """float64 sums of each tensor over the ranks, by one all-reduce; counts below 2^53 are exact. None: one rank."""
    flat = torch.cat([part.flatten().double() for part in parts.values()])
    if group is not None:
        dist.all_reduce(flat, group=group)
    pieces = flat.split([part.numel() for part in parts.values()])
    return {name: piece.view(part.shape) for (name, part), piece in zip(parts.items(), pieces, strict=True)}


def gather_records(
    record: dict[str, Any], num_bytes: int, group: dist.ProcessGroup | None
) -> list[dict[str, Any]] | None:
    """The records of all ranks, by rank, on rank 0; None on others.

    Args:
        num_bytes: room for a record as JSON, the same on all ranks.
    """
    text = json.dumps(finite(record)).encode()
    assert len(text) <= num_bytes, f"a record of {len(text)} bytes, and room for {num_bytes}"
    own = torch.frombuffer(bytearray(text.ljust(num_bytes)), dtype=torch.uint8)
    if group is None:
        return [json.loads(text)]
    is_first = dist.get_rank() == 0
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))] if is_first else None
    dist.gather(own, gathered, dst=0, group=group)
    return None if gathered is None else [json.loads(tensor.numpy().tobytes()) for tensor in gathered]
