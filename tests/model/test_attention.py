"""Attention against its formula, and the properties of rotary position embedding.

Shape letters: B sequences, S tokens of a sequence, N query heads, M key-value heads, D head size.
"""

import math
from typing import Any

import pytest
import torch

from moe_dist.config.schema import ModelConfig
from moe_dist.model.attention import Attention, rotary_angles, rotate

B, S, H, D = 2, 7, 12, 6


def make_attention(**model: Any) -> Attention:
    """Random float64 weights, those of the norms included."""
    attention = Attention(ModelConfig(**{"hidden_size": H, "num_heads": 4, "head_size": D, **model})).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return attention


def make_hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, S, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turn(x_D: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Rotary embedding as multiplication of complex numbers x_i + i x_{i + D/2}."""
    first, second = x_D.chunk(2)
    angle = position * theta ** (-torch.arange(D // 2, dtype=torch.float64) * 2 / D)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag])


def reference(attention: Attention, hidden_BSH: torch.Tensor, mask_BSS: torch.Tensor | None = None) -> torch.Tensor:
    """The formula, one query of one head at a time."""
    query, key, value = (w(hidden_BSH) for w in (attention.w_query, attention.w_key, attention.w_value))
    if attention.qk_norm == "width":
        query, key = rms_norm(query, attention.query_norm.weight), rms_norm(key, attention.key_norm.weight)
    query, key, value = (x.unflatten(-1, (-1, D)) for x in (query, key, value))
    if attention.qk_norm == "head":
        query, key = rms_norm(query, attention.query_norm.weight), rms_norm(key, attention.key_norm.weight)
    out = torch.zeros(B, S, attention.num_heads, D, dtype=torch.float64)
    for b in range(B):
        for n in range(attention.num_heads):
            m = n * attention.num_kv_heads // attention.num_heads
            for i in range(S):
                seen = [j for j in range(i + 1) if mask_BSS is None or mask_BSS[b, i, j]]
                here = turn(query[b, i, n], i, attention.rope_theta)
                there = [turn(key[b, j, m], j, attention.rope_theta) for j in seen]
                weight = torch.stack([here @ x / math.sqrt(D) for x in there]).softmax(0)
                out[b, i, n] = sum(w * value[b, j, m] for w, j in zip(weight, seen, strict=True))
    return attention.w_out(out.flatten(2))


@pytest.mark.parametrize("qk_norm", ["none", "head", "width"])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
def test_it_is_the_formula(qk_norm: str, num_kv_heads: int | None) -> None:
    attention = make_attention(qk_norm=qk_norm, num_kv_heads=num_kv_heads, rope_theta=50.0)
    hidden = make_hidden()
    torch.testing.assert_close(attention(hidden, None), reference(attention, hidden), rtol=1e-12, atol=1e-12)


def test_a_mask_narrows_it() -> None:
    attention, hidden = make_attention(qk_norm="head", num_kv_heads=2), make_hidden()
    mask = torch.rand(B, S, S, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = (mask | torch.eye(S, dtype=torch.bool)).tril()
    actual = attention(hidden, mask[:, None])
    torch.testing.assert_close(actual, reference(attention, hidden, mask), rtol=1e-12, atol=1e-12)


def test_shared_heads_are_repeated_heads() -> None:
    """Query head n uses key-value head n * M // N."""
    shared, hidden = make_attention(num_kv_heads=2), make_hidden()
    full = make_attention()
    weights = shared.state_dict()
    for name in ("w_key.weight", "w_value.weight"):
        weights[name] = weights[name].unflatten(0, (2, D)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(shared(hidden, None), full(hidden, None), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("qk_norm", "query", "key"), [("head", D, D), ("width", 4 * D, 2 * D)])
def test_norms_have_their_width(qk_norm: str, query: int, key: int) -> None:
    attention = make_attention(qk_norm=qk_norm, num_kv_heads=2)
    assert (attention.query_norm.weight.shape, attention.key_norm.weight.shape) == ((query,), (key,))


@pytest.mark.parametrize("qk_norm", ["head", "width"])
def test_with_norms_the_scale_of_queries_and_keys_is_nothing(qk_norm: str) -> None:
    attention, hidden = make_attention(qk_norm=qk_norm), make_hidden()
    before = attention(hidden, None)
    attention.w_query.weight.data *= 100
    attention.w_key.weight.data *= 50
    torch.testing.assert_close(attention(hidden, None), before, rtol=1e-4, atol=1e-5)  # up to epsilon


def test_scores_depend_on_the_distance_alone() -> None:
    cos, sin = rotary_angles(40, D, 10000.0, torch.zeros((), dtype=torch.float64))
    query, key = make_hidden(1)[0, 0, :D], make_hidden(2)[0, 0, :D]
    queries, keys = (rotate(x.expand(1, 1, 40, D), cos, sin)[0, 0] for x in (query, key))
    score = queries @ keys.t()
    for distance in range(-30, 31):
        values = score.diagonal(distance)
        torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-12, atol=1e-12)
    assert score[0].std() > 0.1 * score.abs().mean()  # and do depend on it
    torch.testing.assert_close(queries[0], query)  # position 0 is not turned
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(40), rtol=1e-12, atol=1e-12)


def test_angles_are_float32_in_bfloat16() -> None:
    """bfloat16 positions above 256 would not be distinct."""
    cos, sin = rotary_angles(1000, D, 10000.0, torch.zeros((), dtype=torch.bfloat16))
    exact, _ = rotary_angles(1000, D, 10000.0, torch.zeros((), dtype=torch.float64))
    assert cos.dtype == sin.dtype == torch.bfloat16
    assert (cos.double() - exact).abs().max() < 2**-8


@pytest.mark.parametrize("qk_norm", ["none", "head", "width"])
def test_autocast_is_close(qk_norm: str) -> None:
    attention, hidden = make_attention(qk_norm=qk_norm, num_kv_heads=2).float(), make_hidden().float()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(hidden, None)
    assert out.dtype == torch.bfloat16
    exact = attention(hidden, None)
    assert (out - exact).norm() < 0.03 * exact.norm()
