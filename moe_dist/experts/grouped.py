"""Experts by a grouped matrix product: one product for all experts of a rank, the rows of an expert standing together.

Shape letters: R rows, H hidden, L experts on this rank, F FFN width, G width of the first GEMM (2F for SwiGLU), K and N
width of the rows that go into a product and that come out.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch.nn import functional

from moe_dist.dispatch.types import Segments
from moe_dist.experts.types import Activation

GroupedProduct = Callable[[torch.Tensor, torch.Tensor, list[int]], torch.Tensor]
"""product(rows_RK, w_LKN, sizes_L) -> rows_RN: rows stand by expert, sizes_L rows for each (0 is an ordinary number)."""


def compute_by_product(
    product: GroupedProduct,
    rows_RH: torch.Tensor,
    segments: Segments,
    w_in_LHG: torch.Tensor,
    w_out_LFH: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """See moe_dist.experts.backends. Segments of several source ranks are brought together, and back at the end."""
    if len(w_in_LHG) == 0:
        return rows_RH  # no experts, no rows
    order = sorted(range(len(segments.sizes)), key=lambda s: segments.experts[s])
    regrouped = order != list(range(len(order)))
    if regrouped:
        rows_RH = _reorder(rows_RH, segments.sizes, order)
    sizes_L = [0] * len(w_in_LHG)
    for size, expert in zip(segments.sizes, segments.experts, strict=True):
        sizes_L[expert] += size
    out_RH = product(activate(product(rows_RH, w_in_LHG, sizes_L), activation), w_out_LFH, sizes_L)
    if regrouped:
        back = sorted(range(len(order)), key=order.__getitem__)
        out_RH = _reorder(out_RH, [segments.sizes[s] for s in order], back)
    return out_RH


def activate(pre_RG: torch.Tensor, activation: Activation) -> torch.Tensor:
    """[R, F]: SwiGLU of the two halves, or GELU."""
    if activation == "gelu":
        return functional.gelu(pre_RG)
    gate_RF, up_RF = pre_RG.chunk(2, dim=-1)
    return functional.silu(gate_RF) * up_RF


def grouped_product(rows_RK: torch.Tensor, w_LKN: torch.Tensor, sizes_L: Sequence[int], equal: bool) -> torch.Tensor:
    """[R, N] each expert's rows times its matrix; differentiable.

    Args:
        equal: all experts have equally many rows, so that a batched product does, of any dtype; else it is torch's
            grouped_mm.
    """
    if equal or len(rows_RK) == 0:
        rows_LCK = rows_RK.view(len(sizes_L), len(rows_RK) // len(sizes_L), rows_RK.shape[1])
        return torch.bmm(rows_LCK, w_LKN).flatten(0, 1)
    return functional.grouped_mm(rows_RK, w_LKN, offs=group_ends(tuple(sizes_L), rows_RK.device))


@lru_cache(maxsize=64)
def group_ends(sizes_L: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[L] int32 on the device: the row after the last one of each expert, as torch's grouped products want it."""
    ends_L = torch.tensor(sizes_L, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends_L.to(device, non_blocking=True)


def _reorder(rows: torch.Tensor, sizes: list[int], order: list[int]) -> torch.Tensor:
    blocks = rows.split(sizes)
    return torch.cat([blocks[s] for s in order])
