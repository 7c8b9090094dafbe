"""Scores of all experts, choice of the k best, their weights and the load of every expert, in one launch.

The scores of a tile of tokens stay in registers; only what was chosen is written. Loads are added up by integer atomics, so
that they do not depend on the order. Backward computes the scores again.

Shape letters: T tokens, E experts, K choices of a token.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from moe_dist.kernels.checks import FLOATS, check, require
from moe_dist.kernels.order import LOWEST, key_of

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
MOST_EXPERTS = 4096
"""All experts of a token stand in one tile."""
TILE = 2048


def score_top_k(
    logits_TE: torch.Tensor, top_k: int, score: str, bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the experts with the k highest score + bias for each token; ties go to the lowest index.

    Scores are computed in float32, as in `moe_dist.routing.scores`. NaN counts as the highest score, as in torch.topk.

    Args:
        logits_TE: float32, bfloat16 or float16; differentiable.
        score: softmax, sigmoid or sqrt_softplus.
        bias_E: float32, added for the choice only (arXiv 2408.15664).

    Returns:
        weight_TK: float32, the scores of the chosen without bias, in the order of choice; differentiable.
        expert_TK: int64.
        count_E: int64, how many tokens chose each expert.

    Raises:
        ValueError: a shape, type or device is none of these.
    """
    return _ScoreTopK.apply(logits_TE, top_k, score, bias_E)


class _ScoreTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: torch.Tensor, top_k: int, score: str, bias_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        check("logits_TE", logits_TE, (None, None), FLOATS)
        num_tokens, num_experts = logits_TE.shape
        require("experts", num_experts, 1 <= num_experts <= MOST_EXPERTS, f"from 1 to {MOST_EXPERTS}")
        require("top_k", top_k, 1 <= top_k <= num_experts, f"from 1 to {num_experts}")
        require("score", score, score in SCORES, f"one of {', '.join(SCORES)}")
        if bias_E is not None:
            check("bias_E", bias_E, (num_experts,), (torch.float32,), logits_TE)
        weight_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.float32)
        expert_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64)
        count_E = logits_TE.new_zeros(num_experts, dtype=torch.int64)
        if num_tokens:
            block_t, block_e = _tile(num_experts)
            _forward_kernel[(triton.cdiv(num_tokens, block_t),)](
                *(logits_TE, bias_E, weight_TK, expert_TK, count_E),
                *(num_tokens, num_experts, logits_TE.stride(0)),
                TOP_K=top_k,
                SCORE=score,
                BLOCK_T=block_t,
                BLOCK_E=block_e,
            )
        ctx.score = score
        ctx.save_for_backward(logits_TE, expert_TK)
        ctx.mark_non_differentiable(expert_TK, count_E)
        return weight_TK, expert_TK, count_E

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits_TE, expert_TK = ctx.saved_tensors
        num_tokens, num_experts = logits_TE.shape
        d_weight_TK = grads[0].contiguous()
        d_logits_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
        if num_tokens:
            block_t, block_e = _tile(num_experts)
            _backward_kernel[(triton.cdiv(num_tokens, block_t),)](
                *(logits_TE, expert_TK, d_weight_TK, d_logits_TE),
                *(num_tokens, num_experts, logits_TE.stride(0)),
                TOP_K=expert_TK.shape[1],
                SCORE=ctx.score,
                BLOCK_T=block_t,
                BLOCK_E=block_e,
            )
        return d_logits_TE, None, None, None


