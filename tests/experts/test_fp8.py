"""fp8 experts: quantisation against its bounds, the whole against an emulated GEMM and against the loop.

Shape letters: R rows, K width of a vector.
"""

import math

import pytest
import torch
from torch.nn import functional

from moe_dist.experts import fp8
from moe_dist.experts.backends import compute_loop
from moe_dist.experts.fp8 import LARGEST, compute_fp8, quantise, why_not
from moe_dist.experts.grouped import activate
from moe_dist.experts.types import Activation
from tests.support.expert_runs import SEGMENTS, F, H, make_inputs, run
from tests.support.stand_ins.scaled_grouped_mm import scaled_grouped_mm

GPU, CPU = torch.device("cuda"), torch.device("cpu")
FITS = {"device": GPU, "dtype": torch.bfloat16, "widths": (H, F), "activation": "swiglu"}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "scaled_grouped_mm", scaled_grouped_mm)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, spread: float = 1.0) -> torch.Tensor:
    """Numbers whose rows, and whose elements within a row, differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    rows = torch.exp(spread * 5 * torch.randn(*shape[:-1], 1, generator=generator))
    elements = torch.exp(spread * torch.randn(shape, generator=generator))
    return (x * rows * elements).to(dtype)


# Quantisation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 48), (3, 32, 16)], ids=["rows", "stack"])
def test_quantised_numbers_are_within_the_bounds_of_e4m3(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype, spread=2.0)
    numbers, scale = quantise(x)
    assert numbers.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert scale.shape == shape[:-1]
    back, exact = numbers.double() * scale.double()[..., None], x.double()
    largest = exact.abs().amax(-1, keepdim=True)
    assert bool(((back - exact).abs() <= torch.maximum(exact.abs() / 16, largest / 224 / 1024)).all())


def test_scales_are_the_smallest_powers_of_two_that_fit() -> None:
    x = draw(200, 16)
    _, scale_R = quantise(x)
    largest_R = x.float().abs().amax(-1)
    assert bool((torch.frexp(scale_R).mantissa == 0.5).all())
    assert bool((largest_R / scale_R <= LARGEST).all())
    assert bool((largest_R / (scale_R / 2) > LARGEST).all())


@pytest.mark.parametrize("number", [448.0, 449.0, 224.0, 1.75 * 2**-30, 2.0**100])
def test_the_largest_number_is_reached_and_not_passed(number: float) -> None:
    numbers, scale = quantise(torch.tensor([[number, -number, 0.0]]))
    assert numbers.float().abs().max() <= LARGEST
    assert numbers.float()[0, 0] * scale[0] == pytest.approx(number, rel=1 / 16)


def test_rows_of_zeros_stay_zeros_with_a_finite_scale() -> None:
    numbers, scale = quantise(torch.zeros(2, 16, dtype=torch.bfloat16))
    assert not numbers.float().any()
    assert bool(scale.isfinite().all())


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(number: float) -> None:
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    x[0, 3] = number
    numbers, scale = quantise(x)
    back = numbers.float() * scale[:, None]
    assert bool(back[0].isnan().all())
    assert bool(back[1].isfinite().all())


@pytest.mark.parametrize("exponent", [-20, 0, 20])
def test_a_power_of_two_changes_the_scale_and_nothing_else(exponent: int) -> None:
    x = draw(8, 32)
    (numbers, scale), (moved, moved_scale) = quantise(x), quantise(x * 2.0**exponent)
    assert torch.equal(numbers.float(), moved.float())
    assert torch.equal(scale * 2.0**exponent, moved_scale)


# Experts


def reference(name: str, activation: Activation) -> list[torch.Tensor]:
    """The recipe in float32 on numbers rounded to e4m3 and back, a segment at a time; the activation is bfloat16's."""
    segments = SEGMENTS[name]
    rows, w_in, w_out = (x.detach().float() for x in make_inputs(sum(segments.sizes), activation, torch.float32))
    sent = torch.linspace(-1, 1, rows.numel()).bfloat16().view(rows.shape).float()
    out, d_rows = torch.empty_like(rows), torch.empty_like(rows)
    d_w_in, d_w_out = torch.zeros_like(w_in), torch.zeros_like(w_out)
    start = 0
    for size, e in zip(segments.sizes, segments.experts, strict=True):
        window = slice(start, start + size)
        start += size
        pre = product(rows[window], w_in[e]).bfloat16().requires_grad_()
        active = activate(pre, activation)
        out[window] = product(active.detach().float(), w_out[e])
        d_active = product(sent[window], w_out[e].t())
        d_w_out[e] += active.detach().float().t() @ sent[window]
        d_pre = torch.autograd.grad(active, pre, d_active.bfloat16())[0].float()
        d_rows[window] = product(d_pre, w_in[e].t())
        d_w_in[e] += rows[window].t() @ d_pre
    return [out, d_rows, d_w_in, d_w_out]


