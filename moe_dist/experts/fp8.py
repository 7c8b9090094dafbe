"""Experts in fp8 by torch's scaled grouped GEMM: forward and row gradients in e4m3, weight gradients in bfloat16.

Scales are dynamic and row-wise, as in torchao's recipes for `torchao.float8` (`rowwise`) and for its MoE training: one scale
for each vector that a dot product runs over, a power of two, so that scaling itself rounds nothing. Gradients are e4m3 too:
with a scale for each row, three bits of mantissa are worth more than e5m2's wider range.

Weight gradients stay in bfloat16, torchao's `rowwise_with_gw_hp` (its most accurate recipe; `mxfp8_rceil_wgrad_with_hp` is the
same for its MoE training). They are a third of the FLOPs. In fp8 the rows of each expert would have to be padded to a
multiple of 16 and be at least 16 (torch's kernel refuses an expert without rows where rows are what it sums over), and both
operands be scaled and transposed once more. So nothing is padded here and an expert without rows is an ordinary case.

Not run on hardware.

Shape letters: R rows, L experts on this rank, K and N width of the rows that go into a product and that come out.
"""

from typing import Any

import torch
from torch.nn import functional
from torch.nn.functional import ScalingType

from moe_dist.config.backends import backend_problem
from moe_dist.dispatch.types import Segments
from moe_dist.experts.grouped import compute_by_product, group_ends
from moe_dist.experts.types import Activation

LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448."""
_SMALLEST_ROW = 1e-12
"""Rows whose largest number is below this are scaled as if it were this, so that scales stay finite."""


def compute_fp8(
    rows_RH: torch.Tensor,
    segments: Segments,
    w_in_LHG: torch.Tensor,
    w_out_LFH: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """See moe_dist.experts.backends; takes and gives bfloat16, on a GPU of compute capability 9.0 or 10.x."""
    return compute_by_product(_product, rows_RH, segments, w_in_LHG, w_out_LFH, activation)


def why_not(device: torch.device, dtype: torch.dtype, widths: tuple[int, int], activation: Activation) -> str | None:
    """None if this backend computes such experts here, else the reason and what to use instead."""
    if device.type != "cuda" or torch.version.hip:
        place = "ROCm" if torch.version.hip else device.type
        return f"torch has a scaled grouped GEMM of e4m3 numbers on NVIDIA GPUs, not on {place}; use auto"
    if problem := backend_problem("fp8", str(dtype).removeprefix("torch."), activation, widths):
        return problem
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10):
        return f"torch's scaled grouped GEMM needs compute capability 9.0 or 10.x, not {major}.{minor}; use auto"
    return None


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 numbers [..., K], contiguous, and float32 scales [...]: x is about numbers * scales.

    The scale of a vector is the smallest power of two that brings its largest number to at most 448. An element is off by at
    most 1/16 of itself, or 1/224 / 1024 of the vector's largest, whichever is more; a vector with an infinity or
    a NaN becomes NaN.

    Args:
        x: bfloat16 or float32 [..., K].
    """
    room = LARGEST / x.abs().amax(-1).float().clamp(min=_SMALLEST_ROW)
    up = room / (2 * torch.frexp(room).mantissa)  # the largest power of two not above room; NaN for room 0
    numbers = (x * up.to(x.dtype).unsqueeze(-1)).to(torch.float8_e4m3fn)
    return numbers.contiguous(), up.reciprocal()


def _product(rows_RK: torch.Tensor, w_LKN: torch.Tensor, sizes_L: list[int]) -> torch.Tensor:
    return _ScaledProduct.apply(rows_RK, w_LKN, group_ends(tuple(sizes_L), rows_RK.device))


class _ScaledProduct(torch.autograd.Function):
    """(rows_RK, w_LKN, ends_L) -> rows_RN."""

    @staticmethod
    def forward(ctx: Any, rows_RK: torch.Tensor, w_LKN: torch.Tensor, ends_L: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows_RK, w_LKN, ends_L)
        return _scaled_grouped_mm(rows_RK, w_LKN, ends_L, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        d_out_RN = grads[0].contiguous()
        rows_RK, w_LKN, ends_L = ctx.saved_tensors
        d_rows_RK = d_w_LKN = None
        if ctx.needs_input_grad[0]:
            # Gradients are summed in full float32, as in torchao's linear: fast accumulation keeps some 14 bits.
            d_rows_RK = _scaled_grouped_mm(d_out_RN, w_LKN.transpose(1, 2), ends_L, use_fast_accum=False)
        if ctx.needs_input_grad[1] and len(rows_RK):
            d_w_LKN = functional.grouped_mm(rows_RK.t(), d_out_RN, offs=ends_L)
        elif ctx.needs_input_grad[1]:
            d_w_LKN = torch.zeros_like(w_LKN)
        return d_rows_RK, d_w_LKN, None


def _scaled_grouped_mm(
    rows_RK: torch.Tensor, w_LKN: torch.Tensor, ends_L: torch.Tensor, use_fast_accum: bool
) -> torch.Tensor:
    """[R, N] bfloat16: the rows of each expert times its matrix, both in e4m3."""
    if not len(rows_RK):
        return rows_RK.new_empty(0, w_LKN.shape[2])
    rows, scale_R = quantise(rows_RK)
    w_LNK, scale_LN = quantise(w_LKN.transpose(1, 2))  # the kernel wants each matrix column by column
    return functional.scaled_grouped_mm(  # type: ignore[attr-defined]  # missing in torch's stubs
        rows,
        w_LNK.transpose(1, 2),
        scale_R,
        ScalingType.RowWise,
        scale_LN,
        ScalingType.RowWise,
        offs=ends_L,
        output_dtype=rows_RK.dtype,
        use_fast_accum=use_fast_accum,
    )
