"""Router logits -> scores of all experts, and weights of the chosen ones.

Shape letters: T tokens, H hidden, E experts, K choices of a token.
"""

import torch
from torch.nn import functional

from moe_dist.config.routing import ExpertGroupsConfig, RoutingConfig
from moe_dist.routing.types import Choice


def router_logits(
    hidden_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor | None, routing: RoutingConfig
) -> torch.Tensor:
    """[T, E] by dot product or cosine, divided by the temperature; with logit_normalisation z -> lambda (z - mean) / std of
    each token (Skywork-MoE, arXiv 2406.06563, Eq. 4)."""
    if routing.similarity == "cosine":
        hidden_TH, weight_EH = functional.normalize(hidden_TH, dim=-1), functional.normalize(weight_EH, dim=-1)
    logits_TE = functional.linear(hidden_TH, weight_EH, bias_E) / routing.temperature
    if routing.logit_normalisation is not None:
        centred_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
        deviation_T1 = centred_TE.square().mean(-1, keepdim=True).add(1e-12).sqrt()
        logits_TE = centred_TE * (routing.logit_normalisation / deviation_T1)
    return logits_TE


def expert_scores(logits_TE: torch.Tensor, score: str) -> torch.Tensor:
    """[T, E] scores that selection compares (with the bias added). Softmax over the chosen k selects like softmax over all."""
    if score == "sigmoid":
        return logits_TE.sigmoid()
    if score == "sqrt_softplus":
        # The square root has an infinite slope at 0, which softplus reaches far below.
        return functional.softplus(logits_TE).clamp(min=1e-20).sqrt()
    return logits_TE.softmax(-1)


def score_reach(score: str, num_experts: int) -> float:
    """How far apart scores lie, roughly: histograms look so far around where they were. Too little only takes more steps."""
    return 1.0 if score in ("sigmoid", "sqrt_softplus") else min(1.0, 16 / num_experts)


def balance_scores(scores_TE: torch.Tensor, score: str) -> torch.Tensor:
    """[T, E] scores of each token that sum to 1, for load-balance losses (DeepSeek-V3, arXiv 2412.19437, Eq. 17-20)."""
    if score in ("sigmoid", "sqrt_softplus"):
        return scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
    return scores_TE


def limit_to_groups(selection_TE: torch.Tensor, groups: ExpertGroupsConfig) -> torch.Tensor:
    """[T, E] with -inf for experts outside a token's `keep` best groups (arXiv 2405.04434 by max; 2412.19437 by the sum of
    the two best). Not 0, which negative scores would lose to."""
    assert groups.keep is not None
    num_tokens, num_experts = selection_TE.shape
    in_groups = selection_TE.view(num_tokens, groups.count, -1)
    best = min(2 if groups.score == "top_2_sum" else 1, in_groups.shape[2])
    group_score_TG = in_groups.topk(best, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(group_score_TG, dtype=torch.bool)
    kept_TG.scatter_(1, group_score_TG.topk(groups.keep, dim=-1).indices, True)
    return in_groups.masked_fill(~kept_TG[:, :, None], -torch.inf).view(num_tokens, num_experts)


def combine_weights(
    logits_TE: torch.Tensor, scores_TE: torch.Tensor, choice: Choice, routing: RoutingConfig
) -> torch.Tensor:
    """[T, K] weights of the chosen experts, from the scores without bias; no gradient flows through the choice."""
    if routing.score == "softmax_top_k":
        chosen_TK = logits_TE.gather(-1, choice.expert_TK)
        if choice.valid_TK is not None:
            # A finite filling: a token without a choice must not give NaN.
            chosen_TK = chosen_TK.masked_fill(~choice.valid_TK, torch.finfo(chosen_TK.dtype).min)
        weight_TK = chosen_TK.softmax(-1)
    else:
        weight_TK = scores_TE.gather(-1, choice.expert_TK)
        if routing.renormalise:
            counted_TK = weight_TK if choice.valid_TK is None else torch.where(choice.valid_TK, weight_TK, 0)
            weight_TK = weight_TK / (counted_TK.sum(-1, keepdim=True) + 1e-20)
    return weight_TK * routing.scaling_factor
