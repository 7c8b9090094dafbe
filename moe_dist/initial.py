"""Initial weights that do not depend on the layout of ranks."""

import hashlib

import torch


def draw_normal(
    weight: torch.Tensor, name: str, seed: int, std: float, dimension: int = 0, number: int = 0, count: int = 1
) -> None:
    """Fill `weight` by N(0, std^2), a function of (seed, name) alone.

    It is drawn whole, in float32 and on the CPU, whatever the weight's dtype and device, so that every rank, engine and
    precision starts from the same values. `weight` may be a slice of it: `number` of `count` equal ones along `dimension`.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    with torch.no_grad():
        shape = [size * count if i == dimension else size for i, size in enumerate(weight.shape)]
        whole = torch.empty(shape).normal_(0, std, generator=generator)
        weight.copy_(whole.chunk(count, dimension)[number])
