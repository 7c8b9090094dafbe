"""SonicMoE against the loop, with a stand-in of the released signature."""

import importlib
import importlib.util

import pytest
import torch

from moe_dist.experts.backends import compute_loop
from moe_dist.experts.sonic import compute_sonic, why_not
from tests.support.expert_runs import SEGMENTS, F, H, L, make_inputs, run
from tests.support.stand_ins import installed_stand_ins

GPU, CPU = torch.device("cuda"), torch.device("cpu")
FITS = {"device": GPU, "dtype": torch.bfloat16, "widths": (H, F), "activation": "swiglu"}
U = 7


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with installed_stand_ins():
        yield importlib.import_module("sonicmoe")


@pytest.mark.parametrize("name", SEGMENTS)
def test_output_and_gradients_equal_the_loop(stand_in, name: str) -> None:
    results = [run(compute, SEGMENTS[name], "swiglu", torch.float64) for compute in (compute_sonic, compute_loop)]
    for number, right in zip(*results, strict=True):
        torch.testing.assert_close(number, right, rtol=1e-13, atol=1e-13)


def test_the_gradient_arrives_contiguous(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels take rows that follow each other; sum() sends back one number expanded."""
    strides = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        def backward(ctx, grad):
            strides.append(grad.stride())
            return grad

    real = stand_in.moe_general_routing_inputs

    def watched(*args, **named):
        out, frequency = real(*args, **named)
        return Watched.apply(out), frequency

    monkeypatch.setattr(stand_in, "moe_general_routing_inputs", watched)
    rows, w_in, w_out = make_inputs(9, "swiglu", torch.float64)
    compute_sonic(rows, SEGMENTS["one each"], w_in, w_out, "swiglu").sum().backward()
    assert strides == [(H, 1)]


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_fits_on_hopper_and_blackwell(stand_in, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert why_not(**FITS) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": CPU}, "SonicMoE runs on Hopper and Blackwell GPUs, not on cpu; use auto"),
        (
            {"dtype": torch.float32},
            "experts in bfloat16, not in float32; use auto, or training.precision: bfloat16",
        ),
        ({"activation": "gelu"}, "SonicMoE computes moe.activation: swiglu, not gelu; use auto, or that activation"),
        (
            {"widths": (H, 12)},
            "a multiple of 8 as model.hidden_size and as moe.ffn_size on each rank, not 16 and 12; use auto",
        ),
    ],
    ids=["device", "dtype", "activation", "widths"],
)
def test_refused_where_it_does_not_fit(stand_in, change: dict, reason: str) -> None:
    assert why_not(**FITS) is None
    assert reason in why_not(**FITS | change)


def test_refused_on_an_older_gpu(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "(compute capability 9.0 and 10.x), not 8.0; use auto" in why_not(**FITS)


def test_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not(**FITS) == (
        "SonicMoE is not installed; see docs/backends.md on how to (Python 3.12 or newer), or use auto"
    )


def test_refused_if_it_cannot_be_imported(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(stand_in, "moe_general_routing_inputs")
    assert "cannot be used (module 'sonicmoe' has no attribute" in why_not(**FITS)


def test_refused_if_the_release_is_too_old(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.0.1 took gate and up columns by turns only."""
    monkeypatch.setattr(stand_in, "moe_general_routing_inputs", lambda x, is_inference_mode_enabled=False: None)
    assert "(concat_layout); install 0.1.2 or newer" in why_not(**FITS)


def test_experts_are_as_many_as_the_stack_has(stand_in) -> None:
    out = run(compute_sonic, SEGMENTS["an expert without segments"], "swiglu", torch.float64)
    assert out[2].shape == (L, H, 2 * F)
    assert not out[2][1].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SEGMENTS)
def test_the_real_one_is_close_to_the_loop(name: str) -> None:
    if reason := why_not(**FITS):
        pytest.skip(reason)
    narrow = run(compute_sonic, SEGMENTS[name], "swiglu", torch.bfloat16, "cuda")
    for number, right in zip(narrow, run(compute_loop, SEGMENTS[name], "swiglu", torch.float32), strict=True):
        assert (number.float() - right).norm() <= 0.01 * right.norm()
