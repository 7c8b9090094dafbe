"""Random numbers as pure functions of (seed, step, layer, token): replay, independence, distribution.

Shape letters: T tokens, N numbers for each of them.
"""

import itertools
from collections.abc import Callable
from unittest.mock import patch

import pytest
import scipy.stats
import torch

from moe_dist.routing import random
from moe_dist.routing.random import key_of, normal, permutation, random_bits, uniform

T, N = 4096, 8
KEY = key_of(0, "layers.3", "noise")
CPU = torch.device("cpu")
TOKENS = torch.arange(T)


def mix(value: int) -> int:
    """The finaliser of SplitMix64, twice, on Python's integers."""
    for _ in range(2):
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
        value ^= value >> 31
    return value


def test_bits_are_those_of_splitmix64() -> None:
    golden = 0x9E3779B97F4A7C15
    bits = random_bits(KEY, 5, torch.tensor([0, 7, 2**40]), size=3)
    for row, index in zip(bits.tolist(), [0, 7, 2**40], strict=True):
        token = mix((index * golden + mix((KEY + 5 * golden) % 2**64)) % 2**64)
        assert [value % 2**64 for value in row] == [mix((token + n * golden) % 2**64) for n in range(3)]


@pytest.mark.parametrize("draw", [random_bits, uniform, normal])
def test_any_tokens_in_any_order_get_the_same_numbers(draw: Callable[..., torch.Tensor]) -> None:
    whole = draw(KEY, 3, TOKENS, N)
    some = torch.tensor([17, 4095, 0, 17, 256])
    assert torch.equal(draw(KEY, 3, some, N), whole[some])
    assert torch.equal(draw(KEY, 3, some, 2), whole[some, :2])  # nor do they depend on how many there are
    assert draw(KEY, 3, TOKENS[:0], N).shape == (0, N)


def test_every_part_of_the_identity_gives_other_numbers() -> None:
    """No number of one stream turns up in another, also not shifted: a step must not be the last one, moved by a token."""
    streams = [
        random_bits(key_of(seed, layer, purpose), step, TOKENS[:256], N)
        for seed, layer, purpose, step in itertools.product(
            [0, 1], ["layers.1", "layers.11"], ["a", "b"], [0, 1, 2, 256]
        )
    ]
    assert torch.cat(streams).unique().numel() == len(streams) * 256 * N


def test_names_do_not_run_together() -> None:
    assert len({key_of(1, "ab", "c"), key_of(1, "a", "bc"), key_of(1, "abc"), key_of(11, "ab", "c")}) == 4


def test_uniform_and_normal_have_their_distributions() -> None:
    values = {"uniform": uniform(KEY, 0, TOKENS, N), "norm": normal(KEY, 0, TOKENS, N)}
    for name, value_TN in values.items():
        assert value_TN.dtype == torch.float64
        assert scipy.stats.kstest(value_TN.flatten().numpy(), name).pvalue > 0.01
    moments = [values["norm"].pow(power).mean().item() for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.1)


def test_numbers_of_neighbours_are_not_correlated() -> None:
    """Tokens, steps, layers and numbers of a token side by side."""
    here = normal(KEY, 0, TOKENS, N)
    others = [here.roll(1, 0), here.roll(1, 1), normal(KEY, 1, TOKENS, N), normal(KEY + 1, 0, TOKENS, N)]
    for other in others:
        assert abs((here * other).mean().item()) < 4 / (T * N) ** 0.5


@pytest.mark.parametrize("bits", [0, -1, 2**63 - 1, -(2**63), 4095, -4096])
def test_the_ends_are_never_reached(bits: int) -> None:
    """At 0 or 1 the normal number would be infinite."""
    with patch.object(random, "random_bits", return_value=torch.tensor([[bits]])):
        assert 0 < uniform(KEY, 0, TOKENS).item() < 1
        assert abs(normal(KEY, 0, TOKENS).item()) < 9


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_permutations(size: int) -> None:
    order = permutation(KEY, 0, size, CPU)
    assert order.sort().values.tolist() == list(range(size))
    assert torch.equal(order, permutation(KEY, 0, size, CPU))
    if size == 1000:
        others = [permutation(KEY, 1, size, CPU), permutation(KEY + 1, 0, size, CPU), torch.arange(size)]
        assert all((order == other).sum() < 10 for other in others)


def test_every_order_is_equally_likely() -> None:
    orders = [tuple(permutation(KEY, step, 3, CPU).tolist()) for step in range(1200)]
    counts = [orders.count(order) for order in itertools.permutations(range(3))]
    assert scipy.stats.chisquare(counts).pvalue > 0.01
