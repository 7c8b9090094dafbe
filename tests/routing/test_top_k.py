"""Top-k routing against plain loops: selection, weights, gradients, counts, padding, number formats.

Shape letters: T tokens, H hidden, E experts, K experts per token, P pairs.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from moe_dist import MoELayer
from moe_dist.config.routing import RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.routing import Routing, Tokens, build_router

H, E, K, T = 5, 6, 3, 12
ALL_LOSSES = {"load_balance": {"coefficient": 0.1, "scope": "sequence"}, "z": {"coefficient": 0.01}}
SIGN = {"rule": "sign"}


def make_router(seed: int = 0, **routing: Any) -> nn.Module:
    config = RoutingConfig.model_validate({"top_k": K, "init_std": 1.0, **routing})
    router = build_router(H, E, config)
    router.initialise(seed, "moe")
    return router.double()


def make_hidden(seed: int = 1, tokens: int = T) -> torch.Tensor:
    return torch.randn(tokens, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pairs_of(routing: Routing) -> dict[tuple[int, int], float]:
    return {
        (t, e): w
        for t, e, w in zip(routing.token_P.tolist(), routing.expert_P.tolist(), routing.weight_P.tolist(), strict=True)
    }


def expected_pairs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: list[float], config: RoutingConfig
) -> dict[tuple[int, int], float]:
    """The formulas, one number at a time."""
    pairs = {}
    for t, x in enumerate(hidden.tolist()):
        logits = [sum(a * b for a, b in zip(x, row, strict=True)) for row in weight.tolist()]
        if config.score == "sigmoid":
            scores = [1 / (1 + math.exp(-z)) for z in logits]
        else:
            scores = [math.exp(z) / sum(map(math.exp, logits)) for z in logits]
        chosen = sorted(range(len(logits)), key=lambda e: -(scores[e] + bias[e]))[: config.top_k]
        raw = {e: math.exp(logits[e]) if config.score == "softmax_top_k" else scores[e] for e in chosen}
        divisor = sum(raw.values()) if config.renormalise or config.score == "softmax_top_k" else 1.0
        pairs |= {(t, e): config.scaling_factor * raw[e] / divisor for e in chosen}
    return pairs


VARIANTS = [
    pytest.param({"score": score, "renormalise": renormalise, "scaling_factor": factor}, id=f"{score}-{renormalise}")
    for score, renormalise, factor in [
        ("softmax", False, 1.0),
        ("softmax", True, 2.5),
        ("softmax_top_k", False, 1.0),
        ("sigmoid", False, 0.5),
        ("sigmoid", True, 2.5),
    ]
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("biased", [False, True])
def test_pairs_and_weights_match_a_plain_loop(variant: dict[str, Any], biased: bool) -> None:
    router = make_router(**variant, bias=SIGN)
    if biased:
        router.balance.bias_E.copy_(torch.tensor([0.5, -0.5, 0.25, 0.0, -0.125, -0.125]))
    routing = router(make_hidden(), Tokens())
    expected = expected_pairs(make_hidden(), router.weight, router.balance.bias_E.tolist(), router.routing)
    assert pairs_of(routing) == pytest.approx(expected, rel=1e-12)


def test_pairs_stand_in_token_order_and_load_counts_them() -> None:
    routing = make_router()(make_hidden(), Tokens())
    assert routing.token_P.tolist() == sorted(routing.token_P.tolist())
    assert routing.load_E.dtype == torch.int64
    assert routing.load_E.tolist() == [routing.expert_P.tolist().count(e) for e in range(E)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_selection_sees_the_bias_and_the_weights_do_not(variant: dict[str, Any]) -> None:
    router = make_router(**variant, bias=SIGN)
    free = pairs_of(router(make_hidden(), Tokens()))
    router.balance.bias_E[:K] = 10.0  # the first K experts, whatever the scores say
    forced = router(make_hidden(), Tokens())
    assert forced.expert_P.view(T, K).sort().values.tolist() == [list(range(K))] * T
    router.balance.bias_E[:K] = 20.0  # the same choice
    assert torch.equal(router(make_hidden(), Tokens()).weight_P, forced.weight_P)
    if not variant["renormalise"] and variant["score"] != "softmax_top_k":
        shared = free.keys() & pairs_of(forced).keys()
        assert shared
        assert {p: free[p] for p in shared} == {p: pairs_of(forced)[p] for p in shared}


def test_no_bias_rule_means_that_the_bias_is_not_used() -> None:
    router = make_router()
    before = pairs_of(router(make_hidden(), Tokens()))
    router.balance.bias_E[0] = 10.0
    assert pairs_of(router(make_hidden(), Tokens())) == before


def test_no_gradient_reaches_the_bias() -> None:
    router = make_router(score="sigmoid", bias=SIGN, losses=ALL_LOSSES)
    bias = router.balance.bias_E.clone().requires_grad_()
    router.balance.bias_E = bias
    routing = router(make_hidden(), Tokens())
    (routing.weight_P.sum() + sum(routing.losses.values())).backward()
    assert bias.grad is None
    assert not routing.expert_P.requires_grad
    assert not routing.load_E.requires_grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_that_of_the_scores_at_a_fixed_choice(variant: dict[str, Any]) -> None:
    """Neither the indices nor the bias take part in it: it is the same where the choice is a constant."""
    router = make_router(**variant, bias=SIGN)
    router.balance.bias_E.copy_(torch.linspace(-0.3, 0.3, E))
    hidden = make_hidden().requires_grad_()
    routing = router(hidden, Tokens())
    direction = torch.randn(T * K, dtype=torch.float64)
    actual = torch.autograd.grad(routing.weight_P @ direction, [hidden, router.weight])

    logits = (hidden @ router.weight.T).gather(1, routing.expert_P.view(T, K))
    if variant["score"] == "softmax":
        logits = logits - (hidden @ router.weight.T).logsumexp(1, keepdim=True)
    raw = torch.sigmoid(logits) if variant["score"] == "sigmoid" else logits.exp()
    if variant["renormalise"] or variant["score"] == "softmax_top_k":
        raw = raw / raw.sum(1, keepdim=True)
    weights = variant["scaling_factor"] * raw.flatten()
    torch.testing.assert_close(weights, routing.weight_P, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(weights @ direction, [hidden, router.weight])
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_pass_finite_differences(variant: dict[str, Any]) -> None:
    router = make_router(**variant, bias=SIGN)
    hidden, weight = make_hidden(tokens=4).requires_grad_(), router.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: functional_call(router, {"weight": w}, (h, Tokens())).weight_P, (hidden, weight)
    )


def test_softmax_over_the_chosen_is_softmax_over_all_renormalised() -> None:
    grads, weights = [], []
    for variant in ({"score": "softmax_top_k"}, {"score": "softmax", "renormalise": True}):
        router, hidden = make_router(**variant), make_hidden().requires_grad_()
        routing = router(hidden, Tokens())
        (routing.weight_P**2).sum().backward()
        weights.append(routing.weight_P)
        grads.append((hidden.grad, router.weight.grad))
    torch.testing.assert_close(*weights, rtol=1e-13, atol=0)
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("top_k", [1, E])
def test_extreme_top_k(top_k: int) -> None:
    routing = make_router(top_k=top_k)(make_hidden(), Tokens())
    assert len(routing.token_P) == T * top_k
    if top_k == E:
        assert routing.load_E.tolist() == [T] * E
        torch.testing.assert_close(routing.weight_P.view(T, E).sum(1), torch.ones(T, dtype=torch.float64))


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_no_tokens_at_all(scope: str) -> None:
    losses = {"load_balance": {"coefficient": 1.0, "scope": scope}, "z": {"coefficient": 1.0}}
    router = make_router(losses=losses)
    routing = router(make_hidden(tokens=0), Tokens())
    (routing.weight_P.sum() + sum(routing.losses.values())).backward()
    assert routing.load_E.tolist() == [0] * E
    assert {name: loss.item() for name, loss in routing.losses.items()} == {"load_balance": 0.0, "z": 0.0}
    assert router.weight.grad.tolist() == [[0.0] * H] * E


# Counting.


class Block(nn.Module):
    """A layer inside something that is checkpointed as a whole."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(H, dtype=torch.float64), layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.layer(self.norm(hidden))


