"""Balanced assignment: exact counts whatever the input, and the sum of scores against the linear program's optimum."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import eye_array, kron

from moe_dist.routing import assignment
from moe_dist.routing import auction as auction_module
from moe_dist.routing.assignment import assign, auction, dual_prices

EXPERTS_AND_TOP_K = [(8, 1), (16, 2), (64, 6), (64, 8), (256, 8)]

Generator = torch.Generator


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def clustered(shape: tuple[int, ...], generator: Generator, clusters: int = 6, noise: float = 0.02) -> torch.Tensor:
    centre = torch.randn(clusters, shape[-1], generator=generator)
    member = torch.randint(clusters, shape[:-1], generator=generator)
    return centre[member] + noise * torch.randn(shape, generator=generator)


def heavy_columns(shape: tuple[int, ...], generator: Generator) -> torch.Tensor:
    """Some columns are liked by all rows, by offsets and by scales."""
    offset = torch.empty(shape[-1]).exponential_(0.5, generator=generator)
    scale = torch.randn(shape[-1], generator=generator).exp()
    return scale * torch.randn(shape, generator=generator) + offset


SCORES: dict[str, Callable[[tuple[int, ...], Generator], torch.Tensor]] = {
    "gaussian": lambda shape, generator: torch.randn(shape, generator=generator),
    "sigmoid": lambda shape, generator: torch.randn(shape, generator=generator).mul(2).sigmoid(),
    "clustered": clustered,
    "repeated": lambda shape, generator: clustered(shape, generator, noise=0.0),
    "heavy_columns": heavy_columns,
    "offset": lambda shape, generator: (
        torch.randn(shape, generator=generator) + 5 * (torch.arange(shape[-1]) < shape[-1] / 8)
    ),
    "lognormal": lambda shape, generator: torch.randn(shape, generator=generator).mul(2).exp(),
    "rank_one": lambda shape, generator: (
        torch.rand(*shape[:-1], 1, generator=generator) * torch.rand(shape[-1], generator=generator)
    ),
    "few_values": lambda shape, generator: torch.randint(3, shape, generator=generator).float(),
}


def optimum(score_RC: torch.Tensor, per_row: int, capacity: int) -> float:
    """By scipy: columns copied `capacity` times, or the linear program, whose vertices are whole."""
    score = score_RC.double().numpy()
    if per_row == 1:
        copied = np.repeat(score, capacity, axis=1)
        return float(copied[linear_sum_assignment(copied, maximize=True)].sum())
    num_rows, num_columns = score.shape
    by_row = kron(eye_array(num_rows), np.ones((1, num_columns)), format="csr")
    by_column = kron(np.ones((1, num_rows)), eye_array(num_columns), format="csr")
    room = np.full(num_columns, capacity)
    result = linprog(-score.ravel(), by_column, room, by_row, np.full(num_rows, per_row), bounds=(0, 1), method="highs")
    assert result.success
    return -float(result.fun)


def total(score_RC: torch.Tensor, held_RC: torch.Tensor) -> float:
    return score_RC.double()[held_RC].sum().item()


def regret(score_RC: torch.Tensor, held_RC: torch.Tensor, per_row: int, capacity: int) -> float:
    """What is lost of the optimum, as a part of what the optimum is above the mean of random assignments."""
    best, mean = optimum(score_RC, per_row, capacity), score_RC.double().mean(1).sum().item() * per_row
    lost = best - total(score_RC, held_RC)
    assert lost >= -1e-7 * max(1.0, abs(best))
    return lost / max(best - mean, 1e-9)


def assert_exact(held_GRC: torch.Tensor, per_row: int, capacity: int, real_GR: torch.Tensor | None = None) -> None:
    expected_GR = per_row * (torch.ones(held_GRC.shape[:2], dtype=torch.bool) if real_GR is None else real_GR)
    assert held_GRC.dtype == torch.bool
    assert torch.equal(held_GRC.sum(2), expected_GR)
    assert (held_GRC.sum(1) <= capacity).all()


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """Any shapes; scores with and without ties, huge, and the same for all rows or all columns; padding; spare room."""
    groups, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 24))
    generator = seeded(draw(st.integers(0, 10**6)))
    score = torch.randn(
        groups, rows, columns, generator=generator, dtype=draw(st.sampled_from([torch.float32, torch.float64]))
    )
    match draw(st.sampled_from(["free", "ties", "huge", "rows alike", "columns alike", "one value", "liked by all"])):
        case "ties":
            score = score.round()
        case "huge":
            score = score.sign() * 1e4
        case "rows alike":
            score = score[:, :1].expand(groups, rows, columns)
        case "columns alike":
            score = score[:, :, :1].expand(groups, rows, columns)
        case "one value":
            score = torch.full_like(score, -3.0)
        case "liked by all":
            score[:, :, : columns // 3] += 1e4
    real = torch.rand(groups, rows, generator=generator) >= draw(st.sampled_from([0.0, 0.3, 0.9, 2.0]))
    per_row = draw(st.integers(1, columns))
    needed = math.ceil(draw(st.sampled_from([rows, int(real.sum(1).max())])) * per_row / columns)
    return {"score": score, "real": real, "per_row": per_row, "capacity": max(1, needed + draw(st.integers(0, 2)))}


ALIKE = {"score": torch.zeros(1, 60, 6), "real": torch.ones(1, 60, dtype=torch.bool), "per_row": 5, "capacity": 50}


@settings(deadline=None, max_examples=150)
@given(cases(), st.integers(0, 3))
@example(ALIKE, 3)
def test_counts_are_exact_and_groups_do_not_see_each_other(case: dict[str, Any], iterations: int) -> None:
    score, real, per_row, capacity = case["score"], case["real"], case["per_row"], case["capacity"]
    held, price = assign(score, per_row, capacity, iterations, real_GR=real)
    assert_exact(held, per_row, capacity, real)
    assert price.dtype == score.dtype
    for group in range(len(score)):
        alone, price_alone = assign(score[group, None], per_row, capacity, iterations, real_GR=real[group, None])
        assert torch.equal(alone[0], held[group])
        assert torch.equal(price_alone[0], price[group])


@settings(deadline=None, max_examples=100)
@given(cases(), st.integers(0, 9))
def test_an_auction_of_any_length_gives_exact_counts(case: dict[str, Any], rounds: int) -> None:
    score, real = case["score"], case["real"]
    capacity = max(1, math.ceil(int(real.sum(1).max()) / score.shape[2]))
    held = auction(score, capacity, rounds, real)
    assert_exact(held, 1, capacity, real)
    for group in range(len(score)):
        assert torch.equal(auction(score[group, None], capacity, rounds, real[group, None])[0], held[group])


@pytest.mark.parametrize(("experts", "top_k"), EXPERTS_AND_TOP_K)
def test_little_is_lost_of_the_optimum(experts: int, top_k: int) -> None:
    lost = []
    for name, tokens in itertools.product(SCORES, (64,) if experts > 64 else (64, 128)):
        score = SCORES[name]((1, tokens, experts), seeded(experts + tokens))
        held, _ = assign(score, top_k, tokens * top_k // experts)
        assert torch.equal(held.sum(1), torch.full((1, experts), tokens * top_k // experts))
        lost.append(regret(score[0], held[0], top_k, tokens * top_k // experts))
    assert max(lost) <= 0.005
    assert np.median(lost) <= 0.001


@pytest.mark.parametrize("name", SCORES)
def test_columns_with_room_to_spare(name: str) -> None:
    """Padding and odd numbers leave room: the columns that are left below capacity have to be the right ones."""
    for tokens, experts, top_k, capacity in [(50, 16, 2, 7), (50, 16, 2, 12), (40, 8, 1, 20), (30, 40, 3, 3)]:
        score = SCORES[name]((1, 2 * tokens, experts), seeded(tokens))
        real = torch.rand(1, 2 * tokens, generator=seeded(1)).argsort() < tokens
        score[~real] = torch.nan  # whatever padding holds
        held, price = assign(score, top_k, capacity, real_GR=real)
        assert_exact(held, top_k, capacity, real)
        assert regret(score[real], held[real], top_k, capacity) <= 0.01
        assert price.min() >= 0


@pytest.mark.parametrize("name", SCORES)
def test_expert_choice_with_a_bound_on_each_token(name: str) -> None:
    """Rows are experts and columns tokens: few rows that each take many of the columns."""
    for tokens, experts, top_k, bound in [(64, 8, 1, 1), (64, 8, 2, 4), (96, 16, 2, 3), (128, 16, 4, 6)]:
        score = SCORES[name]((1, tokens, experts), seeded(bound)).transpose(1, 2)
        per_expert = tokens * top_k // experts
        held, _ = assign(score, per_expert, bound)
        assert_exact(held, per_expert, bound)
        assert regret(score[0], held[0], per_expert, bound) <= 0.02


def test_counts_of_large_groups_in_both_orientations() -> None:
    score = heavy_columns((1, 2048, 64), seeded(0))
    held, _ = assign(score, 6, 192)
    assert torch.equal(held.sum(1), torch.full((1, 64), 192))
    assert_exact(assign(score.transpose(1, 2), 192, 8)[0], 192, 8)
    real = torch.arange(2048)[None] < 100
    assert_exact(assign(score, 6, 192, real_GR=real)[0], 6, 192, real)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 1, 8, 8), (1, 1, 8, 3), (2, 9, 1, 1), (1, 7, 5, 5), (1, 1000, 2, 1)]
)
def test_degenerate_shapes(shape: tuple[int, int, int, int]) -> None:
    groups, rows, columns, per_row = shape
    score = torch.randn(groups, rows, columns, generator=seeded(0))
    capacity = math.ceil(rows * per_row / columns)
    held, price = assign(score, per_row, capacity)
    assert_exact(held, per_row, capacity)
    assert price.shape == (groups, columns)
    if capacity == rows:  # room for everyone: each row has its best
        assert torch.equal(held, torch.zeros_like(held).scatter(2, score.topk(per_row, 2).indices, True))


def test_all_rows_padding() -> None:
    real = torch.zeros(2, 5, dtype=torch.bool)
    score = torch.full((2, 5, 3), torch.nan)
    assert not assign(score, 2, 1, real_GR=real)[0].any()
    assert not auction(score, 1, 4, real).any()


@pytest.mark.parametrize("name", ["assign", "auction"])
def test_what_cannot_be_done_is_refused(name: str) -> None:
    score = torch.zeros(1, 9, 2)
    with pytest.raises(AssertionError, match="capacity 4"):
        assign(score, 1, 4) if name == "assign" else auction(score, 4, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    score = torch.randn(1, 24, 6, generator=seeded(0))
    for spoilt in (score.masked_fill(score > 2, bad), torch.full_like(score, bad)):
        for capacity in (8, 9, 24):
            with pytest.raises(FloatingPointError, match="not finite"):
                assign(spoilt, 2, capacity)
            with pytest.raises(FloatingPointError, match="not finite"):
                auction(spoilt, capacity, 9)


def test_more_columns_a_row_than_there_are_is_refused() -> None:
    with pytest.raises(AssertionError):
        assign(torch.zeros(1, 4, 2), 3, 100)


@pytest.mark.parametrize("name", SCORES)
def test_neither_threads_nor_repetition_change_a_result(name: str) -> None:
    score, threads = SCORES[name]((4, 256, 32), seeded(2)), torch.get_num_threads()
    results = []
    try:
        for number in (1, 4, 4):
            torch.set_num_threads(number)
            results.append((*assign(score, 3, 24), auction(score, 8, 20)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", SCORES)
def test_float32_is_as_good_as_float64(name: str) -> None:
    score = SCORES[name]((1, 128, 16), seeded(3))
    single, double = assign(score, 2, 16)[0], assign(score.double(), 2, 16)[0]
    above_mean = total(score, double) - 2 * score.double().mean(2).sum().item()
    assert total(score, single) == pytest.approx(total(score, double), abs=2e-3 * above_mean)


def test_a_level_common_to_a_row_or_a_column_changes_nothing() -> None:
    score = torch.randn(1, 128, 16, generator=seeded(4), dtype=torch.float64)
    row_level = torch.randint(-(2**20), 2**20, (1, 128, 1), generator=seeded(5))
    column_level = torch.randint(-100, 100, (1, 1, 16), generator=seeded(6))
    held, _ = assign(score + row_level + column_level, 2, 16)
    assert regret(score[0], held[0], 2, 16) <= 0.002


def dual_value(score_RC: torch.Tensor, price_C: torch.Tensor, per_row: int, capacity: int) -> float:
    """No assignment within the capacities is worth more, whatever the prices (where room is left: if they are >= 0)."""
    best = (score_RC - price_C).double().topk(per_row, 1).values.sum()
    return (best + capacity * price_C.double().sum()).item()


@pytest.mark.parametrize(("per_row", "capacity"), [(2, 16), (2, 20), (1, 9), (4, 100)])
@pytest.mark.parametrize("name", SCORES)
def test_prices_bound_the_optimum_closely(name: str, per_row: int, capacity: int) -> None:
    score = SCORES[name]((1, 128, 16), seeded(7))
    best = optimum(score[0], per_row, capacity)
    above_mean = best - per_row * score.double().mean(2).sum().item()
    gaps = []
    for iterations in (0, 1, 4, 40):
        price = dual_prices(score, per_row, capacity, iterations)
        gaps.append((dual_value(score[0], price[0], per_row, capacity) - best) / above_mean)
    assert min(gaps) >= -1e-6
    assert gaps[3] <= gaps[0] + 1e-6
    assert gaps[3] <= (0.25 if name == "rank_one" else 0.03)


def test_padding_leaves_prices_as_they_are() -> None:
    score, real = heavy_columns((1, 96, 16), seeded(0)), torch.rand(1, 96, generator=seeded(1)) < 0.6
    padded = torch.where(real[:, :, None], score, 1e6)
    for capacity in (math.ceil(real.sum().item() * 2 / 16), 24):
        prices = dual_prices(padded, 2, capacity, 5, real_GR=real)
        assert torch.equal(prices, dual_prices(score[real][None], 2, capacity, 5))


def test_prices_balance_plain_top_k() -> None:
    score = torch.randn(1, 2048, 32, generator=seeded(8)) + torch.arange(32) / 8
    load = torch.zeros(1, 32).scatter_add_(1, score.topk(4, 2).indices.flatten(1), torch.ones(1, 2048 * 4))
    assert load.max() > 2.5 * 256
    selection = score - dual_prices(score, 4, 256, 10)[:, None]
    load = torch.zeros(1, 32).scatter_add_(1, selection.topk(4, 2).indices.flatten(1), torch.ones(1, 2048 * 4))
    assert load.max() <= 1.02 * 256


def test_prices_start_where_they_are_told() -> None:
    score = heavy_columns((2, 256, 16), seeded(9))
    good = dual_prices(score, 2, 32, 60)
    centred = good - good.mean(1, keepdim=True)
    warm, cold = (dual_prices(score, 2, 32, 1, start_GC=start) for start in (centred, None))
    for group in range(2):
        reached, from_warm, from_cold = (dual_value(score[group], p[group], 2, 32) for p in (good, warm, cold))
        assert from_warm - reached <= 0.1 * (from_cold - reached)
    for start in (torch.full((2, 16), 1e4), 1e3 * torch.randn(2, 16, generator=seeded(0))):
        assert_exact(assign(score, 2, 32, start_GC=start)[0], 2, 32)


def test_exchanges_only_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    results: dict[int, list[float]] = {}
    for rounds in (0, 2, 24):
        monkeypatch.setattr(assignment, "EXCHANGE_ROUNDS", rounds)
        scores = [SCORES[name]((1, 96, 12), seeded(10)) for name in SCORES]
        results[rounds] = [total(score, assign(score, 2, 17)[0]) for score in scores]
    assert all(few <= some + 1e-4 for few, some in zip(results[0], results[2], strict=True))
    assert all(some <= many + 1e-4 for some, many in zip(results[2], results[24], strict=True))
    assert sum(results[24]) > sum(results[0]) + 1


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often `complete` took each of its steps."""
    counts = {"_propose": 0, "_swap": 0}

    def counted(name: str, step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*arguments: Any) -> torch.Tensor:
            counts[name] += 1
            return step(*arguments)

        return call

    for name in counts:
        monkeypatch.setattr(auction_module, name, counted(name, getattr(auction_module, name)))
    return counts


