"""Grouped products and the forms that backward needs.

Shape letters: T rows of x, P pairs, L experts, H width of x, G width of the output.
"""

from types import ModuleType

import pytest
import torch

from moe_dist.kernels import reference
from tests.kernels.conftest import INTERPRETED

SIZES = {
    "uneven": [21, 0, 5, 16, 33],
    "empty experts at the ends": [0, 0, 17, 0],
    "one expert": [19],
    "one row each": [1, 1, 1],
    "no rows": [0, 0],
}
# Triton's interpreter multiplies the bits of bfloat16 as whole numbers (3.7.1, interpreter.py, create_dot).
BFLOAT16 = [] if INTERPRETED else [(40, 24, torch.bfloat16), (128, 256, torch.bfloat16)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture
def gemm(device: torch.device) -> ModuleType:
    from moe_dist.kernels import grouped_gemm

    return grouped_gemm


def starts(sizes: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([sum(sizes[:e]) for e in range(len(sizes) + 1)], device=device)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[found.dtype] * max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize(
    ("width", "out_width", "dtype"),
    [(40, 24, torch.float32), (16, 32, torch.float16), (1, 1, torch.float32), *BFLOAT16],
)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_products_and_their_gradients(
    gemm: ModuleType,
    generator: torch.Generator,
    dtype: torch.dtype,
    sizes: list[int],
    width: int,
    out_width: int,
    gathered: bool,
) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=generator.device).to(dtype)

    pairs, start_L1 = sum(sizes), starts(sizes, generator.device)
    row_P = torch.randint(9, (pairs,), generator=generator, device=generator.device) if gathered else None
    x_TH, w_LHG = draw(9 if gathered else pairs, width), draw(len(sizes), width, out_width)
    d_out_PG = draw(pairs, out_width)
    close(gemm.grouped_gemm(x_TH, w_LHG, start_L1, row_P), reference.grouped_gemm(x_TH, w_LHG, start_L1, row_P))
    w_LGH = w_LHG.transpose(1, 2)
    close(gemm.grouped_gemm(d_out_PG, w_LGH, start_L1), reference.grouped_gemm(d_out_PG, w_LGH, start_L1))
    d_w_LHG = gemm.grouped_weight_grad(x_TH, d_out_PG, start_L1, row_P)
    close(d_w_LHG, reference.grouped_weight_grad(x_TH, d_out_PG, start_L1, row_P))
    assert not d_w_LHG[[e for e, size in enumerate(sizes) if size == 0]].any()


def test_rows_of_other_experts_do_not_matter(gemm: ModuleType, device: torch.device) -> None:
    sizes = [3, 18, 2]
    start_L1 = starts(sizes, device).int()
    x_TH, d_out_PG = torch.ones(23, 5, device=device), torch.ones(23, 4, device=device)
    w_LHG = torch.ones(3, 5, 4, device=device)
    x_TH[3:21], d_out_PG[3:21], w_LHG[1] = torch.nan, torch.nan, torch.nan
    out_PG = gemm.grouped_gemm(x_TH, w_LHG, start_L1)
    assert out_PG[:3].eq(5).all()
    assert out_PG[3:21].isnan().all()
    assert out_PG[21:].eq(5).all()
    d_w_LHG = gemm.grouped_weight_grad(x_TH, d_out_PG, start_L1)
    assert d_w_LHG[0].eq(3).all()
    assert d_w_LHG[1].isnan().all()
    assert d_w_LHG[2].eq(2).all()


def test_more_tiles_than_a_band_of_rows(gemm: ModuleType, generator: torch.Generator) -> None:
    x_TH = torch.randn(200, 3, generator=generator, device=generator.device)
    w_LHG = torch.randn(3, 3, 40, generator=generator, device=generator.device)
    start_L1 = starts([150, 0, 50], generator.device)
    close(gemm.grouped_gemm(x_TH, w_LHG, start_L1), reference.grouped_gemm(x_TH, w_LHG, start_L1))


def test_offsets_beyond_32_bits(gemm: ModuleType, far: torch.Tensor) -> None:
    start_L1 = starts([2, 1, 3], far.device)
    row_P = torch.tensor([2, 0, 1, 2, 2, 0], dtype=torch.int32, device=far.device)
    x_TH, w_LHG = far.as_strided((3, 8), (2**30, 1)), far.as_strided((3, 8, 4), (2**30, 4, 1), 8)
    d_out_PG = far.as_strided((3, 4), (2**30, 1), 40)
    for tensor in (x_TH, w_LHG, d_out_PG):
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) % 5)
    close(gemm.grouped_gemm(x_TH, w_LHG, start_L1, row_P), reference.grouped_gemm(x_TH, w_LHG, start_L1, row_P))
    arguments = x_TH, d_out_PG, starts([1, 2], far.device), row_P[[0, 3, 5]]
    close(gemm.grouped_weight_grad(*arguments), reference.grouped_weight_grad(*arguments))


def test_mistakes_are_named(gemm: ModuleType, device: torch.device) -> None:
    x_TH, w_LHG, start_L1 = (torch.zeros(*shape, device=device) for shape in ((6, 4), (2, 4, 3), (3,)))
    start_L1 = start_L1.long()
    row_P = torch.zeros(5, dtype=torch.int64, device=device)
    wrong = [
        ((x_TH[:, :3].contiguous(), w_LHG, start_L1), "columns of x_TH: 3; must be 4, as in w_LHG"),
        ((x_TH, w_LHG.half(), start_L1), r"w_LHG: torch.float16; must be one of torch.float32"),
        ((x_TH, w_LHG[0], start_L1), r"w_LHG: shape \(4, 3\); must be \(any, any, any\)"),
        ((x_TH, w_LHG.repeat(1, 1, 2)[:, :, ::2], start_L1), "w_LHG: strides"),
        ((x_TH, w_LHG, start_L1[1:]), r"start_L1: shape \(2,\); must be \(3\)"),
        ((x_TH, w_LHG, start_L1.float()), "start_L1: torch.float32; must be one of torch.int32, torch.int64"),
        ((x_TH, w_LHG, start_L1, row_P[None]), r"row_P: shape \(1, 5\); must be \(any\)"),
        ((x_TH, w_LHG[:0], start_L1[:1]), "experts: 0; must be from 1 to 4096"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            gemm.grouped_gemm(*arguments)
    with pytest.raises(ValueError, match=r"d_out_PG: shape \(6, 3\); must be \(5, any\)"):
        gemm.grouped_weight_grad(x_TH, torch.zeros(6, 3, device=device), start_L1, row_P)
