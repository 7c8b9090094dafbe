"""Grouped-query attention with rotary position embedding.

Shape letters: B sequences, S tokens of a sequence, H hidden, N query heads, M key-value heads, D head size.
"""

import torch
from torch import nn
from torch.nn import functional

from moe_dist.config.schema import ModelConfig


class Attention(nn.Module):
    """Causal self-attention; `mask` narrows it further."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = model.num_heads, model.num_kv_heads or model.num_heads
        self.head_size = model.head_size or model.hidden_size // model.num_heads
        self.rope_theta, self.qk_norm = model.rope_theta, model.qk_norm
        query_size, kv_size = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        self.w_query = nn.Linear(model.hidden_size, query_size, bias=False)
        self.w_key = nn.Linear(model.hidden_size, kv_size, bias=False)
        self.w_value = nn.Linear(model.hidden_size, kv_size, bias=False)
        self.w_out = nn.Linear(query_size, model.hidden_size, bias=False)
        if model.qk_norm != "none":
            per_head = model.qk_norm == "head"
            self.query_norm = nn.RMSNorm(self.head_size if per_head else query_size, eps=model.norm_epsilon)
            self.key_norm = nn.RMSNorm(self.head_size if per_head else kv_size, eps=model.norm_epsilon)

    def forward(self, hidden_BSH: torch.Tensor, mask_B1SS: torch.Tensor | None) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]. `mask_B1SS`: bool, True where a query may look, causality included; None: causal."""
        query, key, value = self.w_query(hidden_BSH), self.w_key(hidden_BSH), self.w_value(hidden_BSH)
        if self.qk_norm == "width":
            query, key = self._normed(query, key)
        query_BNSD, key_BMSD, value_BMSD = (self._split_heads(x) for x in (query, key, value))
        if self.qk_norm == "head":
            query_BNSD, key_BMSD = self._normed(query_BNSD, key_BMSD)
        cos_SD, sin_SD = rotary_angles(hidden_BSH.shape[1], self.head_size, self.rope_theta, query_BNSD)
        out_BNSD = functional.scaled_dot_product_attention(
            rotate(query_BNSD, cos_SD, sin_SD).to(value_BMSD.dtype),
            rotate(key_BMSD, cos_SD, sin_SD).to(value_BMSD.dtype),
            value_BMSD,
            attn_mask=mask_B1SS,
            is_causal=mask_B1SS is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.w_out(out_BNSD.transpose(1, 2).flatten(2))

    def _normed(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(query.dtype, torch.float32)  # autocast may have made them bfloat16
        return self.query_norm(query.to(dtype)), self.key_norm(key.to(dtype))

    def _split_heads(self, x_BSW: torch.Tensor) -> torch.Tensor:
        return x_BSW.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


def rotary_angles(
    num_positions: int, head_size: int, theta: float, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [S, D], of position * theta^(-2i/D) for each pair i (arXiv 2104.09864, Eq. 15); halves repeat."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(0, head_size, 2, device=like.device, dtype=dtype) / head_size
    angle = torch.outer(torch.arange(num_positions, device=like.device, dtype=dtype), theta**-exponent).repeat(1, 2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x_BNSD: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i + D/2}) by its angle."""
    first, second = x_BNSD.chunk(2, dim=-1)
    return x_BNSD * cos_SD + torch.cat([-second, first], dim=-1) * sin_SD
