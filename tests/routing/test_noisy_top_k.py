"""Noisy top-k: its noise, the smooth load against Monte Carlo, the losses that balance it, several ranks.

Shape letters: T tokens, H hidden, E experts, K experts per token.
"""

import math
import statistics
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from moe_dist.config.routing import RoutingConfig
from moe_dist.routing import Tokens, build_router
from moe_dist.routing.losses import smooth_load, squared_cv
from moe_dist.routing.random import key_of, normal
from tests.support.distributed import run_ranks

T, H, E, K = 24, 5, 6, 2
LOSSES = {"importance": {"coefficient": 0.3}, "load": {"coefficient": 0.7}}


def make_router(**routing: Any) -> nn.Module:
    group = dist.group.WORLD if dist.is_initialized() else None
    config = RoutingConfig.model_validate({"method": "noisy_top_k", "top_k": K, "init_std": 1.0, **routing})
    router = build_router(H, E, config, group).double()
    generator = torch.Generator().manual_seed(5)
    router.noise_weight.data.copy_(torch.randn(E, H, dtype=torch.float64, generator=generator))
    return router


def make_hidden(tokens: int = T, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# The choice.


def test_logits_are_clean_ones_plus_scaled_noise_in_training() -> None:
    router, index = make_router(), torch.arange(50, 50 + T)
    router.initialise(3, "layers.4")
    router.noise_weight.data.copy_(make_router().noise_weight)
    tokens = Tokens(global_index_T=index, step=6)
    clean = make_hidden() @ router.weight.T
    deviation = functional.softplus(make_hidden() @ router.noise_weight.T).clamp(min=0.01)
    noise = normal(key_of(3, "layers.4", "noise"), 6, index, E)
    torch.testing.assert_close(router.logits(make_hidden(), tokens), clean + noise * deviation, rtol=1e-12, atol=1e-12)
    assert torch.equal(router.eval().logits(make_hidden(), tokens), clean)


def test_the_noise_starts_at_the_same_size_everywhere() -> None:
    router = make_router()
    router.initialise(0, "moe")
    assert not router.noise_weight.any()
    torch.testing.assert_close(router._deviation(make_hidden()), torch.full((T, E), math.log(2), dtype=torch.float64))


def test_noise_changes_choices_and_is_anew_in_each_step() -> None:
    router = make_router()
    choices = [router(make_hidden(), Tokens(step=step)).expert_P for step in (0, 0, 1)]
    choices.append(router.eval()(make_hidden(), Tokens()).expert_P)
    assert torch.equal(choices[0], choices[1])
    assert not torch.equal(choices[0], choices[2])
    assert not torch.equal(choices[0], choices[3])


def test_weights_pass_finite_differences() -> None:
    """With respect to both weights: the noise is a constant of the token."""
    router = make_router(score="softmax_top_k")
    inputs = [make_hidden(4), router.weight.detach(), router.noise_weight.detach()]

    def weights(hidden: torch.Tensor, weight: torch.Tensor, noise_weight: torch.Tensor) -> torch.Tensor:
        return functional_call(router, {"weight": weight, "noise_weight": noise_weight}, (hidden, Tokens())).weight_P

    assert torch.autograd.gradcheck(weights, [value.clone().requires_grad_() for value in inputs])


# The smooth load.


@pytest.mark.parametrize("top_k", [1, 2, E - 1])
def test_the_smooth_load_is_the_frequency_of_choice(top_k: int) -> None:
    """Of each expert when its own noise is drawn anew, and that of the others is as it was."""
    draws, generator = 40_000, torch.Generator().manual_seed(0)
    clean, deviation = make_hidden(8, seed=2) @ make_hidden(E, seed=3).T, 0.2 + make_hidden(8, seed=4)[:, :1].abs()
    deviation = deviation.expand(8, E)
    noisy = clean + deviation * torch.randn(8, E, generator=generator, dtype=torch.float64)
    frequency = torch.zeros(8, E, dtype=torch.float64)
    for expert in range(E):
        others = torch.cat([noisy[:, :expert], noisy[:, expert + 1 :]], dim=1)
        to_beat = others.sort(1, descending=True).values[:, top_k - 1 : top_k]
        own = torch.randn(8, draws, generator=generator, dtype=torch.float64)
        frequency[:, expert] = (clean[:, expert, None] + deviation[:, expert, None] * own > to_beat).double().mean(1)
    load = smooth_load(clean, noisy, deviation, top_k, None)
    assert ((load - frequency.sum(0)) / 8).abs().max() < 3e-3


def test_the_smooth_load_is_the_mean_load() -> None:
    """Over many steps, in which all noise is drawn anew."""
    router, counted, smooth = make_router(), torch.zeros(E), torch.zeros(E, dtype=torch.float64)
    hidden, steps = make_hidden(8), 1500
    clean, deviation = hidden @ router.weight.T, router._deviation(hidden)
    for step in range(steps):
        logits = router.logits(hidden, Tokens(step=step)).detach()
        counted += logits.topk(K, dim=1).indices.flatten().bincount(minlength=E)
        smooth += smooth_load(clean, logits, deviation, K, None).detach()
    assert ((counted - smooth).abs() / steps / 8).max() < 0.01
    assert counted.max() > 2 * counted.min()


def test_the_smooth_load_without_noise_to_speak_of_counts_choices() -> None:
    logits = make_hidden(T) @ make_hidden(E, seed=3).T
    load = smooth_load(logits, logits, torch.full_like(logits, 1e-9), K, None)
    assert load.tolist() == logits.topk(K, dim=1).indices.flatten().bincount(minlength=E).tolist()


def test_padding_adds_no_load() -> None:
    real = torch.arange(T) % 3 > 0
    clean, noisy = make_hidden() @ make_hidden(E).T, make_hidden(seed=7) @ make_hidden(E).T
    filled = noisy.masked_fill(~real[:, None], torch.nan)
    expected = smooth_load(clean[real], noisy[real], torch.ones_like(clean[real]), K, None)
    torch.testing.assert_close(smooth_load(clean, filled, torch.ones_like(clean), K, real), expected)


# The losses.


def test_losses_match_plain_loops() -> None:
    router, hidden = make_router(losses=LOSSES, renormalise=True), make_hidden()
    routing = router(hidden, Tokens())
    importance, load = [0.0] * E, [0.0] * E
    for expert, weight in zip(routing.expert_P.tolist(), routing.weight_P.tolist(), strict=True):
        importance[expert] += weight
    noisy, clean = router.logits(hidden, Tokens()).tolist(), (hidden @ router.weight.T).tolist()
    deviation = functional.softplus(hidden @ router.noise_weight.T).clamp(min=0.01).tolist()
    for t in range(T):
        for e in range(E):
            to_beat = sorted((noisy[t][j] for j in range(E) if j != e), reverse=True)[K - 1]
            load[e] += statistics.NormalDist().cdf((clean[t][e] - to_beat) / deviation[t][e])
    for name, coefficient, values in (("importance", 0.3, importance), ("load", 0.7, load)):
        expected = coefficient * statistics.pvariance(values) / statistics.fmean(values) ** 2
        assert routing.losses[name].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("padded", [False, True])
def test_losses_pass_finite_differences(padded: bool) -> None:
    router = make_router(losses=LOSSES)
    tokens = Tokens(padding_T=torch.arange(6) == 2 if padded else None)
    inputs = [make_hidden(6), router.weight.detach(), router.noise_weight.detach()]

    def losses(hidden: torch.Tensor, weight: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = functional_call(router, {"weight": weight, "noise_weight": noise}, (hidden, tokens)).losses
        return values["importance"], values["load"]

    assert torch.autograd.gradcheck(losses, [value.clone().requires_grad_() for value in inputs])


def test_losses_balance_the_load() -> None:
    """A few steps of descent on them alone."""
    router, hidden = make_router(losses=LOSSES), make_hidden(200) + 1
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    spreads = []
    for step in range(40):
        routing = router(hidden, Tokens(step=step))
        spreads.append(squared_cv(routing.load_E.double()).item())
        optimizer.zero_grad()
        sum(routing.losses.values()).backward()
        optimizer.step()
    assert spreads[0] > 0.2
    assert spreads[-1] < 0.05


@pytest.mark.parametrize("top_k", [1, E])
def test_extreme_top_k(top_k: int) -> None:
    router = make_router(top_k=top_k, losses=LOSSES)
    routing = router(make_hidden(), Tokens())
    sum(routing.losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())
    if top_k == E:
        assert routing.losses["load"].item() == 0


def test_vanishing_noise_keeps_losses_and_gradients_finite() -> None:
    router, hidden = make_router(losses=LOSSES), make_hidden() * 1e4
    routing = router(hidden, Tokens())
    (routing.weight_P.square().sum() + sum(routing.losses.values())).backward()
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())


# Several ranks.


def train_share(num_ranks: int, padded: bool) -> dict[str, Any]:
    """Routing, losses and gradients of this rank's part of 24 tokens; the parts are of different size."""
    sizes = {1: [24], 2: [15, 9], 4: [3, 8, 1, 12]}[num_ranks]
    rank = dist.get_rank() if dist.is_initialized() else 0
    rows = torch.arange(T).split(sizes)[rank]
    padding = (torch.arange(T) % 4 == 1) if padded else torch.zeros(T, dtype=torch.bool)
    router = make_router(losses=LOSSES)
    hidden = make_hidden()[rows].requires_grad_()
    share = (~padding[rows]).sum().item() / (~padding).sum().item()
    tokens = Tokens(global_index_T=rows, padding_T=padding[rows] if padded else None, step=3, share=share)
    routing = router(hidden, tokens)
    (share * sum(routing.losses.values())).backward()
    return {
        "pairs": list(zip(rows[routing.token_P].tolist(), routing.expert_P.tolist(), strict=True)),
        "losses": {name: loss.item() for name, loss in routing.losses.items()},
        "gradients": [router.weight.grad, router.noise_weight.grad],
        "hidden": hidden.grad,
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_together_are_one_rank_with_all_tokens(num_ranks: int, padded: bool) -> None:
    """The same noise for the same token, the same losses on every rank, and gradients that add up to theirs."""
    expected, results = train_share(1, padded), run_ranks(num_ranks, train_share, num_ranks, padded)
    assert [pair for result in results for pair in result["pairs"]] == expected["pairs"]
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-11)
    for number, gradient in enumerate(expected["gradients"]):
        total = sum(result["gradients"][number] for result in results)
        torch.testing.assert_close(total, gradient, rtol=1e-10, atol=1e-13)
    hidden = torch.cat([result["hidden"] for result in results])
    torch.testing.assert_close(hidden, expected["hidden"], rtol=1e-10, atol=1e-13)
