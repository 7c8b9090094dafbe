"""Rows and columns that bid for each other: completion of an assignment by proposals, and the auction of BASE layers.

Shape letters: G groups, R rows (tokens), C columns (experts), N rows that lack columns, K the best of some.
"""

import torch


def auction(score_GRC: torch.Tensor, capacity: int, rounds: int, real_GR: torch.Tensor | None = None) -> torch.Tensor:
    """One column for each real row, and at most `capacity` rows for each column, by the auction of BASE layers.

    Columns bid for rows (arXiv 2103.16716; fairseq, balanced_assignment.cpp). In a round each column bids for as many rows
    as it has room for, those of highest score - price, and goes beyond the price by what such a row is worth to it over
    the best row it does not bid for, plus epsilon = (max - min) / 50 of the group's scores, at least 1e-4. The highest
    bidder holds the row until it is outbid. Prices start at each row's lowest score, and a column bids for no row of
    negative score - price, so that it stays below its capacity only if there is room to spare. When bids end, the sum of
    scores is within R * epsilon of the optimum (Bertsekas 1979).

    Args:
        score_GRC: finite, float32 or float64; padding rows may hold anything.
        rounds: at most; rows without a column are then given one by `complete`. The host waits for the device after every
            eighth round and in each pass of `complete`.
        real_GR: bool, False for padding rows, which get no column. None: all rows are real.

    Returns:
        Bool [G, R, C].
    """
    num_groups, num_rows, _ = score_GRC.shape
    real_GR = score_GRC.new_ones(num_groups, num_rows, dtype=torch.bool) if real_GR is None else real_GR
    padding_GR1 = ~real_GR[:, :, None]
    highest_G = score_GRC.masked_fill(padding_GR1, -torch.inf).amax((1, 2))
    lowest_G = score_GRC.masked_fill(padding_GR1, torch.inf).amin((1, 2))
    epsilon_G11 = ((highest_G - lowest_G) / 50).clamp(min=1e-4)[:, None, None]
    score_GCR = score_GRC.masked_fill(padding_GR1, 0).transpose(1, 2).contiguous()
    price_G1R = score_GCR.amin(1, keepdim=True)
    held_GCR = torch.zeros_like(score_GCR, dtype=torch.bool)
    for step in range(rounds):
        room_GC1 = (capacity - held_GCR.sum(2, keepdim=True)).clamp(max=num_rows)
        value_GCR = torch.where(held_GCR | ~real_GR[:, None], -torch.inf, score_GCR - price_G1R)
        best_GCK = value_GCR.topk(min(capacity + 1, num_rows), dim=2).values
        best_GCK = torch.nn.functional.pad(best_GCK, (0, 1), value=-torch.inf)
        wanted_GCR = first(value_GCR, best_GCK.gather(2, (room_GC1 - 1).clamp(min=0)), room_GC1) & (value_GCR >= 0)
        bid_GCR = value_GCR - best_GCK.gather(2, room_GC1).clamp(min=0) + epsilon_G11
        highest_G1R, bidder_G1R = torch.where(wanted_GCR, bid_GCR, 0).max(1, keepdim=True)
        sold_G1R = highest_G1R > 0
        price_G1R = price_G1R + highest_G1R
        held_GCR = (held_GCR & ~sold_G1R) | torch.zeros_like(held_GCR).scatter(1, bidder_G1R, sold_G1R)
        if step % 8 == 7 and not sold_G1R.any():
            break
    return complete(score_GCR.transpose(1, 2), held_GCR.transpose(1, 2), 1, capacity, real_GR)


def complete(
    value_GRC: torch.Tensor, held_GRC: torch.Tensor, per_row: int, capacity: int, real_GR: torch.Tensor
) -> torch.Tensor:
    """Give every real row its `per_row` columns: by proposals to columns with room, and swaps where these have an end.

    Of two passes in succession one places something, so that they end. The host waits for the device in each.

    Args:
        held_GRC: what is given already, at most `per_row` in a row and `capacity` in a column, nothing in padding rows.

    Raises:
        FloatingPointError: some value is not finite.
    """
    infinite = (~value_GRC.isfinite()).sum()
    total_before = None
    while True:
        lacking_GR = per_row * real_GR - held_GRC.sum(2)
        room_GC = capacity - held_GRC.sum(1)
        spare_G = room_GC.sum(1) - lacking_GR.sum(1)
        numbers = (lacking_GR > 0).sum(1).max(), lacking_GR.sum(), spare_G.min(), infinite
        num_rows, total, spare, num_infinite = torch.stack(numbers).tolist()
        assert spare >= 0, f"capacity {capacity} of {held_GRC.shape[2]} columns is too little for {per_row} of each row"
        if num_infinite:
            raise FloatingPointError(f"routing: {num_infinite} scores (less prices) are not finite")
        if total == 0:
            return held_GRC
        step = _swap if total == total_before else _propose
        held_GRC = step(value_GRC, held_GRC, lacking_GR, room_GC, num_rows)
        total_before = total


