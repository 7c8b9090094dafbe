"""Scores, choice, weights and loads of the fused router.

Shape letters: T tokens, E experts, K choices of a token.
"""

from types import ModuleType

import pytest
import torch

from moe_dist.kernels import reference

SCORES = ["softmax", "sigmoid", "sqrt_softplus"]


@pytest.fixture
def router(device: torch.device) -> ModuleType:
    from moe_dist.kernels import router

    return router


def check(router: ModuleType, logits_TE: torch.Tensor, top_k: int, score: str, bias_E: torch.Tensor | None) -> None:
    """Result and gradient equal the reference's, the choice exactly."""
    found = []
    for implementation in (router.score_top_k, reference.score_top_k):
        leaf_TE = logits_TE.detach().requires_grad_()
        weight_TK, expert_TK, count_E = implementation(leaf_TE, top_k, score, bias_E)
        d_weight_TK = torch.linspace(-1, 2, weight_TK.numel(), device=weight_TK.device).view_as(weight_TK)
        (d_logits_TE,) = torch.autograd.grad(weight_TK, leaf_TE, d_weight_TK)
        assert (weight_TK.dtype, expert_TK.dtype, count_E.dtype) == (torch.float32, torch.int64, torch.int64)
        assert not expert_TK.requires_grad
        assert not count_E.requires_grad
        found.append((weight_TK, d_logits_TE, expert_TK, count_E))
    torch.testing.assert_close(found[0][2:], found[1][2:], rtol=0, atol=0)
    tolerance = 1e-5 if logits_TE.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(300, 8, 2), (37, 6, 1), (5, 9, 9), (1, 1, 1)])
def test_as_the_reference(
    router: ModuleType, generator: torch.Generator, score: str, biased: bool, tokens: int, experts: int, top_k: int
) -> None:
    logits_TE = 2 * torch.randn(tokens, experts, generator=generator, device=generator.device)
    bias_E = torch.randn(experts, generator=generator, device=generator.device) if biased else None
    check(router, logits_TE, top_k, score, bias_E)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits_in_rows_that_stand_apart(
    router: ModuleType, generator: torch.Generator, dtype: torch.dtype
) -> None:
    # Distinct whole numbers: no rounding can exchange two.
    wide_TE = torch.rand(20, 24, generator=generator, device=generator.device).argsort(1).to(dtype) / 8
    check(router, wide_TE[:, 3:15], 3, "sigmoid", None)


def test_ties_go_to_the_lowest_index(router: ModuleType, generator: torch.Generator) -> None:
    logits_TE = torch.randint(-1, 2, (64, 12), generator=generator, device=generator.device).float()
    logits_TE[:8] = torch.tensor([0.0, -0.0] * 6, device=logits_TE.device)
    check(router, logits_TE, 5, "sigmoid", None)
    _, expert_TK, _ = router.score_top_k(logits_TE[:8], 5, "sigmoid", torch.full_like(logits_TE[0], -0.5))
    assert expert_TK.tolist() == [[0, 1, 2, 3, 4]] * 8


def test_infinite_and_undefined_scores_have_their_place(router: ModuleType, device: torch.device) -> None:
    nan, inf = torch.nan, torch.inf
    bias_E = torch.tensor([-inf, 0.0, inf, -inf, nan], device=device)
    weight_TK, expert_TK, count_E = router.score_top_k(torch.zeros(3, 5, device=device), 5, "sigmoid", bias_E)
    assert expert_TK.tolist() == [[4, 2, 1, 0, 3]] * 3
    assert weight_TK.eq(0.5).all()
    assert count_E.tolist() == [3] * 5
    _, expert_TK, _ = router.score_top_k(torch.tensor([[0.0, nan, 1.0]], device=device), 3, "softmax")
    assert sorted(expert_TK[0].tolist()) == [0, 1, 2]


def test_small_and_large_logits_keep_their_precision(router: ModuleType, device: torch.device) -> None:
    logits_TE = torch.tensor([[-90.0, -40.0, -15.0, -3.0, 0.0, 3.0, 19.99, 20.01, 50.0, 100.0]], device=device)
    check(router, logits_TE, 10, "sqrt_softplus", None)
    check(router, logits_TE, 10, "softmax", None)


def test_no_tokens(router: ModuleType, device: torch.device) -> None:
    logits_TE = torch.zeros(0, 4, device=device, requires_grad=True)
    weight_TK, expert_TK, count_E = router.score_top_k(logits_TE, 2, "softmax")
    weight_TK.sum().backward()
    assert weight_TK.shape == expert_TK.shape == (0, 2)
    assert count_E.tolist() == [0] * 4
    assert logits_TE.grad is not None
    assert logits_TE.grad.shape == (0, 4)


def test_rows_beyond_32_bits(router: ModuleType, far: torch.Tensor) -> None:
    logits_TE = far.as_strided((3, 8), (2**30, 1))
    logits_TE.copy_(torch.arange(24).view(3, 8).flip(0) % 7)
    check(router, logits_TE, 2, "softmax", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_TE": torch.zeros(3)}, r"logits_TE: shape \(3,\); must be \(any, any\)"),
        ({"logits_TE": torch.zeros(3, 4, dtype=torch.float64)}, r"logits_TE: torch.float64; must be one of"),
        ({"logits_TE": torch.zeros(4, 3).t()}, r"logits_TE: strides \(1, 3\); the last must be 1"),
        ({"top_k": 5}, "top_k: 5; must be from 1 to 4"),
        ({"top_k": 0}, "top_k: 0; must be from 1 to 4"),
        ({"score": "softmax_top_k"}, "score: softmax_top_k; must be one of softmax, sigmoid, sqrt_softplus"),
        ({"bias_E": torch.zeros(3)}, r"bias_E: shape \(3,\); must be \(4\)"),
        ({"bias_E": torch.zeros(4, dtype=torch.float64)}, "bias_E: torch.float64; must be one of torch.float32"),
    ],
)
def test_mistakes_are_named(router: ModuleType, device: torch.device, change: dict, message: str) -> None:
    right = {"logits_TE": torch.zeros(3, 4), "top_k": 2, "score": "softmax", "bias_E": None}
    arguments = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in (right | change).items()}
    with pytest.raises(ValueError, match=message):
        router.score_top_k(**arguments)
    with pytest.raises(ValueError, match="on meta; must be on"):
        router.score_top_k(torch.zeros(3, 4, device="meta"), 2, "softmax")
