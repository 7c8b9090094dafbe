"""Sinkhorn routing: the plan against POT (Python Optimal Transport), sharding, padding, extreme logits.

Shape letters: G routing groups, N tokens of a group, E experts, K experts per token.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_dist.config.routing import RoutingConfig
from moe_dist.routing import Routing, Tokens, build_router
from moe_dist.routing.balance import sum_over_ranks
from moe_dist.routing.metrics import max_vio
from moe_dist.routing.sinkhorn import sinkhorn_prices
from tests.support.distributed import run_ranks

N, E, K = 32, 8, 2


def make_logits(tokens: int = N, seed: int = 0) -> torch.Tensor:
    """Some experts are far more popular than others."""
    logits = torch.randn(tokens, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return logits + torch.linspace(1.5, -1.5, E, dtype=torch.float64)


def make_router(**routing: Any) -> nn.Module:
    """The hidden state of a token is its logits."""
    group = dist.group.WORLD if dist.is_initialized() else None
    config = RoutingConfig.model_validate({"method": "sinkhorn", "top_k": K, "group": "rank", **routing})
    router = build_router(E, E, config, group).double()
    router.weight.data.copy_(torch.eye(E))
    return router


def plan(logits_NE: torch.Tensor, price_E: torch.Tensor, top_k: int, epsilon: float) -> torch.Tensor:
    """[N, E] whose rows sum to k."""
    scaled = (logits_NE - price_E) / (epsilon * logits_NE.std(correction=0))
    return top_k * scaled.softmax(1)


def train_step(router: nn.Module, logits: torch.Tensor, tokens: Tokens) -> Routing:
    routing = router(logits, tokens)
    router.update(sum_over_ranks([router.balance], router.data_parallel_group)[0], 0.0)
    return routing


# The plan.


@pytest.mark.parametrize("epsilon", [0.3, 1.0])
@pytest.mark.parametrize("top_k", [1, K])
def test_the_plan_is_that_of_pot(top_k: int, epsilon: float) -> None:
    ot = pytest.importorskip("ot")
    logits = make_logits()
    rows, columns = np.full(N, float(top_k)), np.full(E, top_k * N / E)
    cost, strength = -logits.numpy(), epsilon * logits.numpy().std()
    expected = ot.bregman.sinkhorn_log(rows, columns, cost, strength, numItermax=2000, stopThr=1e-13)
    price_GE = sinkhorn_prices(logits[None], top_k, epsilon, 500)
    actual = plan(logits, price_GE[0], top_k, epsilon)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(actual.sum(0).numpy(), columns, rtol=1e-9)


def test_the_iterations_match_a_plain_loop() -> None:
    """By sums of exponentials, as nobody should compute them."""
    logits, iterations = make_logits(6), 3
    scale = 0.5 * logits.std(correction=0).item()
    kernel = [[math.exp(z / scale) for z in row] for row in logits.tolist()]
    column = [1.0] * E
    for _ in range(iterations):
        row = [K / sum(p * v for p, v in zip(values, column, strict=True)) for values in kernel]
        column = [K * 6 / E / sum(kernel[n][e] * row[n] for n in range(6)) for e in range(E)]
    price = sinkhorn_prices(logits[None], K, 0.5, iterations)[0]
    assert price.tolist() == pytest.approx([-scale * math.log(v) for v in column], rel=1e-11)


def test_columns_are_balanced_from_the_first_iteration_on_and_rows_in_the_end() -> None:
    logits = make_logits()
    for iterations, tolerance in ((1, 0.5), (10, 0.03), (200, 1e-10)):
        price = sinkhorn_prices(logits[None], 1, 0.5, iterations)[0]
        assert (plan(logits, price, 1, 0.5).sum(0) * E / N - 1).abs().max() < tolerance


def test_groups_are_solved_each_on_its_own() -> None:
    logits_GNE = torch.stack([make_logits(seed=0), 7 * make_logits(seed=1) + 3])
    together = sinkhorn_prices(logits_GNE, K, 0.5, 10)
    alone = torch.cat([sinkhorn_prices(logits[None], K, 0.5, 10) for logits in logits_GNE])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (1000.0, 1.0), (-50.0, 0.01), (0.0, 1e-3), (0.0, 1e4)])
def test_only_relative_differences_of_logits_matter(offset: float, scale: float) -> None:
    """Also in float32, where a difference of squares would be mostly rounding."""
    single = (make_logits() * scale + offset).float()
    price = sinkhorn_prices(single[None], K, 0.5, 10) / scale
    exact = sinkhorn_prices((single.double()[None] - offset) / scale, K, 0.5, 10)
    rounding = torch.finfo(torch.float32).eps * (1 + abs(offset) / scale)
    assert (price - exact).abs().max() < 10 * rounding


# The router.


def test_tokens_take_the_best_of_the_plan() -> None:
    router, logits = make_router(sinkhorn={"epsilon": 0.4, "iterations": 20}), make_logits()
    routing = router(logits, Tokens())
    price = sinkhorn_prices(logits[None], K, 0.4, 20)[0]
    expected = plan(logits, price, K, 0.4).topk(K, 1).indices
    assert torch.equal(routing.expert_P.view(N, K).sort(1).values, expected.sort(1).values)
    torch.testing.assert_close(routing.weight_P, logits.softmax(1).gather(1, routing.expert_P.view(N, K)).flatten())


@pytest.mark.parametrize("group", ["rank", "global", {"sequences": 1}, {"sequences": 4}])
def test_the_load_is_far_more_even_than_by_top_k(group: Any) -> None:
    logits, tokens = make_logits(512), Tokens(num_sequences=4)
    routing = make_router(group=group)(logits, tokens)
    unbalanced = make_router(method="top_k")(logits, tokens)
    assert max_vio(unbalanced.load_E) > 1
    assert max_vio(routing.load_E) < 0.25


def test_evaluation_takes_the_average_price() -> None:
    router = make_router(dual_decay=0.75)
    average = None
    for seed in range(3):
        price = sinkhorn_prices(make_logits(seed=seed)[None], K, 0.5, 10)[0]
        price = price - price.mean()
        average = price if average is None else 0.75 * average + 0.25 * price
        train_step(router, make_logits(seed=seed), Tokens())
    torch.testing.assert_close(router.balance.price_E.double(), average, rtol=0, atol=1e-6)
    logits = make_logits(seed=9)
    expected = (logits - router.balance.price_E).topk(K, 1).indices
    assert torch.equal(router.eval()(logits, Tokens()).expert_P.view(N, K), expected)


@pytest.mark.parametrize("filling", [0.0, torch.finfo(torch.float64).max, math.inf, math.nan])
@pytest.mark.parametrize("group", ["rank", "global", {"sequences": 1}])
def test_padding_is_left_out_whatever_it_holds(group: Any, filling: float) -> None:
    padding = torch.arange(4 * N) % N >= 20
    short, padded = make_router(group=group), make_router(group=group)
    logits = make_logits(4 * N)
    expected = train_step(short, logits[~padding], Tokens(num_sequences=4))
    logits = logits.masked_fill(padding[:, None], filling)
    routing = train_step(padded, logits, Tokens(num_sequences=4, padding_T=padding))
    assert torch.equal(routing.expert_P, expected.expert_P)
    assert torch.equal(padded.balance.price_E, short.balance.price_E)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group", ["rank", "global", {"sequences": 2}])
def test_extreme_logits_give_finite_prices(group: Any, dtype: torch.dtype) -> None:
    router, generator = make_router(group=group), torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (N, E), generator=generator, dtype=dtype) * 2 - 1
    for logits in (1e4 * signs, 1e4 * signs.abs(), torch.zeros(N, E, dtype=dtype), 1e-30 * signs, signs[:1] * 1e4):
        tokens = Tokens(num_sequences=2 if len(logits) == N else 1)
        if group == {"sequences": 2} and tokens.num_sequences == 1:
            continue
        routing = train_step(router, logits, tokens)
        assert routing.weight_P.isfinite().all()
        assert len(routing.expert_P) == len(logits) * K
        assert router.balance.price_E.isfinite().all()


# Several ranks.


def prices_of_share(num_ranks: int, padded: bool) -> list[torch.Tensor]:
    """Prices of the plan over all ranks; the ranks hold tokens of very different scale, and unequally many."""
    logits = make_logits(48) * torch.linspace(0.1, 4, 48, dtype=torch.float64)[:, None]
    sizes = {1: [48], 2: [40, 8], 4: [20, 0, 27, 1]}[num_ranks]
    rank, group = (dist.get_rank(), dist.group.WORLD) if dist.is_initialized() else (0, None)
    part, real = logits.split(sizes)[rank], (torch.arange(48) % 3 > 0).split(sizes)[rank]
    real_GN = real[None] if padded else None
    return [sinkhorn_prices(part[None], K, epsilon, 10, real_GN, group)[0] for epsilon in (0.1, 0.5, 2.0)]


@pytest.mark.parametrize("padded", [False, True])
def test_prices_over_ranks_are_those_of_one_rank(padded: bool) -> None:
    expected = prices_of_share(1, padded)
    for num_ranks in (2, 4):
        results = run_ranks(num_ranks, prices_of_share, num_ranks, padded)
        for prices in results:
            assert all(map(torch.equal, prices, results[0]))
            torch.testing.assert_close(prices, expected, rtol=1e-10, atol=1e-10)