def make_block() -> Block:
    losses = {"load_balance": {"coefficient": 0.1, "scope": "global_batch"}}
    capacity = {"factor": 0.5}
    routing = RoutingConfig.model_validate({"top_k": K, "bias": SIGN, "losses": losses, "capacity": capacity})
    layer = MoELayer(H, MoEConfig(num_experts=E, ffn_size=4), routing)
    layer.initialise(seed=0, name="moe", std=0.5)
    return Block(layer.double())


def counters(block: Block) -> list[list[int]]:
    balance = block.layer.router.balance
    return [getattr(balance, name).tolist() for name in ("load_E", "dropped_E", "batch_load_balance", "tokens")]


def train_micro_batches(around: str, forwards: list[int] | None = None) -> Block:
    """Two micro-batches of one optimiser step; `forwards` gets an entry for each forward of the router."""
    block = make_block()
    if forwards is not None:
        block.layer.router.register_forward_hook(lambda *_: forwards.append(1))
    for seed in range(2):
        hidden = make_hidden(seed).view(2, -1, H).requires_grad_()
        if around == "layer":
            out = hidden + checkpoint(block.layer, block.norm(hidden), use_reentrant=False)
        elif around == "block":
            out = checkpoint(block, hidden, use_reentrant=False)
        elif around == "nested":
            out = checkpoint(lambda h: checkpoint(block, h, use_reentrant=False), hidden, use_reentrant=False)
        else:
            out = block(hidden)
        out.square().sum().backward()
    return block


