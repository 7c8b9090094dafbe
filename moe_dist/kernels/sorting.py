"""Stable counting sort of pairs by expert, in two launches and a prefix sum.

Each block of pairs is ranked by comparing every pair with every other one of the block, which needs no atomics and does not
depend on the number of experts. Counts of (expert, block) in this order, summed up, say where each block's pairs of each
expert begin. The host waits for nothing.

Shape letters: P pairs, E experts, B blocks of pairs.
"""

import torch
import triton
import triton.language as tl

from moe_dist.kernels.checks import check, require

BLOCK = 128


def sort_pairs(
    expert_P: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Order pairs by expert, those of one expert as they stand.

    Args:
        expert_P: int16, int32 or int64, each from 0 to num_experts - 1; others make the result undefined.

    Returns:
        order_P: int64, the pair at each sorted place.
        slot_P: int64, the sorted place of each pair.
        count_E: int64, pairs of each expert.
        start_E1: int64 [E + 1], where each expert's pairs begin; the last is P.

    Raises:
        ValueError: a shape, type or device is none of these.
    """
    check("expert_P", expert_P, (None,), (torch.int16, torch.int32, torch.int64))
    require("num_experts", num_experts, num_experts >= 1, "at least 1")
    num_pairs = len(expert_P)
    require("pairs", num_pairs, num_pairs < 2**31, "less than 2^31")
    order_P = expert_P.new_empty(num_pairs, dtype=torch.int64)
    slot_P = torch.empty_like(order_P)
    count_E = expert_P.new_zeros(num_experts, dtype=torch.int64)
    start_E1 = expert_P.new_zeros(num_experts + 1, dtype=torch.int64)
    if num_pairs:
        blocks = triton.cdiv(num_pairs, BLOCK)
        # One place more, in front, so that sums do not include the count at their own place.
        count_EB = expert_P.new_zeros(num_experts * blocks + 1, dtype=torch.int32)
        _rank_kernel[(blocks,)](expert_P, slot_P, count_EB, num_pairs, blocks, BLOCK=BLOCK, num_warps=8)
        start_EB = count_EB.cumsum(0, dtype=torch.int32)
        _place_kernel[(blocks,)](
            *(expert_P, start_EB, order_P, slot_P, count_E, start_E1, num_pairs, blocks, num_experts),
            BLOCK=BLOCK,
            BLOCK_E=triton.next_power_of_2(num_experts + 1),
        )
    return order_P, slot_P, count_E, start_E1


@triton.jit
def _rank_kernel(expert_ptr, rank_ptr, count_ptr, num_pairs, num_blocks, BLOCK: tl.constexpr):
    """Write for each pair how many of its block and expert stand before it, and the counts of the block."""
    block = tl.program_id(0)
    place_P = tl.arange(0, BLOCK)
    pair_P = block.to(tl.int64) * BLOCK + place_P
    expert_P = tl.load(expert_ptr + pair_P, pair_P < num_pairs, other=-1).to(tl.int64)
    # Read again rather than transposed: the compiler then has it in the layout it needs.
    other_P = tl.load(expert_ptr + pair_P, pair_P < num_pairs, other=-1).to(tl.int64)
    same_PP = expert_P[:, None] == other_P[None, :]
    rank_P = tl.sum((same_PP & (place_P[None, :] < place_P[:, None])).to(tl.int32), 1)
    count_P = tl.sum(same_PP.to(tl.int32), 1)
    tl.store(rank_ptr + pair_P, rank_P.to(tl.int64), pair_P < num_pairs)
    is_first_P = (rank_P == 0) & (pair_P < num_pairs)
    tl.store(count_ptr + 1 + expert_P * num_blocks + block, count_P, is_first_P)


@triton.jit
def _place_kernel(
    expert_ptr,
    start_ptr,
    order_ptr,
    slot_ptr,
    count_ptr,
    expert_start_ptr,
    num_pairs,
    num_blocks,
    num_experts,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Ranks become places; the first program also writes counts and starts of the experts."""
    block = tl.program_id(0)
    pair_P = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside_P = pair_P < num_pairs
    expert_P = tl.load(expert_ptr + pair_P, inside_P, other=0).to(tl.int64)
    start_P = tl.load(start_ptr + expert_P * num_blocks + block, inside_P, other=0)
    slot_P = tl.load(slot_ptr + pair_P, inside_P, other=0) + start_P
    tl.store(slot_ptr + pair_P, slot_P, inside_P)
    tl.store(order_ptr + slot_P, pair_P, inside_P)
    if block == 0:
        e_E = tl.arange(0, BLOCK_E).to(tl.int64)
        start_E = tl.load(start_ptr + e_E * num_blocks, e_E <= num_experts, other=0)
        end_E = tl.load(start_ptr + (e_E + 1) * num_blocks, e_E < num_experts, other=0)
        tl.store(expert_start_ptr + e_E, start_E.to(tl.int64), e_E <= num_experts)
        tl.store(count_ptr + e_E, (end_E - start_E).to(tl.int64), e_E < num_experts)
