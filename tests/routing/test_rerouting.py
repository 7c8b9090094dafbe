"""Rerouting against plain loops: the serial rule where position decides, Gale and Shapley's own procedure elsewhere."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_dist.config.routing import RoutingConfig
from moe_dist.routing import Routing, Tokens, build_router
from moe_dist.routing.capacity import apply_capacity
from moe_dist.routing.random import key_of, uniform
from moe_dist.routing.rerouting import lost, reroute
from moe_dist.routing.types import Choice
from tests.support.distributed import run_ranks

POLICIES = ["position", "choice", "weight", "random", "batch_priority"]
LEVELS = ["expert", "expert_group"]
KEY = key_of(0, "capacity")


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens of `groups` routing groups that each want `top_k` experts."""

    groups: int
    length: int
    experts: int
    top_k: int
    factor: float
    selection: tuple[tuple[float, ...], ...]
    wanted: tuple[tuple[int, ...], ...]
    """Experts of each token in order; empty for padding."""
    expert_groups: int = 1
    zero_experts: int = 0

    @property
    def tokens(self) -> int:
        return self.groups * self.length

    @property
    def all_experts(self) -> int:
        return self.experts + self.zero_experts


@st.composite
def cases(draw: Any) -> Case:
    """What is wanted need not have the highest scores: some methods choose by more than those. Many scores are equal."""
    groups, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    experts, zero_experts = draw(st.integers(2, 6)), draw(st.integers(0, 1))
    everything = experts + zero_experts
    top_k = draw(st.integers(1, min(4, everything)))
    score = st.sampled_from([-math.inf, -0.5, 0.0, 0.1, 0.2, 0.4, 0.7, 0.9])
    selection, wanted = [], []
    for _ in range(groups * length):
        scores = tuple(draw(st.lists(score, min_size=everything, max_size=everything)))
        best = sorted(range(everything), key=lambda e: -scores[e])
        order = draw(st.sampled_from([best, draw(st.permutations(range(everything)))]))
        selection.append(scores)
        wanted.append(tuple(order[: draw(st.sampled_from([top_k, top_k, draw(st.integers(0, top_k))]))]))
    expert_groups = draw(st.sampled_from([n for n in range(1, experts + 1) if experts % n == 0]))
    factor = draw(st.floats(0.1, 2.0))
    return Case(groups, length, experts, top_k, factor, tuple(selection), tuple(wanted), expert_groups, zero_experts)


