"""Tokens that ranks hold parts of each sequence of: sequence and context parallelism.

A router then sees its own tokens' hidden states only. The scores of all are gathered, so that every rank decides alike on whole
sequences, over routing groups, auxiliary losses and loads as if nothing were split, and each goes on with its own tokens' pairs.

Shape letters: T tokens of all ranks, U tokens of one rank, N values of a token, P pairs, B sequences, R ranks, C chunks of a
rank.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.parallel.collectives import all_gather_rows
from moe_dist.routing.types import Routing, Tokens, keep_pairs


class TokenSplit:
    """How the ranks of a group share the tokens of a micro-batch, of which each has equally many."""

    def __init__(self, group: dist.ProcessGroup, chunks: tuple[tuple[int, ...], ...] | None = None) -> None:
        """Divide every sequence into equal chunks.

        Args:
            chunks: for each rank of the group the numbers of its chunks, rising. Default: rank r has chunk r.
        """
        self.group, self.num_ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.chunks = chunks or tuple((rank,) for rank in range(self.num_ranks))

    def gather(self, value_UN: Tensor, num_sequences: int) -> Tensor:
        """[T, N], batch-major. The gradient of each rank's own rows goes back to it, those of others are left to them."""
        return _Gather.apply(value_UN, self._places_RU(num_sequences, value_UN), self.rank, self.group)

    def own_tokens(self, tokens: Tokens, like_U: Tensor) -> Tokens:
        """What is known of this rank's tokens."""
        own_U = self._places_RU(tokens.num_sequences, like_U)[self.rank]
        per_token = {
            name: value[own_U] for name, value in vars(tokens).items() if name.endswith("_T") and value is not None
        }
        return replace(tokens, **({"global_index_T": own_U} | per_token))

    def own_pairs(self, routing: Routing, tokens: Tokens, like_U: Tensor) -> Routing:
        """The routing of this rank's tokens, numbered from 0; loads, drops and losses stay those of all."""
        own_U = self._places_RU(tokens.num_sequences, like_U)[self.rank]
        place_T1 = own_U.new_full((len(own_U) * self.num_ranks + 1,), -1)  # the last one is of vacant pairs
        place_T1[own_U] = torch.arange(len(own_U), device=own_U.device)
        place_P = place_T1[routing.token_P]
        weight_T = routing.identity_weight_T
        routing = replace(
            routing,
            token_P=place_P,
            identity_weight_T=None if weight_T is None else weight_T[own_U],
            pairs_per_expert=None,  # equal numbers were promised of all tokens together, not of a part of them
        )
        return keep_pairs(routing, place_P >= 0, len(own_U), None)

    def count_once(self, weight: Tensor) -> Tensor:
        """The weight, for what every rank computes of it alike: the gradients of the ranks are summed."""
        return weight.detach() + (weight - weight.detach()) / self.num_ranks

    def _places_RU(self, num_sequences: int, like_U: Tensor) -> Tensor:
        return _places_RU(self.chunks, num_sequences, len(like_U), like_U.device)


@lru_cache
def _places_RU(chunks: tuple[tuple[int, ...], ...], num_sequences: int, num_own: int, device: torch.device) -> Tensor:
    """int64: for each rank the places of its tokens among all, batch-major."""
    length = num_own // num_sequences
    chunk_RC = torch.tensor(chunks)
    size = length // chunk_RC.shape[1]
    assert size * chunk_RC.shape[1] * num_sequences == num_own, "sequences are cut into equal chunks"
    position_RU = (chunk_RC[:, :, None] * size + torch.arange(size)).flatten(1)
    first_B = torch.arange(num_sequences) * length * len(chunks)
    return (first_B[:, None] + position_RU[:, None]).flatten(1).to(device)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_UN: Tensor, places_RU: Tensor, rank: int, group: dist.ProcessGroup) -> Tensor:
        ctx.own_U = places_RU[rank]
        rows_TN = all_gather_rows(value_UN, group)
        return torch.empty_like(rows_TN).index_copy_(0, places_RU.flatten(), rows_TN)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0].index_select(0, ctx.own_U), None, None, None
