"""Load-balance and z losses: normalisation, formulas, gradients, scopes, and how they join the main loss.

Shape letters: T tokens, E experts, K experts per token, B sequences, S tokens of a sequence.
"""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from moe_dist.config.routing import RoutingConfig
from moe_dist.routing import Tokens, build_router
from moe_dist.routing.losses import attach, load_balance_loss, sequence_load_balance_loss, z_loss
from tests.support.distributed import run_ranks

E, K, H = 5, 2, 4
SCOPES = ["micro_batch", "sequence", "global_batch"]
SCORES = ["softmax", "softmax_top_k", "sigmoid"]


def make_router(load_balance: float = 1.0, scope: str = "sequence", z: float = 0.0, **routing: Any) -> nn.Module:
    losses = {"load_balance": {"coefficient": load_balance, "scope": scope}, "z": {"coefficient": z}}
    torch.manual_seed(3)
    config = RoutingConfig.model_validate({"top_k": K, "init_std": 1.0, "losses": losses, **routing})
    group = dist.group.WORLD if dist.is_initialized() else None
    return build_router(H, E, config, group).double()


def make_hidden(num_sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_sequences * length, H, dtype=torch.float64, generator=generator)


def make_padding(num_sequences: int, length: int) -> torch.Tensor:
    """Another number of real tokens in each sequence."""
    return torch.tensor([[place > 1 + 2 * row for place in range(length)] for row in range(num_sequences)]).flatten()


# Normalisation.


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (4, 2), (8, 3), (6, 5), (16, 16)])
def test_uniform_routing_gives_the_coefficient(scope: str, score: str, num_experts: int, top_k: int) -> None:
    """Token t of each sequence prefers experts t, t+1, ... (mod E): equal loads and equal mean probabilities."""
    losses = {"load_balance": {"coefficient": 0.25, "scope": scope}}
    config = RoutingConfig.model_validate({"top_k": top_k, "score": score, "losses": losses})
    router = build_router(num_experts, num_experts, config).double()
    router.weight.data.copy_(torch.eye(num_experts))
    logits = torch.arange(num_experts, 0, -1, dtype=torch.float64) / num_experts
    hidden = torch.stack([logits.roll(t) for t in range(num_experts)]).repeat(2, 1)
    routing = router(hidden, Tokens(num_sequences=2))
    assert len(set(routing.load_E.tolist())) == 1
    assert routing.losses["load_balance"].item() == pytest.approx(0.25, rel=1e-12)


def test_collapse_gives_the_number_of_experts() -> None:
    probability_TE = torch.zeros(7, E, dtype=torch.float64)
    probability_TE[:, 1] = 1
    load_E = torch.tensor([0, 7, 0, 0, 0])
    assert load_balance_loss(probability_TE, load_E, None).item() == E


# Formulas.


def loop_load_balance(probability: list[list[float]], chosen: list[list[int]], real: list[bool]) -> float:
    """sum_i f_i P_i, f_i = E count_i / (K T), over the tokens that are real."""
    tokens = [t for t in range(len(probability)) if real[t]]
    pairs = sum(len(chosen[t]) for t in tokens)
    loss = 0.0
    for expert in range(len(probability[0])):
        count = sum(expert in chosen[t] for t in tokens)
        loss += E * count / pairs * sum(probability[t][expert] for t in tokens) / len(tokens)
    return loss


def loop_loss(router: nn.Module, hidden: torch.Tensor, tokens: Tokens) -> float:
    """Of the router's own logits, by sequence where the scope is that."""
    logits = (hidden @ router.weight.detach().T).tolist()
    if router.routing.score == "sigmoid":
        scores = [[1 / (1 + math.exp(-z)) for z in row] for row in logits]
    else:
        scores = [[math.exp(z) for z in row] for row in logits]
    probability = [[s / sum(row) for s in row] for row in scores]
    chosen = [sorted(range(E), key=lambda e, row=row: -row[e])[:K] for row in scores]
    padding = tokens.padding_T
    real = [True] * len(logits) if padding is None else (~padding).tolist()
    if router.routing.losses.load_balance.scope != "sequence":
        return loop_load_balance(probability, chosen, real)
    length, total = len(logits) // tokens.num_sequences, 0.0
    for start in range(0, len(logits), length):
        part = slice(start, start + length)
        total += sum(real[part]) * loop_load_balance(probability[part], chosen[part], real[part])
    return total / sum(real)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", SCORES)
def test_load_balance_loss_matches_a_plain_loop(score: str, scope: str, padded: bool) -> None:
    router, hidden = make_router(score=score, scope=scope), make_hidden(3, 6)
    tokens = Tokens(num_sequences=3, padding_T=make_padding(3, 6) if padded else None)
    actual = router(hidden, tokens).losses["load_balance"].item()
    assert actual == pytest.approx(loop_loss(router, hidden, tokens), rel=1e-12)


