"""Rows and columns bid for one another: completion of a partial assignment by proposals, and the auction of BASE layers.

Shape letters: G groups, R rows (tokens), C columns (experts), N rows that lack columns.
"""

import torch


def first(value: torch.Tensor, threshold: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """Bool: `count` entries of each line of the last dim, those above its threshold and then those equal to it by index."""
    above, equal = value > threshold, value == threshold
    left = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left))


def complete(
    value_GRC: torch.Tensor, held_GRC: torch.Tensor, per_row: int, capacity: int, real_GR: torch.Tensor
) -> torch.Tensor:
    """Give every real row its `per_row` columns: by proposals to columns with room, and swaps where none is left to take.

    `held_GRC` must not exceed `per_row` or `capacity`. Of any two passes one places something, so that it ends.
    """
    total_before = None
    while True:
        lacking_GR = per_row * real_GR.to(torch.int32) - held_GRC.sum(2, dtype=torch.int32)
        room_GC = capacity - held_GRC.sum(1, dtype=torch.int32)
        num_rows, total = torch.stack([(lacking_GR > 0).sum(1).max(), lacking_GR.sum()]).tolist()
        if total == 0:
            return held_GRC
        step = _swap if total == total_before else _propose
        held_GRC = step(value_GRC, held_GRC, lacking_GR, room_GC, num_rows)
        total_before = total


