"""What each kernel computes, in torch: the same signatures on any device. Nothing here is fast; see benchmarks/kernels_gpu.py.

Shape letters: T tokens, E experts, K choices of a token, P pairs, H hidden, W slots, L experts on this rank, F FFN width,
G width of a GEMM's output; in solvers G groups, R rows, C columns.
"""

import math

import torch
from torch.nn import functional


def score_top_k(
    logits_TE: torch.Tensor, top_k: int, score: str, bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See moe_dist.kernels.router."""
    logits_TE = logits_TE.float()
    if score == "sigmoid":
        scores_TE = logits_TE.sigmoid()
    elif score == "sqrt_softplus":
        scores_TE = functional.softplus(logits_TE).clamp(min=1e-20).sqrt()
    else:
        scores_TE = logits_TE.softmax(-1)
    selection_TE = scores_TE if bias_E is None else scores_TE + bias_E
    expert_TK = selection_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    count_E = torch.bincount(expert_TK.flatten(), minlength=logits_TE.shape[1])
    return scores_TE.gather(-1, expert_TK), expert_TK, count_E


def sort_pairs(
    expert_P: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See moe_dist.kernels.sorting."""
    order_P = expert_P.sort(stable=True).indices
    slot_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
    count_E = torch.bincount(expert_P.long(), minlength=num_experts)
    return order_P, slot_P, count_E, functional.pad(count_E.cumsum(0), (1, 0))


def grouped_gemm(
    x_TH: torch.Tensor, w_LHG: torch.Tensor, start_L1: torch.Tensor, row_P: torch.Tensor | None = None
) -> torch.Tensor:
    """See moe_dist.kernels.grouped_gemm."""
    rows_PH = x_TH if row_P is None else x_TH[row_P.long()]
    return torch.cat([rows @ w for rows, w in zip(_groups(rows_PH, start_L1), w_LHG, strict=True)])


def grouped_weight_grad(
    x_TH: torch.Tensor, d_out_PG: torch.Tensor, start_L1: torch.Tensor, row_P: torch.Tensor | None = None
) -> torch.Tensor:
    """See moe_dist.kernels.grouped_gemm."""
    rows_PH = x_TH if row_P is None else x_TH[row_P.long()]
    pairs = zip(_groups(rows_PH, start_L1), _groups(d_out_PG, start_L1), strict=True)
    return torch.stack([rows.mT @ d_out for rows, d_out in pairs])


def _groups(rows: torch.Tensor, start_L1: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return rows.split(start_L1.diff().tolist())


def swiglu(pre_RG: torch.Tensor) -> torch.Tensor:
    """See moe_dist.kernels.swiglu."""
    gate_RF, up_RF = pre_RG.float().chunk(2, dim=-1)
    return (functional.silu(gate_RF) * up_RF).to(pre_RG.dtype)


def swiglu_backward(
    pre_RG: torch.Tensor, d_active_RF: torch.Tensor, weight_R: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See moe_dist.kernels.swiglu."""
    gate_RF, up_RF = pre_RG.float().chunk(2, dim=-1)
    d_active_RF = d_active_RF.float()
    silu_RF = functional.silu(gate_RF)
    active_RF = silu_RF * up_RF
    d_weight_R = None
    if weight_R is not None:
        d_weight_R = (d_active_RF * active_RF).sum(-1)
        d_active_RF, active_RF = d_active_RF * weight_R[:, None], active_RF * weight_R[:, None]
    d_gate_RF = torch.ops.aten.silu_backward(d_active_RF * up_RF, gate_RF)
    d_pre_RG = torch.cat([d_gate_RF, d_active_RF * silu_RF], dim=-1)
    return d_pre_RG.to(pre_RG.dtype), active_RF.to(pre_RG.dtype), d_weight_R


def combine(
    rows_WH: torch.Tensor, slot_P: torch.Tensor, first_T: torch.Tensor, weight_P: torch.Tensor | None = None
) -> torch.Tensor:
    """See moe_dist.kernels.combine."""
    pair_PH = _pair_rows(rows_WH, slot_P, weight_P)
    out_TH = pair_PH.new_zeros(len(first_T), rows_WH.shape[1])
    return out_TH.index_add_(0, _tokens(first_T, len(slot_P)), pair_PH).to(rows_WH.dtype)


def combine_backward(
    d_out_TH: torch.Tensor,
    rows_WH: torch.Tensor,
    slot_P: torch.Tensor,
    first_T: torch.Tensor,
    weight_P: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See moe_dist.kernels.combine."""
    token_P = _tokens(first_T, len(slot_P))
    d_rows_WH = torch.zeros_like(rows_WH, memory_format=torch.contiguous_format)
    d_rows_WH[slot_P.long()] = _pair_rows(d_out_TH, token_P, weight_P).to(rows_WH.dtype)
    if weight_P is None:
        return d_rows_WH, None
    return d_rows_WH, (_pair_rows(d_out_TH, token_P) * _pair_rows(rows_WH, slot_P)).sum(-1)


def _pair_rows(rows: torch.Tensor, index_P: torch.Tensor, weight_P: torch.Tensor | None = None) -> torch.Tensor:
    pair_PH = rows[index_P.long()].float()
    return pair_PH if weight_P is None else pair_PH * weight_P[:, None]


def _tokens(first_T: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """int64 [P]: the token of each pair."""
    pairs_T = first_T.long().diff(append=first_T.new_tensor([num_pairs]).long())
    return torch.arange(len(first_T), device=first_T.device).repeat_interleave(pairs_T)


def sinkhorn_prices(
    logits_GRC: torch.Tensor, top_k: int, epsilon: float, iterations: int, real_GR: torch.Tensor | None = None
) -> torch.Tensor:
    """See moe_dist.kernels.solvers."""
    num_groups, num_rows, num_columns = logits_GRC.shape
    real_GR = (
        torch.ones(num_groups, num_rows, dtype=torch.bool, device=logits_GRC.device) if real_GR is None else real_GR
    )
    prices = [
        _sinkhorn_prices(logits_RC[real_R], top_k, epsilon, iterations)
        for logits_RC, real_R in zip(logits_GRC, real_GR, strict=True)
    ]
    return torch.stack(prices) if prices else logits_GRC.new_empty(0, num_columns)


def _sinkhorn_prices(logits_RC: torch.Tensor, top_k: int, epsilon: float, iterations: int) -> torch.Tensor:
    """[C] of one group without padding."""
    num_rows, num_columns = logits_RC.shape
    variance = logits_RC.double().var(unbiased=False) if num_rows else logits_RC.new_zeros(())
    scale = epsilon * variance.clamp(min=1e-12).sqrt().to(logits_RC.dtype)
    target = math.log(top_k * max(1, num_rows) / num_columns)
    column_C = logits_RC.new_zeros(num_columns)
    for _ in range(iterations):
        row_R1 = math.log(top_k) - (logits_RC / scale + column_C).logsumexp(1, keepdim=True)
        column_C = target - ((logits_RC / scale + row_R1).logsumexp(0) if num_rows else torch.zeros_like(column_C))
    return -column_C * scale


def dual_iterations(
    score_GRC: torch.Tensor,
    price_GC: torch.Tensor,
    least_G: torch.Tensor,
    per_row: int,
    capacity: int,
    iterations: int,
    real_GR: torch.Tensor | None = None,
) -> torch.Tensor:
    """See moe_dist.kernels.solvers."""
    column_GRC = score_GRC if real_GR is None else score_GRC.masked_fill(~real_GR[:, :, None], -torch.inf)
    for _ in range(iterations):
        row_GR1 = (score_GRC - price_GC[:, None]).topk(per_row + 1).values[:, :, -2:].mean(2, keepdim=True)
        value_GCR = (column_GRC - torch.nan_to_num(row_GR1)).transpose(1, 2)
        price_GC = torch.maximum(value_GCR.topk(capacity + 1).values[:, :, -2:].mean(2), least_G[:, None])
    return price_GC
