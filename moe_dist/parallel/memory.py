"""Host memory that is freed stays with the process, and scratch tensors that are used again."""

import contextlib
import ctypes
import threading
from functools import cache

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_of_thread = threading.local()


@cache
def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of giving them back; does nothing with another C library.

    A setting of the whole process. moe_dist.experts.cpu asks for it when it is first used.

    By default every tensor above 32 MB is mapped anew and its pages are faulted in one by one: filling a fresh 32 MB
    tensor takes 20 ms, filling one whose memory is reused takes 1.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for threshold in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(threshold, 2**31 - 1)


def workspace(name: str, num_rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """[num_rows, width] of the dtype and device of `like`, with whatever the last user left there.

    On a CPU all callers of one name on one thread share the memory, so what is in it lasts only as long as the function
    that asked: nothing that is kept for backward, and nothing that is returned, may live there. Elsewhere it is a fresh
    tensor, since caching allocators make that cheap and streams make sharing unsafe.
    """
    if like.device.type != "cpu":
        return like.new_empty(num_rows, width)
    pool, key = _pool(), (name, like.dtype)
    if key not in pool or pool[key].numel() < num_rows * width:
        pool.pop(key, None)  # before the larger one is made
        with torch.inference_mode(False):  # a tensor made in it could not be written to elsewhere
            pool[key] = torch.empty(num_rows * width, dtype=like.dtype)
    return pool[key][: num_rows * width].view(num_rows, width)


def release_workspaces() -> None:
    """Give back this thread's scratch tensors, for instance when training is done."""
    _pool().clear()


def _pool() -> dict[tuple[str, torch.dtype], torch.Tensor]:
    if not hasattr(_of_thread, "pool"):
        _of_thread.pool = {}
    return _of_thread.pool
