"""Experts by the package's Triton kernels: rows are gathered while the first GEMM reads them, SwiGLU is one pass.

Against grouped products of torch this saves the gathered copies of rows and gradients, forward and backward.

Shape letters: R rows, H hidden, L experts on this rank, F FFN width, G width of the first GEMM (2F for SwiGLU).
"""

from functools import lru_cache
from itertools import accumulate

import torch

from moe_dist.config.backends import backend_problem
from moe_dist.dispatch.types import Segments
from moe_dist.experts.order import (
    experts_of,
    index_by_expert,
    place_by_expert,
    sizes_by_expert,
    take,
    weights_by_expert,
)
from moe_dist.experts.types import Activation, Incoming, Kernels, Result, Rows, RowsDone, WeightGradients, Weights
from moe_dist.kernels import interpreted
from moe_dist.kernels import why_not as why_no_kernels


def why_not(device: torch.device, dtype: torch.dtype, widths: tuple[int, int], activation: Activation) -> str | None:
    """Why this backend does not compute such experts here, and what to use instead; None if it does."""
    if problem := backend_problem("triton", str(dtype).removeprefix("torch."), activation, widths):
        return problem
    reason = why_no_kernels()
    if device.type == "cpu" and (reason or not interpreted()):
        return "its kernels run on GPUs, not on cpu; use auto"
    if reason:
        return f"{reason}; use auto"
    return None


def forward(x: Rows, segments: Segments, weights: Weights, name: str) -> tuple[Result, list[torch.Tensor]]:
    """See moe_dist.experts.types.Kernels."""
    from moe_dist.kernels.grouped_gemm import grouped_gemm
    from moe_dist.kernels.swiglu import swiglu

    device = x.buffer_UH.device
    own, start_L1 = experts_of(segments), _starts(segments, device)
    pre_RG = grouped_gemm(x.buffer_UH, weights.w_in_LHG[own], start_L1, index_by_expert(x, segments))
    out_RH = grouped_gemm(swiglu(pre_RG), weights.w_out_LFH[own], start_L1)
    return Result(out_RH, place_by_expert(segments, device)), [pre_RG]


def backward(
    x: Rows,
    incoming: Incoming,
    segments: Segments,
    weights: Weights,
    to: WeightGradients | None,
    name: str,
    rows_done: RowsDone,
) -> None:
    """See moe_dist.experts.types.Kernels."""
    from moe_dist.kernels.grouped_gemm import grouped_gemm, grouped_weight_grad
    from moe_dist.kernels.swiglu import swiglu_backward

    device = x.buffer_UH.device
    own, start_L1 = experts_of(segments), _starts(segments, device)
    w_in_LHG, w_out_LFH = weights.w_in_LHG[own], weights.w_out_LFH[own]
    row_R, grad = index_by_expert(x, segments), incoming.grad
    grad_row_R = index_by_expert(grad, segments)
    pre_RG = incoming.kept[0] if incoming.kept else grouped_gemm(x.buffer_UH, w_in_LHG, start_L1, row_R)
    d_active_RF = grouped_gemm(grad.buffer_UH, w_out_LFH.mT, start_L1, grad_row_R)
    weight_R = weights_by_expert(incoming, segments, device).float()
    d_pre_RG, active_RF, d_weight_R = swiglu_backward(pre_RG, d_active_RF, weight_R)
    d_rows_RH = grouped_gemm(d_pre_RG, w_in_LHG.mT, start_L1)
    rows_done(Result(d_rows_RH, place_by_expert(segments, device), d_weight_R))
    if to is None:
        return
    to.d_w_in_LHG[own] = grouped_weight_grad(x.buffer_UH, d_pre_RG, start_L1, row_R)
    # The gradients are the right factor here, which the kernel does not gather.
    to.d_w_out_LFH[own] = grouped_weight_grad(active_RF, take(grad, segments), start_L1)


KERNELS = Kernels(forward, backward)


def _starts(segments: Segments, device: torch.device) -> torch.Tensor:
    return _cached_starts(tuple(sizes_by_expert(segments)), device)


# That of static routings is made once: a CUDA graph cannot hold a copy from the host.
@lru_cache(maxsize=64)
def _cached_starts(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 [L + 1]: the first row of each expert, and the end."""
    return torch.tensor([0, *accumulate(sizes)]).to(device, non_blocking=True)
