"""SwiGLU and its backward.

Shape letters: R rows, F FFN width, G = 2F, H width of the second GEMM's output.
"""

from types import ModuleType

import pytest
import torch

from moe_dist.kernels import reference


@pytest.fixture
def swiglu(device: torch.device) -> ModuleType:
    from moe_dist.kernels import swiglu

    return swiglu


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(9, 6), (4, 520), (1, 1), (0, 4), (3, 0)])
def test_as_the_reference(
    swiglu: ModuleType, generator: torch.Generator, rows: int, width: int, dtype: torch.dtype, weighted: bool
) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    pre_RG, d_active_RF = 3 * draw(rows, 2 * width).to(dtype), draw(rows, width).to(dtype)
    weight_R = draw(rows) if weighted else None
    torch.testing.assert_close(swiglu.swiglu(pre_RG), reference.swiglu(pre_RG))
    found = swiglu.swiglu_backward(pre_RG, d_active_RF, weight_R)
    torch.testing.assert_close(found, reference.swiglu_backward(pre_RG, d_active_RF, weight_R))


def test_gradients_of_the_whole_second_half_of_an_expert(swiglu: ModuleType, generator: torch.Generator) -> None:
    pre_RG, w_out_FH, weight_R, d_out_RH = (
        torch.randn(shape, generator=generator, device=generator.device, requires_grad=True)
        for shape in ((7, 12), (6, 5), (7,), (7, 5))
    )
    gate_RF, up_RF = pre_RG.chunk(2, dim=1)
    out_RH = weight_R[:, None] * ((gate_RF * torch.sigmoid(gate_RF) * up_RF) @ w_out_FH)
    expected = torch.autograd.grad(out_RH, (pre_RG, w_out_FH, weight_R), d_out_RH)
    with torch.no_grad():
        d_pre_RG, active_RF, d_weight_R = swiglu.swiglu_backward(pre_RG, d_out_RH @ w_out_FH.t(), weight_R)
        torch.testing.assert_close((d_pre_RG, active_RF.t() @ d_out_RH, d_weight_R), expected)


def test_far_gates(swiglu: ModuleType, device: torch.device) -> None:
    pre_RG = torch.tensor([[-200.0, -88.0, 0.0, 88.0, 200.0] + [1.0] * 5], device=device)
    d_active_RF = torch.ones(1, 5, device=device)
    torch.testing.assert_close(swiglu.swiglu(pre_RG), reference.swiglu(pre_RG))
    found = swiglu.swiglu_backward(pre_RG, d_active_RF)
    torch.testing.assert_close(found, reference.swiglu_backward(pre_RG, d_active_RF))
    assert found[0].isfinite().all()


def test_rows_beyond_32_bits(swiglu: ModuleType, far: torch.Tensor) -> None:
    pre_RG, d_active_RF = far.as_strided((3, 8), (2**30, 1)), far.as_strided((3, 4), (2**30, 1), 8)
    for tensor in (pre_RG, d_active_RF):
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) % 5 - 2)
    torch.testing.assert_close(swiglu.swiglu(pre_RG), reference.swiglu(pre_RG))
    found = swiglu.swiglu_backward(pre_RG, d_active_RF)
    torch.testing.assert_close(found, reference.swiglu_backward(pre_RG, d_active_RF))


def test_mistakes_are_named(swiglu: ModuleType, device: torch.device) -> None:
    pre_RG, d_active_RF = torch.zeros(3, 8, device=device), torch.zeros(3, 4, device=device)
    with pytest.raises(ValueError, match="columns of pre_RG: 7; must be even"):
        swiglu.swiglu(pre_RG[:, :7])
    with pytest.raises(ValueError, match=r"pre_RG: torch.float64; must be one of"):
        swiglu.swiglu(pre_RG.double())
    with pytest.raises(ValueError, match=r"d_active_RF: shape \(3, 8\); must be \(3, 4\)"):
        swiglu.swiglu_backward(pre_RG, pre_RG)
    with pytest.raises(ValueError, match=r"d_active_RF: torch.float16; must be one of torch.float32"):
        swiglu.swiglu_backward(pre_RG, d_active_RF.half())
    with pytest.raises(ValueError, match=r"weight_R: shape \(2,\); must be \(3\)"):
        swiglu.swiglu_backward(pre_RG, d_active_RF, torch.zeros(2, device=device))
