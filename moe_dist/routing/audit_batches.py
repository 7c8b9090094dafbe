"""The random tokens of the audit (`moe_dist.routing.audit`), and what becomes of some of them.

Every rank draws the tokens of all ranks, from one seed: all ranks know what changes on which of them.

Shape letters: A tokens on all ranks, T tokens on this rank, H hidden.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.routing.types import Tokens

CHANGES = ("fresh", "large", "reordered", "rivals", "absent")
"""What becomes of the tokens that change: other random ones; ones ten times as large; the same in another order; near copies
of one of the tokens that are watched, which want the same experts as it, so that limits bind; padding."""


@dataclass(frozen=True)
class Batch:
    """The tokens of all ranks."""

    hidden_AH: Tensor
    id_A: Tensor
    padding_A: Tensor


class Batches:
    """Draws batches of equal shape, and places in them."""

    def __init__(
        self, hidden_size: int, vocab_size: int, num_sequences: int, length: int, group: dist.ProcessGroup | None
    ) -> None:
        self.hidden_size, self.vocab_size, self.num_sequences, self.length = (
            hidden_size,
            vocab_size,
            num_sequences,
            length,
        )
        self.tokens_per_rank, self.group = num_sequences * length, group
        self.num_ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        shape = (self.num_ranks, num_sequences, length)
        self.rank_A, self.sequence_A, self.position_A = torch.cartesian_prod(*map(torch.arange, shape)).T
        self._generator = torch.Generator().manual_seed(0)

    def draw(self) -> Batch:
        """Tokens that have something in common, so that some experts are wanted more than others."""
        num_tokens = len(self.rank_A)
        hidden_AH = self._normal(num_tokens, self.hidden_size) + self._normal(1, self.hidden_size)
        padding_A = torch.zeros(num_tokens, dtype=torch.bool)
        return Batch(hidden_AH, self._integers(self.vocab_size, num_tokens), padding_A)

    def draw_place(self) -> tuple[int, int, int]:
        """A rank, a sequence, and a position in it that is not the last one and rather early: capacity binds later on."""
        rank, sequence = (int(self._integers(size)) for size in (self.num_ranks, self.num_sequences))
        position = int((self.length - 1) * self._uniform(1).square())
        return rank, sequence, position

    def changed(self, batch: Batch, changing_A: Tensor, watched_A: Tensor, change: str) -> Batch:
        """The batch after one of CHANGES."""
        if change == "absent":
            return replace(batch, padding_A=changing_A)
        other = self._replacement(batch, changing_A, watched_A, change)
        return replace(
            batch,
            hidden_AH=torch.where(changing_A[:, None], other.hidden_AH, batch.hidden_AH),
            id_A=torch.where(changing_A, other.id_A, batch.id_A),
        )

    def inputs(self, batch: Batch, step: int) -> tuple[Tensor, Tokens]:
        """What the router of this rank gets."""
        padding_T = self.own(batch.padding_A)
        tokens = Tokens(
            id_T=self.own(batch.id_A),
            sequence_T=self.own(self.sequence_A),
            position_T=self.own(self.position_A),
            global_index_T=self.own(torch.arange(len(self.rank_A))),
            padding_T=padding_T if padding_T.any() else None,
            num_sequences=self.num_sequences,
            step=step,
        )
        return self.own(batch.hidden_AH), tokens

    def own(self, value_A: Tensor) -> Tensor:
        """[T, ...] this rank's part."""
        return value_A.split(self.tokens_per_rank)[self.rank]

    def name_of(self, token: int) -> str:
        """Of a token of this rank."""
        sequence, position = divmod(token, self.length)
        return f"token {position} of sequence {sequence}" + (f" of rank {self.rank}" if self.num_ranks > 1 else "")

    def _replacement(self, batch: Batch, changing_A: Tensor, watched_A: Tensor, change: str) -> Batch:
        if change == "reordered":
            place_C = changing_A.nonzero().squeeze(1)
            order_A = torch.arange(len(changing_A))
            order_A[place_C] = place_C[torch.randperm(len(place_C), generator=self._generator)]
            return Batch(batch.hidden_AH[order_A], batch.id_A[order_A], batch.padding_A)
        other = self.draw()
        if change == "large":
            return replace(other, hidden_AH=10 * other.hidden_AH)
        if change == "rivals":
            watched_W = watched_A.nonzero().squeeze(1)
            rival = watched_W[self._integers(len(watched_W))]
            scale_A1 = 1 + self._uniform(len(watched_A), 1)
            hidden_AH = batch.hidden_AH[rival] * scale_A1 + 0.1 * self._normal(*batch.hidden_AH.shape)
            return replace(other, hidden_AH=hidden_AH, id_A=batch.id_A[rival].expand_as(batch.id_A))
        return other

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self._generator)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=self._generator)

    def _integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self._generator)
