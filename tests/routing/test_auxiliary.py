"""All auxiliary losses of a router: their value at perfect balance, the papers' scaling, plain loops, gradients, ranks.

Shape letters: T tokens, H hidden, E experts, K experts per token, D groups of experts, M groups that a token is sent to.
"""

import math
import statistics
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

from moe_dist.config.routing import RoutingConfig
from moe_dist.routing import Tokens, build_router
from moe_dist.routing.balance import sum_over_ranks
from moe_dist.routing.losses import orthogonality_loss, simbal_loss, squared_cv
from tests.support.distributed import run_ranks

H, E, K, D = 5, 8, 3, 4
SCOPES = ["micro_batch", "sequence", "global_batch"]
BALANCE = ["load_balance", "device", "communication"]


def make_router(losses: dict[str, Any], num_experts: int = E, hidden: int = H, **routing: Any) -> nn.Module:
    group = dist.group.WORLD if dist.is_initialized() else None
    settings = {"top_k": K, "init_std": 1.0, "expert_groups": {"count": D}, "losses": losses, **routing}
    return build_router(hidden, num_experts, RoutingConfig.model_validate(settings), group).double()


def make_hidden(tokens: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Perfect balance.

SHAPES = [(2, 2, 1, 1), (4, 2, 1, 2), (8, 4, 2, 1), (8, 4, 2, 2), (12, 3, 3, 2), (16, 4, 4, 4)]
"""E, D, M, and K / M: experts that a token takes of each of its groups."""


def balanced(num_experts: int, groups: int, sent: int, each: int) -> torch.Tensor:
    """Logits [E, E] of tokens that take `each` experts of exactly `sent` groups, in perfect balance.

    Every expert stands at every place in the tokens' order of preference equally often, so that mean scores are equal too.
    """
    size = num_experts // groups
    logits = torch.full((num_experts, num_experts), -2.0, dtype=torch.float64)
    for token in range(num_experts):
        group, place = divmod(token, size)
        for rank in range(sent * each):
            expert = (group + rank // each) % groups * size + (place + rank % each) % size
            logits[token, expert] = 2 - rank / num_experts
    return logits


def losses_at_balance(shape: tuple[int, int, int, int], losses: dict[str, Any], **routing: Any) -> dict[str, float]:
    num_experts, groups, sent, each = shape
    expert_groups = {"count": groups} | routing.pop("expert_groups", {})
    router = make_router(losses, num_experts, num_experts, top_k=sent * each, expert_groups=expert_groups, **routing)
    router.weight.data.copy_(torch.eye(num_experts))
    hidden = balanced(*shape).repeat(2, 1)  # two sequences
    routing = router(hidden, Tokens(num_sequences=2))
    assert routing.load_E.tolist() == [2 * sent * each] * num_experts
    return {name: loss.item() for name, loss in routing.losses.items()}


@pytest.mark.parametrize("score", ["softmax", "softmax_top_k", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_perfect_balance_gives_the_coefficient(shape: tuple[int, int, int, int], scope: str, score: str) -> None:
    losses = {name: {"coefficient": 0.25, "scope": scope} for name in BALANCE}
    expected = pytest.approx(0.25, rel=1e-12)
    assert losses_at_balance(shape, losses, score=score) == dict.fromkeys(BALANCE, expected)
    first = {"load_balance": {"coefficient": 0.25, "scope": scope, "choices": "first"}}
    assert losses_at_balance(shape, first, score=score) == {"load_balance": expected}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scaling_of_the_papers(shape: tuple[int, int, int, int], scope: str) -> None:
    """Switch: as many times the coefficient as choices; GShard: 1 / E^2 of it; communication: by the limit M."""
    num_experts, groups, sent, each = shape
    losses: dict[str, Any] = {name: {"coefficient": 1.0, "scope": scope} for name in BALANCE}
    values = losses_at_balance(shape, losses | {"scaling": "paper"}, expert_groups={"keep": sent, "score": "max"})
    assert values["load_balance"] == pytest.approx(sent * each, rel=1e-12)
    assert values["device"] == pytest.approx(1, rel=1e-12)
    assert values["communication"] == pytest.approx(1, rel=1e-12)
    unlimited = losses_at_balance(shape, {"communication": losses["communication"], "scaling": "paper"})
    assert unlimited["communication"] == pytest.approx(sent / min(sent * each, groups), rel=1e-12)
    first = {"load_balance": losses["load_balance"] | {"choices": "first"}, "scaling": "paper"}
    assert losses_at_balance(shape, first)["load_balance"] == pytest.approx(1 / num_experts**2, rel=1e-12)


def test_similarity_losses_are_sums_in_the_papers_and_means_here() -> None:
    names = ("simbal", "orthogonality")
    losses: dict[str, Any] = {name: {"coefficient": 0.5} for name in names}
    mean, total = (
        make_router(losses | {"scaling": scaling})(make_hidden(), Tokens()).losses for scaling in ("uniform", "paper")
    )
    assert total["simbal"].item() == pytest.approx(E * E * mean["simbal"].item(), rel=1e-12)
    assert total["orthogonality"].item() == pytest.approx(E * (E - 1) * mean["orthogonality"].item(), rel=1e-12)


# Formulas.


def loop_balance(
    name: str, scores: list[list[float]], chosen: list[list[int]], choices: str, paper: float | None
) -> float:
    """Of one set of tokens: sum_i f_i P_i."""
    tokens, value = len(scores), 0.0
    if choices == "first":
        chosen = [sorted(range(E), key=lambda e, row=row: -row[e])[:1] for row in scores]
    width = 1 if name == "load_balance" else E // D
    kinds = [range(first, first + width) for first in range(0, E, width)]
    count = [sum(sum(e in kind for e in row) for row in chosen) for kind in kinds]
    if name == "communication":
        count = [sum(any(e in kind for e in row) for row in chosen) for kind in kinds]
    divisor = sum(count) if paper is None else paper * tokens
    for kind, number in zip(kinds, count, strict=True):
        probability = statistics.fmean(sum(row[e] for e in kind) / sum(row) for row in scores)
        value += len(kinds) * number / divisor * probability
    return value


@pytest.mark.parametrize("scaling", ["uniform", "paper"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("name", "choices"), [*((name, "all") for name in BALANCE), ("load_balance", "first")])
def test_balance_losses_match_plain_loops(
    name: str, choices: str, score: str, scope: str, padded: bool, scaling: str
) -> None:
    sequences, length = 3, 7
    setting = {"coefficient": 0.7, "scope": scope} | ({"choices": choices} if name == "load_balance" else {})
    router = make_router({name: setting, "scaling": scaling}, score=score)
    hidden = make_hidden(sequences * length)
    padding = torch.arange(sequences * length) % length >= torch.tensor([7, 4, 2]).repeat_interleave(length)
    real = ~padding if padded else torch.ones_like(padding)
    routing = router(hidden, Tokens(num_sequences=sequences, padding_T=padding if padded else None))

    logits = hidden @ router.weight.T
    scores = (logits.softmax(1) if score == "softmax" else logits.sigmoid()).tolist()
    chosen = [routing.expert_P[routing.token_P == t].tolist() for t in range(len(hidden))]
    paper = None
    if scaling == "paper" and name != "device":
        paper = K if name == "communication" else 1  # min(K, D) groups
    parts = [range(len(hidden))]
    if scope == "sequence":
        parts = [range(first, first + length) for first in range(0, len(hidden), length)]
    total = 0.0
    for part in parts:
        rows = [t for t in part if real[t]]
        args = ([scores[t] for t in rows], [chosen[t] for t in rows], choices, paper)
        total += len(rows) * loop_balance(name, *args)
    expected = 0.7 * total / real.sum().item()
    if scaling == "paper" and choices == "first":
        expected /= E**2
    assert routing.losses[name].item() == pytest.approx(expected, rel=1e-11)


def test_importance_matches_a_plain_loop() -> None:
    padding = torch.arange(12) % 4 == 1
    router = make_router({"importance": {"coefficient": 0.3}}, renormalise=True)
    routing = router(make_hidden(), Tokens(padding_T=padding))
    importance = [0.0] * E
    for expert, weight in zip(routing.expert_P.tolist(), routing.weight_P.tolist(), strict=True):
        importance[expert] += weight
    expected = 0.3 * statistics.pvariance(importance) / statistics.fmean(importance) ** 2
    assert routing.losses["importance"].item() == pytest.approx(expected, rel=1e-8)


def test_similarity_losses_match_plain_loops() -> None:
    weight = make_router({}).weight.detach()
    rows = weight.tolist()
    dot = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
    simbal = sum(abs(dot[i][j] - (i == j)) for i in range(E) for j in range(E))
    cosine = sum((dot[i][j] ** 2 / dot[i][i] / dot[j][j]) for i in range(E) for j in range(E) if i != j)
    assert simbal_loss(weight, mean=False).item() == pytest.approx(simbal, rel=1e-12)
    assert orthogonality_loss(weight, mean=False).item() == pytest.approx(cosine, rel=1e-12)


def test_the_least_of_losses_that_are_no_products() -> None:
    """0 for equal importance, and for a router weight with orthonormal rows."""
    assert squared_cv(torch.full((E,), 3.0)).item() == 0
    assert squared_cv(torch.zeros(E)).item() == 0
    basis = torch.linalg.qr(torch.randn(9, E, dtype=torch.float64)).Q.T
    assert simbal_loss(basis, mean=True).item() == pytest.approx(0, abs=1e-14)
    assert orthogonality_loss(7 * basis, mean=True).item() == pytest.approx(0, abs=1e-14)
    assert orthogonality_loss(torch.ones(1, 4), mean=True).item() == 0  # a single expert
    same_rows = torch.ones(3, 4, dtype=torch.float64)
    assert orthogonality_loss(same_rows, mean=True).item() == pytest.approx(1)


# Gradients.

GRADIENTS: dict[str, dict[str, Any]] = {
    **{
        f"{name} {scope} {scaling}": {name: {"coefficient": 0.3, "scope": scope}, "scaling": scaling}
        for name in BALANCE
        for scope in SCOPES
        for scaling in ("uniform", "paper")
    },
    **{
        f"first {scope}": {"load_balance": {"coefficient": 0.3, "scope": scope, "choices": "first"}} for scope in SCOPES
    },
    **{name: {name: {"coefficient": 0.3}} for name in ("importance", "z", "simbal", "orthogonality")},
}


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("losses", GRADIENTS)
def test_losses_pass_finite_differences(losses: str, score: str) -> None:
    router = make_router(GRADIENTS[losses], score=score)
    tokens = Tokens(num_sequences=2, padding_T=torch.arange(6) == 4)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        (value,) = functional_call(router, {"weight": weight}, (hidden, tokens)).losses.values()
        return value

    inputs = [make_hidden(6), router.weight.detach()]
    assert torch.autograd.gradcheck(loss, [value.clone().requires_grad_() for value in inputs])


# The adaptive coefficient.


def test_the_coefficient_follows_the_drop_rate() -> None:
    """Skywork-MoE: from its start value towards ratio * drop rate, at most the maximum."""
    adaptive = {"ratio": 0.5, "maximum": 0.1, "decay": 0.8}
    losses = {"load_balance": {"coefficient": 0.02, "scope": "micro_batch", "adaptive": adaptive}}
    router = make_router(losses, capacity={"factor": 0.9}, bias={"rule": "none"})
    plain = make_router({"load_balance": {"coefficient": 1.0, "scope": "micro_batch"}})
    coefficient, rates = 0.02, []
    for step in range(6):
        hidden = make_hidden(64, seed=step) + (2 if step % 2 else 0)
        routing = router(hidden, Tokens())
        expected = coefficient * plain(hidden, Tokens()).losses["load_balance"].item()
        assert routing.losses["load_balance"].item() == pytest.approx(expected, rel=1e-5)
        rates.append(routing.dropped_E.sum().item() / routing.load_E.sum().item())
        coefficient = 0.8 * coefficient + 0.2 * min(0.5 * rates[-1], 0.1)
        router.update(sum_over_ranks([router.balance], None)[0], 0.0)
        assert router.balance.coefficient.item() == pytest.approx(coefficient, rel=1e-5)
    assert 0.5 * min(rates) < 0.1 < 0.5 * max(rates)  # the maximum mattered, but not always
    assert "balance.coefficient" in router.state_dict()


def test_the_coefficient_falls_where_nothing_is_dropped() -> None:
    adaptive = {"decay": 0.5}
    losses = {"load_balance": {"coefficient": 0.04, "adaptive": adaptive}}
    router = make_router(losses, capacity={"factor": float(E)})
    for _ in range(3):
        router(make_hidden(), Tokens())
        router.update(sum_over_ranks([router.balance], None)[0], 0.0)
    assert router.balance.coefficient.item() == pytest.approx(0.005, rel=1e-5)


# Several ranks.


def losses_of_share(num_parts: int) -> dict[str, Any]:
    """Losses, their gradients by this rank's share, and the adapted coefficient."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    rows = torch.arange(24).split({1: [24], 2: [9, 15], 4: [2, 10, 1, 11]}[num_parts])[rank]
    losses: dict[str, Any] = {name: {"coefficient": 0.5, "scope": "global_batch"} for name in BALANCE}
    losses["load_balance"]["adaptive"] = {"decay": 0.5}
    losses |= {name: {"coefficient": 0.5} for name in ("importance", "z", "simbal", "orthogonality")}
    router = make_router(losses, score="sigmoid", capacity={"factor": 0.8}, group="rank")
    padding, share = torch.arange(24) % 5 == 2, (rows % 5 != 2).sum().item() / 19
    routing = router(make_hidden(24)[rows], Tokens(global_index_T=rows, padding_T=padding[rows], share=share))
    (share * sum(routing.losses.values())).backward()
    dropped = routing.dropped_E.sum().item()
    router.update(sum_over_ranks([router.balance], router.data_parallel_group)[0], 0.0)
    values = {name: loss.item() for name, loss in routing.losses.items()}
    return {
        "share": share,
        "losses": values,
        "gradient": router.weight.grad,
        "dropped": dropped,
        "coefficient": router.balance.coefficient.item(),
    }


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_together_have_the_losses_of_one_rank(num_ranks: int) -> None:
    """Importance is the same on every rank; means over tokens add up, weighted by the shares, and gradients do."""
    expected, results = losses_of_share(1), run_ranks(num_ranks, losses_of_share, num_ranks)
    for name, value in expected["losses"].items():
        total = sum(result["share"] * result["losses"][name] for result in results)
        assert total == pytest.approx(value, rel=1e-11)
    assert [result["losses"]["importance"] for result in results] == pytest.approx(
        [expected["losses"]["importance"]] * num_ranks, rel=1e-11
    )
    torch.testing.assert_close(
        sum(result["gradient"] for result in results), expected["gradient"], rtol=1e-10, atol=1e-13
    )
    rate = sum(result["dropped"] for result in results) / (19 * K)
    assert rate > 0
    coefficient = 0.5 * 0.5 + 0.5 * min(0.2 * rate, 0.01)
    assert [result["coefficient"] for result in results] == pytest.approx([coefficient] * num_ranks, rel=1e-6)


def test_a_rank_of_padding_alone_does_no_harm() -> None:
    """Its share is 0, by which the others' gradients are not divided."""
    for result in run_ranks(2, losses_beside_padding):
        assert math.isfinite(result)


def losses_beside_padding() -> float:
    router = make_router({"importance": {"coefficient": 1.0}})
    is_padding, real = dist.get_rank() == 1, 0.0 if dist.get_rank() == 1 else 1.0
    tokens = Tokens(padding_T=torch.full((12,), is_padding), share=real)
    loss = router(make_hidden(), tokens).losses["importance"]
    (real * loss).backward()
    assert bool(router.weight.grad.any()) != is_padding
    return router.weight.grad.abs().sum().item()
