"""Initial weights that do not depend on the layout of ranks."""

import hashlib

import torch


def draw_normal(weight: torch.Tensor, name: str, seed: int, std: float) -> None:
    """Fill `weight` by N(0, std^2), a function of (seed, name) alone.

    It is drawn whole, in float32 and on the CPU, whatever the weight's dtype and device, so that every rank, engine and
    precision starts from the same values.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    with torch.no_grad():
        weight.copy_(torch.empty(weight.shape).normal_(0, std, generator=generator))
