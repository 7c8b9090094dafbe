"""Capacity against a plain loop: who is kept, with what weight, and that every drop is counted."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_dist import MoELayer
from moe_dist.config.schema import CapacityConfig, MoEConfig, RoutingConfig, SequenceGroup
from moe_dist.routing import Routing, Tokens, build_router
from moe_dist.routing.capacity import apply_capacity, capacity_of_group
from moe_dist.routing.top_k import count_per_expert

Pair = tuple[int, int, float]


@dataclasses.dataclass(frozen=True)
class Case:
    """Some pairs of `groups` routing groups, each of `length` tokens."""

    groups: int
    length: int
    experts: int
    pairs: list[Pair]
    factor: float

    @property
    def tokens(self) -> int:
        return self.groups * self.length


@st.composite
def cases(draw: Any) -> Case:
    """Tokens with 0 to E pairs, so that padding and expert choice are among them."""
    groups, length, experts = (draw(st.integers(1, most)) for most in (3, 8, 5))
    chosen = draw(st.lists(st.sets(st.integers(0, experts - 1)), min_size=groups * length, max_size=groups * length))
    weights = st.floats(0.01, 1.0)
    pairs = [(token, expert, draw(weights)) for token in range(groups * length) for expert in sorted(chosen[token])]
    return Case(groups, length, experts, pairs, draw(st.floats(0.1, 3.0)))


def random_case(seed: int = 0, groups: int = 2, length: int = 8, experts: int = 4, factor: float = 0.5) -> Case:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(groups * length, experts, generator=generator)
    chosen = score.topk(2, dim=1).indices.tolist()
    return Case(
        groups, length, experts, [(t, e, score[t, e].item()) for t, es in enumerate(chosen) for e in es], factor
    )


def routing_of(case: Case, weights: torch.Tensor | None = None) -> Routing:
    token_P, expert_P = (torch.tensor([pair[i] for pair in case.pairs], dtype=torch.int64) for i in (0, 1))
    weight_P = torch.tensor([pair[2] for pair in case.pairs], dtype=torch.float64) if weights is None else weights
    return Routing(token_P, expert_P, weight_P, load_E=count_per_expert(expert_P, case.experts))


def drop(case: Case, weights: torch.Tensor | None = None, **capacity: Any) -> Routing:
    config = CapacityConfig(factor=case.factor, **capacity)
    tokens = Tokens(num_sequences=2 * case.groups)  # two sequences a group
    return apply_capacity(routing_of(case, weights), config, 2, tokens, case.tokens, group_sequences=2)


def pairs_of(routing: Routing) -> list[Pair]:
    return list(zip(routing.token_P.tolist(), routing.expert_P.tolist(), routing.weight_P.tolist(), strict=True))


def room_of(case: Case) -> int:
    """ceil(factor k T / E) of one group, between 1 and T."""
    return max(1, min(case.length, math.ceil(case.factor * 2 * case.length / case.experts - 1e-9)))


def loop_kept(case: Case, policy: str) -> list[Pair]:
    kept = []
    for group in range(case.groups):
        for expert in range(case.experts):
            here = [pair for pair in case.pairs if pair[0] // case.length == group and pair[1] == expert]
            if policy == "weight":
                here.sort(key=lambda pair: -pair[2])  # stable: ties by position
            kept += here[: room_of(case)]
    return [pair for pair in case.pairs if pair in kept]


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from(["position", "weight"]))
@example(Case(1, 3, 2, [], 1.0), "weight")
@example(Case(1, 3, 2, [(0, 1, 0.5), (1, 1, 0.5), (2, 1, 0.5)], 0.4), "weight")  # ties
def test_the_kept_pairs_are_those_of_a_plain_loop(case: Case, policy: str) -> None:
    routing = drop(case, policy=policy)
    kept = loop_kept(case, policy)
    assert pairs_of(routing) == kept
    lost = [[p[1] for p in case.pairs].count(e) - [p[1] for p in kept].count(e) for e in range(case.experts)]
    assert routing.dropped_E.tolist() == lost
    kept_E = count_per_expert(routing.expert_P, case.experts)
    assert torch.equal(routing.dropped_E + kept_E, routing.load_E)
    assert torch.equal(routing.load_E, routing_of(case).load_E)  # loads are counted before the drop


@settings(deadline=None, max_examples=40)
@given(cases(), st.sampled_from(["position", "weight"]))
def test_renormalising_keeps_the_sum_of_every_token_that_has_an_expert_left(case: Case, policy: str) -> None:
    plain, scaled = pairs_of(drop(case, policy=policy)), pairs_of(drop(case, policy=policy, renormalise=True))
    assert [pair[:2] for pair in scaled] == [pair[:2] for pair in plain]
    for token in {pair[0] for pair in plain}:
        before = sum(pair[2] for pair in case.pairs if pair[0] == token)
        kept = sum(pair[2] for pair in plain if pair[0] == token)
        expected = [pair[2] * before / kept for pair in plain if pair[0] == token]
        assert [pair[2] for pair in scaled if pair[0] == token] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("policy", ["position", "weight"])
def test_gradient_passes_finite_differences(policy: str, renormalise: bool) -> None:
    case = random_case(length=4)
    weights = routing_of(case).weight_P.requires_grad_()
    capacity = {"policy": policy, "renormalise": renormalise}
    assert len(drop(case, weights, **capacity).token_P) < len(case.pairs)
    assert torch.autograd.gradcheck(lambda w: drop(case, w, **capacity).weight_P, weights)


def test_a_dropped_pair_gets_no_gradient() -> None:
    case = random_case()
    weights = routing_of(case).weight_P.requires_grad_()
    drop(case, weights).weight_P.sum().backward()
    kept = set(loop_kept(case, "position"))
    assert weights.grad.tolist() == [float(pair in kept) for pair in case.pairs]


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("policy", ["position", "weight"])
def test_with_room_for_every_token_nothing_changes(policy: str, renormalise: bool, pad: bool) -> None:
    case = dataclasses.replace(random_case(), factor=2.0)  # E / k
    routing = drop(case, policy=policy, renormalise=renormalise, pad=pad)
    assert [pair[:2] for pair in pairs_of(routing)] == [pair[:2] for pair in case.pairs]
    torch.testing.assert_close(routing.weight_P, routing_of(case).weight_P, rtol=1e-15, atol=0)
    assert routing.dropped_E.tolist() == [0] * case.experts


def test_each_group_decides_on_its_own() -> None:
    """What a group holds changes nothing of the other: this is why routing does not depend on the layout."""
    case, other = random_case(seed=0), random_case(seed=1)
    mixed = dataclasses.replace(
        case, pairs=[p for p in case.pairs if p[0] < case.length] + [p for p in other.pairs if p[0] >= case.length]
    )
    for policy in ("position", "weight"):
        first, second = (pairs_of(drop(c, policy=policy)) for c in (case, mixed))
        assert [p for p in first if p[0] < case.length] == [p for p in second if p[0] < case.length]


def test_one_group_gets_the_room_of_all_its_sequences() -> None:
    """All tokens to one expert: 4 sequences of 4 tokens as four groups keep 4 x 2, as one group 8 in token order."""
    case = Case(4, 4, 2, [(t, 0, 1.0) for t in range(16)], factor=0.5)
    tokens, config = Tokens(num_sequences=4), CapacityConfig(factor=0.5)
    kept = [
        apply_capacity(routing_of(case), config, 2, tokens, 16, sequences).token_P.tolist() for sequences in (1, 2, 4)
    ]
    assert kept[0] == [0, 1, 4, 5, 8, 9, 12, 13]
    assert kept[1] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert kept[2] == list(range(8))


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "factor", "room"),
    [
        (10, 4, 2, 1.0, 5),
        (10, 4, 2, 1.1, 6),  # 5.5
        (10, 4, 2, 1.2, 6),  # exactly 6, though 1.2 * 5 is no exact product
        (5, 3, 1, 1.0, 2),
        (30, 10, 1, 1.1, 4),  # 3.3000000000000003
        (100, 10, 1, 1.1, 11),  # 11.000000000000002 in floating point
        (4, 64, 1, 0.01, 1),  # never none
        (4, 2, 2, 50.0, 4),  # never more than tokens
    ],
)
def test_room_by_hand(tokens: int, experts: int, top_k: int, factor: float, room: int) -> None:
    assert capacity_of_group(tokens, experts, top_k, factor) == room


def test_padded_slots_are_the_room_of_all_groups() -> None:
    case = random_case(groups=3)
    assert drop(case, pad=True).pairs_per_expert == 3 * room_of(case)
    assert drop(case, pad=False).pairs_per_expert is None
    kept_E = count_per_expert(drop(case, pad=True).expert_P, case.experts)
    assert kept_E.max() <= 3 * room_of(case)


def test_the_router_applies_it_in_training_and_counts_the_drops() -> None:
    torch.manual_seed(0)
    config = RoutingConfig.model_validate({"top_k": 2, "init_std": 1.0, "capacity": {"factor": 0.75}})
    router, hidden = build_router(5, 4, config), torch.randn(16, 5)
    routing = router(hidden, Tokens(num_sequences=2))
    everything = router.eval()(hidden, Tokens(num_sequences=2))
    case = Case(2, 8, 4, pairs_of(everything), 0.75)
    assert pairs_of(routing) == loop_kept(case, "position")
    assert routing.dropped_E.sum() == 32 - len(routing.token_P) > 0
    assert torch.equal(router.balance.dropped_E, routing.dropped_E)
    assert torch.equal(router.balance.load_E, everything.load_E)


def test_padding_takes_no_room() -> None:
    """All tokens want expert 0; the two places of each sequence go to its first real tokens."""
    config = RoutingConfig.model_validate({"top_k": 1, "capacity": {"factor": 1.0}})
    router = build_router(1, 2, config)
    router.weight.data.copy_(torch.tensor([[1.0], [0.0]]))
    padding = torch.tensor([True, False, True, False, False, True, False, False])
    routing = router(torch.ones(8, 1), Tokens(num_sequences=2, padding_T=padding))
    assert routing.token_P.tolist() == [1, 3, 4, 6]
    assert (routing.load_E.tolist(), routing.dropped_E.tolist()) == ([5, 0], [1, 0])


@pytest.mark.parametrize("policy", ["position", "weight"])
def test_only_the_position_policy_is_causal(policy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    config = RoutingConfig.model_validate({"top_k": 2, "init_std": 1.0, "capacity": {"factor": 0.5, "policy": policy}})
    router, hidden = build_router(5, 4, config), torch.randn(16, 5, generator=generator)
    torch.nn.init.normal_(router.weight, generator=generator)
    early = []
    for seed in range(5):
        later = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
        routing = router(torch.cat([hidden[:8], later]), Tokens())
        early.append([pair for pair in pairs_of(routing) if pair[0] < 8])
    assert all(pairs == early[0] for pairs in early) == (policy == "position")


def test_groups_must_divide_the_sequences() -> None:
    routing = RoutingConfig(group=SequenceGroup(sequences=2), capacity=CapacityConfig(factor=1.0))
    layer = MoELayer(8, MoEConfig(num_experts=4, ffn_size=8), routing)
    with pytest.raises(ValueError, match=r"routing\.group\.sequences: 2 does not divide the 3 sequences of the batch"):
        layer(torch.randn(3, 4, 8))