@pytest.mark.parametrize("around", ["layer", "block", "nested"])
def test_recomputation_is_not_counted_again(around: str) -> None:
    forwards: list[int] = []
    plain, recomputed = train_micro_batches("nothing"), train_micro_batches(around, forwards)
    assert len(forwards) > 2  # there was recomputation
    assert counters(recomputed) == counters(plain)
    load, dropped, (*batch_load, batch_tokens), tokens = counters(plain)
    assert sum(load) == sum(batch_load) == 2 * T * K
    assert tokens == batch_tokens == 2 * T
    assert sum(dropped) > 0
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14, msg=name)


def test_evaluation_and_no_grad_touch_no_state() -> None:
    block = train_micro_batches("nothing")
    before, bias = counters(block), block.layer.router.balance.bias_E.clone()
    block.eval()
    block(make_hidden(7)).sum().backward()
    with torch.no_grad():
        block(make_hidden(8))
        block.train()
        block(make_hidden(9))
    with torch.inference_mode():
        block(make_hidden(9))
    assert counters(block) == before
    assert torch.equal(block.layer.router.balance.bias_E, bias)


def test_evaluation_drops_nothing_and_has_no_losses() -> None:
    router = make_router(losses=ALL_LOSSES, capacity={"factor": 0.2, "pad": True}).eval()
    routing = router(make_hidden(), Tokens())
    assert (routing.losses, routing.dropped_E, routing.pairs_per_expert) == ({}, None, None)
    assert len(routing.token_P) == T * K


# Padding.


