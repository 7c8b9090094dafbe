"""The torch references, against the code that the kernels are to replace. Needs no triton.

Shape letters: T tokens, E experts, G groups, R rows, C columns, F FFN width.
"""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from moe_dist.kernels import available, reference, why_not
from moe_dist.routing.assignment import dual_prices
from moe_dist.routing.scores import expert_scores
from moe_dist.routing.sinkhorn import sinkhorn_prices


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_router(score: str, generator: torch.Generator) -> None:
    logits_TE, bias_E = torch.randn(50, 7, generator=generator), torch.randn(7, generator=generator)
    weight_TK, expert_TK, count_E = reference.score_top_k(logits_TE, 3, score, bias_E)
    scores_TE = expert_scores(logits_TE, score)
    assert torch.equal(expert_TK, (scores_TE + bias_E).topk(3).indices)
    assert torch.equal(weight_TK, scores_TE.gather(1, expert_TK))
    assert count_E.tolist() == [expert_TK.flatten().tolist().count(e) for e in range(7)]


def test_swiglu_backward_is_the_derivative(generator: torch.Generator) -> None:
    pre_RG, d_active_RF, weight_R = (torch.randn(s, generator=generator) for s in ((5, 8), (5, 4), (5,)))
    pre_RG.requires_grad_(), weight_R.requires_grad_()
    active_RF = functional.silu(pre_RG[:, :4]) * pre_RG[:, 4:]
    torch.testing.assert_close(reference.swiglu(pre_RG), active_RF)
    expected = torch.autograd.grad((weight_R[:, None] * active_RF * d_active_RF).sum(), (pre_RG, weight_R))
    d_pre_RG, weighted_RF, d_weight_R = reference.swiglu_backward(pre_RG, d_active_RF, weight_R)
    torch.testing.assert_close((d_pre_RG, d_weight_R), expected)
    torch.testing.assert_close(weighted_RF, weight_R[:, None] * active_RF)


@pytest.mark.parametrize("padded", [False, True])
def test_sinkhorn(padded: bool, generator: torch.Generator) -> None:
    logits_GRC = 5 + torch.randn(2, 40, 6, generator=generator)
    real_GR = torch.rand(2, 40, generator=generator) < 0.7 if padded else None
    for iterations in (0, 3):
        arguments = logits_GRC, 2, 0.1, iterations, real_GR
        torch.testing.assert_close(reference.sinkhorn_prices(*arguments), sinkhorn_prices(*arguments))


def test_dual(generator: torch.Generator) -> None:
    score_GRC, price_GC = torch.randn(2, 24, 6, generator=generator), torch.zeros(2, 6)
    least_G = torch.full((2,), -torch.inf)
    expected = dual_prices(score_GRC, 2, 8, 3, price_GC)  # 24 * 2 = 6 * 8: no room to spare
    assert torch.equal(reference.dual_iterations(score_GRC, price_GC, least_G, 2, 8, 3), expected)


def test_the_package_needs_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import moe_dist.kernels.reference; from moe_dist import MoELayer"
    )
    program += "; from moe_dist.kernels import available, why_not; print(available(), why_not())"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.startswith("False triton is not installed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_the_interpreter_can_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    reason = why_not()
    assert reason is not None
    assert reason.startswith("torch sees no GPU")
    assert not available()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not() is None
    assert available()