def _first_rows(chosen_GR: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Indices [G, num_rows] of the chosen rows in order, then of others."""
    return (~chosen_GR).to(torch.int8).argsort(dim=1, stable=True)[:, :num_rows]


def _propose(
    value_GRC: torch.Tensor, held_GRC: torch.Tensor, lacking_GR: torch.Tensor, room_GC: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Each row that lacks columns proposes to its best open ones; these take the rows that would lose most elsewhere."""
    num_columns = value_GRC.shape[2]
    row_GNC = _first_rows(lacking_GR > 0, num_rows)[:, :, None].expand(-1, -1, num_columns)
    lacking_GN1 = lacking_GR.gather(1, row_GNC[:, :, 0])[:, :, None].clamp(min=0)
    held_GNC, value_GNC = held_GRC.gather(1, row_GNC), value_GRC.gather(1, row_GNC)
    value_GNC = value_GNC.masked_fill(held_GNC | (room_GC == 0)[:, None] | (lacking_GN1 == 0), -torch.inf)
    sorted_GNC = value_GNC.sort(dim=2, descending=True).values
    least_GN1 = sorted_GNC.gather(2, (lacking_GN1 - 1).clamp(min=0).long())
    proposed_GNC = first(value_GNC, least_GN1, lacking_GN1) & (value_GNC > -torch.inf)
    # A row that proposes to all columns has a runner-up of its own; its surplus is infinite all the same if none is open.
    runner_up_GN1 = sorted_GNC.gather(2, lacking_GN1.clamp(max=num_columns - 1).long())
    surplus_GCN = torch.where(proposed_GNC, value_GNC - runner_up_GN1, -torch.inf).transpose(1, 2).contiguous()
    place_GC1 = (room_GC[:, :, None] - 1).clamp(0, num_rows - 1).long()
    least_GC1 = surplus_GCN.sort(dim=2, descending=True).values.gather(2, place_GC1)
    taken_GNC = first(surplus_GCN, least_GC1, room_GC[:, :, None]).transpose(1, 2) & proposed_GNC
    return held_GRC.scatter(1, row_GNC, held_GNC | taken_GNC)


def _swap(
    value_GRC: torch.Tensor, held_GRC: torch.Tensor, lacking_GR: torch.Tensor, room_GC: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Rows that lack a column but hold all open ones take one from rows that get the first open column j for it.

    Always possible. A row t that lacks one lacks only full columns, so that there are at least `capacity` other rows; j has
    fewer holders, and all rows that lack one hold it: some complete row d does not. d holds more columns than t, so one
    that t lacks.
    """
    num_columns = value_GRC.shape[2]
    open_G11 = (room_GC > 0).to(torch.int8).argmax(1)[:, None, None]
    open_GR1 = open_G11.expand(-1, value_GRC.shape[1], 1)
    holds_GR = held_GRC.gather(2, open_GR1)[:, :, 0]
    taker_GR = (lacking_GR > 0) & holds_GR
    donor_GR = (lacking_GR == 0) & ~holds_GR & held_GRC.any(2)
    worth_GR = torch.where(donor_GR, value_GRC.gather(2, open_GR1)[:, :, 0], -torch.inf)
    donor_GN = worth_GR.argsort(dim=1, descending=True, stable=True)[:, :num_rows]
    taker_GN = _first_rows(taker_GR, num_rows)
    pairs_G1 = torch.minimum(taker_GR.sum(1), donor_GR.sum(1)).minimum(room_GC.gather(1, open_G11[:, :, 0])[:, 0])[
        :, None
    ]
    paired_GN1 = (torch.arange(num_rows, device=value_GRC.device) < pairs_G1)[:, :, None]
    taker_GNC, donor_GNC = (row_GN[:, :, None].expand(-1, -1, num_columns) for row_GN in (taker_GN, donor_GN))
    movable_GNC = held_GRC.gather(1, donor_GNC) & ~held_GRC.gather(1, taker_GNC)
    gain_GNC = value_GRC.gather(1, taker_GNC) - value_GRC.gather(1, donor_GNC)
    moved_GN1 = torch.where(movable_GNC, gain_GNC, -torch.inf).argmax(2, keepdim=True)
    column_C = torch.arange(num_columns, device=value_GRC.device)
    moved_GNC, opened_GNC = (column_C == moved_GN1) & paired_GN1, (column_C == open_G11) & paired_GN1
    held_GRC = held_GRC.scatter(1, taker_GNC, held_GRC.gather(1, taker_GNC) | moved_GNC)
    return held_GRC.scatter(1, donor_GNC, (held_GRC.gather(1, donor_GNC) & ~moved_GNC) | opened_GNC)


def auction(score_GRC: torch.Tensor, capacity: int, rounds: int, real_GR: torch.Tensor | None = None) -> torch.Tensor:
    """One column for each real row by the auction of BASE layers (arXiv 2103.16716), where columns bid for rows.

    In a round each column bids for as many rows as it has room for, those it values most at score - price, as much more
    than their price as they are worth above its next best row, plus epsilon; a row goes to its highest bidder. When no
    column bids any more, the sum of scores is within R * epsilon of the optimum (Bertsekas). epsilon is (max - min) / 50 of
    the group's scores, at least 1e-4 (fairseq, balanced_assignment.cpp). A column wants no row of negative value, which
    matters only where there is room to spare: prices begin at each row's lowest score, and so every row is wanted.

    Args:
        score_GRC: finite, float32 or float64; padding rows may hold anything.
        rounds: at most; rows without a column are then given one by `complete`. Waits for the device every 8 rounds.

    Returns:
        Bool [G, R, C], as from `assign` with `per_row` 1.
    """
    num_rows = score_GRC.shape[1]
    if real_GR is None:
        real_GR = score_GRC.new_ones(score_GRC.shape[:2], dtype=torch.bool)
    score_GRC = score_GRC.masked_fill(~real_GR[:, :, None], 0)
    highest_G = score_GRC.masked_fill(~real_GR[:, :, None], -torch.inf).amax((1, 2))
    lowest_G = score_GRC.masked_fill(~real_GR[:, :, None], torch.inf).amin((1, 2))
    epsilon_G11 = ((highest_G - lowest_G) / 50).clamp(min=1e-4)[:, None, None]
    score_GCR = score_GRC.transpose(1, 2).contiguous()
    price_G1R = score_GCR.amin(1, keepdim=True)
    held_GCR = torch.zeros_like(score_GCR, dtype=torch.bool)
    for step in range(rounds):
        room_GC1 = (capacity - held_GCR.sum(2, keepdim=True)).clamp(max=num_rows)
        value_GCR = torch.where(held_GCR | ~real_GR[:, None], -torch.inf, score_GCR - price_G1R)
        best_GCK = value_GCR.topk(min(capacity + 1, num_rows), dim=2).values
        best_GCK = torch.cat([best_GCK, best_GCK.new_full((*best_GCK.shape[:2], 1), -torch.inf)], dim=2)
        last_GC1 = best_GCK.gather(2, (room_GC1 - 1).clamp(min=0))
        next_GC1 = best_GCK.gather(2, room_GC1).clamp(min=0)
        wanted_GCR = first(value_GCR, last_GC1, room_GC1) & (value_GCR >= 0) & (room_GC1 > 0)
        bid_GCR = torch.where(wanted_GCR, value_GCR - next_GC1 + epsilon_G11, 0)
        highest_G1R, winner_G1R = bid_GCR.max(1, keepdim=True)
        sold_G1R = highest_G1R > 0
        if step % 8 == 7 and not sold_G1R.any():
            break
        price_G1R = price_G1R + highest_G1R
        won_GCR = torch.zeros_like(held_GCR).scatter(1, winner_G1R, sold_G1R)
        held_GCR = (held_GCR & ~sold_G1R) | won_GCR
    return complete(score_GRC, held_GCR.transpose(1, 2), 1, capacity, real_GR)
