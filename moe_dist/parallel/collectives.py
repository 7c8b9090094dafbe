"""Collectives: all-to-all with autograd, and all-gather.

Shape letters: P rows sent, R rows received, H width of a row, T rows of a rank, N their width.
"""

from typing import Any

import torch
import torch.distributed as dist

from moe_dist.parallel.traffic import Kind, count_bytes


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
        return all_to_all("rows", rows_PH, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return all_to_all("rows", grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


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


def all_to_all(
    kind: Kind, rows: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """The all-to-all itself, without autograd: blocks of the first dimension of any tensor; its bytes are counted."""
    count_bytes(kind, send, rows[:1].nbytes if len(rows) else 0, group)
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


def start_all_to_all(
    kind: Kind,
    rows: torch.Tensor,
    send: list[int],
    received: torch.Tensor,
    receive: list[int],
    group: dist.ProcessGroup,
) -> dist.Work:
    """`all_to_all` into `received`, which holds the result once the returned work is waited for."""
    count_bytes(kind, send, rows[:1].nbytes if len(rows) else 0, group)
    work = dist.all_to_all_single(received, rows, receive, send, group=group, async_op=True)
    assert work is not None, "this rank is not of the group"
    return work


def all_gather_rows(rows_TN: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The rows of all ranks in rank order, [ranks x T, N]; every rank must hold equally many. Not differentiable."""
    if group is None:
        return rows_TN
    all_rows = rows_TN.new_empty(dist.get_world_size(group), *rows_TN.shape)
    dist.all_gather(list(all_rows), rows_TN.contiguous(), group=group)
    return all_rows.flatten(0, 1)


def global_ranks(group: dist.ProcessGroup | None) -> list[int]:
    """Numbers of the ranks of a group in the default group; None is this rank alone."""
    if group is not None:
        return dist.get_process_group_ranks(group)
    return [dist.get_rank() if dist.is_initialized() else 0]
