"""The Triton backend of the experts: through a whole layer it is the plain loop, forward and backward."""

from typing import Any

import pytest
import torch

from moe_dist import MoELayer
from moe_dist.config.routing import RoutingConfig
from moe_dist.config.schema import MoEConfig

H, F, E, K, T = 24, 20, 5, 2, 30
ROUTINGS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "an expert without rows": {"router_bias": True},
    "static": {"capacity": {"factor": 1.5, "pad": True}},
}


def run(backend: str, routing: dict[str, Any], recompute: str, device: torch.device) -> list[torch.Tensor]:
    moe = MoEConfig(num_experts=E, ffn_size=F, backend=backend, recompute=recompute)
    layer = MoELayer(H, moe, RoutingConfig(top_k=K, init_std=1.0, **routing))
    layer.initialise(seed=0, name="layers.0", std=0.3)
    if layer.router.bias is not None:
        layer.router.bias.data[3] = -100
    layer.to(device)
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    layer(hidden).square().sum().backward()
    gradients = [p.grad for p in layer.parameters()]
    return [layer(hidden).detach(), hidden.grad, *gradients]


@pytest.mark.parametrize("recompute", ["activation", "experts"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_it_is_the_loop(name: str, recompute: str, device: torch.device) -> None:
    expected = run("loop", ROUTINGS[name], "activation", device)
    for actual, right in zip(run("triton", ROUTINGS[name], recompute, device), expected, strict=True):
        assert (actual - right).abs().max() <= 1e-5 * right.abs().max()