def random_case(seed: int = 0, groups: int = 2, length: int = 8, experts: int = 4, factor: float = 1.0) -> Case:
    """Some experts are wanted much more than others, some tokens are padding."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(groups * length, experts, generator=generator) + torch.arange(experts) / 4
    real = torch.rand(groups * length, generator=generator) < 0.9
    chosen = [tuple(row) if r else () for row, r in zip(score.topk(2, dim=1).indices.tolist(), real, strict=True)]
    selection = tuple(map(tuple, score.tolist()))
    return Case(groups, length, experts, 2, factor, selection, tuple(chosen), expert_groups=experts // 2)


def config_of(case: Case, group: Any = None, **capacity: Any) -> RoutingConfig:
    tree: dict[str, Any] = {
        "top_k": case.top_k,
        "group": group or {"sequences": 2},
        "capacity": {"factor": case.factor, "overflow": "reroute", **capacity},
    }
    if capacity.get("level") == "expert_group":
        tree["expert_groups"] = {"count": case.expert_groups}
    if case.zero_experts:
        tree["zero_experts"] = {"count": case.zero_experts, "target": target_of(case)}
    return RoutingConfig.model_validate(tree)


def target_of(case: Case) -> float:
    """Routed experts of a token on average where there are zero-computation experts."""
    return case.top_k / 2


def choice_of(case: Case) -> Choice:
    """Slots without a choice come first, where they would do most harm, and hold any expert."""
    padded = [[*range(case.top_k - len(row)), *row] for row in case.wanted]
    valid = [[slot >= case.top_k - len(row) for slot in range(case.top_k)] for row in case.wanted]
    shape = (case.tokens, case.top_k)
    return Choice(
        torch.tensor(padded, dtype=torch.int64).view(shape), torch.tensor(valid, dtype=torch.bool).view(shape)
    )


def tokens_of(case: Case, first_token: int = 0) -> Tokens:
    return Tokens(num_sequences=2 * case.groups, global_index_T=first_token + torch.arange(case.tokens))


def run(
    case: Case,
    *,
    group: Any = None,
    training: bool = True,
    first_token: int = 0,
    process_group: dist.ProcessGroup | None = None,
    **capacity: Any,
) -> Choice:
    """With the weights and best scores that the selection scores themselves would be."""
    config, selection_TE = config_of(case, group, **capacity), torch.tensor(case.selection, dtype=torch.float64)
    tokens, best_T = tokens_of(case, first_token), selection_TE.amax(1)
    return reroute(choice_of(case), selection_TE, selection_TE, best_T, config, tokens, KEY, training, process_group)


def experts_of(choice: Choice) -> list[list[int]]:
    """Of each token, in order."""
    valid = torch.ones_like(choice.expert_TK) if choice.valid_TK is None else choice.valid_TK
    rows = zip(choice.expert_TK.tolist(), valid.tolist(), strict=True)
    return [[e for e, v in zip(*row, strict=True) if v] for row in rows]


def preferences(case: Case, token: int) -> list[int]:
    """What is wanted, then the others by falling score; none at -inf."""
    wanted, scores = case.wanted[token], case.selection[token]
    others = [e for e in range(case.all_experts) if e not in wanted and scores[e] > -math.inf]
    return [*wanted, *sorted(others, key=lambda e: -scores[e])]


class Buckets:
    """Room of experts or of groups of experts, by the formula."""

    def __init__(self, case: Case, level: str) -> None:
        self.case = case
        self.count = case.experts if level == "expert" else case.expert_groups
        most = case.length * (case.experts // self.count)
        routed = target_of(case) if case.zero_experts else case.top_k  # experts of a token
        self.room = max(1, min(most, math.ceil(case.factor * routed * case.length / self.count - 1e-9)))

    def of(self, token: int, expert: int) -> tuple[int, int] | None:
        """None for a zero-computation expert, which has room for everybody."""
        size = self.case.experts // self.count
        return None if expert >= self.case.experts else (token // self.case.length, expert // size)


def serial(case: Case, level: str) -> list[list[int]]:
    """Token after token takes its most preferred experts that still have room."""
    buckets, load, taken = Buckets(case, level), {}, []
    for token in range(case.tokens):
        own: list[int] = []
        for expert in preferences(case, token):
            bucket = buckets.of(token, expert)
            if len(own) < len(case.wanted[token]) and (bucket is None or load.get(bucket, 0) < buckets.room):
                own.append(expert)
                load[bucket] = load.get(bucket, 0) + 1
        taken.append(own)
    return taken


def priority(case: Case, policy: str, token: int, expert: int) -> tuple[float, ...]:
    """High for whom a bucket keeps; ties by position, then by what the token prefers."""
    routed = [e for e in preferences(case, token) if e < case.experts]
    first = {
        "position": 0.0,
        "choice": -routed.index(expert) if expert < case.experts else 0.0,
        "weight": case.selection[token][expert],
        "batch_priority": max(case.selection[token]),
        "random": uniform(KEY, 0, torch.tensor([token * case.experts + expert])).item(),
    }[policy]
    return first, -token, -preferences(case, token).index(expert)


def one_proposal_at_a_time(case: Case, policy: str, level: str) -> list[list[int]]:
    """Gale and Shapley's procedure, the last token that wants something first: the order must not matter."""
    buckets, held = Buckets(case, level), {}
    next_choice = [0] * case.tokens
    looking = [token for token in range(case.tokens) for _ in case.wanted[token]]
    while looking:
        token = looking.pop()
        if next_choice[token] == len(preferences(case, token)):
            continue
        expert = preferences(case, token)[next_choice[token]]
        next_choice[token] += 1
        bucket = buckets.of(token, expert)
        here = held.setdefault(bucket, [])
        here.append((token, expert))
        if bucket is not None and len(here) > buckets.room:
            worst = min(here, key=lambda pair: priority(case, policy, *pair))
            here.remove(worst)
            looking.append(worst[0])
    pairs = [pair for here in held.values() for pair in here]
    return [[e for e in preferences(case, t) if (t, e) in pairs] for t in range(case.tokens)]


