"""What the machine could do: the GEMMs of perfectly balanced experts, and a bare exchange of their rows.

Shape letters: H hidden, F expert FFN width, G = 2F, L experts of this rank, R rows of one expert under perfect balance.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .problem import Problem, chosen_experts

Passes = tuple[Callable[[], object], Callable[[], object]]
"""Forward and backward."""

EXCHANGE, EXCHANGE_AS_ROUTED = "all-to-all", "all-to-all as routed"


class Limit:
    """The GEMMs into buffers that exist already (grouped_mm has no such form), without activation, and the exchange."""

    def __init__(self, problem: Problem):
        self.problem, shape = problem, problem.shape
        gate_up_LHG, down_LFH = problem.gate_up_LHG, problem.down_LFH
        num_local = len(down_LFH)
        num_rows = shape.tokens * shape.top_k * problem.ranks // shape.experts

        def stack(width: int) -> Tensor:
            drawn = torch.randn(num_local, num_rows, width, device=problem.device)
            return drawn.to(problem.dtype)

        x, dx, y, dy = (stack(shape.hidden) for _ in range(4))
        h, dh, a, da = stack(2 * shape.ffn), stack(2 * shape.ffn), stack(shape.ffn), stack(shape.ffn)
        self.forward = [(x, gate_up_LHG, h), (a, down_LFH, y)]
        self.backward_x = [(dy, down_LFH.mT, da), (dh, gate_up_LHG.mT, dx)]
        self.backward_w = [(a.mT, dy, torch.empty_like(down_LFH)), (x.mT, dh, torch.empty_like(gate_up_LHG))]
        self.rows, self.received = x.view(-1, shape.hidden), dx.view(-1, shape.hidden)
        self.ends_L = torch.arange(1, num_local + 1, device=problem.device, dtype=torch.int32) * num_rows

    def gemms(self) -> dict[str, Passes]:
        """Ways to compute them; the limit is the fastest."""
        passes = (self.forward, self.backward_x + self.backward_w)
        bmm: Passes = tuple(_call(torch.bmm, stacks) for stacks in passes)
        if self.problem.device.type == "cpu":
            return {"loop of mm": tuple(_call(torch.mm, _by_expert(stacks)) for stacks in passes), "bmm": bmm}
        if self.problem.dtype != torch.bfloat16:
            return {"bmm": bmm}  # on a GPU, grouped_mm takes no float32
        return {"grouped_mm": (self._grouped_forward, self._grouped_backward), "bmm": bmm}

    def _grouped_forward(self) -> None:
        for rows, weight, _ in self.forward:
            torch.nn.functional.grouped_mm(rows.flatten(0, 1), weight, offs=self.ends_L)

    def _grouped_backward(self) -> None:
        for rows, weight, _ in self.backward_x:
            torch.nn.functional.grouped_mm(rows.flatten(0, 1), weight, offs=self.ends_L)
        for rows, grad, _ in self.backward_w:
            torch.nn.functional.grouped_mm(rows.mT.flatten(0, 1).T, grad.flatten(0, 1), offs=self.ends_L)

    def exchanges(self, as_routed: bool) -> dict[str, Passes]:
        """Dispatch and combine, where there are several ranks; a rank's own rows stay where they are.

        Args:
            as_routed: beside the balanced exchange, also that of the rows which the problem's routing sends.
        """
        if self.problem.ranks == 1:
            return {}
        balanced = {EXCHANGE: self._exchange(None, None, self.received)}
        return balanced | {EXCHANGE_AS_ROUTED: self._routed_exchange()} if as_routed else balanced

    def _routed_exchange(self) -> Passes:
        problem = self.problem
        rank_TK = chosen_experts(problem) // len(problem.down_LFH)
        send = rank_TK.flatten().bincount(minlength=problem.ranks)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send)
        received = self.received.new_empty(int(receive.sum()), problem.shape.hidden)
        return self._exchange(send.tolist(), receive.tolist(), received)

    def _exchange(self, send: list[int] | None, receive: list[int] | None, received: Tensor) -> Passes:
        def there_and_back() -> None:
            dist.all_to_all_single(received, self.rows, receive, send)
            dist.all_to_all_single(self.rows, received, send, receive)

        return there_and_back, there_and_back


def _call(product: Callable[..., Tensor], gemms: list[tuple[Tensor, Tensor, Tensor]]) -> Callable[[], None]:
    def run() -> None:
        for left, right, out in gemms:
            product(left, right, out=out)

    return run


def _by_expert(stacks: list[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The same GEMMs expert after expert, so that the rows of one stay in cache from GEMM to GEMM."""
    by_stack = [zip(*(tensor.unbind() for tensor in stack), strict=True) for stack in stacks]
    return [gemm for expert in zip(*by_stack, strict=True) for gemm in expert]
