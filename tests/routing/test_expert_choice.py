"""Expert choice: capacities, the cap on a token's experts, weights, padding, and the thresholds of evaluation.

Shape letters: T tokens, E experts, K experts per token on average, G routing groups, N tokens of a group.
"""

import math
from typing import Any

import pytest
import torch
from torch import nn

from moe_dist.config.routing import RoutingConfig
from moe_dist.routing import Routing, Tokens, build_router, real_pairs
from moe_dist.routing.balance import sum_over_ranks

E, K, GROUPS = 4, 2, 3
CAPS = [None, 2, 3]


def make_router(cap: int | None = None, top_k: int = K, **routing: Any) -> nn.Module:
    """The hidden state of a token is its logits."""
    settings = {"method": "expert_choice", "top_k": top_k, "expert_choice": {"max_experts": cap}}
    router = build_router(E, E, RoutingConfig.model_validate(settings | routing)).double()
    router.weight.data.copy_(torch.eye(E))
    return router


def make_logits(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, E, dtype=torch.float64, generator=generator) + torch.linspace(2, -2, E)


def chosen(routing: Routing, tokens: int) -> torch.Tensor:
    """bool [T, E]."""
    routing = real_pairs(routing)
    chosen_TE = torch.zeros(tokens, E, dtype=torch.bool)
    chosen_TE[routing.token_P, routing.expert_P] = True
    assert chosen_TE.sum() == len(routing.token_P)  # none twice
    return chosen_TE


def train_step(router: nn.Module, logits: torch.Tensor, tokens: Tokens) -> Routing:
    routing = router(logits, tokens)
    router.update(sum_over_ranks([router.balance], None)[0], 0.0)
    return routing


# Who is chosen.


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("length", [1, 6, 7, 32])
def test_each_expert_takes_its_highest_scores(length: int, top_k: int, score: str) -> None:
    logits, capacity = make_logits(GROUPS * length), math.ceil(length * top_k / E)
    routing = make_router(top_k=top_k, score=score)(logits, Tokens(num_sequences=GROUPS))
    scores = logits.softmax(1) if score == "softmax" else logits.sigmoid()
    for group, group_scores in zip(chosen(routing, len(logits)).split(length), scores.split(length), strict=True):
        for expert in range(E):
            best = sorted(range(length), key=lambda t, e=expert, s=group_scores: -s[t, e])[:capacity]
            assert group[:, expert].nonzero().flatten().tolist() == sorted(best)
    assert routing.load_E.tolist() == [GROUPS * capacity] * E
    assert routing.pairs_per_expert == GROUPS * capacity


def test_tokens_differ_in_their_number_of_experts() -> None:
    logits = make_logits(64) + torch.linspace(-3, 3, 64)[:, None]
    numbers = chosen(make_router(score="sigmoid")(logits, Tokens()), 64).sum(1)
    assert numbers.double().mean() == K
    assert {0, E} <= set(numbers.tolist())


@pytest.mark.parametrize("cap", [2, 3, E])
@pytest.mark.parametrize("length", [6, 7, 32, 33])
def test_the_cap_holds_and_every_expert_takes_equally_many(length: int, cap: int) -> None:
    """Rounded up, but where the cap leaves no room for that."""
    logits = make_logits(GROUPS * length)
    routing = make_router(cap)(logits, Tokens(num_sequences=GROUPS))
    assert chosen(routing, len(logits)).sum(1).max() <= cap
    capacity = min(math.ceil(length * K / E), length * cap // E)
    for group in chosen(routing, len(logits)).split(length):
        assert group.sum(0).tolist() == [capacity] * E


def test_a_cap_of_all_experts_is_none() -> None:
    logits = make_logits(32)
    assert torch.equal(make_router(E)(logits, Tokens()).expert_P, make_router(None)(logits, Tokens()).expert_P)


def test_a_cap_costs_little_score() -> None:
    """Less than any other way to keep it that takes tokens one after the other."""
    logits, room = make_logits(64), [32] * E
    scores = logits.softmax(1)
    serial = 0.0
    for row in scores.tolist():
        for expert in sorted((e for e in range(E) if room[e]), key=lambda e, row=row: -row[e])[:K]:
            room[expert] -= 1
            serial += row[expert]
    free, capped = (make_router(cap)(logits, Tokens()).weight_P.sum().item() for cap in (None, K))
    assert serial < capped <= free


@pytest.mark.parametrize("cap", [1, 2])
def test_fewer_slots_than_experts(cap: int) -> None:
    """One token, which at most `cap` of four experts may take: none does, as all take equally many."""
    routing = make_router(cap, top_k=1)(make_logits(1), Tokens())
    assert len(real_pairs(routing).token_P) == 0


# Weights.


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize(
    ("settings", "divided"),
    [
        ({"scaling_factor": 1.5}, False),
        ({"renormalise": True, "scaling_factor": 2.5}, True),
        ({"score": "softmax_top_k"}, True),
        ({"score": "sigmoid", "renormalise": True}, True),
    ],
)
def test_weights_match_a_plain_loop(settings: dict[str, Any], divided: bool, cap: int | None) -> None:
    logits, router = make_logits(20), make_router(cap, **settings)
    routing = router(logits, Tokens())
    for token, row in enumerate(logits.tolist()):
        own = (routing.token_P == token).nonzero().flatten()
        raw = [1 / (1 + math.exp(-z)) if router.routing.score == "sigmoid" else math.exp(z) for z in row]
        if not divided:
            raw = [value / sum(raw) for value in raw]
        taken = routing.expert_P[own].tolist()
        divisor = sum(raw[e] for e in taken) if divided else 1
        expected = [router.routing.scaling_factor * raw[e] / divisor for e in taken]
        assert routing.weight_P[own].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "settings", [{}, {"renormalise": True}, {"score": "softmax_top_k"}, {"score": "sigmoid", "renormalise": True}]
)
def test_tokens_without_an_expert_have_no_gradient_and_no_nan(settings: dict[str, Any]) -> None:
    logits = make_logits(32).requires_grad_()
    routing = make_router(top_k=1, **settings)(logits, Tokens())
    routing.weight_P.square().sum().backward()
    none = ~chosen(routing, 32).any(1)
    assert none.any()
    assert not logits.grad[none].any()
    assert logits.grad.isfinite().all()