@pytest.mark.parametrize(("rows", "columns", "per_row"), [(640, 64, 6), (600, 6, 5), (512, 16, 15), (65, 13, 12)])
def test_rows_that_all_want_the_same_take_few_passes(
    rows: int, columns: int, per_row: int, passes: dict[str, int]
) -> None:
    """Rows that already hold all columns with room are helped many at once."""
    capacity = rows * per_row // columns
    held, _ = assign(torch.randn(1, 1, columns, generator=seeded(0)).expand(1, rows, columns), per_row, capacity)
    assert torch.equal(held.sum(1), torch.full((1, columns), capacity))
    assert_exact(held, per_row, capacity)
    assert passes["_swap"] >= 1
    assert sum(passes.values()) <= 2 * columns + per_row


@pytest.mark.parametrize("name", SCORES)
def test_a_finished_auction_is_within_epsilon_of_the_optimum_for_each_row(name: str) -> None:
    for rows, columns, capacity in [(64, 8, 8), (60, 16, 4), (40, 8, 15), (8, 32, 1)]:
        score = SCORES[name]((1, rows, columns), seeded(rows))
        epsilon = max(1e-4, (score.max() - score.min()).item() / 50)
        held = auction(score, capacity, 20_000)
        assert_exact(held, 1, capacity)
        lost = optimum(score[0], 1, capacity) - total(score, held)
        assert -1e-6 <= lost <= rows * epsilon


def test_rounds_bound_the_auction(monkeypatch: pytest.MonkeyPatch) -> None:
    score = SCORES["rank_one"]((1, 64, 8), seeded(0))
    lost = {r: optimum(score[0], 1, 8) - total(score, auction(score, 8, r)) for r in (1, 10_000)}
    assert lost[10_000] < lost[1]
    taken: list[torch.Tensor] = []
    real_first = auction_module.first
    monkeypatch.setattr(auction_module, "first", lambda *a: taken.append(a[0]) or real_first(*a))
    monkeypatch.setattr(auction_module, "complete", lambda value, held, *rest: held)
    partial = auction(score, 8, 3)
    assert len(taken) == 3
    assert (partial.sum(1) <= 8).all()
    assert (partial.sum(2) <= 1).all()
