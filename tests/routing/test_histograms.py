"""Quantiles from histograms against sorted values.

Shape letters: T tokens, E experts, B bins.
"""

import numpy as np
import pytest
import torch

from moe_dist.routing.histograms import BINS, histogram, quantile

T, E = 3000, 4
LOW, HIGH = torch.tensor(-1.5), torch.tensor(2.5)
WIDTH = 4 / BINS


def make_values(tokens: int = T) -> torch.Tensor:
    """Another distribution in each column, some far from smooth, all inside the range."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(tokens, generator=generator, dtype=torch.float64)
    return torch.stack([uniform, uniform.pow(8) - 1, (uniform * 5).floor() / 3, torch.full_like(uniform, 0.3)], dim=1)


def test_counts_are_those_of_numpy() -> None:
    counts = histogram(make_values(), LOW, HIGH, None)
    assert (counts.dtype, counts.shape) == (torch.int64, (E, BINS))
    for expert in range(2):
        expected, _ = np.histogram(make_values()[:, expert].numpy(), bins=BINS, range=(-1.5, 2.5))
        assert counts[expert].tolist() == expected.tolist()


def test_every_token_counts_once_even_outside_the_range() -> None:
    value = torch.tensor([[-9.0], [torch.inf], [-torch.inf], [2.5], [-1.5], [9.0]])
    counts = histogram(value, LOW, HIGH, None)[0]
    assert (counts[0], counts[-1], counts.sum()) == (3, 3, 6)


def test_padding_is_left_out_whatever_it_holds() -> None:
    real = torch.rand(T, generator=torch.Generator().manual_seed(1)) < 0.7
    value = make_values().masked_fill(~real[:, None], torch.nan)
    assert torch.equal(histogram(value, LOW, HIGH, real), histogram(make_values()[real], LOW, HIGH, None))
    assert not histogram(value, LOW, HIGH, torch.zeros(T, dtype=torch.bool)).any()
    assert not histogram(value[:0], LOW, HIGH, None).any()


@pytest.mark.parametrize("rank", [1, 2, T // 3, T // 2, T - 1, T])
def test_quantiles_are_within_a_bin_of_the_sorted_value(rank: int) -> None:
    estimate = quantile(histogram(make_values(), LOW, HIGH, None), torch.tensor(rank), LOW, HIGH)
    exact = make_values().sort(0).values[rank - 1]
    assert (estimate - exact).abs().max() <= WIDTH * (1 + 1e-6)


def test_quantiles_interpolate_inside_a_bin() -> None:
    """Of evenly spread values the error is far below the width of a bin."""
    value = torch.linspace(-1.5, 2.5, 100_001, dtype=torch.float64)[:, None]
    counts = histogram(value, LOW, HIGH, None)
    for share in (0.1234, 0.5, 0.98765):
        assert quantile(counts, share * counts.sum(), LOW, HIGH).item() == pytest.approx(4 * share - 1.5, abs=1e-4)


def test_each_column_has_its_own_rank() -> None:
    counts = histogram(make_values(), LOW, HIGH, None)
    rank_E1 = torch.tensor([[10], [1000], [2000], [T]])
    alone = [quantile(counts, rank, LOW, HIGH)[expert] for expert, rank in enumerate(rank_E1)]
    assert torch.equal(quantile(counts, rank_E1, LOW, HIGH), torch.stack(alone))


def test_parts_add_up_to_the_whole() -> None:
    """Not so the quantiles themselves, where the parts differ: hence histograms."""
    value = make_values().sort(0).values
    parts = [histogram(part, LOW, HIGH, None) for part in value.split(T // 4)]
    whole = histogram(value, LOW, HIGH, None)
    assert torch.equal(sum(parts), whole)
    rank = torch.tensor(T // 4 * 3)
    mean_of_parts = sum(quantile(part, rank / 4, LOW, HIGH) for part in parts) / 4
    assert (mean_of_parts - quantile(whole, rank, LOW, HIGH)).abs().max() > 10 * WIDTH


def test_counts_beyond_float32() -> None:
    counts = torch.zeros(1, BINS, dtype=torch.int64)
    counts[0, 10], counts[0, 20] = 2**40 + 1, 2**40
    assert quantile(counts, torch.tensor(2**40 + 1), LOW, HIGH).item() == pytest.approx(-1.5 + 11 * WIDTH)
    assert quantile(counts, torch.tensor(2**40 + 2), LOW, HIGH).item() == pytest.approx(-1.5 + 20 * WIDTH)
