"""Router logits -> scores of all experts, and weights of the chosen ones.

Shape letters: T tokens, E experts, K experts per token.
"""

from typing import Literal

import torch

Score = Literal["softmax", "softmax_top_k", "sigmoid"]


def expert_scores(logits_TE: torch.Tensor, score: Score) -> torch.Tensor:
    """[T, E] scores that selection compares (with the bias added). Softmax over the chosen k selects like softmax over all."""
    return logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(-1)


def balance_scores(scores_TE: torch.Tensor, score: Score) -> torch.Tensor:
    """[T, E] scores of each token that sum to 1, for load-balance losses (DeepSeek-V3, arXiv 2412.19437, Eq. 17-20)."""
    return scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20) if score == "sigmoid" else scores_TE


def combine_weights(
    logits_TE: torch.Tensor,
    scores_TE: torch.Tensor,
    chosen_TK: torch.Tensor,
    score: Score,
    renormalise: bool,
    scaling_factor: float,
) -> torch.Tensor:
    """[T, K] weights of the chosen experts, from the scores without bias; no gradient flows through the choice."""
    if score == "softmax_top_k":
        weight_TK = logits_TE.gather(-1, chosen_TK).softmax(-1)
    else:
        weight_TK = scores_TE.gather(-1, chosen_TK)
        if renormalise:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return weight_TK * scaling_factor
