"""Top-k routing by a linear router, with an optional loss-free bias.

Shape letters: T tokens, H hidden, E experts, K experts per token, P pairs.
"""

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.config.schema import RoutingConfig, SequenceGroup
from moe_dist.routing.balance import BalanceState
from moe_dist.routing.capacity import apply_capacity
from moe_dist.routing.losses import load_balance_loss, sequence_load_balance_loss, z_loss
from moe_dist.routing.router import Router
from moe_dist.routing.scores import balance_scores, combine_weights, expert_scores
from moe_dist.routing.types import Routing, Tokens


class TopKRouter(Router):
    """Each token takes the `top_k` experts of highest score plus bias; its weights are the scores without bias."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        routing: RoutingConfig,
        data_parallel_group: dist.ProcessGroup | None = None,
    ) -> None:
        """`data_parallel_group`: all ranks that hold different tokens, for the global_batch loss. None: this rank alone."""
        super().__init__()
        self.routing = routing
        self.data_parallel_group = data_parallel_group
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=routing.init_std)
        self.balance = BalanceState(num_experts)

    def forward(self, hidden_TH: torch.Tensor, tokens: Tokens) -> Routing:
        """Route. Scores and losses are float32, or float64 where hidden is; autocast does not reach them."""
        with torch.autocast(hidden_TH.device.type, enabled=False):
            return self._route(hidden_TH, tokens)

    def _route(self, hidden_TH: torch.Tensor, tokens: Tokens) -> Routing:
        config = self.routing
        logits_TE = self._logits(hidden_TH)
        scores_TE = expert_scores(logits_TE, config.score)
        with torch.no_grad():
            selection_TE = scores_TE + self.balance.bias_E.to(scores_TE.dtype) if self.uses_bias else scores_TE
            chosen_TK = selection_TE.topk(config.top_k, dim=-1).indices
        weight_TK = combine_weights(
            logits_TE, scores_TE, chosen_TK, config.score, config.renormalise, config.scaling_factor
        )
        real_T = None if tokens.padding_T is None else ~tokens.padding_T
        token_P, expert_P, weight_P = _pairs(chosen_TK, weight_TK, real_T)
        routing = Routing(
            token_P=token_P,
            expert_P=expert_P,
            weight_P=weight_P,
            load_E=count_per_expert(expert_P, logits_TE.shape[1]),
            losses=self._losses(logits_TE, scores_TE, chosen_TK, tokens, real_T) if self.training else {},
        )
        if self.training and config.capacity is not None:
            group = config.group.sequences if isinstance(config.group, SequenceGroup) else tokens.num_sequences
            routing = apply_capacity(routing, config.capacity, config.top_k, tokens, hidden_TH.shape[0], group)
        if self.balance.counts_now():
            self.balance.count(routing)
        return routing

    @property
    def uses_bias(self) -> bool:
        return self.routing.bias.rule != "none"

    def _logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        dtype = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        return hidden_TH.to(dtype) @ self.weight.to(dtype).t()

    def _losses(
        self,
        logits_TE: torch.Tensor,
        scores_TE: torch.Tensor,
        chosen_TK: torch.Tensor,
        tokens: Tokens,
        real_T: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        config, losses = self.routing.losses, {}
        if config.load_balance.coefficient:
            if self.uses_bias:  # loads of the loss are those of the scores themselves (arXiv 2412.19437, Eq. 18)
                chosen_TK = scores_TE.detach().topk(self.routing.top_k, dim=-1).indices
            loss = self._load_balance(balance_scores(scores_TE, self.routing.score), chosen_TK, tokens, real_T)
            losses["load_balance"] = config.load_balance.coefficient * loss
        if config.z.coefficient:
            losses["z"] = config.z.coefficient * z_loss(logits_TE, real_T)
        return losses

    def _load_balance(
        self, probability_TE: torch.Tensor, chosen_TK: torch.Tensor, tokens: Tokens, real_T: torch.Tensor | None
    ) -> torch.Tensor:
        chosen_TE = torch.zeros_like(probability_TE, dtype=torch.int64).scatter_(1, chosen_TK, 1)
        if real_T is not None:
            chosen_TE *= real_T[:, None]
        scope = self.routing.losses.load_balance.scope
        if scope == "sequence":
            return sequence_load_balance_loss(probability_TE, chosen_TE, tokens.num_sequences, real_T)
        load_E = chosen_TE.sum(0)
        return load_balance_loss(probability_TE, load_E if scope == "micro_batch" else self._batch_load(load_E), real_T)

    def _batch_load(self, load_E: torch.Tensor) -> torch.Tensor:
        """Loads over all ranks and over the accumulation steps so far (arXiv 2501.11873, Algorithm 1)."""
        if self.balance.counts_now():
            if self.data_parallel_group is not None:
                dist.all_reduce(load_E, group=self.data_parallel_group)
            self.balance.batch_load_E += load_E
        return self.balance.batch_load_E.clone()


def count_per_expert(expert_P: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int64 [E]: how often each expert occurs. Unlike bincount, it does not make the host wait for a GPU."""
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_P.device)
    return counts_E.scatter_add_(0, expert_P, torch.ones_like(expert_P))


def _pairs(
    chosen_TK: torch.Tensor, weight_TK: torch.Tensor, real_T: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, top_k = chosen_TK.shape
    token_P = torch.arange(num_tokens, device=chosen_TK.device).repeat_interleave(top_k)
    if real_T is None:
        return token_P, chosen_TK.flatten(), weight_TK.flatten()
    kept_Q = real_T[token_P].nonzero().squeeze(1)
    return token_P[kept_Q], chosen_TK.flatten()[kept_Q], weight_TK.flatten()[kept_Q]