EVERYONE_WANTS_THE_SAME = Case(1, 8, 4, 2, 1.0, ((0.9, 0.7, 0.4, 0.2),) * 8, ((0, 1),) * 8, expert_groups=2)


@settings(deadline=None, max_examples=150)
@given(cases(), st.sampled_from(LEVELS))
@example(EVERYONE_WANTS_THE_SAME, "expert")
@example(EVERYONE_WANTS_THE_SAME, "expert_group")
def test_by_position_it_is_the_serial_rule(case: Case, level: str) -> None:
    assert experts_of(run(case, level=level)) == serial(case, level)


@settings(deadline=None, max_examples=150)
@given(cases(), st.sampled_from(POLICIES), st.sampled_from(LEVELS))
@example(EVERYONE_WANTS_THE_SAME, "random", "expert")
@example(EVERYONE_WANTS_THE_SAME, "batch_priority", "expert_group")
def test_it_is_deferred_acceptance(case: Case, policy: str, level: str) -> None:
    final = run(case, policy=policy, level=level)
    assert experts_of(final) == one_proposal_at_a_time(case, policy, level)
    assert final.expert_TK.shape == choice_of(case).expert_TK.shape
    for row in final.expert_TK.tolist():  # columns without an expert repeat none that another column has
        assert len(set(row)) == len(row)


def test_by_hand() -> None:
    """Expert 0 has room for two of three tokens: the last goes on to expert 2, as 1 is closed to it; by weight, the first."""
    selection = ((0.5, 0.1, 0.2), (0.8, 0.3, 0.1), (0.9, -math.inf, 0.1))
    case = Case(1, 3, 3, 1, 2.0, selection, ((0,), (0,), (0,)))
    assert experts_of(run(case)) == [[0], [0], [2]]
    assert experts_of(run(case, policy="weight")) == [[2], [0], [0]]


@settings(deadline=None, max_examples=100)
@given(cases(), st.sampled_from(POLICIES), st.sampled_from(LEVELS))
def test_capacity_drops_nothing_afterwards(case: Case, policy: str, level: str) -> None:
    final, config = run(case, policy=policy, level=level), config_of(case, policy=policy, level=level)
    pairs = [(t, e) for t, own in enumerate(experts_of(final)) for e in own if e < case.experts]
    token_P, expert_P = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    load_E = torch.bincount(expert_P, minlength=case.experts)
    routing = Routing(token_P, expert_P, torch.rand(len(pairs)), load_E)
    kept = apply_capacity(routing, config, tokens_of(case), torch.rand(case.tokens), KEY, True, None)
    assert kept.dropped_E.tolist() == [0] * case.experts
    assert torch.equal(kept.token_P, token_P)


@settings(deadline=None, max_examples=100)
@given(cases(), st.sampled_from(POLICIES))
def test_every_slot_that_found_no_expert_is_counted(case: Case, policy: str) -> None:
    final, expected = run(case, policy=policy), [0] * case.experts
    for wanted, own in zip(case.wanted, experts_of(final), strict=True):
        missing = [e for e in wanted if e not in own]
        for expert in missing[len(missing) - (len(wanted) - len(own)) :]:
            expected[expert] += 1
    counted = lost(choice_of(case), final, case.experts)
    assert counted.tolist() == expected
    assert sum(map(len, case.wanted)) == sum(map(len, experts_of(final))) + counted.sum()


def test_lost_by_hand() -> None:
    """The first token found one expert for three slots; the second found others for all; the third is padding."""
    choice = Choice(
        torch.tensor([[3, 1, 2], [0, 1, 2], [0, 0, 0]]), torch.tensor([[True] * 3, [True] * 3, [False] * 3])
    )
    final = Choice(
        torch.tensor([[1, 3, 0], [3, 4, 5], [0, 1, 2]]), torch.tensor([[True, False, False], [True] * 3, [False] * 3])
    )
    assert lost(choice, final, 6).tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("level", LEVELS)
