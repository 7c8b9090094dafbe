"""Logits, scores, group limits and weights, against plain loops and the routers of Hugging Face transformers.

Shape letters: T tokens, H hidden, E experts, K experts per token.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from moe_dist import MoELayer
from moe_dist.config.routing import ExpertGroupsConfig, RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.routing import Tokens, build_router
from moe_dist.routing.random import key_of, uniform
from moe_dist.routing.scores import combine_weights, expert_scores, limit_to_groups, weights_beside
from moe_dist.routing.types import Choice
from tests.support.precision import float32_means_float64

H, E, K, T = 6, 8, 3, 40


def make_router(num_experts: int = E, **routing: Any) -> nn.Module:
    config = RoutingConfig.model_validate({"top_k": K, "init_std": 1.0, **routing})
    return build_router(H, num_experts, config).double()


def make_hidden(tokens: int = T, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logits_of(router: nn.Module, hidden: torch.Tensor, **tokens: Any) -> torch.Tensor:
    return router.logits(hidden, Tokens(**tokens)).detach()


# Logits.


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_logits_match_a_plain_loop(similarity: str, biased: bool, temperature: float) -> None:
    router = make_router(similarity=similarity, router_bias=biased, temperature=temperature)
    bias = [0.0] * E
    if biased:
        assert not router.bias.any()
        bias = torch.linspace(-1, 1, E, dtype=torch.float64).tolist()
        router.bias.data.copy_(torch.tensor(bias, dtype=torch.float64))
    for x, logits in zip(make_hidden(5).tolist(), logits_of(router, make_hidden(5)).tolist(), strict=True):
        for w, b, logit in zip(router.weight.tolist(), bias, logits, strict=True):
            value = sum(a * c for a, c in zip(x, w, strict=True))
            if similarity == "cosine":
                value /= math.hypot(*x) * math.hypot(*w)
            assert logit == pytest.approx((value + b) / temperature, abs=1e-12)


def test_cosines_do_not_depend_on_lengths() -> None:
    router = make_router(similarity="cosine", temperature=0.1)
    logits = logits_of(router, make_hidden())
    torch.testing.assert_close(logits_of(router, make_hidden() * 1e3), logits, rtol=1e-12, atol=1e-12)
    router.weight.data *= 1e-3
    torch.testing.assert_close(logits_of(router, make_hidden()), logits, rtol=1e-12, atol=1e-12)
    assert logits.abs().max() <= 10
    assert not logits_of(router, torch.zeros(2, H, dtype=torch.float64)).any()


def test_normalised_logits_have_the_chosen_deviation() -> None:
    """Whatever the scale and the mean were, and in the same order."""
    router = make_router(logit_normalisation=1.7, router_bias=True)
    router.bias.data.fill_(5)
    raw = make_hidden() @ router.weight.T + 5
    logits = logits_of(router, make_hidden())
    for before, after in zip(raw.tolist(), logits.tolist(), strict=True):
        mean, deviation = statistics.fmean(before), statistics.pstdev(before)
        assert after == pytest.approx([1.7 * (z - mean) / deviation for z in before], abs=1e-9)
    router.bias.data.zero_()
    torch.testing.assert_close(
        logits_of(router, make_hidden() * 50), logits_of(router, make_hidden()), rtol=1e-9, atol=0
    )
    assert not logits_of(router, torch.zeros(2, H, dtype=torch.float64)).any()  # equal logits stay equal


VARIANTS: dict[str, dict[str, Any]] = {
    "cosine": {"similarity": "cosine", "temperature": 0.3},
    "bias": {"router_bias": True, "temperature": 2.0},
    "normalised": {"logit_normalisation": 1.5},
    "sqrt_softplus": {"score": "sqrt_softplus", "renormalise": True, "scaling_factor": 1.5},
    "jitter": {"input_jitter": 0.2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_pass_finite_differences(variant: str) -> None:
    router = make_router(**VARIANTS[variant])
    names, parameters = zip(*router.named_parameters(), strict=True)
    inputs = [make_hidden(3), *(p.detach().clone() for p in parameters)]

    def weights(hidden: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return functional_call(router, dict(zip(names, values, strict=True)), (hidden, Tokens())).weight_P

    assert torch.autograd.gradcheck(weights, [value.requires_grad_() for value in inputs])


# Scores.


def test_sqrt_softplus_and_its_slope() -> None:
    logits = torch.linspace(-30, 30, 13, dtype=torch.float64, requires_grad=True)
    scores = expert_scores(logits[:, None], "sqrt_softplus")[:, 0]
    assert scores.tolist() == pytest.approx([math.sqrt(math.log1p(math.exp(z))) for z in logits.tolist()], rel=1e-12)
    scores.sum().backward()
    slopes = [1 / (1 + math.exp(-z)) / (2 * math.sqrt(math.log1p(math.exp(z)))) for z in logits.tolist()]
    assert logits.grad.tolist() == pytest.approx(slopes, rel=1e-8)  # torch's softplus is linear from 20 on


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_scores_and_their_slopes_are_finite_at_any_logit(score: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[-1e4, 1e4, 0.0, -200.0], [-1e4] * 4, [1e4] * 4], dtype=dtype, requires_grad=True)
    scores = expert_scores(logits, score)
    scores.square().sum().backward()
    assert scores.isfinite().all()
    assert logits.grad.isfinite().all()


# Weights.


def test_llama_weights_act_on_the_input() -> None:
    """SwiGLU experts are not linear, so that it is not the same as a weight on the output."""
    routing = {"top_k": 1, "score": "sigmoid", "weight_on": "input", "init_std": 1.0}
    layer = MoELayer(H, MoEConfig(num_experts=E, ffn_size=5), RoutingConfig.model_validate(routing)).double()
    layer.initialise(0, "moe", std=0.5)
    assert layer.router(make_hidden(), Tokens()).weight_on == "input"
    expected, by_output = [], []
    for x in make_hidden():
        logits = layer.router.weight @ x
        expert, weight = int(logits.argmax()), logits.max().sigmoid()
        gate, up, down = layer.experts.weights_of(expert, lambda p: p.detach()).values()

        def ffn(y: torch.Tensor, gate: torch.Tensor = gate, up: torch.Tensor = up, down: torch.Tensor = down) -> Any:
            return (nn.functional.silu(y @ gate) * (y @ up)) @ down

        expected.append(ffn(x * weight))
        by_output.append(ffn(x) * weight)
    out = layer(make_hidden())
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-11, atol=1e-12)
    assert (out - torch.stack(by_output)).abs().max() > 0.01


# Gradients of few chosen experts.


def plain_weights(logits: torch.Tensor, chosen: torch.Tensor, score: str, renormalise: bool) -> torch.Tensor:
    """By operators of torch on all logits, so with dense gradients."""
    scores = {
        "softmax": lambda: logits.softmax(1),
        "softmax_top_k": lambda: logits.exp(),
        "sigmoid": logits.sigmoid,
        "sqrt_softplus": lambda: nn.functional.softplus(logits).sqrt(),
    }[score]()
    raw = scores.gather(1, chosen)
    return raw / raw.sum(1, keepdim=True) if renormalise or score == "softmax_top_k" else raw


MANY = 4 * K
"""The fewest experts for which K are few."""


@pytest.mark.parametrize("num_experts", [MANY - 1, MANY])
@pytest.mark.parametrize(
    ("score", "renormalise"),
    [
        ("softmax", False),
        ("softmax", True),
        ("softmax_top_k", False),
        ("sigmoid", False),
        ("sigmoid", True),
        ("sqrt_softplus", True),
    ],
)
@pytest.mark.parametrize("extra", [{}, {"temperature": 0.5}, {"losses": {"z": {"coefficient": 0.3}}}])
def test_gradients_of_few_experts_are_those_of_all(
    num_experts: int, score: str, renormalise: bool, extra: dict[str, Any]
) -> None:
    """Also where a bias and a loss on all logits take part."""
    router = make_router(num_experts, score=score, renormalise=renormalise, router_bias=True, **extra)
    router.bias.data.copy_(torch.linspace(-1, 1, num_experts, dtype=torch.float64))
    inputs = [make_hidden().requires_grad_(), router.weight, router.bias]
    routing = router(inputs[0], Tokens())
    direction = torch.randn(T, K, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    loss = (routing.weight_P.view(T, K) * direction).sum() + sum(routing.losses.values())
    actual = torch.autograd.grad(loss, inputs)
    logits = (inputs[0] @ router.weight.T + router.bias) / router.routing.temperature
    weights = plain_weights(logits, routing.expert_P.view(T, K), score, renormalise)
    torch.testing.assert_close(routing.weight_P, weights.flatten(), rtol=1e-12, atol=0)
    expected = (weights * direction).sum() + router.routing.losses.z.coefficient * logits.logsumexp(1).square().mean()
    torch.testing.assert_close(actual, torch.autograd.grad(expected, inputs), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("num_experts", [MANY - 1, MANY])
def test_few_chosen_logits_have_a_sparse_gradient(num_experts: int) -> None:
    """And may be gathered more than once."""
    router, hidden, sparse = make_router(num_experts, score="softmax_top_k"), make_hidden().requires_grad_(), []
    order = torch.rand(T, num_experts, generator=torch.Generator().manual_seed(3)).argsort(1)
    chosen = [order[:, :K], order[:, :1]]
    for choices in (chosen[:1], chosen[1:], chosen):
        logits = router.logits(hidden, Tokens())
        logits.register_hook(lambda grad: sparse.append(grad.is_sparse))
        config = RoutingConfig(score="sigmoid")
        outputs = [combine_weights(logits, expert_scores(logits, "sigmoid"), Choice(c), config) for c in choices]
        actual = torch.autograd.grad(sum(out.square().sum() for out in outputs), [hidden, router.weight])
        plain = (hidden @ router.weight.T).sigmoid()
        expected = sum(plain.gather(1, c).square().sum() for c in choices)
        expected = torch.autograd.grad(expected, [hidden, router.weight])
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)
    assert sparse == [num_experts == MANY, True, num_experts == MANY]


def test_finite_logits_are_routed_even_if_their_sum_is_not() -> None:
    router = make_router().float()
    router.weight.data.fill_(3e38)
    hidden = torch.zeros(T, H)
    hidden[:, 0] = 1
    assert router.logits(hidden, Tokens()).sum() == math.inf
    assert len(router(hidden, Tokens()).weight_P) == T * K


# Jitter.


def test_jitter_multiplies_what_the_router_sees_in_training_only() -> None:
    router, index = make_router(input_jitter=0.3), torch.arange(100, 100 + T)
    router.initialise(7, "layers.2")
    tokens = Tokens(global_index_T=index, step=4)
    noise = uniform(key_of(7, "layers.2", "jitter"), 4, index, H)
    expected = make_router()
    expected.initialise(7, "layers.2")
    wanted = expected(make_hidden() * (0.7 + 0.6 * noise), Tokens())
    actual = router(make_hidden(), tokens)
    assert torch.equal(actual.expert_P, wanted.expert_P)
    torch.testing.assert_close(actual.weight_P, wanted.weight_P, rtol=1e-12, atol=0)
    calm = expected(make_hidden(), Tokens())
    assert not torch.equal(actual.expert_P, calm.expert_P)
    assert torch.equal(router.eval()(make_hidden(), tokens).weight_P, calm.weight_P)


def test_jitter_is_replayed_and_belongs_to_the_token_the_step_and_the_layer() -> None:
    router, hidden = make_router(input_jitter=0.3), make_hidden()

    def weights(step: int = 0, rows: slice = slice(None), name: str = "layers.0") -> torch.Tensor:
        router.initialise(0, name)
        router.weight.data.copy_(make_router().weight)
        tokens = Tokens(global_index_T=torch.arange(T)[rows], step=step)
        return router(hidden[rows], tokens).weight_P.view(-1, K)

    assert torch.equal(weights(), weights())
    torch.testing.assert_close(weights(rows=slice(10, 20)), weights()[10:20], rtol=1e-12, atol=0)
    assert (weights(step=1) != weights()).all()
    assert (weights(name="layers.1") != weights()).all()


# Group limits.


def loop_groups(selection: list[float], groups: ExpertGroupsConfig) -> set[int]:
    """Experts that a token may choose from."""
    size = len(selection) // groups.count
    members = [range(g * size, (g + 1) * size) for g in range(groups.count)]
    best = 1 if groups.score == "max" else 2
    worth = [sum(sorted((selection[e] for e in member), reverse=True)[:best]) for member in members]
    kept = sorted(range(groups.count), key=lambda g: -worth[g])[: groups.keep]
    return {e for g in kept for e in members[g]}


@pytest.mark.parametrize("count", [1, 2, 4, E])
@pytest.mark.parametrize("score", ["max", "top_2_sum"])
def test_groups_match_a_plain_loop(score: str, count: int) -> None:
    for keep in range(1, count + 1):
        groups = ExpertGroupsConfig(count=count, keep=keep, score=score)
        selection = torch.randn(T, E, generator=torch.Generator().manual_seed(count))
        limited = limit_to_groups(selection, groups)
        for row, values in zip(limited, selection.tolist(), strict=True):
            allowed = loop_groups(values, groups)
            assert row.tolist() == [value if e in allowed else -math.inf for e, value in enumerate(values)]


def test_an_excluded_expert_never_wins_against_negative_scores() -> None:
    """Scores plus bias of the kept groups are below 0, the value of a masked expert in the first code of DeepSeek-V3."""
    groups = {"count": 4, "keep": 2}
    router = make_router(score="sigmoid", bias={"rule": "sign"}, expert_groups=groups)
    router.balance.bias_E.fill_(-3)
    routing = router(make_hidden(), Tokens())
    chosen = routing.expert_P.view(T, K)
    assert ((chosen // 2).sort(1).values.diff(dim=1) > 0).sum(1).max() == 1  # K = 3 experts of 2 groups
    router.balance.bias_E.fill_(0)
    assert torch.equal(router(make_hidden(), Tokens()).expert_P, routing.expert_P)


def deepseek_v2() -> nn.Module:
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as model
    from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config

    sizes = {"hidden_size": H, "n_routed_experts": E, "num_experts_per_tok": K, "n_group": 4, "topk_group": 2}
    return model.DeepseekV2TopkRouter(
        DeepseekV2Config(**sizes, topk_method="group_limited_greedy", routed_scaling_factor=16.0, num_attention_heads=1)
    )


def deepseek_v3() -> nn.Module:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as model
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

    sizes = {"hidden_size": H, "n_routed_experts": E, "num_experts_per_tok": K, "n_group": 4, "topk_group": 2}
    return model.DeepseekV3TopkRouter(DeepseekV3Config(**sizes, routed_scaling_factor=2.5))


def deepseek_v4() -> nn.Module:
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as model
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    config = DeepseekV4Config(hidden_size=H, n_routed_experts=E, num_experts_per_tok=K, routed_scaling_factor=1.5)
    return model.DeepseekV4TopKRouter(config)


SIGN = {"bias": {"rule": "sign"}}
PUBLISHED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "DeepSeek-V2": (
        deepseek_v2,
        {"scaling_factor": 16.0, "expert_groups": {"count": 4, "keep": 2, "score": "max"}},
    ),
    "DeepSeek-V3": (
        deepseek_v3,
        {"score": "sigmoid", "renormalise": True, "scaling_factor": 2.5, "expert_groups": {"count": 4, "keep": 2}}
        | SIGN,
    ),
    "DeepSeek-V4": (deepseek_v4, {"score": "sqrt_softplus", "renormalise": True, "scaling_factor": 1.5} | SIGN),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_routers_of_transformers_choose_alike(name: str) -> None:
    pytest.importorskip("transformers")
    make_theirs, routing = PUBLISHED[name]
    ours, theirs, hidden = make_router(**routing), make_theirs().double(), make_hidden(200)
    theirs.weight.data.copy_(ours.weight)
    if "bias" in routing:
        ours.balance.bias_E.copy_(torch.linspace(-1.2, 0.4, E))
        theirs.e_score_correction_bias.copy_(ours.balance.bias_E)
    with float32_means_float64():
        _, their_weights, their_experts = theirs(hidden)
    mine = ours(hidden, Tokens())
    order = their_experts.argsort(1)
    experts, sorting = mine.expert_P.view(-1, K).sort(1)
    assert torch.equal(experts, their_experts.gather(1, order))
    torch.testing.assert_close(
        mine.weight_P.view(-1, K).gather(1, sorting), their_weights.gather(1, order), rtol=1e-11, atol=0
    )


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("score", ["softmax", "softmax_top_k", "sigmoid", "sqrt_softplus"])
def test_weights_beside_the_chosen(score: str, renormalise: bool) -> None:
    """The chosen keep theirs to the bit; another expert gets what it would have, were no weight but its own changed."""
    config = RoutingConfig(top_k=K, score=score, renormalise=renormalise, scaling_factor=1.5)
    logits_TE = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores_TE = expert_scores(logits_TE, score)
    choice = Choice(scores_TE.topk(K, dim=1).indices)
    weight_TK = combine_weights(logits_TE, scores_TE, choice, config)
    weight_TE = weights_beside(weight_TK, scores_TE, choice, config)
    assert torch.equal(weight_TE.gather(1, choice.expert_TK), weight_TK)
    per_score_T1 = (weight_TK / scores_TE.gather(1, choice.expert_TK))[:, :1]  # the same for all chosen
    torch.testing.assert_close(weight_TE, scores_TE * per_score_T1, rtol=1e-12, atol=0)
