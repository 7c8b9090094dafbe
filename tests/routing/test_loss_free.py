"""The rules that follow the load: biases against plain loops, zero-computation experts, load adjustment; one rank and several.

Shape letters: T tokens, E experts, K experts per token.
"""

import math
import statistics
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_dist import MoELayer
from moe_dist.config.routing import BiasConfig, RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.routing import Tokens, build_router
from moe_dist.routing.balance import BalanceState, sum_over_ranks
from moe_dist.routing.histograms import BINS
from moe_dist.routing.loss_free import add_state, update_bias
from moe_dist.routing.metrics import max_vio
from tests.support.distributed import run_ranks

E, K = 8, 2
RULES = ["sign", "proportional", "multiplicative", "momentum", "quantile"]
RATE = 0.05


def make_config(**routing: Any) -> RoutingConfig:
    return RoutingConfig.model_validate({"top_k": K, **routing})


def make_scores(tokens: int, num_experts: int = E, seed: int = 0) -> torch.Tensor:
    """Logits with some experts far more popular than others."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tokens, num_experts, dtype=torch.float64, generator=generator)
    return noise + torch.linspace(1, -1, num_experts, dtype=torch.float64)


def make_router(num_experts: int = E, **routing: Any) -> nn.Module:
    """The hidden state of a token is its logits."""
    config, group = make_config(**routing), dist.group.WORLD if dist.is_initialized() else None
    outputs = num_experts + (config.zero_experts.count if config.zero_experts else 0)
    router = build_router(outputs, num_experts, config, group).double()
    router.weight.data.copy_(torch.eye(outputs))
    return router


def step(router: nn.Module, hidden: torch.Tensor, rate: float = RATE) -> torch.Tensor:
    """One optimiser step over all ranks; the loads."""
    router(hidden, Tokens())
    (totals,) = sum_over_ranks([router.balance], router.data_parallel_group)
    router.update(totals, rate)
    return totals["load_E"]


# The rules.


def loop_rule(config: BiasConfig, bias: list[float], momentum: list[float], load: list[int]) -> list[float]:
    """One step; `momentum` is changed."""
    mean = statistics.fmean(load)
    error = [(mean - c) / mean for c in load]
    sign = [(e > 0) - (e < 0) for e in error]
    if config.rule == "momentum":  # SMEBU, arXiv 2602.17004
        change = [RATE * math.tanh(config.slope * e) for e in error]
        momentum[:] = [config.momentum * m + (1 - config.momentum) * d for m, d in zip(momentum, change, strict=True)]
        bias = [b + m for b, m in zip(bias, momentum, strict=True)]
    else:
        change = error if config.rule == "proportional" else sign
        bias = [b + RATE * d for b, d in zip(bias, change, strict=True)]
    if not config.centre:
        return bias
    mean = statistics.fmean(bias)
    return [b / mean if config.rule == "multiplicative" else b - mean for b in bias]


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("rule", ["sign", "proportional", "multiplicative", "momentum"])
def test_many_steps_match_a_plain_loop(rule: str, centre: bool) -> None:
    routing = make_config(bias={"rule": rule, "centre": centre, "momentum": 0.7, "slope": 3.0})
    state = BalanceState(E)
    add_state(state, routing, E)
    bias, momentum = state.bias_E.tolist(), [0.0] * E
    assert bias == [1.0 if rule == "multiplicative" else 0.0] * E
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        load = torch.randint(1, 90, (E,), generator=generator)
        state.load_E += load
        update_bias(state, sum_over_ranks([state], None)[0], routing, RATE)
        bias = loop_rule(routing.bias, bias, momentum, load.tolist())
        assert state.bias_E.tolist() == pytest.approx(bias, abs=2e-6)
    if not centre and rule != "proportional":  # whose errors sum to 0
        assert abs(statistics.fmean(bias) - (rule == "multiplicative")) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_centring_changes_no_choice(rule: str) -> None:
    choices, means = [], []
    for centre in (True, False):
        router = make_router(bias={"rule": rule, "centre": centre}, score="sigmoid")
        step(router, make_scores(500), rate=0.3)
        choices.append(router(make_scores(5000, seed=1), Tokens()).expert_P)
        means.append(router.balance.bias_E.mean().item())
    assert torch.equal(*choices)
    assert means[0] == pytest.approx(1.0 if rule == "multiplicative" else 0.0, abs=1e-6)
    if rule in ("sign", "multiplicative", "quantile"):  # there was something to centre
        assert abs(means[1] - means[0]) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_a_rate_of_zero_leaves_the_bias(rule: str) -> None:
    router = make_router(bias={"rule": rule})
    before = {name: value.clone() for name, value in router.state_dict().items()}
    step(router, make_scores(50), rate=0.0)
    assert all(torch.equal(before[name], value) for name, value in router.state_dict().items())


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_without_tokens_leaves_the_bias(rule: str, centre: bool) -> None:
    router = make_router(bias={"rule": rule, "centre": centre, "momentum": 0.0})
    for _ in range(3):
        step(router, make_scores(50))
    before = router.balance.bias_E.clone()
    step(router, make_scores(0))
    torch.testing.assert_close(router.balance.bias_E, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_balances(rule: str, score: str) -> None:
    """Of fixed scores, from a MaxVio above 1; the popular experts get the lower bias."""
    router, hidden = make_router(bias={"rule": rule}, score=score), make_scores(2000)
    rate = 0.01 if score == "softmax" and rule != "multiplicative" else RATE
    first = max_vio(step(router, hidden, rate))
    for _ in range(60):
        last = max_vio(step(router, hidden, rate))
    assert first > 1
    assert last < (0.1 if rule in ("proportional", "quantile") else 0.35)  # the others go to and fro by their rate
    assert router.balance.bias_E[0] < router.balance.bias_E[-1]


# The quantile rule.


def wanted_biases(score: torch.Tensor, bias: torch.Tensor, top_k: int) -> torch.Tensor:
    """[T, E]: from which bias on the token would take the expert, all other biases as they are."""
    return (score + bias).sort(1, descending=True).values[:, top_k : top_k + 1] - score


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_step_is_the_quantile_of_sorted_values(score: str) -> None:
    tokens, hidden = 4000, make_scores(4000)
    router = make_router(bias={"rule": "quantile", "centre": False}, score=score)
    router.balance.bias_E.copy_(torch.linspace(-0.1, 0.1, E))
    before = router.balance.bias_E.double()
    score_TE = hidden.softmax(1) if score == "softmax" else hidden.sigmoid()
    exact = wanted_biases(score_TE, before, K).sort(0).values[tokens * K // E - 1]
    step(router, hidden)
    width = (0.2 + 2) / BINS
    assert (router.balance.bias_E - exact).abs().max() <= width + 1e-6


def test_the_moving_average_of_quantiles() -> None:
    hidden, biases = make_scores(1000), []
    for decay in (0.0, 0.75):
        router = make_router(bias={"rule": "quantile", "decay": decay, "centre": False})
        router.balance.bias_E.fill_(0.25)
        step(router, hidden)
        biases.append(router.balance.bias_E)
    torch.testing.assert_close(biases[1], 0.75 * 0.25 + 0.25 * biases[0], rtol=0, atol=1e-6)


def test_tokens_that_may_not_choose_an_expert_do_not_lower_its_bias() -> None:
    """With a group limit a token counts as one that no bias would bring in."""
    groups = {"count": 2, "keep": 1, "score": "max"}
    router, hidden = make_router(bias={"rule": "quantile"}, expert_groups=groups), make_scores(600)
    hidden[:, : E // 2] += torch.where(torch.arange(600) % 2 == 0, 9.0, -9.0)[:, None]
    for _ in range(10):
        load = step(router, hidden)
    assert max_vio(load) < 0.15


def test_padding_takes_no_part() -> None:
    hidden, padding = make_scores(300), torch.arange(300) % 3 == 0
    hidden[padding] = -50.0
    biases = []
    for part, tokens in ((hidden, Tokens(padding_T=padding)), (hidden[~padding], Tokens())):
        router = make_router(bias={"rule": "quantile"})
        router(part, tokens)
        router.update(sum_over_ranks([router.balance], None)[0], RATE)
        biases.append(router.balance.bias_E)
    assert torch.equal(*biases)


# Several ranks.


def follow(num_parts: int) -> dict[tuple[str, str], tuple[list[torch.Tensor], list[float]]]:
    """Rule and score -> (state, MaxVio of each step), where each rank holds another kind of tokens."""
    hidden = make_scores(2048, 16)
    hidden = hidden[hidden[:, 0].argsort()]  # the ranks' own quantiles would be of no use
    part = hidden.chunk(num_parts)[dist.get_rank() if dist.is_initialized() else 0]
    results = {}
    for rule in RULES:
        for score in ("softmax", "sigmoid"):
            router = make_router(16, top_k=4, bias={"rule": rule}, score=score, load_adjustment={"strength": 0.1})
            vio = [max_vio(step(router, part)).item() for _ in range(5)]
            results[rule, score] = list(router.balance.state_dict().values()), vio
    return results


def test_all_ranks_follow_the_same_bias_as_one_with_all_tokens() -> None:
    alone = follow(1)
    for num_ranks in (2, 4):
        for result in run_ranks(num_ranks, follow, num_ranks):
            for case, (state, vio) in alone.items():
                assert vio == result[case][1]
                assert all(map(torch.equal, state, result[case][0])), (num_ranks, case)
    assert not torch.equal(alone["sign", "softmax"][0][0], torch.zeros(16))


def test_quantiles_balance_tokens_that_are_sorted_over_ranks() -> None:
    for score in ("softmax", "sigmoid"):
        expected = balance_by_quantile(score, 1)
        assert run_ranks(4, balance_by_quantile, score, 4) == [expected] * 4
        assert expected[0] > 1
        assert expected[-1] < 0.1


def balance_by_quantile(score: str, num_parts: int) -> list[float]:
    hidden = make_scores(8192, 16)
    hidden = hidden[hidden[:, 0].argsort()].chunk(num_parts)[dist.get_rank() if dist.is_initialized() else 0]
    router = make_router(16, top_k=4, bias={"rule": "quantile"}, score=score)
    return [max_vio(step(router, hidden)).item() for _ in range(6)]


# Zero-computation experts.

ZERO = {"count": 4, "target": 1.5}


def test_zero_experts_give_the_token_itself_and_never_travel() -> None:
    config = make_config(top_k=3, zero_experts=ZERO, bias={"rule": "proportional"}, init_std=1.0, scaling_factor=6.0)
    layer = MoELayer(5, MoEConfig(num_experts=E, ffn_size=4), config).double()
    layer.initialise(0, "moe", std=0.5)
    layer.router.balance.bias_E.copy_(torch.linspace(-0.02, 0.02, E))
    hidden = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with patch.object(layer.dispatcher, "plan", wraps=layer.dispatcher.plan) as plan:
        out = layer(hidden)
    sent = plan.call_args.args[0]
    assert sent.expert_P.max() < E
    assert sent.load_E.shape == (E,)

    score_TX = (hidden @ layer.router.weight.T).softmax(1)
    bias_X = torch.cat([layer.router.balance.bias_E.double(), torch.zeros(4)])
    expected, dispatched, kinds = torch.zeros_like(hidden), 0, set()
    for token, (x, score, order) in enumerate(zip(hidden, score_TX, (score_TX + bias_X).argsort(1, True), strict=True)):
        chosen = order[:3].tolist()
        kinds.add(sum(expert >= E for expert in chosen))
        for expert in chosen:
            y = x
            if expert < E:
                dispatched += 1
                gate, up, down = layer.experts.weights_of(expert, lambda p: p).values()
                y = (nn.functional.silu(x @ gate) * (x @ up)) @ down
            expected[token] += 6 * score[expert] * y
    assert kinds >= {0, 1, 2}
    assert len(sent.token_P) == sent.load_E.sum() == dispatched
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rule", ["sign", "proportional", "momentum", "quantile"])
def test_the_bias_holds_the_number_of_computed_experts(rule: str, score: str) -> None:
    """Zero-computation experts start as the best of all, or the worst; every rule ends at the target, in balance."""
    for preference in (3.0, -3.0):
        config = {"top_k": 3, "zero_experts": ZERO, "bias": {"rule": rule}, "score": score}
        router, hidden = make_router(**config), make_scores(1000, E + 4)
        hidden[:, E:] += preference
        for progress in range(80):
            load = step(router, hidden, rate=(0.03 if score == "softmax" else 0.1) * (1 - progress / 80))
        assert load.sum().item() / 1000 == pytest.approx(ZERO["target"], rel=0.03)
        assert max_vio(load) < 0.15


def test_a_share_of_the_target_is_compared_exactly() -> None:
    """tokens * target / E = 2^25 + 1 is no float32."""
    routing = make_config(zero_experts={"count": 1, "target": 1.0}, bias={"rule": "sign"})
    state = BalanceState(4)
    state.tokens += 4 * (2**25 + 1)
    state.load_E += torch.tensor([2**25 + 1, 2**25, 2**25 + 2, 2**25 + 1])
    update_bias(state, sum_over_ranks([state], None)[0], routing, 0.125)
    assert state.bias_E.tolist() == [0, 0.125, -0.125, 0]


# Load adjustment.


def test_recent_loads_match_a_plain_loop_and_lower_the_logits() -> None:
    router, hidden = make_router(load_adjustment={"strength": 0.5, "decay": 0.8}), make_scores(500)
    recent = [1.0] * E
    for _ in range(5):
        expected = hidden - 0.5 * (torch.tensor(recent, dtype=torch.float64) - 1)
        torch.testing.assert_close(router.logits(hidden, Tokens()), expected, rtol=0, atol=1e-6)
        load = step(router, hidden).tolist()
        mean = statistics.fmean(load)
        recent = [0.8 * r + 0.2 * c / mean for r, c in zip(recent, load, strict=True)]
    assert router.balance.recent_load_E.tolist() == pytest.approx(recent, abs=1e-6)


def test_load_adjustment_takes_load_from_the_overloaded() -> None:
    router, hidden = make_router(load_adjustment={"strength": 1.0}), make_scores(2000)
    first = step(router, hidden)
    for _ in range(30):
        last = step(router, hidden)
    assert max_vio(last) < 0.6 * max_vio(first)
    assert (last[first > first.double().mean()] <= first[first > first.double().mean()]).all()


def test_load_adjustment_does_not_look_ahead() -> None:
    """Within a step the loads are those of earlier steps, also over accumulation, in training and evaluation alike."""
    router, hidden = make_router(load_adjustment={"strength": 1.0}), make_scores(100)
    step(router, hidden)
    early = router(hidden, Tokens()).expert_P[: 40 * K]
    changed = torch.cat([hidden[:40], make_scores(60, seed=9)])
    assert torch.equal(router(changed, Tokens()).expert_P[: 40 * K], early)
    assert torch.equal(router.eval()(hidden, Tokens()).expert_P[: 40 * K], early)