def test_with_room_for_every_token_nothing_changes(level: str, policy: str) -> None:
    case, chosen = random_case(), {"level": level, "policy": policy}
    wanted = [list(row) for row in case.wanted]
    for capacity in ({"factor": 2.0}, {"factor": "auto"}, {"factor": "auto", "maximum_factor": 2.0}):
        assert experts_of(run(case, **chosen, **capacity)) == wanted
    assert experts_of(run(case, **chosen)) != wanted
    assert experts_of(run(case, **chosen, training=False)) == wanted
    assert experts_of(run(case, **chosen, training=False, evaluation_factor="auto")) == wanted
    in_evaluation = run(case, **chosen, factor=2.0, evaluation_factor=1.0, training=False)
    assert experts_of(in_evaluation) == experts_of(run(case, **chosen))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("level", LEVELS)
def test_above_its_maximum_auto_is_like_that_factor(level: str, policy: str) -> None:
    case, chosen = random_case(), {"level": level, "policy": policy}
    bounded = experts_of(run(case, **chosen, factor="auto", maximum_factor=0.75))
    assert bounded == experts_of(run(case, **chosen, factor=0.75)) != [list(row) for row in case.wanted]


def test_tokens_that_want_nothing_get_nothing_and_take_no_room() -> None:
    case = random_case()
    case = dataclasses.replace(case, wanted=tuple(() if t % 2 else row for t, row in enumerate(case.wanted)))
    assert all(not own for own in experts_of(run(case))[1::2])
    assert run(dataclasses.replace(case, wanted=((),) * case.tokens)).valid_TK.sum() == 0


def test_a_batch_without_tokens() -> None:
    case = Case(1, 0, 4, 2, 1.0, (), ())
    config, empty_TE = config_of(case), torch.zeros(0, 4)
    final = reroute(
        choice_of(case), empty_TE, empty_TE, torch.zeros(0), config, Tokens(num_sequences=2), KEY, True, None
    )
    assert final.expert_TK.shape == (0, 2)
    assert lost(choice_of(case), final, 4).tolist() == [0] * 4


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from(LEVELS), st.data())
def test_by_position_no_later_token_changes_anything(case: Case, level: str, data: Any) -> None:
    seen = data.draw(st.integers(0, case.tokens))
    order = data.draw(st.permutations(range(seen, case.tokens)))
    changed = dataclasses.replace(
        case,
        selection=case.selection[:seen] + tuple(case.selection[t][::-1] for t in order),
        wanted=case.wanted[:seen] + tuple(case.wanted[t] for t in order),
    )
    before, after = (experts_of(run(c, level=level)) for c in (case, changed))
    assert before[:seen] == after[:seen]


@pytest.mark.parametrize("policy", ["choice", "weight", "random", "batch_priority"])
def test_other_policies_look_ahead(policy: str) -> None:
    changed = 0
    for seed in range(5):
        case = random_case(seed, groups=1, length=16)
        halved = dataclasses.replace(case, wanted=case.wanted[:8] + ((),) * 8)
        before, after = (experts_of(run(c, policy=policy)) for c in (case, halved))
        changed += before[:8] != after[:8]
    assert changed


