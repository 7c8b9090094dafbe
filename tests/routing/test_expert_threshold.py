"""Expert threshold: what is above the threshold is taken; thresholds follow the quantile of all tokens of all ranks.

Shape letters: T tokens, E experts, K experts per token on average.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_dist.config.routing import RoutingConfig
from moe_dist.routing import Routing, Tokens, build_router
from moe_dist.routing.balance import sum_over_ranks
from moe_dist.routing.histograms import BINS
from moe_dist.routing.scores import expert_scores, score_reach
from tests.support.distributed import run_ranks

T, E, K = 2000, 8, 2
SCORES = ["softmax", "sigmoid", "sqrt_softplus"]


def make_router(**routing: Any) -> nn.Module:
    """The hidden state of a token is its logits."""
    group = dist.group.WORLD if dist.is_initialized() else None
    config = RoutingConfig.model_validate({"method": "expert_threshold", "top_k": K, **routing})
    router = build_router(E, E, config, group).double()
    router.weight.data.copy_(torch.eye(E))
    return router


def make_logits(tokens: int = T, seed: int = 0) -> torch.Tensor:
    """Some experts are far more popular than others, some tokens too."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, E, dtype=torch.float64, generator=generator)
    level = torch.randn(tokens, 1, dtype=torch.float64, generator=generator)
    return logits + level + torch.linspace(1, -1, E, dtype=torch.float64)


def train_step(router: nn.Module, logits: torch.Tensor, tokens: Tokens | None = None) -> Routing:
    routing = router(logits, tokens or Tokens())
    router.update(sum_over_ranks([router.balance], router.data_parallel_group)[0], 0.0)
    return routing


def exact_threshold(scores: torch.Tensor) -> torch.Tensor:
    """[E] the score that k / E of the tokens exceed."""
    return scores.sort(0).values[round(len(scores) * (1 - K / E)) - 1]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_before_the_first_update_tokens_take_their_top_k(mode: str) -> None:
    router = make_router()
    getattr(router, mode)()
    for _ in range(2):  # the forward itself makes no threshold
        routing = router(make_logits(), Tokens())
        expected = make_logits().topk(K, dim=1).indices.sort(1).values
        assert torch.equal(routing.expert_P.view(T, K), expected)


@pytest.mark.parametrize("score", SCORES)
def test_the_first_update_is_the_quantile_of_sorted_scores(score: str) -> None:
    router, logits = make_router(score=score), make_logits().clamp(max=0.5)
    scores = expert_scores(logits, score)
    train_step(router, logits)
    width = 2 * score_reach(score, E) / BINS
    assert (router.balance.threshold_E - exact_threshold(scores)).abs().max() <= width + 1e-6


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("score", SCORES)
def test_after_it_experts_take_what_is_above_their_threshold(score: str, mode: str) -> None:
    router = make_router(score=score)
    train_step(router, make_logits())
    getattr(router, mode)()
    logits = make_logits(seed=1)
    routing = router(logits, Tokens())
    above = expert_scores(logits, score) > router.balance.threshold_E
    token, expert = above.nonzero(as_tuple=True)
    assert torch.equal(routing.token_P, token)
    assert torch.equal(routing.expert_P, expert)
    assert torch.equal(routing.load_E, above.sum(0))
    torch.testing.assert_close(routing.weight_P, expert_scores(logits, score)[above], rtol=1e-12, atol=0)
    assert len(above.sum(1).unique()) > 3
    assert routing.pairs_per_expert is None


def test_the_moving_average() -> None:
    router, average = make_router(expert_threshold={"decay": 0.75}), None
    for seed in range(4):
        logits = make_logits(seed=seed)
        train_step(router, logits)
        exact = exact_threshold(logits.softmax(1))
        average = exact if average is None else 0.75 * average + 0.25 * exact
    assert (router.balance.threshold_E - average).abs().max() < 2 * 2.2 / BINS
    assert router.balance.threshold_updates == 4


@pytest.mark.parametrize("score", SCORES)
def test_tokens_take_k_experts_on_average_and_experts_equally_many(score: str) -> None:
    router = make_router(score=score, expert_threshold={"decay": 0.5})
    for seed in range(10):
        train_step(router, make_logits(seed=seed))
    load = router.eval()(make_logits(8 * T, seed=99), Tokens()).load_E
    assert (load / (8 * T * K / E) - 1).abs().max() < 0.1


def test_thresholds_are_found_where_histograms_do_not_reach_at_first() -> None:
    router, logits = make_router(score="sqrt_softplus", expert_threshold={"decay": 0.0}), 30 + make_logits()
    for _ in range(8):
        routing = train_step(router, logits)
    assert (routing.load_E / (T * K / E) - 1).abs().max() < 0.05


@pytest.mark.parametrize("settings", [{"renormalise": True}, {"score": "softmax_top_k"}])
def test_weights_of_a_token_sum_to_1_if_it_has_an_expert(settings: dict[str, Any]) -> None:
    router = make_router(**settings)
    train_step(router, make_logits())
    logits = (make_logits(seed=1) * 0.5).requires_grad_()
    routing = router(logits, Tokens())
    numbers = torch.zeros(T, dtype=torch.int64).index_add(0, routing.token_P, torch.ones_like(routing.token_P))
    sums = torch.zeros(T, dtype=torch.float64).index_add(0, routing.token_P, routing.weight_P.detach())
    assert len(numbers.unique()) > 3
    torch.testing.assert_close(sums, (numbers > 0).double(), rtol=1e-12, atol=1e-12)
    routing.weight_P.square().sum().backward()
    assert logits.grad.isfinite().all()


def test_padding_and_empty_steps_leave_no_trace() -> None:
    padding, states = torch.arange(T) % 3 == 1, []
    for padded in (False, True):
        router = make_router()
        logits = make_logits().masked_fill(padding[:, None], torch.nan)
        if padded:
            train_step(router, logits, Tokens(padding_T=padding))
            train_step(router, logits, Tokens(padding_T=torch.ones(T, dtype=torch.bool)))
        else:
            train_step(router, logits[~padding])
        train_step(router, make_logits(0))
        states.append(router.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def follow(num_parts: int, score: str) -> list[torch.Tensor]:
    """Thresholds where each rank holds another kind of tokens."""
    router, rank = make_router(score=score), dist.get_rank() if dist.is_initialized() else 0
    logits = make_logits(2048)
    part = logits[logits[:, 0].argsort()].chunk(num_parts)[rank]
    for _ in range(3):
        train_step(router, part)
    return list(router.balance.state_dict().values())


@pytest.mark.parametrize("score", SCORES)
def test_all_ranks_follow_the_quantile_of_all_tokens(score: str) -> None:
    expected = follow(1, score)
    for num_ranks in (2, 4):
        for state in run_ranks(num_ranks, follow, num_ranks, score):
            assert all(map(torch.equal, state, expected))