# Padding.


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("filling", [9.0, math.inf, math.nan])
def test_padding_is_as_if_it_were_not_there(filling: float, cap: int | None) -> None:
    """The capacity follows the tokens that are real, another number in each group."""
    length, real = 10, [10, 7, 3]
    padding = torch.cat([torch.arange(length) >= number for number in real])
    logits = make_logits(GROUPS * length).masked_fill(padding[:, None], filling)
    router = make_router(cap)
    routing = train_step(router, logits, Tokens(num_sequences=GROUPS, padding_T=padding))
    for group, number in enumerate(real):
        rows = slice(group * length, group * length + number)
        alone = make_router(cap)(logits[rows], Tokens())
        assert torch.equal(chosen(routing, len(logits))[rows], chosen(alone, number))
    assert not chosen(routing, len(logits))[padding].any()
    assert routing.pairs_per_expert == GROUPS * math.ceil(length * K / E)
    assert router.balance.price_E.isfinite().all()


# Evaluation.


@pytest.mark.parametrize("cap", CAPS)
def test_thresholds_are_averages_of_the_least_score_taken(cap: int | None) -> None:
    router, average = make_router(cap, dual_decay=0.75), None
    for seed in range(3):
        logits = make_logits(GROUPS * 8, seed)
        taken = chosen(train_step(router, logits, Tokens(num_sequences=GROUPS)), len(logits))
        least = logits.softmax(1).masked_fill(~taken, math.inf).view(GROUPS, 8, E).amin(1).mean(0)
        least = least - least.mean()
        average = least if average is None else 0.75 * average + 0.25 * least
    torch.testing.assert_close(router.balance.price_E.double(), average, rtol=0, atol=1e-6)


def test_evaluation_takes_the_k_experts_with_most_to_spare() -> None:
    router, logits = make_router(), make_logits(40)
    router.balance.price_E.copy_(torch.tensor([0.5, 0.1, -0.2, -0.4]))
    routing = router.eval()(logits, Tokens(num_sequences=5))
    expected = (logits.softmax(1) - torch.tensor([0.5, 0.1, -0.2, -0.4])).topk(K, dim=1).indices
    assert torch.equal(routing.expert_P.view(40, K), expected)
    assert routing.pairs_per_expert is None


def test_evaluation_stays_near_the_balance_of_training() -> None:
    router = make_router()
    before = router.eval()(make_logits(512), Tokens()).load_E
    router.train()
    for seed in range(8):
        train_step(router, make_logits(512, seed), Tokens(num_sequences=4))
    after = router.eval()(make_logits(512, 99), Tokens()).load_E
    assert before.max() > 1.8 * 512 * K / E
    assert after.max() < 1.3 * 512 * K / E


def test_evaluation_as_trained_lets_experts_choose() -> None:
    logits, tokens = make_logits(24), Tokens(num_sequences=GROUPS)
    router = make_router(evaluation="as_trained")
    assert torch.equal(router(logits, tokens).expert_P, router.eval()(logits, tokens).expert_P)
