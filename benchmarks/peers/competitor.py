"""What every timed layer has in common.

Shape letters: T tokens of this rank, H hidden, F expert FFN width, G = 2F, L experts of this rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .problem import Problem

Source = Callable[[nn.Parameter], Tensor]
"""What to look at of a parameter: its values or its gradient."""


class UnavailableError(Exception):
    """A competitor that cannot run here."""


class Competitor:
    """A whole MoE layer with learned top-k routing, loaded with the problem's weights, its parameters in its dtype."""

    layer: nn.Module
    one_rank_only = False

    def __init__(self, problem: Problem, **variant) -> None:
        """Build the layer.

        Args:
            variant: what `build` takes beside the problem.

        Raises UnavailableError or ImportError if it cannot run here.
        """
        if self.one_rank_only and problem.ranks > 1:
            raise UnavailableError("one rank only: its expert parallelism comes with a whole model")
        self.hidden_TH = problem.hidden_TH.clone().requires_grad_()
        self.grad_TH, self.num_local = problem.grad_TH, len(problem.down_LFH)
        with torch.device(problem.device):
            self.layer = self.build(problem, **variant)
        for parameter in self.layer.parameters():
            parameter.data = parameter.data.to(problem.device, problem.dtype)
        with torch.no_grad():
            self.router_weight().copy_(problem.router_EH)
            for place, (gate_up_HG, down_FH) in enumerate(zip(problem.gate_up_LHG, problem.down_LFH, strict=True)):
                gate, up, down = self.expert(place, lambda parameter: parameter.data)
                gate.copy_(gate_up_HG[:, : gate.shape[1]])
                up.copy_(gate_up_HG[:, gate.shape[1] :])
                down.copy_(down_FH)

    def build(self, problem: Problem, **variant) -> nn.Module:
        raise NotImplementedError

    def forward(self, hidden_TH: Tensor) -> Tensor:
        raise NotImplementedError

    def router_weight(self) -> nn.Parameter:
        raise NotImplementedError

    def expert(self, place: int, source: Source) -> tuple[Tensor, Tensor, Tensor]:
        """Views of one expert of this rank, as gate [H, F], up [H, F] and down [F, H]."""
        raise NotImplementedError

    def clear(self) -> None:
        """Drop the gradients of the step before."""
        self.hidden_TH.grad = None
        self.layer.zero_grad(set_to_none=True)

    def run_forward(self) -> None:
        self.output_TH = self.forward(self.hidden_TH)

    def run_backward(self) -> None:
        self.output_TH.backward(self.grad_TH)
        self.output_TH = self.output_TH.detach()

    def results(self) -> dict[str, Tensor]:
        """One step's output and gradients in float32, under the names that `reference` gives them."""
        self.clear()
        self.run_forward()
        self.run_backward()
        experts = [self.expert(place, _gradient) for place in range(self.num_local)]
        return {
            "output": self.output_TH.float(),
            "input gradient": self.hidden_TH.grad.float(),
            "router gradient": self.router_weight().grad.float(),
            "gate_up gradient": torch.stack([torch.cat([gate, up], dim=1) for gate, up, _ in experts]).float(),
            "down gradient": torch.stack([down for _, _, down in experts]).float(),
        }


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Experts without a token may be left without a gradient."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