def _tile(num_experts: int) -> tuple[int, int]:
    block_e = triton.next_power_of_2(num_experts)
    return max(1, TILE // block_e), block_e


@triton.jit
def _softplus(x):
    """log(1 + exp(x)); where exp(x) is small, what rounding took from 1 + exp(x) is put back."""
    u = tl.exp(x)
    log1p = tl.where(1.0 + u == 1.0, u, tl.log(1.0 + u) * (u / ((1.0 + u) - 1.0)))
    return tl.where(x > 20.0, x, log1p)  # as torch does


@triton.jit
def _scores(logits_TE, SCORE: tl.constexpr):
    """Scores of a tile; logits behind the last expert are -inf."""
    if SCORE == "sigmoid":
        scores_TE = tl.sigmoid(logits_TE)
    elif SCORE == "sqrt_softplus":
        scores_TE = tl.sqrt_rn(tl.maximum(_softplus(logits_TE), 1e-20))
    else:
        exp_TE = tl.exp(logits_TE - tl.max(logits_TE, 1)[:, None])
        scores_TE = exp_TE / tl.sum(exp_TE, 1)[:, None]
    return scores_TE


@triton.jit
def _load_logits(logits_ptr, num_tokens, num_experts, logits_stride, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """The tokens and experts of this program's tile, where they exist, and the logits."""
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e_E = tl.arange(0, BLOCK_E)
    inside_TE = (t_T < num_tokens)[:, None] & (e_E < num_experts)[None, :]
    logits_TE = tl.load(logits_ptr + t_T[:, None] * logits_stride + e_E[None, :], inside_TE, other=float("-inf"))
    return t_T, e_E, inside_TE, logits_TE.to(tl.float32)


@triton.jit
def _forward_kernel(
    logits_ptr,
    bias_ptr,
    weight_ptr,
    expert_ptr,
    count_ptr,
    num_tokens,
    num_experts,
    logits_stride,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t_T, e_E, inside_TE, logits_TE = _load_logits(logits_ptr, num_tokens, num_experts, logits_stride, BLOCK_T, BLOCK_E)
    scores_TE = _scores(logits_TE, SCORE)
    selection_TE = scores_TE
    if bias_ptr is not None:
        selection_TE += tl.load(bias_ptr + e_E, e_E < num_experts, other=0.0)[None, :]
    key_TE = tl.where(inside_TE, key_of(selection_TE), LOWEST)
    for k in range(TOP_K):
        best_T = tl.argmax(key_TE, 1, tie_break_left=True)
        is_best_TE = e_E[None, :] == best_T[:, None]
        weight_T = tl.sum(tl.where(is_best_TE, scores_TE, 0.0), 1)
        tl.store(weight_ptr + t_T * TOP_K + k, weight_T, t_T < num_tokens)
        tl.store(expert_ptr + t_T * TOP_K + k, best_T.to(tl.int64), t_T < num_tokens)
        key_TE = tl.where(is_best_TE, LOWEST, key_TE)
    chosen_TE = (key_TE == LOWEST) & inside_TE
    tl.atomic_add(count_ptr + e_E, tl.sum(chosen_TE.to(tl.int64), 0), e_E < num_experts, sem="relaxed")


@triton.jit
def _backward_kernel(
    logits_ptr,
    expert_ptr,
    d_weight_ptr,
    d_logits_ptr,
    num_tokens,
    num_experts,
    logits_stride,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t_T, e_E, inside_TE, logits_TE = _load_logits(logits_ptr, num_tokens, num_experts, logits_stride, BLOCK_T, BLOCK_E)
    scores_TE = _scores(logits_TE, SCORE)
    d_scores_TE = tl.zeros_like(scores_TE)
    for k in range(TOP_K):
        expert_T = tl.load(expert_ptr + t_T * TOP_K + k, t_T < num_tokens, other=0)
        d_weight_T = tl.load(d_weight_ptr + t_T * TOP_K + k, t_T < num_tokens, other=0.0)
        d_scores_TE = tl.where(e_E[None, :] == expert_T[:, None], d_weight_T[:, None], d_scores_TE)
    if SCORE == "sigmoid":
        d_logits_TE = d_scores_TE * scores_TE * (1.0 - scores_TE)
    elif SCORE == "sqrt_softplus":
        slope_TE = tl.sigmoid(logits_TE) * 0.5 / scores_TE
        d_logits_TE = tl.where(_softplus(logits_TE) < 1e-20, 0.0, d_scores_TE * slope_TE)
    else:
        d_logits_TE = scores_TE * (d_scores_TE - tl.sum(d_scores_TE * scores_TE, 1)[:, None])
    tl.store(d_logits_ptr + t_T[:, None] * num_experts + e_E[None, :], d_logits_TE, inside_TE)
