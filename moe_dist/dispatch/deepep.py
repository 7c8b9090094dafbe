"""DeepEP as an exchange (see hierarchical.py): its kernels bring each token to each rank that needs it, once.

Written for the interface of DeepEP 1.2.1, its last tagged release (github.com/deepseek-ai/DeepEP, 9af0e0d), whose `Buffer`
version 2 keeps under the same name. Not run on hardware: tests run it against a stand-in of the same signature.

Between nodes DeepEP sends a token once for each node and fans out over NVLink, so that nothing is left to do inside the
node: the dispatcher behind it sorts rows by expert on this rank alone. The gradient of its dispatch is its combine, with
the gradients of the weights beside the rows, and that of combine is its dispatch by the same handle.

Shape letters: T tokens, H hidden, K the most experts of a token, P pairs, U rows received, Q pairs received.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.config.deepep import deepep_problems
from moe_dist.placement import ExpertMap
from moe_dist.routing.types import Routing


@dataclass(frozen=True)
class DeepEPTicket:
    """What `bring_back` needs: DeepEP's own record of a dispatch."""

    handle: tuple[Any, ...]


class DeepEPExchange(nn.Module):
    """Holds where experts are and DeepEP's buffers; layers share one.

    Attributes:
        inner_map: the experts of this rank, by their place in its stack.
        inner_group: None, because the rows are where their experts are.
    """

    number_E: torch.Tensor
    inner_group: dist.ProcessGroup | None = None

    def __init__(self, expert_map: ExpertMap, group: dist.ProcessGroup, hidden_size: int, num_choices: int) -> None:
        """Collective over `group`.

        Args:
            num_choices: the most experts that one token can have.

        Raises:
            ValueError: if DeepEP is not installed, there is no CUDA device, or the sizes are beyond its kernels.
        """
        super().__init__()
        problems = list(deepep_problems(hidden_size, dist.get_world_size(group), num_choices))
        if not torch.cuda.is_available():
            problems.append("parallel.dispatch: deepep needs CUDA devices, and there is none; use flat or hierarchical")
        if problems:
            raise ValueError("\n".join(problems))
        self.buffer = _buffer(group, hidden_size)
        self.num_choices = num_choices
        self.inner_map = ExpertMap((tuple(range(expert_map.num_experts_of_rank[dist.get_rank(group)])),))
        # DeepEP counts equally many experts on every rank: a rank with fewer leaves numbers without a use.
        most = max(expert_map.num_experts_of_rank)
        self.num_numbers = most * dist.get_world_size(group)
        number_E = torch.empty(expert_map.num_experts, dtype=torch.int64)
        for rank, experts in enumerate(expert_map.experts_of_rank):
            number_E[list(experts)] = torch.arange(len(experts)) + rank * most
        self.register_buffer("number_E", number_E, persistent=False)

    def send(self, hidden_TH: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Routing, DeepEPTicket]:
        """Bring each token to the ranks of its experts.

        Returns:
            rows [U, H] by source rank, their routing over the experts of this rank, and the ticket for `bring_back`.

        Raises:
            ValueError: if rows are not bfloat16, or the routing is padded.
        """
        if hidden_TH.dtype != torch.bfloat16:
            raise ValueError(
                f"parallel.dispatch: deepep moves bfloat16, and rows are {hidden_TH.dtype}; "
                "set training.precision: bfloat16, or use flat or hierarchical"
            )
        if routing.pairs_per_expert is not None:
            raise ValueError(
                "parallel.dispatch: deepep does not carry padded slots (routing.capacity.pad, exactly balanced "
                "methods); use flat or hierarchical"
            )
        token_P = routing.token_P
        choice_P = torch.arange(len(token_P), device=token_P.device) - torch.searchsorted(token_P, token_P)
        place_P = token_P * self.num_choices + choice_P
        shape = hidden_TH.shape[0], self.num_choices
        number_TK = torch.full(shape, -1, dtype=torch.int64, device=token_P.device)
        number_TK.view(-1).scatter_(0, place_P, self.number_E[routing.expert_P])
        rows_UH, weight_Q, token_Q, expert_Q, handle = _Dispatch.apply(
            hidden_TH, routing.weight_P, place_P, number_TK, self.num_numbers, self.buffer
        )
        load_E = torch.zeros(self.inner_map.num_experts, dtype=torch.int64, device=token_P.device)
        load_E.scatter_add_(0, expert_Q, torch.ones_like(expert_Q))
        routing_U = Routing(token_Q, expert_Q, weight_Q, load_E, weight_on=routing.weight_on)
        return rows_UH, routing_U, DeepEPTicket(handle)

    def bring_back(self, out_UH: torch.Tensor, ticket: DeepEPTicket) -> torch.Tensor:
        """[T, H]: rows return to the rank they came from and are added up over the ranks of each token."""
        return _Combine.apply(out_UH, ticket.handle, self.buffer)

    def hop(self, ticket: DeepEPTicket) -> None:
        """What moved is inside DeepEP's handle."""