def some_padding() -> torch.Tensor:
    return torch.tensor([False, True, False, False, False, True, True, False, False, False, False, True])


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_padding_counts_nowhere(scope: str) -> None:
    """All but the numbering is as if the padded tokens were not there, gradients too."""
    losses = {"load_balance": {"coefficient": 0.5, "scope": scope}, "z": {"coefficient": 0.1}}
    padding, results = some_padding(), []
    for hidden, tokens in [
        (make_hidden(), Tokens(padding_T=padding)),
        (make_hidden()[~padding], Tokens()),
    ]:
        router = make_router(score="sigmoid", bias=SIGN, losses=losses)
        routing = router(hidden, tokens)
        ((routing.weight_P**2).sum() + sum(routing.losses.values())).backward()
        results.append((routing, router.weight.grad, router.balance.load_E))
    (padded, padded_grad, padded_load), (short, short_grad, short_load) = results
    assert padded.token_P.tolist() == (~padding).nonzero().squeeze(1)[short.token_P].tolist()
    assert padded.expert_P.tolist() == short.expert_P.tolist()
    assert padded.load_E.tolist() == short.load_E.tolist() == padded_load.tolist() == short_load.tolist()
    torch.testing.assert_close(padded.weight_P, short.weight_P, rtol=1e-13, atol=0)
    torch.testing.assert_close(padded.losses, short.losses, rtol=1e-13, atol=0)
    torch.testing.assert_close(padded_grad, short_grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("filling", [1e3, math.inf, math.nan])
def test_what_padding_holds_does_not_matter(filling: float) -> None:
    padding, results = some_padding(), []
    for value in (0.0, filling):
        router = make_router(score="sigmoid", losses=ALL_LOSSES)
        hidden = make_hidden().masked_fill(padding[:, None], value)
        routing = router(hidden, Tokens(padding_T=padding, num_sequences=2))
        results.append((routing.weight_P, routing.expert_P, routing.load_E, routing.losses))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_nothing_but_padding() -> None:
    router = make_router(losses=ALL_LOSSES)
    routing = router(make_hidden(), Tokens(padding_T=torch.ones(T, dtype=torch.bool), num_sequences=2))
    (routing.weight_P.sum() + sum(routing.losses.values())).backward()
    assert len(routing.token_P) == 0
    assert all(loss.item() == 0 for loss in routing.losses.values())
    assert not router.weight.grad.any()


# Number formats.


@pytest.mark.parametrize("score", ["softmax", "softmax_top_k", "sigmoid"])
@pytest.mark.parametrize(
    ("hidden_dtype", "score_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_score_arithmetic_is_float32_or_float64(
    score: str, hidden_dtype: torch.dtype, score_dtype: torch.dtype
) -> None:
    """Weights and losses are those of the same numbers in the wider format, to its precision."""
    router = make_router(score=score, losses=ALL_LOSSES).to(hidden_dtype)
    hidden = make_hidden().to(hidden_dtype)
    routing = router(hidden, Tokens(num_sequences=2))
    exact = router.double()(hidden.double(), Tokens(num_sequences=2))
    assert routing.expert_P.tolist() == exact.expert_P.tolist()
    numbers = [routing.weight_P, *routing.losses.values()]
    assert {number.dtype for number in numbers} == {score_dtype}
    tolerance = 1e-13 if score_dtype == torch.float64 else 2e-6
    for number, right in zip(numbers, [exact.weight_P, *exact.losses.values()], strict=True):
        torch.testing.assert_close(number.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_autocast_does_not_reach_the_router(scope: str) -> None:
    losses = {"load_balance": {"coefficient": 0.1, "scope": scope}, "z": {"coefficient": 0.1}}
    results = []
    for enabled in (False, True):
        router, hidden = make_router(losses=losses).float(), make_hidden().float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            routing = router(hidden, Tokens(num_sequences=2))
        (routing.weight_P.sum() + sum(routing.losses.values())).backward()
        results.append((routing.weight_P, routing.losses, hidden.grad, router.weight.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.double, nn.Module.bfloat16])
def test_casts_leave_bias_and_counters_as_they_are(cast: Any) -> None:
    block = train_micro_batches("nothing").float()
    balance = block.layer.router.balance
    balance.bias_E.copy_(torch.tensor([1 + 1e-6, -1e-3, 1 / 3, 0.0, 1e-9, -0.1]))
    before = {name: buffer.clone() for name, buffer in balance.named_buffers()}
    cast(block)
    assert block.norm.weight.dtype == cast(torch.nn.Linear(1, 1)).weight.dtype
    after = dict(balance.named_buffers())
    assert {name: buffer.dtype for name, buffer in after.items()} == {
        name: torch.float32 if name == "bias_E" else torch.int64 for name in before
    }
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_counting_goes_on_after_a_cast() -> None:
    block = train_micro_batches("nothing")
    block.bfloat16().double()
    before = block.layer.router.balance.load_E.sum().item()
    block(make_hidden(5)).sum().backward()
    assert block.layer.router.balance.load_E.sum().item() == before + T * K


def test_the_bias_is_in_the_checkpoint_and_is_no_parameter() -> None:
    router = make_router(bias=SIGN)
    router.balance.bias_E.copy_(torch.arange(E))
    assert list(router.state_dict()) == ["weight", "balance.bias_E"]
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    other = make_router(seed=9, bias=SIGN)
    other.load_state_dict(router.state_dict())
    assert pairs_of(other(make_hidden(), Tokens())) == pairs_of(router(make_hidden(), Tokens()))


@pytest.mark.parametrize("capacity", [None, {"factor": 0.5}])
def test_routing_does_not_look_ahead(capacity: dict[str, Any] | None) -> None:
    """What later tokens hold changes neither the pairs nor the weights of the earlier ones."""
    router, hidden = make_router(capacity=capacity), make_hidden()
    changed = torch.cat([hidden[:7], make_hidden(99)[7:]])
    early = [
        {pair: weight for pair, weight in pairs_of(router(h, Tokens())).items() if pair[0] < 7}
        for h in (hidden, changed)
    ]
    assert early[0] == early[1]


def test_a_token_is_routed_alike_in_any_company() -> None:
    router, hidden = make_router(score="sigmoid", bias=SIGN), make_hidden()
    together = router(hidden, Tokens()).expert_P.view(T, K)
    alone = torch.stack([router(hidden[t : t + 1], Tokens()).expert_P for t in range(T)])
    halves = torch.cat([router(half, Tokens()).expert_P for half in hidden.split(T // 2)]).view(T, K)
    assert all(a.tolist() == b.tolist() for a, b in itertools.combinations([together, alone, halves], 2))
