"""All auxiliary losses of a router that the config switches on, from what the router knows of a forward.

Shape letters: T tokens, H hidden, E experts, K choices of a token, D groups of experts.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config.routing import AdaptiveConfig, BalanceLossConfig, RoutingConfig
from moe_dist.routing.balance import BalanceState, Totals
from moe_dist.routing.losses import (
    load_balance_loss,
    orthogonality_loss,
    sequence_load_balance_loss,
    simbal_loss,
    squared_cv,
    z_loss,
)
from moe_dist.routing.scores import balance_scores
from moe_dist.routing.types import Choice, Tokens

BALANCE_LOSSES = ("load_balance", "device", "communication")
"""The losses of the form sum_i f_i P_i: of experts, of groups of experts, of the tokens sent to such groups."""


@dataclass(frozen=True)
class Evidence:
    """What the losses of one forward are computed from."""

    hidden_TH: Tensor
    """Of this rank's tokens, if ranks hold parts of the sequences; all else is of all parts."""
    logits_TE: Tensor
    scores_TE: Tensor
    choice: Choice
    """What was wanted ..."""
    final: Choice
    """... and what became of it by rerouting; weight_TK belongs to it."""
    weight_TK: Tensor
    tokens: Tokens
    real_T: Tensor | None
    counts: bool
    """Whether the loads of this forward enter those of the batch."""


def auxiliary_losses(
    evidence: Evidence,
    routing: RoutingConfig,
    balance: BalanceState,
    weight_EH: Tensor | None,
    group: dist.ProcessGroup | None,
) -> dict[str, Tensor]:
    """Named scalars with their coefficients, of the tokens of this forward, ready to be attached.

    Args:
        weight_EH: of the router, for the losses on it.
        group: all ranks that hold different tokens, for scope: global_batch.
    """
    config = routing.losses
    losses = {
        name: _coefficient(name, routing, balance) * _balance_loss(name, evidence, routing, balance, group)
        for name in BALANCE_LOSSES
        if getattr(config, name).coefficient
    }
    if config.importance.coefficient:
        weight_TE = torch.zeros_like(evidence.scores_TE).scatter(1, evidence.final.expert_TK, _valid_weight(evidence))
        importance_E = over_ranks(weight_TE.sum(0), evidence.tokens, group)
        losses["importance"] = config.importance.coefficient * squared_cv(importance_E)
    if config.z.coefficient:
        losses["z"] = config.z.coefficient * z_loss(evidence.logits_TE, evidence.real_T)
    for name, formula in (("simbal", simbal_loss), ("orthogonality", orthogonality_loss)):
        if coefficient := getattr(config, name).coefficient:
            assert weight_EH is not None
            weight_EH = weight_EH.to(evidence.logits_TE.dtype)
            losses[name] = coefficient * formula(weight_EH, mean=config.scaling == "uniform")
    return losses


def over_ranks(value_E: Tensor, tokens: Tokens, group: dist.ProcessGroup | None) -> Tensor:
    """[E] the sum over the forward passes of all ranks, for losses that are no means over tokens.

    Every rank then computes the same loss, and attaches it with its own share of the step: gradients through this rank's
    part are scaled up so that those of all ranks add up to the gradient of that loss.
    """
    if group is None:
        return value_E
    share = torch.as_tensor(tokens.share, dtype=value_E.dtype, device=value_E.device)
    total = torch.cat([value_E.detach(), share[None]])
    dist.all_reduce(total, group=group)
    scale = total[-1] / share.clamp(min=1e-12)
    return total[:-1] + (value_E - value_E.detach()) * scale


def add_state(balance: BalanceState, routing: RoutingConfig, num_experts: int) -> None:
    """Loads of the batch for scope: global_batch, and the coefficient that follows the drop rate."""
    for name in BALANCE_LOSSES:
        loss_config: BalanceLossConfig = getattr(routing.losses, name)
        if loss_config.coefficient and loss_config.scope == "global_batch":
            groups = num_experts if name == "load_balance" else _num_groups(routing)
            balance.add_batch_load(name, groups + 1)
    if routing.losses.load_balance.adaptive is not None:
        balance.add_value("coefficient", torch.tensor(routing.losses.load_balance.coefficient))


