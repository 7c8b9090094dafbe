"""Router logits -> scores of all experts, and weights of the chosen ones.

Shape letters: T tokens, H hidden, E experts, K choices of a token, P pairs (T K of them).
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moe_dist.config.routing import ExpertGroupsConfig, RoutingConfig
from moe_dist.kernels import onednn
from moe_dist.routing.types import Choice

LEAST_SPARSITY = 4
"""Experts for each that a token chooses, from which on gradients of the chosen logits are sparse (measured on CPUs)."""


def router_logits(
    hidden_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor | None, routing: RoutingConfig
) -> torch.Tensor:
    """[T, E] by dot product or cosine, divided by the temperature; with logit_normalisation z -> lambda (z - mean) / std of
    each token (Skywork-MoE, arXiv 2406.06563, Eq. 4)."""
    if routing.similarity == "cosine":
        hidden_TH, weight_EH = functional.normalize(hidden_TH, dim=-1), functional.normalize(weight_EH, dim=-1)
    # Compiled code knows no sparse tensors, and for a GPU dense gradients are little work.
    eager_on_cpu = hidden_TH.device.type == "cpu" and not torch.compiler.is_compiling()
    logits_TE = (_Linear.apply if eager_on_cpu else functional.linear)(hidden_TH, weight_EH, bias_E)
    if routing.temperature != 1:
        logits_TE = logits_TE / routing.temperature
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
    """[T, K] weights of the chosen experts, from the scores without bias; no gradient flows through the choice.

    Softmax over all experts, renormalised, is softmax over the chosen: only it unnormalised needs more than their logits.
    """
    if routing.score == "softmax" and not routing.renormalise:
        weight_TK = scores_TE.gather(-1, choice.expert_TK)
    elif routing.score in ("softmax", "softmax_top_k"):
        chosen_TK = _chosen_logits(logits_TE, choice.expert_TK)
        if choice.valid_TK is not None:
            # A finite filling: a token without a choice must not give NaN.
            chosen_TK = chosen_TK.masked_fill(~choice.valid_TK, torch.finfo(chosen_TK.dtype).min)
        weight_TK = chosen_TK.softmax(-1)
    else:
        weight_TK = expert_scores(_chosen_logits(logits_TE, choice.expert_TK), routing.score)
        if routing.renormalise:
            counted_TK = weight_TK if choice.valid_TK is None else torch.where(choice.valid_TK, weight_TK, 0)
            weight_TK = weight_TK / (counted_TK.sum(-1, keepdim=True) + 1e-20)
    return weight_TK if routing.scaling_factor == 1 else weight_TK * routing.scaling_factor


def weights_beside(
    weight_TK: torch.Tensor, scores_TE: torch.Tensor, choice: Choice, routing: RoutingConfig
) -> torch.Tensor:
    """[T, E] the weight of every expert beside what was chosen: `weight_TK` of the chosen, others by their scores likewise.

    Args:
        choice: with all columns of a token valid, or none.
    """
    if routing.renormalise or routing.score == "softmax_top_k":
        scores_TE = scores_TE / (scores_TE.gather(1, choice.expert_TK).sum(1, keepdim=True) + 1e-20)
    return (scores_TE * routing.scaling_factor).scatter(1, choice.expert_TK, weight_TK)


def _chosen_logits(logits_TE: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
    """[T, K]; the gradient is a sparse tensor where few experts are chosen and logits come straight from `_Linear`."""
    few = expert_TK.shape[1] * LEAST_SPARSITY <= logits_TE.shape[1]
    sparse = few and not torch.compiler.is_compiling() and getattr(logits_TE.grad_fn, "takes_sparse", False)
    return logits_TE.gather(-1, expert_TK, sparse_grad=sparse)


class _Linear(torch.autograd.Function):
    """functional.linear, whose backward leaves the zeros of a sparse gradient out: K / E of the work."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_TH, weight_EH)
        ctx.takes_sparse = True
        logits_TE = onednn.matmul(hidden_TH, weight_EH.t())
        return logits_TE if bias_E is None else logits_TE.add_(bias_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_TE,) = grads
        hidden_TH, weight_EH = ctx.saved_tensors
        to_hidden, to_weight, to_bias = ctx.needs_input_grad
        return (
            _times_weight(grad_TE, weight_EH) if to_hidden else None,
            _times(grad_TE.t(), hidden_TH) if to_weight else None,
            grad_TE.sum(0).to_dense() if to_bias else None,
        )


def _times_weight(grad_TE: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """[T, H]; by sums over rows of the weight if a sparse gradient has as many experts for each token."""
    if grad_TE.is_sparse and grad_TE._nnz() and grad_TE._nnz() % len(grad_TE) == 0:
        token_TK, expert_TK = grad_TE._indices().view(2, len(grad_TE), -1)
        if (token_TK == token_TK[:, :1]).all():  # not so where chosen logits were gathered twice
            grad_TK = grad_TE._values().view_as(expert_TK)
            return functional.embedding_bag(expert_TK, weight_EH, per_sample_weights=grad_TK, mode="sum")
    return _times(grad_TE, weight_EH)


def _times(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x @ y if x.is_sparse else onednn.matmul(x, y)