def test_the_loss_counts_what_the_scores_choose_without_the_bias() -> None:
    hidden, tokens, values = make_hidden(2, 6), Tokens(num_sequences=2), []
    for bias in (0.0, 5.0):
        router = make_router(score="sigmoid", bias={"rule": "sign"})
        router.balance.bias_E[0] = bias
        values.append(router(hidden, tokens).losses["load_balance"].item())
    assert values[0] == values[1] == pytest.approx(loop_loss(router, hidden, tokens), rel=1e-12)


def test_the_coefficient_scales_and_zero_switches_off() -> None:
    hidden, tokens = make_hidden(1, 6), Tokens()
    one = make_router(load_balance=1.0, z=1.0)(hidden, tokens).losses
    other = make_router(load_balance=0.3, z=0.2)(hidden, tokens).losses
    assert other["load_balance"].item() == pytest.approx(0.3 * one["load_balance"].item(), rel=1e-12)
    assert other["z"].item() == pytest.approx(0.2 * one["z"].item(), rel=1e-12)
    assert make_router(load_balance=0.0, z=0.0)(hidden, tokens).losses == {}


@pytest.mark.parametrize("padded", [False, True])
def test_z_loss_matches_a_plain_loop(padded: bool) -> None:
    logits, padding = make_hidden(2, 5), make_padding(2, 5)
    rows = [row for row, out in zip(logits.tolist(), padding.tolist(), strict=True) if not (padded and out)]
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / len(rows)
    actual = z_loss(logits, ~padding if padded else None)
    assert actual.item() == pytest.approx(expected, rel=1e-12)


def test_z_loss_does_not_overflow() -> None:
    assert z_loss(torch.full((2, 4), 1e4), None).item() == pytest.approx(1e8, rel=1e-3)


def test_sequence_loss_is_the_mean_of_each_sequence_alone() -> None:
    hidden, router = make_hidden(4, 6), make_router()
    together = router(hidden, Tokens(num_sequences=4)).losses["load_balance"]
    alone = [router(part, Tokens()).losses["load_balance"] for part in hidden.split(6)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-13, atol=0)


# Gradients.


@pytest.mark.parametrize("padded", [False, True])
def test_losses_pass_finite_differences(padded: bool) -> None:
    real_T = ~make_padding(2, 4) if padded else None
    probability_TE = torch.rand(8, E, dtype=torch.float64, requires_grad=True)
    chosen_TE = torch.zeros(8, E, dtype=torch.int64).scatter_(1, torch.randint(0, E, (8, 1)), 1)
    load_E = torch.tensor([3, 0, 4, 1, 9])
    assert torch.autograd.gradcheck(lambda p: load_balance_loss(p, load_E, real_T), probability_TE)
    assert torch.autograd.gradcheck(lambda p: sequence_load_balance_loss(p, chosen_TE, 2, real_T), probability_TE)
    assert torch.autograd.gradcheck(lambda z: z_loss(z, real_T), probability_TE)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
@pytest.mark.parametrize("score", SCORES)
def test_router_losses_pass_finite_differences(score: str, scope: str) -> None:
    router, tokens = make_router(score=score, scope=scope, z=0.7), Tokens(num_sequences=2)
    hidden, weight = make_hidden(2, 3).requires_grad_(), router.weight.detach().clone().requires_grad_()

    def losses(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(functional_call(router, {"weight": w}, (h, tokens)).losses.values())

    assert torch.autograd.gradcheck(losses, (hidden, weight))


# Joining the main loss.


@pytest.mark.parametrize("share", [1.0, 0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)])
def test_attach_changes_nothing_forward_and_adds_the_share_backward(share: float | torch.Tensor) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    out = attach(x, x.pow(2).sum(), share)
    assert torch.equal(out, x)
    out.sin().sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos() + 2 * float(share) * x.detach(), rtol=1e-13, atol=0)


def test_attach_does_not_scale_with_the_main_loss() -> None:
    """The engine's divisor is in the share already."""
    w = torch.ones((), requires_grad=True)
    attach(torch.ones(2, requires_grad=True), 5 * w, 0.5).mul(1e6).sum().backward()
    assert w.grad.item() == 2.5


def test_attach_keeps_the_formats_of_both() -> None:
    x, w = torch.ones(2, dtype=torch.bfloat16, requires_grad=True), torch.ones((), requires_grad=True)
    out = attach(x, w * 0.001, 1.0)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert w.grad.item() == pytest.approx(0.001, rel=1e-6)  # not rounded to bfloat16


