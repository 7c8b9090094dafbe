"""TransformerEngine's grouped GEMM against the loop, with a stand-in of the released signature."""

import importlib
import importlib.util

import pytest
import torch

from moe_dist.experts.backends import compute_loop
from moe_dist.experts.transformer_engine import compute_transformer_engine, why_not
from moe_dist.experts.types import Activation
from tests.support.expert_runs import SEGMENTS, F, H, L, make_inputs, run
from tests.support.stand_ins import installed_stand_ins

MODULE = "transformer_engine.pytorch.cpp_extensions"
GPU, CPU = torch.device("cuda"), torch.device("cpu")
FITS = {"device": GPU, "dtype": torch.bfloat16, "widths": (H, F), "activation": "swiglu"}


@pytest.fixture
def stand_in():
    with installed_stand_ins():
        yield importlib.import_module(MODULE)


def test_stand_in_reads_layouts_as_transformer_engine_uses_them(stand_in) -> None:
    """TransformerEngine's own linear has weights [out, in]: y = x W^T by TN, dx = dy W by NN, dW = dy^T x by NT."""
    x, w, dy = torch.randn(5, 4), torch.randn(3, 4), torch.randn(5, 3)
    for layout, a, b, right in [("TN", w, x, x @ w.t()), ("NN", w, dy, dy @ w), ("NT", x, dy, dy.t() @ x)]:
        out = torch.empty_like(right)
        stand_in.general_grouped_gemm([a], [b], [out], [None], torch.float32, layout=layout, m_splits=[5])
        torch.testing.assert_close(out, right)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("name", SEGMENTS)
def test_output_and_gradients_equal_the_loop(stand_in, name: str, activation: Activation) -> None:
    results = [run(c, SEGMENTS[name], activation, torch.float64) for c in (compute_transformer_engine, compute_loop)]
    for number, right in zip(*results, strict=True):
        torch.testing.assert_close(number, right, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_passes_finite_differences(stand_in, activation: Activation) -> None:
    segments = SEGMENTS["several each, some empty"]
    inputs = make_inputs(sum(segments.sizes), activation, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, a, b: compute_transformer_engine(x, segments, a, b, activation), inputs, fast_mode=True
    )


def test_strided_tensors_and_gradients_are_made_contiguous(stand_in) -> None:
    """The function takes bare pointers; sum() sends back one number expanded over the rows."""
    segments = SEGMENTS["one each"]
    results = []
    for compute in (compute_transformer_engine, compute_loop):
        rows, w_in, w_out = (x.detach() for x in make_inputs(9, "swiglu", torch.float64))
        strided = [torch.stack([x, x], dim=-1)[..., 0].requires_grad_() for x in (rows, w_in, w_out)]
        compute(strided[0], segments, strided[1], strided[2], "swiglu").sum().backward()
        results.append([x.grad for x in strided])
    for number, right in zip(*results, strict=True):
        torch.testing.assert_close(number, right, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("frozen", ["rows", "weights"])
def test_what_needs_no_gradient_costs_no_gemm(stand_in, monkeypatch: pytest.MonkeyPatch, frozen: str) -> None:
    layouts = []
    real = stand_in.general_grouped_gemm
    monkeypatch.setattr(
        stand_in, "general_grouped_gemm", lambda *args, **named: layouts.append(named["layout"]) or real(*args, **named)
    )
    rows, w_in, w_out = make_inputs(9, "swiglu", torch.float64)
    for tensor in [rows] if frozen == "rows" else [w_in, w_out]:
        tensor.requires_grad_(False)
    compute_transformer_engine(rows, SEGMENTS["one each"], w_in, w_out, "swiglu").sum().backward()
    assert layouts == ["NN", "NN", *(["TN", "NT", "NT"] if frozen == "rows" else ["TN", "TN"])]
    assert (rows.grad is None) == (frozen == "rows")
    assert all((w.grad is None) == (frozen == "weights") for w in (w_in, w_out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fits_on_a_gpu_in_half_precision(stand_in, dtype: torch.dtype) -> None:
    assert why_not(GPU, dtype, (H, F), "gelu") is None
    narrow, wide = (
        run(compute_transformer_engine, SEGMENTS["several each"], "gelu", d) for d in (dtype, torch.float32)
    )
    for number, right in zip(narrow, wide, strict=True):
        assert number.dtype == dtype
        torch.testing.assert_close(number.float() / right.abs().max(), right / right.abs().max(), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": CPU}, "TransformerEngine runs on CUDA devices, not on cpu; use auto"),
        ({"dtype": torch.float32}, "in bfloat16 or float16, not in float32; use auto"),
        ({"dtype": torch.float64}, "in bfloat16 or float16, not in float64; use auto"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_refused_where_it_does_not_fit(stand_in, change: dict, reason: str) -> None:
    assert why_not(**FITS) is None
    assert reason in why_not(**FITS | change)


def test_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not(**FITS) == (
        "TransformerEngine is not installed; pip install 'transformer_engine[pytorch]', or use auto"
    )


def test_refused_if_its_torch_part_is_missing(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(stand_in, "general_grouped_gemm")
    assert "cannot be used (module 'transformer_engine" in why_not(**FITS)


def test_refused_if_the_release_is_too_old(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until 2.10 there was no quantization_params; the fourth argument was the type of the output."""
    monkeypatch.setattr(
        stand_in,
        "general_grouped_gemm",
        lambda A, B, out, out_dtype, layout="TN", m_splits=None, single_output=False: None,
    )
    assert "has no quantization_params; install 2.11 or newer" in why_not(**FITS)


def test_experts_are_as_many_as_the_stack_has(stand_in) -> None:
    out = run(compute_transformer_engine, SEGMENTS["an expert without segments"], "swiglu", torch.float64)
    assert out[2].shape == (L, H, 2 * F)
    assert not out[2][1].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SEGMENTS)
def test_the_real_one_is_close_to_the_loop(name: str) -> None:
    if reason := why_not(**FITS):
        pytest.skip(reason)
    narrow = run(compute_transformer_engine, SEGMENTS[name], "swiglu", torch.bfloat16, "cuda")
    for number, right in zip(narrow, run(compute_loop, SEGMENTS[name], "swiglu", torch.float32), strict=True):
        assert (number.float() - right).norm() <= 0.01 * right.norm()