def first(value: torch.Tensor, threshold: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """Bool: `count` of each line of the last dim, those above its threshold, then those equal to it in order."""
    above, equal = value > threshold, value == threshold
    left = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left))


def _first_rows(chosen_GR: torch.Tensor, num_rows: int) -> torch.Tensor:
    """int64 [G, num_rows]: the chosen rows in order, then others."""
    return (~chosen_GR).to(torch.int8).argsort(dim=1, stable=True)[:, :num_rows]


def _propose(
    value_GRC: torch.Tensor, held_GRC: torch.Tensor, lacking_GR: torch.Tensor, room_GC: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Each row that lacks columns proposes to its best open ones; these take the rows that would lose most elsewhere."""
    num_columns = value_GRC.shape[2]
    row_GN = _first_rows(lacking_GR > 0, num_rows)
    row_GNC, lacking_GN1 = row_GN[:, :, None].expand(-1, -1, num_columns), lacking_GR.gather(1, row_GN)[:, :, None]
    held_GNC, value_GNC = held_GRC.gather(1, row_GNC), value_GRC.gather(1, row_GNC)
    closed_GNC = held_GNC | (room_GC == 0)[:, None] | (lacking_GN1 == 0)
    value_GNC = value_GNC.masked_fill(closed_GNC, -torch.inf)
    best_GNC = value_GNC.sort(dim=2, descending=True).values
    least_GN1, next_GN1 = (
        best_GNC.gather(2, place_GN1.clamp(0, num_columns - 1)) for place_GN1 in (lacking_GN1 - 1, lacking_GN1)
    )
    proposed_GNC = first(value_GNC, least_GN1, lacking_GN1) & ~closed_GNC
    surplus_GCN = torch.where(proposed_GNC, value_GNC - next_GN1, -torch.inf).transpose(1, 2).contiguous()
    last_GC1 = (room_GC[:, :, None] - 1).clamp(0, num_rows - 1)
    least_GC1 = surplus_GCN.sort(dim=2, descending=True).values.gather(2, last_GC1)
    taken_GNC = first(surplus_GCN, least_GC1, room_GC[:, :, None]).transpose(1, 2) & proposed_GNC
    return held_GRC.scatter(1, row_GNC, held_GNC | taken_GNC)


def _swap(
    value_GRC: torch.Tensor, held_GRC: torch.Tensor, lacking_GR: torch.Tensor, room_GC: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Rows that lack a column and hold all open ones take one from rows that get the first open column, j, for it.

    Always possible. A column that such a row t lacks is full, of rows other than t; j is not full, and held by t: so not all
    rows hold j. Those that lack a column do, as all open ones, so that some complete row d does not. d holds more columns
    than t, hence one that t lacks.
    """
    num_columns = value_GRC.shape[2]
    open_G1 = (room_GC > 0).to(torch.int8).argmax(1, keepdim=True)
    open_GR1 = open_G1[:, :, None].expand(-1, value_GRC.shape[1], 1)
    holds_GR, worth_GR = held_GRC.gather(2, open_GR1)[:, :, 0], value_GRC.gather(2, open_GR1)[:, :, 0]
    taker_GR, donor_GR = (lacking_GR > 0) & holds_GR, (lacking_GR == 0) & held_GRC.any(2) & ~holds_GR
    num_pairs_G1 = torch.minimum(taker_GR.sum(1, keepdim=True), donor_GR.sum(1, keepdim=True))
    num_pairs_G1 = torch.minimum(num_pairs_G1, room_GC.gather(1, open_G1))
    paired_GN1 = (torch.arange(num_rows, device=value_GRC.device) < num_pairs_G1)[:, :, None]
    donor_GN = torch.where(donor_GR, worth_GR, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :num_rows]
    taker_GNC, donor_GNC = (
        row_GN[:, :, None].expand(-1, -1, num_columns) for row_GN in (_first_rows(taker_GR, num_rows), donor_GN)
    )
    movable_GNC = held_GRC.gather(1, donor_GNC) & ~held_GRC.gather(1, taker_GNC)
    gain_GNC = value_GRC.gather(1, taker_GNC) - value_GRC.gather(1, donor_GNC)
    moved_GN1 = torch.where(movable_GNC, gain_GNC, -torch.inf).argmax(2, keepdim=True)
    column_C = torch.arange(num_columns, device=value_GRC.device)
    moved_GNC, opened_GNC = (column_C == moved_GN1) & paired_GN1, (column_C == open_G1[:, :, None]) & paired_GN1
    held_GRC = held_GRC.scatter(1, taker_GNC, held_GRC.gather(1, taker_GNC) | moved_GNC)
    return held_GRC.scatter(1, donor_GNC, (held_GRC.gather(1, donor_GNC) & ~moved_GNC) | opened_GNC)
