"""How the received rows are laid out for GEMMs: the rows of one expert together, small experts several at a time.

Rows arrive in segments, by source rank and then by expert. A GEMM over all rows of an expert is faster than one for each
segment, so the segments of an expert are brought together while a block of rows is read into cache. Numbers of rows
are rounded up where the library builds a kernel for every number it meets, or where several experts share one batched
GEMM; rows beyond the real ones have weight zero.

Shape letters: R rows received, Q rows in blocks (rounded up).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from moe_dist.dispatch.types import Segments


@dataclass(frozen=True)
class Piece:
    """The rows of one segment within a block."""

    segment: int
    start: int
    """First row within the block."""
    size: int


@dataclass(frozen=True)
class Block:
    """Consecutive experts that are computed together."""

    experts: list[int]
    """Places in the weight stack."""
    padded: list[int]
    """Rows of each expert, rounded up."""
    start: int
    """First row of the block in Q."""
    pieces: list[Piece]
    is_batch: bool
    """Several experts get equally many rows, for one batched GEMM. Never by chance: that may round in another way."""

    @property
    def rows(self) -> slice:
        """Which of Q."""
        return slice(self.start, self.start + sum(self.padded))

    @property
    def stack(self) -> slice:
        """Which of the weight stack."""
        return slice(self.experts[0], self.experts[-1] + 1)


@dataclass(frozen=True)
class Layout:
    """Blocks of rows and where their rows come from."""

    blocks: list[Block]
    num_rows: int
    """Q."""
    idle: list[int]
    """Experts that have segments but no rows."""

    def place_of(self, segments: Segments) -> torch.Tensor:
        """int64 [R]: for each row in the order of the segments its place in Q."""
        return torch.empty_like(self.place_R).index_copy_(0, self.source_R(segments.starts()), self.place_R)

    @cached_property
    def place_R(self) -> torch.Tensor:
        """int64 [R]: the rows of Q that are real, in rising order."""
        return self._spread([block.start + piece.start for block, piece in self._pieces()])

    def source_R(self, starts: list[int]) -> torch.Tensor:
        """int64 [R]: where the same rows are in a buffer in which segment s begins at row starts[s]."""
        return self._spread([starts[piece.segment] for _, piece in self._pieces()])

    def _pieces(self) -> Iterator[tuple[Block, Piece]]:
        return ((block, piece) for block in self.blocks for piece in block.pieces)

    def _spread(self, firsts: list[int]) -> torch.Tensor:
        """first, first + 1, ... for each piece, one run after the other."""
        size_S = torch.tensor([piece.size for _, piece in self._pieces()], dtype=torch.int64)
        end_S = size_S.cumsum(0)
        offset_S = torch.tensor(firsts, dtype=torch.int64) - (end_S - size_S)
        return torch.arange(int(size_S.sum())) + offset_S.repeat_interleave(size_S)


def arrange(segments: Segments, round_up: Callable[[int], int], block_rows: int, batch_below: int) -> Layout:
    """Lay out segments in blocks.

    Args:
        round_up: what the rows of an expert are rounded up to.
        block_rows: experts are taken together up to this many rows.
        batch_below: experts of a block get equally many rows, for a batched GEMM, where all have fewer than this.
    """
    segments_of: dict[int, list[int]] = {}
    for segment, (size, expert) in enumerate(zip(segments.sizes, segments.experts, strict=True)):
        if size:
            segments_of.setdefault(expert, []).append(segment)
    rows_of = {expert: sum(segments.sizes[s] for s in segments_of[expert]) for expert in sorted(segments_of)}
    blocks: list[Block] = []
    start = 0
    for experts in _runs(rows_of, block_rows):
        sizes = [rows_of[expert] for expert in experts]
        is_batch = len(experts) > 1 and max(sizes) < batch_below
        padded = [round_up(max(sizes) if is_batch else size) for size in sizes]
        block = Block(experts, padded, start, [], is_batch)
        for expert, end, size in zip(experts, accumulate(padded), padded, strict=True):
            first = end - size
            for segment in segments_of[expert]:
                block.pieces.append(Piece(segment, first, segments.sizes[segment]))
                first += segments.sizes[segment]
        blocks.append(block)
        start = block.rows.stop
    return Layout(blocks, start, sorted(set(segments.experts) - set(rows_of)))


def _runs(rows_of: dict[int, int], block_rows: int) -> list[list[int]]:
    """Runs of consecutive experts with at most `block_rows` rows, or one expert each."""
    runs: list[list[int]] = []
    rows = 0
    for expert, size in rows_of.items():
        if runs and runs[-1][-1] == expert - 1 and rows + size <= block_rows:
            runs[-1].append(expert)
            rows += size
        else:
            runs.append([expert])
            rows = size
    return runs
