"""Exact balance by sorting: the pairs of row and column by falling value, each taken while both have room.

Shape letters: G groups, R rows (tokens), C columns (experts).
"""

import torch

from moe_dist.routing.auction import complete, first


def assign_greedily(
    value_GRC: torch.Tensor, per_row: int, capacity: int, real_GR: torch.Tensor | None = None
) -> torch.Tensor:
    """Bool [G, R, C] with `per_row` columns for each real row and at most `capacity` rows in each column.

    Not one pair after another but by deferred acceptance (Gale and Shapley 1962), which gives the same where rows and columns
    both prefer high values: rows propose to their best columns, and full columns reject all but their best rows, until none
    is rejected. A row that is left with columns that it has already gets others by swaps. Ties go to the lower row, then
    column. Waits for the device once a round.

    Args:
        value_GRC: finite; padding rows may hold anything.
        real_GR: bool, False for padding rows, which get no column. None: all rows are real.
    """
    if real_GR is None:
        real_GR = value_GRC.new_ones(value_GRC.shape[:2], dtype=torch.bool)
    value_GRC = value_GRC.masked_fill(~real_GR[:, :, None], 0)
    open_GRC = real_GR[:, :, None].expand_as(value_GRC)
    while True:
        wanted_GRC = torch.where(open_GRC, value_GRC, -torch.inf)
        least_GR1 = wanted_GRC.topk(per_row, dim=2).values[:, :, -1:]
        proposed_GRC = first(wanted_GRC, least_GR1, per_row) & open_GRC
        if capacity >= value_GRC.shape[1]:
            break
        offered_GCR = torch.where(proposed_GRC, value_GRC, -torch.inf).transpose(1, 2).contiguous()
        least_GC1 = offered_GCR.topk(capacity, dim=2).values[:, :, -1:]
        kept_GRC = first(offered_GCR, least_GC1, capacity).transpose(1, 2) & proposed_GRC
        rejected_GRC = proposed_GRC & ~kept_GRC
        if not rejected_GRC.any():
            break
        # What a full column holds only gets better, so it also rejects whoever would come after its last one.
        open_GRC = open_GRC & ~rejected_GRC & (value_GRC >= least_GC1.transpose(1, 2))
    return complete(value_GRC, proposed_GRC, per_row, capacity, real_GR)
