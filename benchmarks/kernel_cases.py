"""What benchmarks/kernels_gpu.py times: each Triton kernel beside the ways in which torch computes the same.

Needs triton. Shape letters: T tokens, H hidden, E experts, K choices of a token, P pairs, W slots, F FFN width,
G = 2F; in solvers N tokens of a routing group, C experts.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peers import Shape
from torch import Tensor
from torch.nn import functional

from moe_dist.kernels import combine, grouped_gemm, reference, router, solvers, sorting, swiglu
from moe_dist.routing.sinkhorn import sinkhorn_prices

SINKHORN = {"epsilon": 0.05, "iterations": 10}
DUAL_ITERATIONS = 4
OURS = "triton"


@dataclass(frozen=True)
class Case:
    """One computation; all rows return tensors that must agree."""

    name: str
    rows: dict[str, Callable[[], tuple[Tensor, ...]]]
    """The last is ours."""
    flops: float = 0.0
    """Of its GEMMs, where it has some."""


class Data:
    """Router logits, tokens and pairs of one shape; pairs in token order, slots by expert."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool) -> None:
        self.shape, self.device, self.dtype, self.compiled = shape, device, dtype, compiled
        self.generator = torch.Generator(device).manual_seed(0)
        self.hidden_TH = self.draw(shape.tokens, shape.hidden)
        self.logits_TE = self.draw(shape.tokens, shape.experts, dtype=torch.float32)
        self.bias_E = 1e-3 * self.draw(shape.experts, dtype=torch.float32)
        self.weight_TK, expert_TK = self.logits_TE.softmax(-1).topk(shape.top_k)
        self.expert_P, self.weight_P = expert_TK.flatten(), self.weight_TK.flatten()
        self.token_P = torch.arange(shape.tokens, device=device).repeat_interleave(shape.top_k)
        self.first_T = torch.arange(0, len(self.token_P), shape.top_k, device=device)
        self.order_P, self.slot_P, _, self.start_E1 = reference.sort_pairs(self.expert_P, shape.experts)
        self.end_E = self.start_E1[1:].int()
        self.token_W, self.weight_W = self.token_P[self.order_P], self.weight_P[self.order_P]

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def paths(self, name: str, plain: Callable[..., Any], ours: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """The plain path, compiled as well if wanted, and ours."""
        return {name: plain} | ({"compiled": torch.compile(plain)} if self.compiled else {}) | {OURS: ours}


def cases(shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool = True) -> Iterator[Case]:
    """One after the other, so that only one's tensors are in memory. `compiled`: rows by torch.compile as well."""
    data = Data(shape, device, dtype, compiled)
    for make in (router_cases, sort_cases, gemm_cases, swiglu_cases, combine_cases, solver_cases):
        yield from make(data)


def router_cases(data: Data) -> Iterator[Case]:
    top_k, num_experts = data.shape.top_k, data.shape.experts

    def plain(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        scores_TE = logits_TE.softmax(-1)
        expert_TK = (scores_TE + data.bias_E).topk(top_k, dim=-1).indices
        expert_P = expert_TK.flatten()
        count_E = torch.zeros(num_experts, dtype=torch.int64, device=data.device)
        return scores_TE.gather(-1, expert_TK), count_E.scatter_add_(0, expert_P, torch.ones_like(expert_P))

    def fused(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        weight_TK, _, count_E = router.score_top_k(logits_TE, top_k, "softmax", data.bias_E)
        return weight_TK, count_E

    leaf_TE, d_weight_TK = data.logits_TE.clone().requires_grad_(), torch.rand_like(data.weight_TK)

    def trained(route: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        weight_TK, _ = route(leaf_TE)
        return torch.autograd.grad(weight_TK, leaf_TE, d_weight_TK)

    rows = data.paths("topk", plain, fused)
    yield Case("router", {name: bind(route, data.logits_TE) for name, route in rows.items()})
    yield Case("router, and back", {name: bind(trained, route) for name, route in rows.items()})


def sort_cases(data: Data) -> Iterator[Case]:
    num_experts = data.shape.experts

    def by_sort() -> tuple[Tensor, ...]:
        key_P, order_P = data.expert_P.to(torch.int16).sort(stable=True)
        slot_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=data.device))
        edges = torch.arange(num_experts + 1, dtype=torch.int16, device=data.device)
        return order_P, slot_P, torch.searchsorted(key_P, edges).diff()

    yield Case("sort", {"sort": by_sort, OURS: lambda: sorting.sort_pairs(data.expert_P, num_experts)[:3]})


def gemm_cases(data: Data) -> Iterator[Case]:
    hidden, width = data.shape.hidden, 2 * data.shape.ffn
    flops = 2.0 * len(data.token_P) * hidden * width
    w_EHG, d_pre_WG = data.draw(data.shape.experts, hidden, width), data.draw(len(data.token_P), width)
    x_TH, token_W, start_E1, end_E = data.hidden_TH, data.token_W, data.start_E1, data.end_E

    def gathered() -> Tensor:
        return x_TH.index_select(0, token_W)

    yield Case(
        "gemm, gathered",
        {
            "grouped_mm": lambda: (functional.grouped_mm(gathered(), w_EHG, offs=end_E),),
            OURS: lambda: (grouped_gemm.grouped_gemm(x_TH, w_EHG, start_E1, token_W),),
        },
        flops,
    )
    w_EGH = w_EHG.transpose(1, 2)
    yield Case(
        "gemm, transposed",
        {
            "grouped_mm": lambda: (functional.grouped_mm(d_pre_WG, w_EGH, offs=end_E),),
            OURS: lambda: (grouped_gemm.grouped_gemm(d_pre_WG, w_EGH, start_E1),),
        },
        flops,
    )
    yield Case(
        "weight gradient",
        {
            "grouped_mm": lambda: (functional.grouped_mm(gathered().t(), d_pre_WG, offs=end_E),),
            OURS: lambda: (grouped_gemm.grouped_weight_grad(x_TH, d_pre_WG, start_E1, token_W),),
        },
        flops,
    )


def swiglu_cases(data: Data) -> Iterator[Case]:
    width = data.shape.ffn
    pre_WG, d_active_WF = data.draw(len(data.token_P), 2 * width), data.draw(len(data.token_P), width)

    def eager(pre_WG: Tensor) -> tuple[Tensor, ...]:
        gate_WF, up_WF = pre_WG.chunk(2, dim=-1)
        return (functional.silu(gate_WF) * up_WF,)

    def ours(pre_WG: Tensor) -> tuple[Tensor, ...]:
        return (swiglu.swiglu(pre_WG),)

    rows = data.paths("eager", eager, ours)
    yield Case("swiglu", {name: bind(function, pre_WG) for name, function in rows.items()})
    rows = data.paths("eager", reference.swiglu_backward, swiglu.swiglu_backward)
    yield Case("swiglu, back", {name: bind(f, pre_WG, d_active_WF, data.weight_W) for name, f in rows.items()})


def combine_cases(data: Data) -> Iterator[Case]:
    rows_WH, d_out_TH = data.draw(len(data.token_P), data.shape.hidden), data.draw(*data.hidden_TH.shape)
    pairing = data.slot_P, data.first_T, data.weight_P

    def by_bags() -> tuple[Tensor, ...]:
        summed_TH = functional.embedding_bag(
            data.slot_P, rows_WH.float(), data.first_T, mode="sum", per_sample_weights=data.weight_P
        )
        return (summed_TH.to(rows_WH.dtype),)

    def by_index_add() -> tuple[Tensor, ...]:
        weighted_WH = rows_WH * data.weight_W[:, None]
        sum_TH = torch.zeros_like(data.hidden_TH, dtype=torch.float32).index_add_(0, data.token_W, weighted_WH)
        return (sum_TH.to(rows_WH.dtype),)

    def back() -> tuple[Tensor, ...]:
        d_rows_WH = d_out_TH.index_select(0, data.token_W)
        d_weight_W = (d_rows_WH * rows_WH).sum(1, dtype=torch.float32)
        return d_rows_WH * data.weight_W.to(d_rows_WH.dtype)[:, None], d_weight_W[data.slot_P]

    forward = {"embedding_bag": by_bags, "index_add": by_index_add}
    yield Case("combine", forward | {OURS: lambda: (combine.combine(rows_WH, *pairing),)})
    yield Case(
        "combine, back", {"index_select": back, OURS: lambda: combine.combine_backward(d_out_TH, rows_WH, *pairing)}
    )


def solver_cases(data: Data) -> Iterator[Case]:
    """Routing groups as large as the kernels take."""
    tokens, num_experts, top_k = data.shape.tokens, data.shape.experts, data.shape.top_k
    in_group = min(tokens, solvers.LARGEST_GROUP // num_experts)
    logits_GNC = data.logits_TE[: tokens // in_group * in_group].view(-1, in_group, num_experts)
    arguments = logits_GNC, top_k, *SINKHORN.values()
    yield Case(
        "sinkhorn",
        {"loop": lambda: (sinkhorn_prices(*arguments),), OURS: lambda: (solvers.sinkhorn_prices(*arguments),)},
    )
    score_GNC = logits_GNC.softmax(-1)
    price_GC = score_GNC.mean(1)
    least_G, capacity = torch.full_like(price_GC[:, 0], -torch.inf), math.ceil(in_group * top_k / num_experts)
    dual = score_GNC, price_GC, least_G.contiguous(), top_k, capacity, DUAL_ITERATIONS
    yield Case(
        "dual",
        {"loop": lambda: (reference.dual_iterations(*dual),), OURS: lambda: (solvers.dual_iterations(*dual),)},
    )


def bind(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """The call itself, for functions and arguments that a loop changes."""
    return lambda: function(*arguments)