def test_several_losses_are_each_added_once_under_recomputation() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return attach(attach(x, x.pow(2).sum(), 0.5), x.pow(3).sum(), 0.5)

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    checkpoint(step, x, use_reentrant=False).sum().backward()
    assert x.grad.tolist() == [1 + 1 + 1.5, 1 + 2 + 6]


# Scopes over micro-batches, ranks and accumulation steps.


@pytest.mark.parametrize("padded", [False, True])
def test_shares_of_micro_batches_add_up_to_the_whole_batch(padded: bool) -> None:
    """For `sequence` and z: whatever the cut, with another number of real tokens in each part."""
    sequences, length = 4, 9
    hidden = make_hidden(sequences, length)
    padding = make_padding(sequences, length) if padded else torch.zeros(sequences * length, dtype=torch.bool)
    results = []
    for cut in ([4], [2, 2], [1, 3], [1, 1, 1, 1]):
        router, total, first = make_router(z=0.1), torch.zeros((), dtype=torch.float64), 0
        for part in cut:
            rows = slice(first * length, (first + part) * length)
            share = (~padding[rows]).sum().item() / (~padding).sum().item()
            losses = router(hidden[rows], Tokens(num_sequences=part, padding_T=padding[rows])).losses
            total = total + share * sum(losses.values())
            first += part
        total.backward()
        results.append((total.item(), router.weight.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-11, atol=1e-14)


def global_losses(parts: list[torch.Tensor]) -> list[tuple[float, torch.Tensor, list[int]]]:
    """This rank's micro-batches, one after the other: share * loss, gradient so far, buffer."""
    router, results = make_router(scope="global_batch"), []
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    for hidden in parts:
        loss = router(hidden, Tokens(share=1 / len(parts) / num_ranks)).losses["load_balance"] / len(parts) / num_ranks
        loss.backward()
        results.append((loss.item(), router.weight.grad.clone(), router.balance.batch_load("load_balance").tolist()))
    return results


def global_losses_of_rank(parts_of_rank: list[list[torch.Tensor]]) -> list[tuple[float, torch.Tensor, list[int]]]:
    return global_losses(parts_of_rank[dist.get_rank()])


def test_global_batch_over_two_ranks_is_one_rank_with_everything() -> None:
    hidden = make_hidden(2, 8)
    [(loss, grad, load)] = global_losses([hidden])
    ranks = run_ranks(2, global_losses_of_rank, [[part] for part in hidden.split(8)])
    assert sum(part for [(part, _, _)] in ranks) == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(sum(part for [(_, part, _)] in ranks), grad, rtol=1e-11, atol=1e-14)
    assert [buffer for [(_, _, buffer)] in ranks] == [load, load]
    assert sum(load[:-1]) == 16 * K
    assert load[-1] == 16


def test_early_micro_batches_see_partial_loads() -> None:
    """The buffer of arXiv 2501.11873, Algorithm 1, over two ranks and two accumulation steps."""
    a, b, c, d = make_hidden(4, 8).split(8)
    ranks = run_ranks(2, global_losses_of_rank, [[a, b], [c, d]])
    probability = {id(x): (x @ make_router().weight.detach().T).softmax(1) for x in (a, b, c, d)}

    def load(*parts: torch.Tensor) -> list[int]:
        chosen = torch.cat([probability[id(x)].topk(K, 1).indices.flatten() for x in parts])
        return [*chosen.bincount(minlength=E).tolist(), 8 * len(parts)]  # the last is the number of tokens

    def expected(x: torch.Tensor, seen: list[int]) -> float:
        fraction = [E * count / sum(seen[:-1]) for count in seen[:-1]]
        return sum(f * p for f, p in zip(fraction, probability[id(x)].mean(0).tolist(), strict=True)) / 4

    for rank, (first, second) in enumerate([(a, b), (c, d)]):
        (first_loss, _, first_buffer), (second_loss, _, second_buffer) = ranks[rank]
        assert (first_buffer, second_buffer) == (load(a, c), load(a, b, c, d))
        assert first_loss == pytest.approx(expected(first, load(a, c)), rel=1e-12)
        assert second_loss == pytest.approx(expected(second, load(a, b, c, d)), rel=1e-12)


def test_recomputation_sees_the_loads_of_the_forward() -> None:
    grads = []
    for recompute in (False, True):
        router = make_router(scope="global_batch")

        def loss(hidden: torch.Tensor, router: nn.Module = router) -> torch.Tensor:
            return router(hidden, Tokens()).losses["load_balance"]

        for hidden in make_hidden(2, 8).requires_grad_().split(8):
            (checkpoint(loss, hidden, use_reentrant=False) if recompute else loss(hidden)).backward()
        grads.append(router.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)
