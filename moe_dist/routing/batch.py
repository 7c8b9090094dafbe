"""Routers that decide over a whole routing group in training, and token by token in evaluation.

What a batch-wide solution amounts to is a price for each expert: a token takes the k experts of highest affinity - price. A
moving average of the prices over optimiser steps is the causal rule of evaluation, where later tokens may not be looked at.

Shape letters: T tokens, E experts, G routing groups, N tokens of a routing group.
"""

import dataclasses
import math

import torch
import torch.distributed as dist

from moe_dist.routing.balance import Totals, from_fixed_point, to_fixed_point
from moe_dist.routing.groups import num_groups, solve_in_groups
from moe_dist.routing.router import Router
from moe_dist.routing.types import Choice, Tokens


class BatchRouter(Router):
    """A method gives `affinity` and `solve`."""

    def build(self) -> None:
        """See Router."""
        super().build()
        self.balance.add_value("price_E", torch.zeros(self.num_experts))
        self.balance.add_value("price_updates", torch.zeros((), dtype=torch.int64))
        self.balance.add_counter("priced_groups")
        self.balance.add_counter("price_sum_E", self.num_experts)

    def affinity(self, logits_TE: torch.Tensor, scores_TE: torch.Tensor) -> torch.Tensor:
        """[T, E] what the group's choice maximises, and prices are subtracted from."""
        raise NotImplementedError

    def solve(self, affinity_GNE: torch.Tensor, real_GN: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve routing groups: bool [G, N, E] which experts each token takes, and the prices [G, E]."""
        raise NotImplementedError

    def choose(self, logits_TE: torch.Tensor, scores_TE: torch.Tensor, tokens: Tokens, counts: bool) -> Choice:
        """See Router."""
        affinity_TE = self.affinity(logits_TE, scores_TE).nan_to_num(0.0, 0.0, 0.0)  # the step is skipped then
        if not (self.training or self.as_trained):
            return self.choose_causally(affinity_TE)
        real_T = None if tokens.padding_T is None else ~tokens.padding_T
        if real_T is not None:  # what padding holds may be too large to compute with
            affinity_TE = affinity_TE.masked_fill(~real_T[:, None], 0)
        chosen_TE, price_GE = self.solve_groups(affinity_TE, real_T, tokens)
        if counts:
            self._count_prices(price_GE)
        return self.as_choice(chosen_TE, affinity_TE, tokens)

    def solve_groups(
        self, affinity_TE: torch.Tensor, real_T: torch.Tensor | None, tokens: Tokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`solve` over the routing groups of the config: [T, E] and [G, E], where NaN is no price."""

        def solve(affinity_GNE: torch.Tensor, real_GN: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            chosen_GNE, price_GE = self.solve(affinity_GNE, real_GN)
            return chosen_GNE, of_real_groups(price_GE, real_GN)

        chosen_TE, price_GE = solve_in_groups(
            solve, affinity_TE, real_T, self.routing.group, tokens, self.data_parallel_group
        )
        return chosen_TE, price_GE

    def choose_causally(self, affinity_TE: torch.Tensor) -> Choice:
        """Each token by itself: top-k of its affinities less the average prices."""
        adjusted_TE = affinity_TE - self.balance.price_E.to(affinity_TE.dtype)
        return Choice(adjusted_TE.topk(self.routing.top_k, dim=-1).indices)

    def as_choice(self, chosen_TE: torch.Tensor, affinity_TE: torch.Tensor, tokens: Tokens) -> Choice:
        """Exactly k experts of each token, in order of affinity; padding's may be any."""
        ordered_TE = affinity_TE.masked_fill(~chosen_TE, -torch.inf)
        return Choice(ordered_TE.topk(self.routing.top_k, dim=-1).indices, slots=self.slots(len(chosen_TE), tokens))

    def slots(self, num_tokens: int, tokens: Tokens) -> int | None:
        """Slots of each expert from this rank, where the method fills them exactly in groups that lie on one rank."""
        return None

    def update(self, totals: Totals, bias_rate: float) -> None:
        """See Router."""
        super().update(totals, bias_rate)
        groups = totals["priced_groups"]
        price_E = (from_fixed_point(totals["price_sum_E"]) / groups.clamp(min=1)).to(self.balance.price_E.dtype)
        decay = torch.where(self.balance.price_updates > 0, self.routing.dual_decay, 0.0)
        new_E = decay * self.balance.price_E + (1 - decay) * (price_E - price_E.mean())
        self.balance.price_E.copy_(torch.where(groups > 0, new_E, self.balance.price_E))
        self.balance.price_updates += groups > 0

    def _count_prices(self, price_GE: torch.Tensor) -> None:
        # Every rank solves the groups of routing.group: global alike; they count once.
        if self.routing.group == "global" and self._rank() > 0:
            return
        priced_G = price_GE.isfinite().all(1)
        self.balance.priced_groups += priced_G.sum()
        self.balance.price_sum_E += to_fixed_point(torch.where(priced_G[:, None], price_GE, 0)).sum(0)

    def _rank(self) -> int:
        return 0 if self.data_parallel_group is None else dist.get_rank(self.data_parallel_group)


class ExactRouter(BatchRouter):
    """A batch router that gives every expert the same number of slots in every routing group."""

    def choose(self, logits_TE: torch.Tensor, scores_TE: torch.Tensor, tokens: Tokens, counts: bool) -> Choice:
        """See Router."""
        if not len(logits_TE):  # nothing to assign, so on all ranks of a global group
            return self.as_choice(torch.zeros_like(logits_TE, dtype=torch.bool), logits_TE, tokens)
        return super().choose(logits_TE, scores_TE, tokens, counts)

    def capacity(self, num_tokens: int) -> int:
        """Slots of an expert in a routing group of so many tokens, padding included: ceil(n k / E)."""
        return math.ceil(num_tokens * self.routing.top_k / self.num_experts)

    def start_prices(self, affinity_GNE: torch.Tensor) -> torch.Tensor:
        """[G, E] the average prices of earlier steps, from which a solution is not far."""
        return self.balance.price_E.to(affinity_GNE.dtype).expand(len(affinity_GNE), -1)

    def slots(self, num_tokens: int, tokens: Tokens) -> int | None:
        """See BatchRouter."""
        if self.routing.group == "global":  # a rank holds only a part of the group
            return None
        groups = num_groups(self.routing.group, tokens)
        return groups * self.capacity(num_tokens // groups)


def of_real_groups(price_GE: torch.Tensor, real_GN: torch.Tensor | None) -> torch.Tensor:
    """The prices, NaN for groups of padding alone."""
    return price_GE if real_GN is None else price_GE.masked_fill(~real_GN.any(1, keepdim=True), torch.nan)


def all_experts(chosen_TE: torch.Tensor, slots: int | None) -> Choice:
    """The choice of a method whose number of experts varies by token."""
    expert_TE = torch.arange(chosen_TE.shape[1], device=chosen_TE.device).expand_as(chosen_TE)
    return dataclasses.replace(Choice(expert_TE, chosen_TE), slots=slots)
