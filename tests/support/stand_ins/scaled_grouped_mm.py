"""torch.nn.functional.scaled_grouped_mm as float32 arithmetic, for devices without the kernel (torch 2.13)."""

import torch
from torch.nn.functional import ScalingType


def scaled_grouped_mm(
    mat_a,
    mat_b,
    scale_a,
    scale_recipe_a,
    scale_b,
    scale_recipe_b,
    swizzle_a=None,
    swizzle_b=None,
    bias=None,
    offs=None,
    output_dtype=torch.bfloat16,
    contraction_dim=(),
    use_fast_accum=False,
):
    """[R, N] for e4m3 mat_a [R, K] row-major, mat_b [L, K, N] column-major, float32 scales [R] and [L, N], offs [L]."""
    assert scale_recipe_a == scale_recipe_b == ScalingType.RowWise
    assert swizzle_a is None
    assert swizzle_b is None
    assert not contraction_dim
    for width in (mat_a.shape[-1], *mat_b.shape[-2:]):
        assert width % 16 == 0, width
    # torch's own checks of dtypes, strides and the shapes of scales, on tensors without data
    bare = [tensor.to("meta") for tensor in (mat_a, mat_b, scale_a, scale_b, offs)]
    bare[1] = torch.empty_strided(mat_b.shape, mat_b.stride(), dtype=mat_b.dtype, device="meta")
    shape = torch._scaled_grouped_mm(*bare, bias=bias, out_dtype=output_dtype, use_fast_accum=use_fast_accum).shape
    ends = offs.tolist()
    assert ends[-1] == len(mat_a)
    a = mat_a.float() * scale_a[:, None]
    b = mat_b.float() * scale_b[:, None, :]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    out = torch.cat([block @ matrix for block, matrix in zip(a.split(sizes), b, strict=True)])
    assert out.shape == shape
    return out.to(output_dtype)
