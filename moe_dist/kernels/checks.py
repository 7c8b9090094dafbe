"""Checks of what a kernel is called with. Contents are never looked at: that would make the host wait for the device."""

import torch

from moe_dist.kernels import interpreted

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)


def check(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    like: torch.Tensor | None = None,
) -> None:
    """Raise ValueError unless the tensor has this shape (None: any size), one of the dtypes, and elements side by side.

    Args:
        like: a tensor on whose device it must be. None: the current GPU.
    """
    matches = tensor.dim() == len(shape) and all(
        size in (None, found) for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not matches:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; must be ({wanted})")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: {tensor.dtype}; must be one of {', '.join(map(str, dtypes))}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: strides {tensor.stride()}; the last must be 1 (use contiguous())")
    device = _launch_device() if like is None else like.device
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}; must be on {device}")


def require(name: str, value: object, holds: bool, valid: str) -> None:
    """Raise ValueError unless `holds`."""
    if not holds:
        raise ValueError(f"{name}: {value}; must be {valid}")


def _launch_device() -> torch.device:
    """Where triton launches."""
    return torch.device("cpu") if interpreted() else torch.device("cuda", torch.cuda.current_device())