def run_share(case: Case, capacity: dict[str, Any]) -> Choice:
    """This rank's part of the tokens of all ranks, one rank for each routing group of the case."""
    first = dist.get_rank() * case.length
    own = slice(first, first + case.length)
    share = dataclasses.replace(case, groups=1, selection=case.selection[own], wanted=case.wanted[own])
    return run(share, group="global", first_token=first, process_group=dist.group.WORLD, **capacity)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_global_group_is_decided_like_on_one_rank_that_holds_all_tokens(num_ranks: int, policy: str) -> None:
    case = random_case(groups=num_ranks, experts=6)
    for level in LEVELS:
        capacity = {"policy": policy, "level": level}
        whole, shares = run(case, group="global", **capacity), run_ranks(num_ranks, run_share, case, capacity)
        assert torch.equal(torch.cat([share.expert_TK for share in shares]), whole.expert_TK)
        assert torch.equal(torch.cat([share.valid_TK for share in shares]), whole.valid_TK)
        assert experts_of(whole) != experts_of(run(case, **capacity))  # which decides in two groups


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("score", ["softmax", "softmax_top_k", "sigmoid"])
def test_the_router_sends_overflow_on_and_counts_what_was_wanted(score: str, policy: str) -> None:
    tree = {"top_k": 2, "score": score, "init_std": 1.0}
    capacity = {"factor": 1.0, "overflow": "reroute", "policy": policy}
    hidden = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    padding = torch.zeros(16, dtype=torch.bool)
    padding[13:] = True
    tokens = Tokens(padding_T=padding)
    plain = build_router(5, 4, RoutingConfig.model_validate(tree))(hidden, tokens)
    router = build_router(5, 4, RoutingConfig.model_validate({**tree, "capacity": capacity}))
    routing = router(hidden, tokens)
    assert torch.equal(routing.load_E, plain.load_E)
    assert routing.load_E.max() > 8  # room of an expert
    assert torch.bincount(routing.expert_P, minlength=4).max() <= 8
    assert len(routing.token_P) + routing.dropped_E.sum() == 2 * 13
    assert len(set(zip(routing.token_P.tolist(), routing.expert_P.tolist(), strict=True))) == len(routing.token_P)
    assert torch.equal(router.balance.dropped_E, routing.dropped_E)
    weight = torch.zeros(16, 4).index_put((routing.token_P, routing.expert_P), routing.weight_P)
    if score == "softmax_top_k":  # of whatever experts the token has in the end
        assert torch.allclose(weight[:13].sum(1), torch.ones(13))
    routing.weight_P.square().sum().backward()
    assert router.weight.grad.isfinite().all()
    assert router.weight.grad.any()


RULES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "renormalised": {"renormalise": True, "scaling_factor": 2.5},
    "softmax of the chosen": {"score": "softmax_top_k"},
    "biased": {"score": "sigmoid", "renormalise": True, "bias": {"rule": "sign"}},
    "biased, zero-computation experts": {"bias": {"rule": "sign"}, "zero_experts": {"count": 2, "target": 1.5}},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rule", RULES)
def test_an_expert_rejects_whom_it_drops_without_rerouting(rule: str, policy: str) -> None:
    """The first proposals are what is wanted, and a rejection is never taken back."""
    hidden, pairs = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), {}
    for capacity in (None, "drop", "reroute"):
        tree = {"top_k": 2, "init_std": 1.0, "group": "rank", **RULES[rule]}
        if capacity is not None:
            tree["capacity"] = {"factor": 0.6, "policy": policy, "overflow": capacity}
        router = build_router(6, 5, RoutingConfig.model_validate(tree))
        router.balance.bias_E.copy_(torch.linspace(-0.3, 0.3, 5))
        routing = router(hidden, Tokens())
        pairs[capacity] = set(zip(routing.token_P.tolist(), routing.expert_P.tolist(), strict=True))
    dropped = pairs[None] - pairs["drop"]
    assert dropped
    assert not dropped & pairs["reroute"]


def test_by_weight_the_same_pair_stays_by_hand() -> None:
    """Expert 0 has room for one: token 1, of weight 0.50 against 0.42, though its score is 0.30 against 0.40."""
    logits_TE = torch.tensor([[0.40, 0.55, 0.03, 0.02], [0.30, 0.15, 0.30, 0.25], [0.02, 0.03, 0.50, 0.45]]).log()
    for overflow in ("drop", "reroute"):
        capacity = {"factor": 0.6, "policy": "weight", "overflow": overflow}
        config = {"top_k": 2, "renormalise": True, "group": "rank", "capacity": capacity}
        router = build_router(4, 4, RoutingConfig.model_validate(config))
        router.weight.data.copy_(torch.eye(4))
        routing = router(logits_TE, Tokens())
        assert routing.token_P[routing.expert_P == 0].tolist() == [1], overflow
