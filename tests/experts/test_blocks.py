"""Layouts of received rows in blocks, against rows moved one at a time; and the CPU's products against the plain loop.

Shape letters: R rows received, Q rows in blocks.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.dispatch import Segments
from moe_dist.experts import cpu
from moe_dist.experts.backends import BACKENDS, Activation
from moe_dist.experts.blocks import Layout, arrange
from moe_dist.experts.types import Incoming, Rows
from moe_dist.kernels import onednn


def multiple_of(number: int) -> Any:
    return lambda rows: -(-rows // number) * number


@st.composite
def segments_of(draw: st.DrawFn) -> Segments:
    """Of some ranks, each with the same experts in order; experts in between may be another chunk's."""
    experts = draw(st.lists(st.integers(0, 9), unique=True).map(sorted))
    ranks = draw(st.integers(1, 3))
    count = len(experts) * ranks
    return Segments(draw(st.lists(st.integers(0, 7), min_size=count, max_size=count)), experts * ranks)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Segments, Layout, int, int, int]:
    segments = draw(segments_of())
    multiple, block_rows, batch_below = draw(st.integers(1, 4)), draw(st.integers(1, 30)), draw(st.integers(0, 12))
    layout = arrange(segments, multiple_of(multiple), block_rows, batch_below)
    return segments, layout, multiple, block_rows, batch_below


def naive_rows(segments: Segments) -> list[tuple[int, int]]:
    """(segment, number within it) of each row in the order of the segments."""
    return [(segment, row) for segment, size in enumerate(segments.sizes) for row in range(size)]


@given(layouts())
def test_every_row_stands_once_with_its_expert_in_the_order_of_arrival(case: tuple[Any, ...]) -> None:
    segments, layout, *_ = case
    rows, places = naive_rows(segments), layout.place_of(segments).tolist()
    assert len(set(places)) == len(places) == len(rows)
    assert sorted(places) == layout.place_R.tolist()
    row_at = dict(zip(places, rows, strict=True))
    for block in layout.blocks:
        first = block.start
        for expert, padded in zip(block.experts, block.padded, strict=True):
            found = [row_at[place] for place in range(first, first + padded) if place in row_at]
            assert found == [row for row in rows if segments.experts[row[0]] == expert]
            assert [place in row_at for place in range(first, first + padded)] == [True] * len(found) + [False] * (
                padded - len(found)
            )
            first += padded


@given(layouts(), st.data())
def test_sources_are_where_a_buffer_has_the_rows(case: tuple[Any, ...], data: st.DataObject) -> None:
    """Wherever its segments begin."""
    segments, layout, *_ = case
    gaps = [data.draw(st.integers(0, 3)) for _ in segments.sizes]
    starts, end = [], 0
    for gap, size in zip(gaps, segments.sizes, strict=True):
        starts.append(end + gap)
        end += gap + size
    rows, places = naive_rows(segments), layout.place_of(segments).tolist()
    naive = {place: starts[segment] + row for place, (segment, row) in zip(places, rows, strict=True)}
    assert layout.source_R(starts).tolist() == [naive[place] for place in layout.place_R.tolist()]


@given(layouts())
def test_blocks_are_runs_of_consecutive_experts(case: tuple[Any, ...]) -> None:
    segments, layout, multiple, block_rows, batch_below = case
    rows_of = dict.fromkeys(segments.experts, 0)
    for size, expert in zip(segments.sizes, segments.experts, strict=True):
        rows_of[expert] += size
    assert [e for block in layout.blocks for e in block.experts] == sorted(e for e, rows in rows_of.items() if rows)
    assert layout.idle == sorted(e for e, rows in rows_of.items() if not rows)
    end = 0
    for block in layout.blocks:
        assert all(b == a + 1 for a, b in pairwise(block.experts))
        assert len(block.experts) == 1 or sum(rows_of[e] for e in block.experts) <= block_rows
        most = max(rows_of[e] for e in block.experts)
        assert block.is_batch == (len(block.experts) > 1 and most < batch_below)
        sizes = [most if block.is_batch else rows_of[e] for e in block.experts]
        assert block.padded == [multiple_of(multiple)(size) for size in sizes]
        assert block.rows == slice(end, end + sum(block.padded))
        end = block.rows.stop
    assert layout.num_rows == end


def test_equal_experts_are_no_batch_unless_asked() -> None:
    """A batched product may round in another way, and which experts stand together depends on the chunks."""
    (block,) = arrange(Segments([3, 3], [0, 1]), multiple_of(1), 100, 0).blocks
    assert not block.is_batch


@given(layouts(), st.booleans())
def test_rows_that_are_not_there_have_weight_zero(case: tuple[Any, ...], weighted: bool) -> None:
    segments, layout, *_ = case
    num_rows = sum(segments.sizes)
    weight_R = torch.arange(1.0, num_rows + 1) if weighted else None
    incoming = Incoming(Rows(torch.zeros(num_rows, 1), segments.starts()), weight_R, [])
    expected_Q = torch.zeros(layout.num_rows)
    for row, place in enumerate(layout.place_of(segments).tolist()):
        expected_Q[place] = row + 1 if weighted else 1
    assert torch.equal(cpu._weights(incoming, layout), expected_Q)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("large", [1, 2**60])
@pytest.mark.parametrize("by_onednn", [False, True])
def test_either_library_computes_the_loop(
    monkeypatch: pytest.MonkeyPatch, by_onednn: bool, large: int, activation: Activation
) -> None:
    """Float32 by oneDNN and by MKL, weight gradients of any size by either."""
    if by_onednn and not onednn.AVAILABLE:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(onednn, "FASTER", by_onednn)
    monkeypatch.setattr(onednn, "FASTER_TRANSPOSED", by_onednn)
    monkeypatch.setattr(cpu, "_LARGE_PRODUCT", large)
    segments = Segments([3, 0, 1, 130, 5, 600, 17, 0, 0, 2, 0, 9], [0, 1, 2, 3, 4, 5] * 2)
    results = []
    for backend in ("cpu", "loop"):
        generator = torch.Generator().manual_seed(0)
        shapes = (sum(segments.sizes), 12), (6, 12, 20 if activation == "swiglu" else 10), (6, 10, 12)
        inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        out = BACKENDS[backend].compute(inputs[0], segments, inputs[1], inputs[2], activation)
        out.square().mean().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
