"""Capacity against a plain loop: who is kept, with what weight, and that every drop is counted."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_dist import MoELayer
from moe_dist.config.routing import CapacityConfig, RoutingConfig, SequenceGroup
from moe_dist.config.schema import MoEConfig
from moe_dist.routing import Routing, Tokens, build_router, real_pairs
from moe_dist.routing.capacity import apply_capacity, capacity_of_group
from moe_dist.routing.random import key_of, uniform
from tests.support.distributed import run_ranks

Pair = tuple[int, int, float]
POLICIES = ["position", "choice", "weight", "random", "batch_priority"]
LEVELS = ["expert", "expert_group"]
KEY = key_of(0, "capacity")


@dataclasses.dataclass(frozen=True)
class Case:
    """Some pairs of `groups` routing groups, each of `length` tokens; those of a token by falling preference."""

    groups: int
    length: int
    experts: int
    pairs: list[Pair]
    factor: float
    expert_groups: int = 1
    best: tuple[float, ...] = ()
    """Best score of each token; all 0 if not given."""

    @property
    def tokens(self) -> int:
        return self.groups * self.length


@st.composite
def cases(draw: Any) -> Case:
    """Tokens with 0 to E pairs, so that padding and expert choice are among them."""
    groups, length, experts = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 6))
    expert_groups = draw(st.sampled_from([n for n in range(1, experts + 1) if experts % n == 0]))
    tokens = groups * length
    chosen = draw(st.lists(st.sets(st.integers(0, experts - 1)), min_size=tokens, max_size=tokens))
    weights = st.floats(0.01, 1.0)
    pairs = [(t, e, draw(weights)) for t in range(tokens) for e in draw(st.permutations(sorted(chosen[t])))]
    best = tuple(
        draw(st.lists(st.sampled_from([0.1, 0.2, 0.5, 0.9]), min_size=tokens, max_size=tokens))
    )  # some are equal
    return Case(groups, length, experts, pairs, draw(st.floats(0.1, 3.0)), expert_groups, best)


def random_case(seed: int = 0, groups: int = 2, length: int = 8, experts: int = 4, factor: float = 0.5) -> Case:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(groups * length, experts, generator=generator)
    chosen = score.topk(2, dim=1).indices.tolist()
    pairs = [(t, e, score[t, e].item()) for t, es in enumerate(chosen) for e in es]
    return Case(groups, length, experts, pairs, factor, experts // 2, tuple(score.amax(1).tolist()))


def config_of(case: Case, group: Any = None, **capacity: Any) -> RoutingConfig:
    """Routing groups are two sequences each, if nothing else is said."""
    capacity = {"factor": case.factor, **capacity}
    grouped = {"expert_groups": {"count": case.expert_groups}} if capacity.get("level") == "expert_group" else {}
    return RoutingConfig.model_validate(
        {"top_k": 2, "group": group or {"sequences": 2}, "capacity": capacity} | grouped
    )


def share_of(case: Case, group: int) -> Case:
    """One routing group of a case, as if there were no other."""
    first = group * case.length
    pairs = [(t - first, e, w) for t, e, w in case.pairs if t // case.length == group]
    return dataclasses.replace(case, groups=1, pairs=pairs, best=case.best[first : first + case.length])


def count(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.bincount(experts, minlength=num_experts)


def routing_of(case: Case, weights: torch.Tensor | None = None) -> Routing:
    token_P, expert_P = (torch.tensor([pair[i] for pair in case.pairs], dtype=torch.int64) for i in (0, 1))
    weight_P = torch.tensor([pair[2] for pair in case.pairs], dtype=torch.float64) if weights is None else weights
    return Routing(token_P, expert_P, weight_P, load_E=count(expert_P, case.experts))


def drop(
    case: Case,
    weights: torch.Tensor | None = None,
    *,
    training: bool = True,
    group: Any = None,
    sequences: int | None = None,
    key: int = KEY,
    step: int = 0,
    first_token: int = 0,
    process_group: dist.ProcessGroup | None = None,
    **capacity: Any,
) -> Routing:
    tokens = Tokens(
        num_sequences=sequences or 2 * case.groups,
        global_index_T=first_token + torch.arange(case.tokens),
        step=step,
    )
    best_T = torch.tensor(case.best or [0.0] * case.tokens, dtype=torch.float64)
    config = config_of(case, group, **capacity)
    routing = apply_capacity(routing_of(case, weights), config, tokens, best_T, key, training, process_group)
    return real_pairs(routing)


def pairs_of(routing: Routing) -> list[Pair]:
    return list(zip(routing.token_P.tolist(), routing.expert_P.tolist(), routing.weight_P.tolist(), strict=True))


def room_of(case: Case, level: str = "expert") -> int:
    """ceil(factor k T / E) of one group, between 1 and T; of a group of experts between 1 and what its experts could take."""
    buckets = case.experts if level == "expert" else case.expert_groups
    most = case.length * (case.experts // buckets)
    return max(1, min(most, math.ceil(case.factor * 2 * case.length / buckets - 1e-9)))


def loop_kept(case: Case, policy: str = "position", level: str = "expert") -> list[Pair]:
    size = 1 if level == "expert" else case.experts // case.expert_groups

    def priority(pair: Pair) -> float:
        if policy == "weight":
            return pair[2]
        if policy == "choice":
            return -[p[1] for p in case.pairs if p[0] == pair[0]].index(pair[1])
        if policy == "batch_priority":
            return case.best[pair[0]]
        if policy == "random":
            return uniform(KEY, 0, torch.tensor([pair[0] * case.experts + pair[1]])).item()
        return 0

    kept = []
    for group in range(case.groups):
        for bucket in range(case.experts // size):
            here = [p for p in case.pairs if p[0] // case.length == group and p[1] // size == bucket]
            here.sort(key=priority, reverse=True)  # stable: ties by position
            kept += here[: room_of(case, level)]
    return [pair for pair in case.pairs if pair in kept]


@settings(deadline=None, max_examples=120)
@given(cases(), st.sampled_from(POLICIES), st.sampled_from(LEVELS))
@example(Case(1, 3, 2, [], 1.0), "weight", "expert")
@example(Case(1, 3, 2, [(0, 1, 0.5), (1, 1, 0.5), (2, 1, 0.5)], 0.4), "weight", "expert")  # ties
@example(Case(1, 2, 2, [(0, 1, 0.5), (0, 0, 0.5), (1, 1, 0.5)], 0.4), "position", "expert_group")  # the preferred stays
def test_the_kept_pairs_are_those_of_a_plain_loop(case: Case, policy: str, level: str) -> None:
    routing = drop(case, policy=policy, level=level)
    kept = loop_kept(case, policy, level)
    assert pairs_of(routing) == kept
    lost = [[p[1] for p in case.pairs].count(e) - [p[1] for p in kept].count(e) for e in range(case.experts)]
    assert routing.dropped_E.tolist() == lost
    kept_E = count(routing.expert_P, case.experts)
    assert torch.equal(routing.dropped_E + kept_E, routing.load_E)
    assert torch.equal(routing.load_E, routing_of(case).load_E)  # loads are counted before the drop


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from(POLICIES), st.sampled_from(LEVELS))
def test_no_bucket_is_over_its_room_nor_below_it_while_it_drops(case: Case, policy: str, level: str) -> None:
    size = 1 if level == "expert" else case.experts // case.expert_groups
    routing, room = drop(case, policy=policy, level=level), room_of(case, level)
    bucket = routing.token_P // case.length * case.experts + routing.expert_P // size
    assert routing.token_P.tolist() == sorted(routing.token_P.tolist())
    kept = count(bucket, case.groups * case.experts)
    everything = routing_of(case)
    wanted_bucket = everything.token_P // case.length * case.experts + everything.expert_P // size
    wanted = count(wanted_bucket, case.groups * case.experts)
    assert torch.equal(kept, wanted.clamp(max=room))


@settings(deadline=None, max_examples=40)
@given(cases(), st.sampled_from(POLICIES), st.sampled_from(LEVELS))
def test_renormalising_keeps_the_sum_of_every_token_that_has_an_expert_left(
    case: Case, policy: str, level: str
) -> None:
    chosen = {"policy": policy, "level": level}
    plain, scaled = pairs_of(drop(case, **chosen)), pairs_of(drop(case, **chosen, renormalise=True))
    assert [pair[:2] for pair in scaled] == [pair[:2] for pair in plain]
    for token in {pair[0] for pair in plain}:
        before = sum(pair[2] for pair in case.pairs if pair[0] == token)
        kept = sum(pair[2] for pair in plain if pair[0] == token)
        expected = [pair[2] * before / kept for pair in plain if pair[0] == token]
        assert [pair[2] for pair in scaled if pair[0] == token] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradient_passes_finite_differences(policy: str, renormalise: bool) -> None:
    case = random_case(length=4)
    weights = routing_of(case).weight_P.requires_grad_()
    capacity = {"policy": policy, "renormalise": renormalise}
    assert len(drop(case, weights, **capacity).token_P) < len(case.pairs)
    assert torch.autograd.gradcheck(lambda w: drop(case, w, **capacity).weight_P, weights)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_dropped_pair_gets_no_gradient(policy: str) -> None:
    case = random_case()
    weights = routing_of(case).weight_P.requires_grad_()
    drop(case, weights, policy=policy).weight_P.sum().backward()
    kept = set(loop_kept(case, policy))
    assert weights.grad.tolist() == [float(pair in kept) for pair in case.pairs]


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_with_room_for_every_token_nothing_changes(policy: str, renormalise: bool, pad: bool) -> None:
    case = dataclasses.replace(random_case(), factor=2.0)  # E / k
    routing = drop(case, policy=policy, renormalise=renormalise, pad=pad)
    assert [pair[:2] for pair in pairs_of(routing)] == [pair[:2] for pair in case.pairs]
    torch.testing.assert_close(routing.weight_P, routing_of(case).weight_P, rtol=1e-15, atol=0)
    assert routing.dropped_E.tolist() == [0] * case.experts


@pytest.mark.parametrize("level", LEVELS)
def test_much_room_is_enough_for_methods_that_give_a_token_any_number_of_experts(level: str) -> None:
    case = Case(1, 3, 4, [(t, e, 1.0) for t in range(3) for e in range(4)], factor=50.0)
    assert pairs_of(drop(case, level=level)) == case.pairs


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("level", LEVELS)
def test_each_group_decides_on_its_own(level: str, policy: str) -> None:
    """What a group holds changes nothing of the other: this is why routing does not depend on the layout."""
    case, other = random_case(seed=0), random_case(seed=1)
    mixed = dataclasses.replace(
        case,
        pairs=[p for p in case.pairs if p[0] < case.length] + [p for p in other.pairs if p[0] >= case.length],
        best=case.best[: case.length] + other.best[case.length :],
    )
    first, second = (pairs_of(drop(c, policy=policy, level=level)) for c in (case, mixed))
    assert [p for p in first if p[0] < case.length] == [p for p in second if p[0] < case.length]
    assert first != second


def test_one_group_gets_the_room_of_all_its_sequences() -> None:
    """All tokens to one expert: 4 sequences of 4 tokens as four groups keep 4 x 2, as one group 8 in token order."""
    case = Case(4, 4, 2, [(t, 0, 1.0) for t in range(16)], factor=0.5)
    groups = [{"sequences": 1}, {"sequences": 2}, {"sequences": 4}, "rank", "global"]
    kept = [drop(case, group=group, sequences=4).token_P.tolist() for group in groups]
    assert kept[0] == [0, 1, 4, 5, 8, 9, 12, 13]
    assert kept[1] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert kept[2] == kept[3] == kept[4] == list(range(8))


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


@pytest.mark.parametrize(("minimum", "kept"), [(1, 1), (3, 3), (6, 6), (7, 6)])
def test_the_minimum_holds_up_to_the_number_of_tokens(minimum: int, kept: int) -> None:
    case = Case(1, 6, 12, [(t, 5, 1.0) for t in range(6)], factor=1.0)
    routing = drop(case, minimum=minimum, pad=True)
    assert routing.token_P.tolist() == list(range(kept))
    assert routing.pairs_per_expert == kept


def test_room_of_a_group_of_experts_by_hand() -> None:
    """4 tokens, k = 2: two groups of two experts have room for 4 pairs each, whichever of their experts these are for."""
    pairs = [(0, 0, 1.0), (0, 1, 1.0), (1, 1, 1.0), (1, 2, 1.0), (2, 1, 1.0), (2, 0, 1.0), (3, 1, 1.0), (3, 3, 1.0)]
    routing = drop(Case(1, 4, 4, pairs, factor=1.0, expert_groups=2), level="expert_group")
    assert pairs_of(routing) == [
        *pairs[:5],
        pairs[7],
    ]  # token 2 loses expert 0, which it prefers less, token 3 expert 1
    assert routing.dropped_E.tolist() == [1, 1, 0, 0]


def test_padded_slots_are_the_room_of_all_groups() -> None:
    case = random_case(groups=3)
    assert drop(case, pad=True).pairs_per_expert == 3 * room_of(case)
    assert drop(case, pad=False).pairs_per_expert is None
    kept_E = count(drop(case, pad=True).expert_P, case.experts)
    assert kept_E.max() <= 3 * room_of(case)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("level", LEVELS)
def test_auto_drops_nothing_but_above_its_maximum(level: str, policy: str) -> None:
    case, chosen = random_case(), {"policy": policy, "level": level}
    unbounded = drop(case, factor="auto", **chosen)
    assert pairs_of(unbounded) == case.pairs
    assert unbounded.dropped_E.tolist() == [0] * case.experts
    bounded, fixed = drop(case, factor="auto", maximum_factor=0.5, **chosen), drop(case, factor=0.5, **chosen)
    assert pairs_of(bounded) == pairs_of(fixed) == loop_kept(case, policy, level) != case.pairs
    assert torch.equal(bounded.dropped_E, fixed.dropped_E)


def test_auto_pads_to_the_fullest_expert() -> None:
    case = random_case()
    assert drop(case, factor="auto", pad=True).pairs_per_expert == routing_of(case).load_E.max()
    assert drop(case, factor="auto", pad=True, minimum=50).pairs_per_expert == 50
    bounded = drop(case, factor="auto", maximum_factor=0.5, pad=True)
    assert bounded.pairs_per_expert == count(bounded.expert_P, case.experts).max() < routing_of(case).load_E.max()


def test_evaluation_has_a_factor_of_its_own() -> None:
    case = random_case()
    assert pairs_of(drop(case, training=False)) == case.pairs
    assert pairs_of(drop(case, training=False, evaluation_factor="auto")) == case.pairs
    assert pairs_of(drop(case, factor=2.0, evaluation_factor=0.5)) == case.pairs
    assert pairs_of(drop(case, factor=2.0, evaluation_factor=0.5, training=False)) == loop_kept(case)


def test_random_drops_are_a_pure_function_of_key_step_and_place_in_the_global_batch() -> None:
    case = random_case()
    whole = pairs_of(drop(case, policy="random"))
    first, second = (pairs_of(drop(share_of(case, i), policy="random", first_token=i * case.length)) for i in range(2))
    assert whole == first + [(t + case.length, e, w) for t, e, w in second]
    variants = [drop(case, policy="random", **change) for change in ({}, {"step": 1}, {"key": KEY + 1})]
    assert len({tuple(v.token_P.tolist()) for v in variants}) == 3


def test_random_drops_favour_no_position() -> None:
    """40 tokens for 10 places over 400 steps: each is kept 100 times on average, give or take 5 standard deviations."""
    case = Case(1, 40, 2, [(t, 0, 1.0) for t in range(40)], factor=0.25)
    kept = sum(count(drop(case, policy="random", step=step).token_P, 40) for step in range(400))
    assert kept.sum() == 4000
    assert (kept - 100).abs().max() < 5 * math.sqrt(400 * 0.25 * 0.75)


@settings(deadline=None, max_examples=60)
@given(cases(), cases(), st.sampled_from(LEVELS), st.data())
def test_by_position_no_later_token_changes_anything(case: Case, other: Case, level: str, data: Any) -> None:
    seen = data.draw(st.integers(0, case.tokens))
    later = [(t + seen, e, w) for t, e, w in other.pairs if t + seen < case.tokens and e < case.experts]
    changed = dataclasses.replace(case, pairs=[p for p in case.pairs if p[0] < seen] + later)
    before, after = (pairs_of(drop(c, level=level)) for c in (case, changed))
    assert [p for p in before if p[0] < seen] == [p for p in after if p[0] < seen]


def drop_share(case: Case, capacity: dict[str, Any]) -> Routing:
    """This rank's part of the tokens of all ranks, one rank for each routing group of the case."""
    rank = dist.get_rank()
    where = {"group": "global", "first_token": rank * case.length, "process_group": dist.group.WORLD}
    return drop(share_of(case, rank), **where, **capacity)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_global_group_is_decided_like_on_one_rank_that_holds_all_tokens(
    num_ranks: int, level: str, policy: str
) -> None:
    case = random_case(groups=num_ranks)
    # Ranks with few pairs or none, as padding makes them; the last rank has all of its own.
    pairs = [p for p in case.pairs if p[0] // case.length == num_ranks - 1 or p[0] in (9, 10, 17)]
    for full in (case, dataclasses.replace(case, pairs=pairs)):
        capacity = {"policy": policy, "level": level, "renormalise": True}
        whole = drop(full, group="global", **capacity)
        shares = run_ranks(num_ranks, drop_share, full, capacity)
        found = [(t + rank * case.length, e, w) for rank, share in enumerate(shares) for t, e, w in pairs_of(share)]
        assert found == pairs_of(whole)
        assert torch.equal(sum(share.dropped_E for share in shares), whole.dropped_E)
        if full is case:
            assert found == pairs_of(drop(full, group={"sequences": 2 * num_ranks}, **capacity))
            assert whole.dropped_E.sum() > 0


@pytest.mark.parametrize(
    ("factor", "slots"),
    [
        (0.5, 4),  # of the whole group, ceil(0.5 * 2 * 16 / 4), all of which may be on one rank
        (3.0, 8),  # room for 24, but a rank has 8 tokens
        ("auto", 6),  # the fullest expert of rank 1
    ],
)
def test_ranks_agree_on_padded_slots(factor: float | str, slots: int) -> None:
    pairs = [(t, t % 4, 1.0) for t in range(8)] + [(t, 3, 1.0) for t in range(10, 16)]
    case = Case(2, 8, 4, pairs, factor=1.0)
    shares = run_ranks(2, drop_share, case, {"factor": factor, "pad": True})
    assert [share.pairs_per_expert for share in shares] == [slots, slots]
    assert all(count(share.expert_P, 4).max() <= slots for share in shares)


def test_the_router_applies_it_in_training_and_counts_the_drops() -> None:
    config = RoutingConfig.model_validate({"top_k": 2, "init_std": 1.0, "capacity": {"factor": 0.75}})
    router, hidden = build_router(5, 4, config), torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    routing = router(hidden, Tokens(num_sequences=2))
    everything = router.eval()(hidden, Tokens(num_sequences=2))
    case = Case(2, 8, 4, pairs_of(everything), 0.75)
    assert pairs_of(routing) == loop_kept(case, "position")
    assert routing.dropped_E.sum() == 32 - len(routing.token_P) > 0
    assert torch.equal(router.balance.dropped_E, routing.dropped_E)
    assert torch.equal(router.balance.load_E, everything.load_E)


@pytest.mark.parametrize("policy", POLICIES)
def test_padding_takes_no_room(policy: str) -> None:
    """All tokens want expert 0; the two places of each sequence go to real tokens, by position to the first."""
    config = RoutingConfig.model_validate({"top_k": 1, "capacity": {"factor": 1.0, "policy": policy}})
    router = build_router(1, 2, config)
    router.weight.data.copy_(torch.tensor([[1.0], [0.0]]))
    padding = torch.tensor([True, False, True, False, False, True, False, False])
    # Padding has the highest score, which gives it no priority.
    hidden = torch.where(padding, 9.0, torch.arange(8, 0, -1))[:, None]
    routing = router(hidden, Tokens(num_sequences=2, padding_T=padding))
    assert not padding[routing.token_P].any()
    assert (routing.load_E.tolist(), routing.dropped_E.tolist()) == ([5, 0], [1, 0])
    if policy != "random":
        assert routing.token_P.tolist() == [1, 3, 4, 6]


@pytest.mark.parametrize("policy", POLICIES)
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