def product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x @ matrix of numbers in e4m3 by row and by column, as bfloat16 gives it."""
    return (rounded(x) @ rounded(matrix.t()).t()).bfloat16().float()


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To e4m3 and back: four bits of mantissa with the leading one, steps no finer than 2^-9 of the scaled row."""
    if not len(x):
        return x
    scale = 2.0 ** torch.floor(torch.log2(448 / x.abs().amax(1, keepdim=True).clamp(min=1e-12)))
    y = (x * scale).double()
    step = 2.0 ** (torch.floor(torch.log2(y.abs().clamp(min=2.0**-6))) - 3)
    return (torch.round(y / step) * step).float() / scale


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("name", SEGMENTS)
def test_output_and_gradients_are_those_of_rounded_numbers(emulated: None, name: str, activation: Activation) -> None:
    """Up to a few roundings of bfloat16."""
    actual = run(compute_fp8, SEGMENTS[name], activation, torch.bfloat16)
    for number, right in zip(actual, reference(name, activation), strict=True):
        assert number.dtype == torch.bfloat16
        scale = right.abs().max().clamp(min=1e-6) if right.numel() else 1
        torch.testing.assert_close(number.float() / scale, right / scale, rtol=0, atol=0.01)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("name", ["one each", "several each, some empty"])
def test_close_to_the_loop(emulated: None, name: str, activation: Activation) -> None:
    """Relative error by norm: e4m3 rounds by 2.6 % (root mean square), a product of two such numbers by 3.7 %."""
    narrow, wide = (
        run(compute, SEGMENTS[name], activation, dtype)
        for compute, dtype in ((compute_fp8, torch.bfloat16), (compute_loop, torch.float32))
    )
    for number, right in zip(narrow, wide, strict=True):
        assert (number.float() - right).norm() <= 0.1 * right.norm()


def test_a_product_is_within_the_bounds_of_its_factors(emulated: None) -> None:
    rows, stack = draw(40, 64, spread=0.5), draw(2, 64, 32, spread=0.5)
    out = fp8._product(rows, stack, [15, 25]).double()
    for window, matrix in ((slice(0, 15), stack[0]), (slice(15, 40), stack[1])):
        x, w = rows[window].double(), matrix.double()
        reach_x = torch.maximum(x.abs() / 16, x.abs().amax(1, keepdim=True) / 224 / 1024)
        reach_w = torch.maximum(w.abs() / 16, w.abs().amax(0, keepdim=True) / 224 / 1024)
        bound = (x.abs() + reach_x) @ (w.abs() + reach_w) - x.abs() @ w.abs()
        right = x @ w
        assert bool(((out[window] - right).abs() <= bound + (right.abs() + bound) / 256).all())


def test_weight_gradients_are_not_quantised(emulated: None) -> None:
    rows, stack = draw(24, 32), draw(2, 32, 16).requires_grad_()
    sent = draw(24, 16)
    fp8._product(rows, stack, [10, 14]).backward(sent)
    right = torch.stack([rows[:10].t() @ sent[:10], rows[10:].t() @ sent[10:]])
    torch.testing.assert_close(stack.grad, right)


def test_an_upstream_gradient_of_any_layout_is_taken(emulated: None) -> None:
    rows, w_in, w_out = make_inputs(9, "swiglu", torch.bfloat16)
    compute_fp8(rows, SEGMENTS["one each"], w_in, w_out, "swiglu").sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (rows, w_in, w_out))


def test_gradients_are_summed_in_full_precision(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = []
    monkeypatch.setattr(
        functional,
        "scaled_grouped_mm",
        lambda *args, **named: fast.append(named["use_fast_accum"]) or scaled_grouped_mm(*args, **named),
    )
    run(compute_fp8, SEGMENTS["one each"], "swiglu", torch.bfloat16)
    assert fast == [True, True, False, False]


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_fits_where_torch_has_the_kernel(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert why_not(**FITS) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": CPU}, "on NVIDIA GPUs, not on cpu; use auto"),
        (
            {"dtype": torch.float32},
            "fp8 computes experts in bfloat16, not in float32; use auto, or training.precision: bfloat16",
        ),
        (
            {"dtype": torch.float16},
            "fp8 computes experts in bfloat16, not in float16; use auto, or training.precision: bfloat16",
        ),
        (
            {"widths": (H, 24)},
            "a multiple of 16 as model.hidden_size and as moe.ffn_size on each rank, not 16 and 24; use auto",
        ),
    ],
    ids=["device", "float32", "float16", "widths"],
)
def test_refused_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch, change: dict, reason: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not(**FITS) is None
    assert reason in why_not(**FITS | change)


@pytest.mark.parametrize("capability", [(8, 9), (12, 0)])
def test_refused_on_other_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    shown = ".".join(map(str, capability))
    assert f"needs compute capability 9.0 or 10.x, not {shown}; use auto" in why_not(**FITS)


def test_refused_on_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "on NVIDIA GPUs, not on ROCm; use auto" in why_not(**FITS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SEGMENTS)
def test_the_real_kernel_gives_what_the_emulation_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_not(**FITS):
        pytest.skip(reason)
    real = run(compute_fp8, SEGMENTS[name], "swiglu", torch.bfloat16, "cuda")
    monkeypatch.setattr(functional, "scaled_grouped_mm", scaled_grouped_mm)
    for number, right in zip(real, run(compute_fp8, SEGMENTS[name], "swiglu", torch.bfloat16), strict=True):
        assert (number.float() - right.float()).norm() <= 0.02 * right.float().norm()
