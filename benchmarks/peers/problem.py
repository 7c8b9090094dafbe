"""One problem that every layer solves: its shape, weights, tokens and loads, and what a plain loop makes of them.

Shape letters: T tokens of this rank, A tokens of all ranks, H hidden, F expert FFN width, G = 2F (gate columns, then up
columns), E experts, L experts of this rank, K experts per token.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

LOADS = ("uniform", "zipf")

CLEAR_GAP = {torch.float32: 1e-3, torch.bfloat16: 2**-4}
"""Least distance between a token's last chosen logit and the next one: no rounding of logits may choose differently."""

ZIPF_SAMPLE = 8192
ZIPF_STEPS = 60
ZIPF_RATE = 0.3


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer; `tokens` are those of each rank."""

    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int

    def flops(self) -> int:
        """Multiplications and additions of the experts on one rank: three matrices, forward, dX and dW."""
        return 3 * 2 * self.tokens * self.top_k * 3 * self.hidden * self.ffn


SHAPES = {
    "small-8": Shape(4096, 256, 512, 8, 2),
    "medium-64": Shape(4096, 512, 256, 64, 6),
    "large-8": Shape(2048, 1024, 1408, 8, 2),
    "small-64": Shape(4096, 256, 128, 64, 4),
    "small-256": Shape(4096, 256, 128, 256, 4),
    "olmoe": Shape(16384, 2048, 1024, 64, 8),
    "qwen3-30b-a3b": Shape(16384, 2048, 768, 128, 8),
    "deepseek-v3": Shape(16384, 7168, 2048, 256, 8),
    "sonicmoe-7b": Shape(24576, 1536, 256, 128, 8),
    "sonicmoe-30b": Shape(32768, 4096, 512, 128, 8),
}
"""Five shapes for CPUs; those of published models; and the two of SonicMoE (arXiv 2512.14080)."""

PRESETS = {name: [shape] for name, shape in SHAPES.items()} | {
    "cpu": list(SHAPES.values())[:5],
    "gpu": [SHAPES[name] for name in ("olmoe", "qwen3-30b-a3b", "sonicmoe-7b", "sonicmoe-30b")],
}


@dataclass(frozen=True)
class Problem:
    """The router's weights, which all ranks share, this rank's experts, and this rank's tokens."""

    shape: Shape
    rank: int
    ranks: int
    hidden_TH: Tensor
    grad_TH: Tensor
    router_EH: Tensor
    gate_up_LHG: Tensor
    down_LFH: Tensor

    @property
    def device(self) -> torch.device:
        return self.hidden_TH.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden_TH.dtype


