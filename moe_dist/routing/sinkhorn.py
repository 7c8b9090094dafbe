"""Sinkhorn routing: top-k of the entropic transport plan from tokens to experts (S-BASE, arXiv 2202.01169).

In the log domain, with a fixed number of iterations. For routing.group: global the sums over tokens are all-reduced in each
iteration, so that no scores travel. For k > 1 the plan's columns are balanced but not quite its top-k: the plan knows no
bound of 1 on a pair. Not causal in training.

Shape letters: T tokens, E experts, G routing groups, N tokens of a routing group.
"""

import math

import torch
import torch.distributed as dist

from moe_dist.routing.batch import BatchRouter
from moe_dist.routing.types import Tokens


class SinkhornRouter(BatchRouter):
    """Prices are the column scalings of the plan."""

    def affinity(self, logits_TE: torch.Tensor, scores_TE: torch.Tensor) -> torch.Tensor:
        """See BatchRouter."""
        return logits_TE

    def solve_groups(
        self, affinity_TE: torch.Tensor, real_T: torch.Tensor | None, tokens: Tokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See BatchRouter; a global group is solved in place, by all-reduces."""
        if self.routing.group != "global":
            return super().solve_groups(affinity_TE, real_T, tokens)
        real_GN = None if real_T is None else real_T[None]
        chosen_GNE, price_GE = self._solve(affinity_TE[None], real_GN, self.data_parallel_group)
        return chosen_GNE[0], price_GE

    def solve(self, affinity_GNE: torch.Tensor, real_GN: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """See BatchRouter."""
        return self._solve(affinity_GNE, real_GN, None)

    def _solve(
        self, affinity_GNE: torch.Tensor, real_GN: torch.Tensor | None, group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config, top_k = self.routing.sinkhorn, self.routing.top_k
        price_GE = sinkhorn_prices(affinity_GNE, top_k, config.epsilon, config.iterations, real_GN, group)
        chosen_GNK = (affinity_GNE - price_GE[:, None]).topk(top_k, dim=-1).indices
        return torch.zeros_like(affinity_GNE, dtype=torch.bool).scatter_(2, chosen_GNK, True), price_GE


def sinkhorn_prices(
    logits_GNE: torch.Tensor,
    top_k: int,
    epsilon: float,
    iterations: int,
    real_GN: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """[G, E] prices v such that exp((logits - v) / e), its rows scaled to sum to k, has columns that sum to k N / E.

    The iterations are f = log k - LSE_E(L + v'), v' = log(k N / E) - LSE_N(L + f) with L = logits / e and v = -e v'.

    Args:
        epsilon: e in units of the standard deviation of the group's logits.
        real_GN: False for padding, which takes no part.
        group: ranks that each hold a part of the tokens of every group; None if this rank holds all.
    """
    real_GN1 = torch.ones_like(logits_GNE[..., :1]) if real_GN is None else real_GN[..., None].to(logits_GNE.dtype)
    tokens_G, deviation_G = _moments(logits_GNE, real_GN1, group)
    scale_G11 = (epsilon * deviation_G)[:, None, None]
    scaled_GNE = logits_GNE / scale_G11
    target_GE = (top_k * tokens_G.clamp(min=1) / logits_GNE.shape[2]).log()[:, None]
    column_GE = torch.zeros_like(scaled_GNE[:, 0]) if scaled_GNE.shape[1] else scaled_GNE.sum(1)
    row_mask_GN1 = real_GN1.log()  # -inf for padding
    for _ in range(iterations):
        row_GN1 = math.log(top_k) - (scaled_GNE + column_GE[:, None]).logsumexp(2, keepdim=True)
        column_GE = target_GE - _logsumexp_over_tokens(scaled_GNE + (row_GN1 + row_mask_GN1), group)
    return -column_GE * scale_G11[:, 0]


def _moments(
    logits_GNE: torch.Tensor, real_GN1: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of tokens and standard deviation of their logits, each [G]."""
    # In float64: where all logits have an offset in common, the difference of squares would cancel.
    kept_GNE = (logits_GNE * real_GN1).double()
    sums = torch.stack([real_GN1.double().sum((1, 2)), kept_GNE.sum((1, 2)), kept_GNE.square().sum((1, 2))])
    if group is not None:
        dist.all_reduce(sums, group=group)
    values_G = (sums[0] * logits_GNE.shape[2]).clamp(min=1)
    variance_G = sums[2] / values_G - (sums[1] / values_G).square()
    return sums[0].to(logits_GNE.dtype), variance_G.clamp(min=1e-12).sqrt().to(logits_GNE.dtype)


def _logsumexp_over_tokens(value_GNE: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[G, E] over the tokens of all ranks."""
    if group is None and value_GNE.shape[1]:
        return _finite(value_GNE.logsumexp(1))
    highest_GE = (
        value_GNE.amax(1) if value_GNE.shape[1] else value_GNE.new_full(value_GNE[:, 0:0].sum(1).shape, -torch.inf)
    )
    if group is not None:
        dist.all_reduce(highest_GE, op=dist.ReduceOp.MAX, group=group)
    highest_GE = _finite(highest_GE)
    sum_GE = (value_GNE - highest_GE[:, None]).exp().sum(1)
    if group is not None:
        dist.all_reduce(sum_GE, group=group)
    return highest_GE + _finite(sum_GE.log())


def _finite(value: torch.Tensor) -> torch.Tensor:
    """0 where nothing was summed, as in a group of padding only."""
    return torch.where(value.isinf(), 0, value)
