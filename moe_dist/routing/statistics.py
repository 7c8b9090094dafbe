"""How sure a router is, what it chooses together, and how far experts specialise.

Statistics of tokens are given for each token, [T]: callers leave padding out and take the mean over the real tokens of all
micro-batches and ranks. Statistics of experts come as int64 counts, which add up over micro-batches and ranks, and a function
that turns counts into shares.

Shape letters: T tokens, E experts, K experts per token, P (token, expert) pairs, V vocabulary ids.
"""

import torch

# What the router's scores say.


def entropy(probability: torch.Tensor) -> torch.Tensor:
    """-sum p log p over the last dimension, in nats, with 0 log 0 = 0."""
    return torch.special.entr(probability).sum(-1)


def router_entropy(probability_TE: torch.Tensor) -> torch.Tensor:
    """[T], in nats: 0 is sure of one expert, log E has no preference.

    `probability_TE` sums to 1 for each token; for sigmoid scores that is `balance_scores`.
    """
    return entropy(probability_TE)


def marginal_entropy(probability_E: torch.Tensor) -> torch.Tensor:
    """Scalar, in nats, of the mean probabilities over tokens: log E where all experts are equally probable on the whole."""
    return entropy(probability_E)


def mutual_information(probability_E: torch.Tensor, mean_router_entropy: torch.Tensor) -> torch.Tensor:
    """Of token and expert, in nats: marginal entropy - mean router entropy.

    0 is a router that treats all tokens alike, log E one that is sure of each token and balanced. Both arguments are means
    over the same tokens.
    """
    return marginal_entropy(probability_E) - mean_router_entropy


def margin(selection_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """[T]: k-th minus (k+1)-th largest selection score (scores plus bias), by which the choice was decided.

    0, instead of inf, where there was nothing to decide: k = E, or all other experts masked by -inf.
    """
    if top_k == selection_TE.shape[1]:
        return selection_TE.new_zeros(selection_TE.shape[0])
    last_T, next_T = selection_TE.topk(top_k + 1, dim=-1).values[:, -2:].unbind(-1)
    return torch.where(next_T.isfinite(), last_T - next_T, 0)


def changed_by_bias(scores_TE: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """float64 [T]: share of a token's choices that its scores without bias would not have made.

    |topk(s + b) without topk(s)| / k, where `chosen_TK` is topk(s + b) and `scores_TE` is s.
    """
    return 1 - saturation(scores_TE.topk(chosen_TK.shape[1], dim=-1).indices, chosen_TK)


# Which experts were chosen.


def saturation(chosen_then_TK: torch.Tensor, chosen_now_TK: torch.Tensor) -> torch.Tensor:
    """float64 [T]: share of a token's experts that it already had then, |E_then and E_now| / k.

    The mean over tokens is the router saturation of OLMoE (arXiv 2409.02060, Sec. 5), with "now" the end of training. Random
    choices give k / E.

    Args:
        chosen_then_TK: int64, the experts of each token at an earlier checkpoint, in any order.
        chosen_now_TK: int64, those of the same tokens at the later one.
    """
    return (chosen_now_TK[:, :, None] == chosen_then_TK[:, None, :]).any(-1).double().mean(-1)


def mask_saturation(chosen_then_TE: torch.Tensor, chosen_now_TE: torch.Tensor) -> torch.Tensor:
    """`saturation` where the number of experts differs between tokens, from masks (bool): |E_then and E_now| / |E_now|.

    0 for a token that has no expert now.
    """
    return (chosen_then_TE & chosen_now_TE).sum(-1).double() / chosen_now_TE.sum(-1).clamp(min=1)


def coactivation(token_P: torch.Tensor, expert_P: torch.Tensor, num_tokens: int, num_experts: int) -> torch.Tensor:
    """int64 [E, E]: N_ij, tokens that use both experts i and j; N_ii = N_i, tokens that use i. Symmetric."""
    chosen_TE = token_P.new_zeros(num_tokens, num_experts, dtype=torch.float64)  # GPUs multiply no matrices of integers
    chosen_TE[token_P, expert_P] = 1
    return (chosen_TE.t() @ chosen_TE).to(torch.int64)


def coactivation_rate(count_EE: torch.Tensor) -> torch.Tensor:
    """float64 [E, E]: N_ij / N_i, share of the tokens of expert i that use j too (arXiv 2409.02060, Sec. 5). Not symmetric.

    1 on the diagonal; 0 in the rows of experts that no token uses. (The script published with the paper counts less: only
    pairs whose scores are next to each other in a token's order.)
    """
    return count_EE / count_EE.diagonal().clamp(min=1).double()[:, None]


# Which tokens an expert gets.


def vocabulary_counts(
    id_T: torch.Tensor,
    real_T: torch.Tensor | None,
    token_P: torch.Tensor,
    expert_P: torch.Tensor,
    vocab_size: int,
    num_experts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each vocabulary id occurs, and how often each expert gets it.

    Args:
        id_T: int64, vocabulary ids: of the input tokens, or of the targets or predictions.
        real_T: False for padding; None where there is none.
        token_P: int64, the token of each pair; without pairs of padding.
        expert_P: int64, its expert. For OLMoE's k = 1, give only the pairs of each token's first choice.

    Returns:
        int64 count_V (N_x) and count_VE (N_x,i).
    """
    count_V = id_T.new_zeros(vocab_size)
    count_V.scatter_add_(0, id_T, torch.ones_like(id_T) if real_T is None else real_T.to(id_T.dtype))
    count_VE = id_T.new_zeros(vocab_size * num_experts)
    count_VE.scatter_add_(0, id_T[token_P] * num_experts + expert_P, torch.ones_like(expert_P))
    return count_V, count_VE.view(vocab_size, num_experts)


def vocabulary_specialisation(count_V: torch.Tensor, count_VE: torch.Tensor) -> torch.Tensor:
    """float64 [V, E]: N_x,i / N_x, share of the tokens of id x that expert i gets (arXiv 2409.02060, Sec. 5).

    Rows sum to the experts per token; uniform routing gives k / E; 0 for ids that do not occur.
    """
    return count_VE / count_V.clamp(min=1).double()[:, None]


def expert_specialisation(
    count_V: torch.Tensor, count_VE: torch.Tensor, min_count: int = 10
) -> tuple[torch.Tensor, torch.Tensor]:
    """How exclusively each expert gets the ids that are its own, as in the script of OLMoE (arXiv 2409.02060, Sec. 5).

    An id belongs to the expert that gets most of it (of equals, the first). An expert's specialisation is the mean of
    N_x,i / N_x over its ids, each id counted once. The mean over all ids, that of the layer, is
    (mean_E * num_ids_E).sum() / num_ids_E.sum().

    Args:
        min_count: at least 1; ids that occur less often are left out, since few draws look special by chance.

    Returns:
        float64 mean_E, 0 for an expert without ids, and int64 num_ids_E.
    """
    share_V, owner_V = vocabulary_specialisation(count_V, count_VE).max(-1)
    frequent_V = count_V >= min_count
    num_ids_E = count_VE.new_zeros(count_VE.shape[1]).scatter_add_(0, owner_V, frequent_V.to(torch.int64))
    sum_E = share_V.new_zeros(count_VE.shape[1]).scatter_add_(0, owner_V, share_V * frequent_V)
    return sum_E / num_ids_E.clamp(min=1), num_ids_E
