"""Our layer beside another one: equal weights and tokens for both, and how far their results are apart.

Shape letters: B sequences, S tokens of each, H hidden, F expert FFN width, E experts, K experts per token.
"""

from collections.abc import Callable, Iterable
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist import MoELayer
from moe_dist.config.routing import RoutingConfig
from moe_dist.config.schema import MoEConfig

B, S, H, F, E, K = 3, 20, 10, 8, 12, 3
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-11}

Source = Callable[[nn.Parameter], Tensor]
"""What to look at of a parameter: its values or its gradient."""
Pair = tuple[str, Tensor, Tensor]
"""Name, ours, theirs."""
Forward = Callable[[Tensor], tuple[Tensor, Tensor | float]]
"""[B, S, H] -> the same shape, and what of the loss does not come by the output."""


def make_ours(moe: dict[str, Any], routing: dict[str, Any], dtype: torch.dtype) -> MoELayer:
    """Our layer, its experts spread over all ranks; settings beside the sizes."""
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    config = RoutingConfig.model_validate({"top_k": K, "group": "rank", **routing})
    return MoELayer(H, MoEConfig(num_experts=E, ffn_size=F, **moe), config, group).to(dtype)


def values(parameter: nn.Parameter) -> Tensor:
    return parameter.data


def gradient(parameter: nn.Parameter) -> Tensor:
    """An expert without a token may be left without a gradient."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def fill(pairs: Iterable[Pair]) -> None:
    """Draw each weight, a function of its name alone: the same on all ranks."""
    for name, mine, right in pairs:
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        mine.copy_(torch.randn(mine.shape, generator=generator) * 0.5)
        right.copy_(mine)


def run(forward: Forward, dtype: torch.dtype, sequences: int = B) -> tuple[Tensor, Tensor]:
    """Output and input gradient on tokens of this rank; gradients of the weights stay in the layer."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    hidden, target = torch.randn(2, sequences, B * S // sequences, H, generator=generator).to(dtype).unbind()
    hidden = hidden.clone().requires_grad_()
    out, loss = forward(hidden)
    ((out - target).square().sum() + loss).backward()
    return out.detach(), hidden.grad


def distances(pairs: Iterable[Pair]) -> dict[str, float]:
    """Largest difference, relative to the largest value of theirs."""
    found = {}
    for name, mine, right in pairs:
        scale = right.abs().max()
        assert scale > 0.1, f"{name}: nothing to compare"
        found[name] = ((mine - right).abs().max() / scale).item()
    return found


def assert_equal(found: list[dict[str, float]], dtype: torch.dtype) -> None:
    """Args: what `distances` found, by rank."""
    for rank, by_name in enumerate(found):
        worst = max(by_name, key=by_name.__getitem__)
        assert by_name[worst] < TOLERANCES[dtype], f"rank {rank}, {worst}: {by_name[worst]}"