def _buffer(group: dist.ProcessGroup, hidden_size: int) -> Any:
    try:
        buffer_class = importlib.import_module("deep_ep").Buffer
    except ImportError as error:
        raise ValueError(
            f"parallel.dispatch: deepep needs the package deep_ep, which cannot be imported ({error}); build it from "
            "github.com/deepseek-ai/DeepEP, or use flat or hierarchical"
        ) from None
    ranks, row_bytes = dist.get_world_size(group), 2 * hidden_size
    configs = buffer_class.get_dispatch_config(ranks), buffer_class.get_combine_config(ranks)
    return buffer_class(
        group,
        max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs),
        max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs),
    )


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_P: torch.Tensor,
        place_P: torch.Tensor,
        number_TK: torch.Tensor,
        num_numbers: int,
        buffer: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, tuple[Any, ...]]:
        weight_TK = torch.zeros(number_TK.shape, dtype=torch.float32, device=weight_P.device)
        weight_TK.view(-1).scatter_(0, place_P, weight_P.float())
        to_rank, to_node, to_expert, is_in_rank, _ = buffer.get_dispatch_layout(number_TK, num_numbers)
        rows_UH, expert_UK, weight_UK, counts, handle, _ = buffer.dispatch(
            hidden_TH.contiguous(),
            num_tokens_per_rank=to_rank,
            num_tokens_per_rdma_rank=to_node,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=to_expert,
            topk_idx=number_TK,
            topk_weights=weight_TK,
        )
        # DeepEP has waited for the counts, so the number of pairs is known on the host.
        place_Q = torch.nonzero_static(expert_UK.flatten() >= 0, size=sum(counts)).flatten()
        token_Q, expert_Q = place_Q // expert_UK.shape[1], expert_UK.flatten()[place_Q]
        ctx.save_for_backward(place_P, place_Q)
        ctx.buffer, ctx.handle, ctx.shape, ctx.weight_dtype = buffer, handle, expert_UK.shape, weight_P.dtype
        ctx.mark_non_differentiable(token_Q, expert_Q)
        return rows_UH, weight_UK.flatten()[place_Q].to(weight_P.dtype), token_Q, expert_Q, handle

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        place_P, place_Q = ctx.saved_tensors
        grad_UH, grad_Q = grads[0].contiguous(), grads[1].float()
        grad_UK = grad_Q.new_zeros(ctx.shape)
        grad_UK.view(-1).scatter_(0, place_Q, grad_Q)
        grad_TH, grad_TK, _ = ctx.buffer.combine(grad_UH, ctx.handle, topk_weights=grad_UK)
        return grad_TH, grad_TK.flatten()[place_P].to(ctx.weight_dtype), None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_UH: torch.Tensor, handle: tuple[Any, ...], buffer: Any) -> torch.Tensor:
        ctx.handle, ctx.buffer = handle, buffer
        return buffer.combine(out_UH.contiguous(), handle)[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.buffer.dispatch(grads[0].contiguous(), handle=ctx.handle)[0], None, None
