"""Collectives: all-to-all with autograd, and all-gather.

Shape letters: P rows sent, R rows received, H width of a row, T rows of a rank, N their width.
"""

from typing import Any

import torch
import torch.distributed as dist


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_PH: torch.Tensor,
        send: list[int],
        receive: list[int],
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows_PH, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _exchange(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


def all_to_all_rows(
    rows_PH: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Send consecutive blocks of rows to the ranks of `group`; differentiable (the gradient travels back).

    Args:
        rows_PH: rows, ordered by destination rank.
        send: rows for each rank, their sum is P.
        receive: rows from each rank; R is their sum.
        group: None for a single rank, where the rows come back as they are.

    Returns:
        [R, H], ordered by source rank.
    """
    return rows_PH if group is None else _AllToAllRows.apply(rows_PH, send, receive, group)


def all_to_all_counts(
    count_E: torch.Tensor, experts_of_rank: list[int], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Tell each rank how many rows its experts will get from here.

    Args:
        count_E: int64, for each expert (ordered by owner) the rows this rank will send it.
        experts_of_rank: experts on each rank; their sum is E.

    Returns:
        int64 [ranks x L], for each source rank the rows of each expert of this rank.
    """
    if group is None:
        return count_E
    own = experts_of_rank[dist.get_rank(group)]
    received = count_E.new_empty(len(experts_of_rank) * own)
    dist.all_to_all_single(received, count_E, [own] * len(experts_of_rank), experts_of_rank, group=group)
    return received


def _exchange(rows: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


def all_gather_rows(rows_TN: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The rows of all ranks in rank order, [ranks x T, N]; every rank must hold equally many. Not differentiable."""
    if group is None:
        return rows_TN
    all_rows = rows_TN.new_empty(dist.get_world_size(group), *rows_TN.shape)
    dist.all_gather(list(all_rows), rows_TN.contiguous(), group=group)
    return all_rows.flatten(0, 1)