def update_coefficient(balance: BalanceState, totals: Totals, adaptive: AdaptiveConfig) -> None:
    """alpha = beta alpha + (1 - beta) min(xi d, alpha_max) with the drop rate d (arXiv 2406.06563, Eq. 6-7)."""
    drop_rate = totals["dropped_E"].sum().double() / totals["load_E"].sum().clamp(min=1)
    target = (adaptive.ratio * drop_rate).clamp(max=adaptive.maximum)
    balance.coefficient.lerp_(target.to(balance.coefficient.dtype), 1 - adaptive.decay)


def _coefficient(name: str, routing: RoutingConfig, balance: BalanceState) -> float | Tensor:
    config = routing.losses
    if name == "load_balance" and config.load_balance.adaptive is not None:
        return balance.coefficient
    return getattr(config, name).coefficient


def _balance_loss(
    name: str, evidence: Evidence, routing: RoutingConfig, balance: BalanceState, group: dist.ProcessGroup | None
) -> Tensor:
    probability_TE = balance_scores(evidence.scores_TE, routing.score)
    chosen_TE = _chosen(
        evidence, routing, only_first=name == "load_balance" and routing.losses.load_balance.choices == "first"
    )
    if name != "load_balance":
        probability_TE = probability_TE.unflatten(1, (_num_groups(routing), -1)).sum(2)
        chosen_TE = chosen_TE.unflatten(1, (_num_groups(routing), -1)).sum(2)
    if name == "communication":
        chosen_TE = chosen_TE.clamp(max=1)  # a token is sent to a group once
    loss_config: BalanceLossConfig = getattr(routing.losses, name)
    per_token = _paper_choices(name, routing) if routing.losses.scaling == "paper" else None
    if loss_config.scope == "sequence":
        loss = sequence_load_balance_loss(
            probability_TE, chosen_TE, evidence.tokens.num_sequences, evidence.real_T, per_token
        )
    else:
        num_tokens = chosen_TE.new_full((), len(chosen_TE)) if evidence.real_T is None else evidence.real_T.sum()
        load = torch.cat([chosen_TE.sum(0), num_tokens[None]])
        if loss_config.scope == "global_batch":
            load = _load_of_batch(name, load, balance, group, evidence.counts)
        divisor = None if per_token is None else (per_token * load[-1]).clamp(min=1)
        loss = load_balance_loss(probability_TE, load[:-1], evidence.real_T, divisor)
    if routing.losses.scaling == "paper" and name == "load_balance" and routing.losses.load_balance.choices == "first":
        return loss / chosen_TE.shape[1] ** 2  # GShard takes the mean of f_i P_i, and no factor E in f_i
    return loss


def _paper_choices(name: str, routing: RoutingConfig) -> float | None:
    """By how many choices of a token the loads are divided in the papers; None: by those there are."""
    if name == "communication":
        keep = routing.expert_groups.keep if routing.expert_groups else None
        return keep or min(routing.top_k, _num_groups(routing))
    return 1 if name == "load_balance" else None


def _chosen(evidence: Evidence, routing: RoutingConfig, only_first: bool) -> Tensor:
    """int64 [T, E]: 1 where the token chose the expert; padding chose none.

    Loads of the losses are those of the scores themselves where a bias takes part in the choice (arXiv 2412.19437, Eq. 18).
    """
    choice = evidence.choice
    if only_first or routing.bias.rule != "none":
        top_k = 1 if only_first else routing.top_k
        choice = Choice(evidence.scores_TE.detach().topk(top_k, dim=-1).indices)
    one_TK = torch.ones_like(choice.expert_TK) if choice.valid_TK is None else choice.valid_TK.long()
    chosen_TE = torch.zeros_like(evidence.scores_TE, dtype=torch.int64).scatter_(1, choice.expert_TK, one_TK)
    return chosen_TE if evidence.real_T is None else chosen_TE * evidence.real_T[:, None]


def _load_of_batch(
    name: str, load: Tensor, balance: BalanceState, group: dist.ProcessGroup | None, counts: bool
) -> Tensor:
    """Loads over all ranks and over the accumulation steps so far (arXiv 2501.11873, Algorithm 1)."""
    total = balance.batch_load(name)
    if counts:
        if group is not None:
            dist.all_reduce(load, group=group)
        total += load
    return total.clone()


def _valid_weight(evidence: Evidence) -> Tensor:
    valid_TK = evidence.final.valid_TK
    return evidence.weight_TK if valid_TK is None else torch.where(valid_TK, evidence.weight_TK, 0)


def _num_groups(routing: RoutingConfig) -> int:
    assert routing.expert_groups is not None
    return routing.expert_groups.count
