"""Statistics of routers and choices against loops, sets, numpy and scipy.

Shape letters: T tokens, E experts, K experts per token, P pairs, V vocabulary ids.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.routing.metrics import (
    changed_by_bias,
    coactivation,
    coactivation_rate,
    expert_specialisation,
    margin,
    marginal_entropy,
    mask_saturation,
    mutual_information,
    router_entropy,
    saturation,
    vocabulary_counts,
    vocabulary_specialisation,
)

E, T, V = 6, 40, 5


def make_logits(seed: int = 0, tokens: int = T) -> torch.Tensor:
    return torch.randn(tokens, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_chosen(top_k: int, seed: int = 0) -> torch.Tensor:
    return make_logits(seed).topk(top_k, dim=-1).indices


def make_mask(seed: int = 0, tokens: int = T) -> torch.Tensor:
    """bool [T, E] with any number of experts per token, also none."""
    return make_logits(seed, tokens) > 0.5


# What the router's scores say.


def test_router_entropy_against_scipy() -> None:
    probability_TE = make_logits().softmax(-1)
    np.testing.assert_allclose(router_entropy(probability_TE), scipy.stats.entropy(probability_TE, axis=1), rtol=1e-12)
    mean_E = probability_TE.mean(0)
    assert marginal_entropy(mean_E).item() == pytest.approx(scipy.stats.entropy(mean_E), rel=1e-12)


def test_router_entropy_by_hand() -> None:
    probability_TE = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(router_entropy(probability_TE), torch.tensor([0.0, math.log(4), math.log(2)]))


def test_mutual_information_is_that_of_the_joint_distribution() -> None:
    """sum p(t, e) log(p(t, e) / (p(t) p(e))) with each token equally probable."""
    probability_TE = make_logits().softmax(-1)
    joint_TE, mean_E = probability_TE / T, probability_TE.mean(0)
    expected = (joint_TE * (joint_TE / (mean_E / T)).log()).sum().item()
    information = mutual_information(mean_E, router_entropy(probability_TE).mean())
    assert information.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("probability_TE", "expected"),
    [(torch.eye(4), math.log(4)), (torch.full((3, 4), 0.25), 0), (torch.eye(4)[:1].repeat(5, 1), 0)],
    ids=["sure and balanced", "no preference", "all to one"],
)
def test_mutual_information_by_hand(probability_TE: torch.Tensor, expected: float) -> None:
    information = mutual_information(probability_TE.mean(0), router_entropy(probability_TE).mean())
    assert information.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("top_k", range(1, E))
def test_margin_against_sorting(top_k: int) -> None:
    selection_TE = make_logits()
    ordered = [sorted(row, reverse=True) for row in selection_TE.tolist()]
    assert margin(selection_TE, top_k).tolist() == pytest.approx([row[top_k - 1] - row[top_k] for row in ordered])


def test_margin_is_zero_where_nothing_is_decided() -> None:
    assert margin(make_logits(), E).tolist() == [0] * T
    masked_TE = torch.tensor([[3.0, 1.0, -math.inf], [3.0, -math.inf, 1.0], [3.0, 1.0, 0.5]])
    assert margin(masked_TE, 2).tolist() == [0, 0, 0.5]


@pytest.mark.parametrize("top_k", range(1, E + 1))
def test_changed_by_bias_against_sets(top_k: int) -> None:
    scores_TE = make_logits()
    chosen_TK = (scores_TE + torch.linspace(-1, 1, E)).topk(top_k, dim=-1).indices
    expected = []
    for scores, chosen in zip(scores_TE.tolist(), chosen_TK.tolist(), strict=True):
        unbiased = sorted(range(E), key=lambda e: -scores[e])[:top_k]
        expected.append(len(set(chosen) - set(unbiased)) / top_k)
    assert changed_by_bias(scores_TE, chosen_TK).tolist() == pytest.approx(expected)
    assert any(expected) == (top_k < E)
    assert changed_by_bias(scores_TE, scores_TE.topk(top_k, dim=-1).indices).tolist() == [0] * T


# Which experts were chosen.


@pytest.mark.parametrize("top_k", range(1, E + 1))
def test_saturation_against_sets(top_k: int) -> None:
    then_TK, now_TK = make_chosen(top_k, seed=1), make_chosen(top_k, seed=2)
    expected = [len({*a} & {*b}) / top_k for a, b in zip(then_TK.tolist(), now_TK.tolist(), strict=True)]
    assert saturation(then_TK, now_TK).tolist() == pytest.approx(expected)
    assert saturation(now_TK.flip(1), now_TK).tolist() == [1] * T  # order does not matter
    masks = [torch.zeros(T, E, dtype=torch.bool).scatter_(1, chosen_TK, True) for chosen_TK in (then_TK, now_TK)]
    torch.testing.assert_close(mask_saturation(*masks), saturation(then_TK, now_TK))


def test_random_choices_saturate_to_k_over_e() -> None:
    then_TK, now_TK = (make_logits(seed, 20_000).topk(2, dim=-1).indices for seed in (1, 2))
    assert saturation(then_TK, now_TK).mean().item() == pytest.approx(2 / E, abs=0.01)


def test_saturation_of_masks_divides_by_the_later_choice() -> None:
    then_TE = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    now_TE = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    assert mask_saturation(then_TE, now_TE).tolist() == [1, 0.5, 0, 0]


@given(st.lists(st.sets(st.integers(0, E - 1)), max_size=8))
@settings(max_examples=50, deadline=None)
def test_coactivation_counts_tokens_that_use_both(experts_of_token: list[set[int]]) -> None:
    pairs = [(token, expert) for token, experts in enumerate(experts_of_token) for expert in experts]
    token_P, expert_P = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    count_EE = coactivation(token_P, expert_P, len(experts_of_token), E)
    assert count_EE.dtype == torch.int64
    rate_EE = coactivation_rate(count_EE)
    for i, j in itertools.product(range(E), repeat=2):
        both, first = (sum(used <= experts for experts in experts_of_token) for used in ({i, j}, {i}))
        assert count_EE[i, j].item() == both
        assert rate_EE[i, j].item() == pytest.approx(both / first if first else 0)


def test_coactivation_by_hand() -> None:
    """Tokens use {0, 1}, {0, 1}, {0, 2}: all tokens of 1 use 0, two thirds of those of 0 use 1; nothing uses 3."""
    token_P, expert_P = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 0, 2, 0])
    count_EE = coactivation(token_P, expert_P, 3, 4)
    assert count_EE.tolist() == [[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    third = 1 / 3
    expected_EE = torch.tensor(
        [[1, 2 * third, third, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.float64
    )
    torch.testing.assert_close(coactivation_rate(count_EE), expected_EE)


@pytest.mark.parametrize("top_k", range(1, E + 1))
def test_rows_of_coactivation_rate_sum_to_k(top_k: int) -> None:
    expert_P, token_P = make_chosen(top_k).flatten(), torch.arange(T).repeat_interleave(top_k)
    rate_EE = coactivation_rate(coactivation(token_P, expert_P, T, E))
    torch.testing.assert_close(rate_EE.sum(1), torch.full((E,), float(top_k), dtype=torch.float64))


# Which tokens an expert gets.


def vocabulary(chosen_TE: torch.Tensor, real_T: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """id_T and what `vocabulary_counts` says of it."""
    generator = torch.Generator().manual_seed(len(chosen_TE))
    id_T = torch.randint(0, V - 1, (len(chosen_TE),), generator=generator)  # the last id never occurs
    token_P, expert_P = (chosen_TE if real_T is None else chosen_TE & real_T[:, None]).nonzero().unbind(1)
    return id_T, *vocabulary_counts(id_T, real_T, token_P, expert_P, V, E)


@pytest.mark.parametrize("padded", [False, True])
def test_vocabulary_specialisation_against_counters(padded: bool) -> None:
    chosen_TE, real_T = make_mask(), torch.arange(T) % 3 > 0 if padded else torch.ones(T, dtype=torch.bool)
    id_T, count_V, count_VE = vocabulary(chosen_TE, real_T if padded else None)
    occurs, gets = Counter[int](), Counter[tuple[int, int]]()
    for x, chosen, real in zip(id_T.tolist(), chosen_TE.tolist(), real_T.tolist(), strict=True):
        occurs[x] += real
        gets.update((x, e) for e in range(E) if chosen[e] and real)
    assert count_V.tolist() == [occurs[x] for x in range(V)]
    assert count_VE.tolist() == [[gets[x, e] for e in range(E)] for x in range(V)]
    share_VE = vocabulary_specialisation(count_V, count_VE)
    expected = [[gets[x, e] / occurs[x] if occurs[x] else 0 for e in range(E)] for x in range(V)]
    torch.testing.assert_close(share_VE, torch.tensor(expected, dtype=torch.float64))
    assert share_VE[V - 1].tolist() == [0] * E


def test_counts_add_up_over_batches() -> None:
    chosen_TE, real_T = make_mask(tokens=2 * T), torch.arange(2 * T) % 3 > 0
    id_T, *whole = vocabulary(chosen_TE, real_T)
    halves = []
    for half in (slice(T), slice(T, 2 * T)):
        token_P, expert_P = (chosen_TE & real_T[:, None])[half].nonzero().unbind(1)
        counts = vocabulary_counts(id_T[half], real_T[half], token_P, expert_P, V, E)
        halves.append((*counts, coactivation(token_P, expert_P, T, E)))
    token_P, expert_P = (chosen_TE & real_T[:, None]).nonzero().unbind(1)
    whole.append(coactivation(token_P, expert_P, 2 * T, E))
    for expected, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(first + second, expected)


def test_expert_specialisation_by_hand() -> None:
    """Ids 0 and 1 belong to expert 0, id 2 to expert 1 (a tie with 2), id 3 is too rare; expert 2 owns nothing."""
    count_V = torch.tensor([10, 20, 12, 9, 0])
    count_VE = torch.tensor([[10, 0, 0], [10, 5, 5], [0, 6, 6], [0, 0, 9], [0, 0, 0]])
    mean_E, num_ids_E = expert_specialisation(count_V, count_VE)
    assert mean_E.tolist() == [0.75, 0.5, 0]
    assert num_ids_E.tolist() == [2, 1, 0]
    mean_E, num_ids_E = expert_specialisation(count_V, count_VE, min_count=1)
    assert mean_E.tolist() == [0.75, 0.5, 1]
    assert num_ids_E.tolist() == [2, 1, 1]


def test_mean_over_the_ids_of_all_experts_is_that_of_the_layer() -> None:
    _, count_V, count_VE = vocabulary(make_mask())
    mean_E, num_ids_E = expert_specialisation(count_V, count_VE, min_count=1)
    seen_V = count_V > 0
    expected = vocabulary_specialisation(count_V, count_VE)[seen_V].amax(1).mean()
    torch.testing.assert_close((mean_E * num_ids_E).sum() / num_ids_E.sum(), expected)


def test_no_tokens() -> None:
    none_TE, none_TK, none_P = (
        torch.empty(0, E),
        torch.empty(0, 2, dtype=torch.int64),
        torch.empty(0, dtype=torch.int64),
    )
    mask_TE = none_TE.bool()
    for value_T in (
        router_entropy(none_TE),
        margin(none_TE, 2),
        margin(none_TE, E),
        changed_by_bias(none_TE, none_TK),
        saturation(none_TK, none_TK),
        mask_saturation(mask_TE, mask_TE),
    ):
        assert value_T.shape == (0,)
    count_EE = coactivation(none_P, none_P, 0, E)
    assert count_EE.tolist() == coactivation_rate(count_EE).tolist() == [[0] * E] * E
    counts = vocabulary_counts(none_P, None, none_P, none_P, V, E)
    assert vocabulary_specialisation(*counts).tolist() == [[0] * E] * V
    assert [value_E.tolist() for value_E in expert_specialisation(*counts)] == [[0] * E] * 2