def make_problem(
    shape: Shape,
    rank: int,
    ranks: int,
    load: str = "uniform",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Problem:
    """Draw weights (each expert's the same for every number of ranks) and tokens (different ones on every rank).

    Args:
        load: "uniform" leaves the router as drawn; "zipf" gives its logits fixed offsets such that expert i is chosen
            in proportion to 1 / (i + 1), but by no more than every token.
        dtype: of all weights and tokens.
    """
    weights, tokens = _generator(0, device), _generator(1 + rank, device)
    router_EH = torch.randn(shape.experts, shape.hidden, generator=weights, device=device) / shape.hidden**0.5
    has_offsets = load == "zipf"
    if has_offsets:
        # The first component of every token is 1, so that the first column of the weights is an offset of the logits.
        router_EH[:, 0] = _zipf_offsets(router_EH, shape.top_k)
    router_EH = router_EH.to(dtype)
    hidden_TH = _clear_tokens(shape, router_EH, has_offsets, tokens)
    local = shape.experts // ranks
    own = [_expert(shape, expert, dtype, device) for expert in range(rank * local, (rank + 1) * local)]
    gate_up_LHG, down_LFH = (torch.stack(part) for part in zip(*own, strict=True))
    grad_TH = torch.randn(hidden_TH.shape, generator=tokens, device=device).to(dtype)
    return Problem(shape, rank, ranks, hidden_TH, grad_TH, router_EH, gate_up_LHG, down_LFH)


def _generator(seed: int, device: str | torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _expert(shape: Shape, expert: int, dtype: torch.dtype, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """gate_up [H, G] and down [F, H] of one expert."""
    generator = _generator(1_000_000 + expert, device)
    gate_up_HG = torch.randn(shape.hidden, 2 * shape.ffn, generator=generator, device=device) / shape.hidden**0.5
    down_FH = torch.randn(shape.ffn, shape.hidden, generator=generator, device=device) / shape.ffn**0.5
    return gate_up_HG.to(dtype), down_FH.to(dtype)


def _clear_tokens(shape: Shape, router_EH: Tensor, has_offsets: bool, generator: torch.Generator) -> Tensor:
    """[T, H]: tokens whose choice of experts is clear; those whose choice is not are drawn again."""
    hidden_TH = router_EH.new_empty(shape.tokens, shape.hidden)
    unclear = torch.arange(shape.tokens, device=router_EH.device)
    while len(unclear):
        drawn = torch.randn(len(unclear), shape.hidden, generator=generator, device=router_EH.device)
        if has_offsets:
            drawn[:, 0] = 1
        hidden_TH[unclear] = drawn.to(router_EH.dtype)
        if shape.top_k == shape.experts:
            break
        top = (hidden_TH[unclear].float() @ router_EH.float().T).topk(shape.top_k + 1).values
        unclear = unclear[top[:, -2] - top[:, -1] < CLEAR_GAP[router_EH.dtype]]
    return hidden_TH


def zipf_shares(experts: int, top_k: int) -> Tensor:
    """[E] float64: the share of tokens that choose each expert, min(1, c / (i + 1)), which sums to k."""
    inverse_E = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    for full in range(top_k):  # experts that every token chooses
        scale = (top_k - full) / inverse_E[full:].sum()
        if scale * inverse_E[full] <= 1:
            break
    return torch.cat([torch.ones(full, dtype=torch.float64), scale * inverse_E[full:]])


def _zipf_offsets(router_EH: Tensor, top_k: int) -> Tensor:
    """[E]: what to add to the logits for loads as `zipf_shares` has them, by iteration on tokens of its own."""
    experts, hidden = router_EH.shape
    generator = _generator(2_000_000, router_EH.device)
    sample_TH = torch.randn(ZIPF_SAMPLE, hidden, generator=generator, device=router_EH.device)
    logits_TE = sample_TH[:, 1:] @ router_EH[:, 1:].T
    log_share_E = zipf_shares(experts, top_k).log().to(logits_TE)
    offset_E = torch.zeros_like(log_share_E)
    for _ in range(ZIPF_STEPS):
        load_E = (logits_TE + offset_E).topk(top_k).indices.flatten().bincount(minlength=experts)
        offset_E += ZIPF_RATE * (log_share_E - (load_E.clamp(min=1) / ZIPF_SAMPLE).log())
    return offset_E - offset_E.max()


def chosen_experts(problem: Problem) -> Tensor:
    """[T, K] int64."""
    return (problem.hidden_TH.float() @ problem.router_EH.float().T).topk(problem.shape.top_k).indices


def loads(problem: Problem) -> Tensor:
    """[E]: pairs that each expert gets from all ranks."""
    load_E = chosen_experts(problem).flatten().bincount(minlength=problem.shape.experts)
    dist.all_reduce(load_E)
    return load_E


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, where gate is the first half of the last dimension."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def reference(problem: Problem) -> dict[str, Tensor]:
    """Output and gradients in float32: every rank's experts, one after the other, on the tokens of all ranks.

    Tokens are gathered and outputs added up, so that nothing of it is a dispatch.
    """
    hidden_AH, grad_AH = _gather(problem.hidden_TH.float(), problem), _gather(problem.grad_TH.float(), problem)
    leaves = (hidden_AH, problem.router_EH.float(), problem.gate_up_LHG.float(), problem.down_LFH.float())
    hidden_AH, router_EH, gate_up_LHG, down_LFH = (leaf.clone().requires_grad_() for leaf in leaves)
    logits_AE = hidden_AH @ router_EH.T
    logits_AE.retain_grad()
    top_AK, expert_AK = logits_AE.topk(problem.shape.top_k)
    weight_AK = top_AK.softmax(dim=-1)
    output_AH = torch.zeros_like(hidden_AH)
    first = problem.rank * len(gate_up_LHG)
    for place, (gate_up_HG, down_FH) in enumerate(zip(gate_up_LHG, down_LFH, strict=True)):
        token, slot = (expert_AK == first + place).nonzero(as_tuple=True)
        rows = swiglu(hidden_AH[token] @ gate_up_HG) @ down_FH
        output_AH = output_AH.index_add(0, token, rows * weight_AK[token, slot, None])
    output_AH.backward(grad_AH)
    # So far each is the part of this rank's experts; the router's gradient is that of this rank's tokens.
    output_TH, d_hidden_TH, d_logits_TE = (
        _own_sum(part, problem) for part in (output_AH.detach(), hidden_AH.grad, logits_AE.grad)
    )
    return {
        "output": output_TH,
        "input gradient": d_hidden_TH,
        "router gradient": d_logits_TE.T @ problem.hidden_TH.float(),
        "gate_up gradient": gate_up_LHG.grad,
        "down gradient": down_LFH.grad,
    }


def _gather(own_T: Tensor, problem: Problem) -> Tensor:
    """The tokens of all ranks, rank after rank."""
    parts = [torch.empty_like(own_T) for _ in range(problem.ranks)]
    dist.all_gather(parts, own_T)
    return torch.cat(parts)


def _own_sum(part_A: Tensor, problem: Problem) -> Tensor:
    """The sum over ranks, for this rank's tokens."""
    dist.all_reduce(part_A)
    return part_A.chunk(problem.ranks)[problem.rank]
