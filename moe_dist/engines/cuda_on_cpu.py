"""Megatron-Core on processes without CUDA: what it asks of CUDA is answered by the CPU for the time of a `with` block.

Megatron-Core allocates on `torch.cuda.current_device()`, makes streams and keeps CUDA's random state, whatever the backend of
its groups. Everything on a CPU is synchronous, so streams and events have nothing to do. For trying and testing only.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Idle:
    """Stands for torch.cuda.Stream and torch.cuda.Event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, *args: Any) -> "_Idle":
        return self


@contextlib.contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Inside, Megatron-Core finds a CUDA device that is the CPU; afterwards nothing is left of it. May be nested."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in _replacements():
            stack.callback(_restorer(owner, name))
            setattr(owner, name, value)
        stack.enter_context(_DeviceIsCPU())
        yield


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    cuda, tensor = torch.cuda, torch.Tensor

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    yield cuda, "current_device", lambda: "cpu"
    yield cuda, "Stream", _Idle
    yield cuda, "Event", _Idle
    yield cuda, "current_stream", _Idle
    yield cuda, "default_stream", _Idle
    yield cuda, "stream", lambda stream: contextlib.nullcontext()
    yield cuda, "synchronize", nothing
    yield cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state()
    yield cuda, "set_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)
    yield cuda, "manual_seed", torch.manual_seed
    yield tensor, "cuda", lambda self, *args, **kwargs: self
    yield tensor, "record_stream", nothing
    yield tensor, "type", _type_of_cuda(tensor.type)
    from megatron.core.tensor_parallel import random  # after CUDA is there: it looks at its import

    yield random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)
    yield random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()


def _type_of_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original(self, *args, **kwargs)  # the optimizers compare it with 'torch.cuda.FloatTensor'
        return name.replace("torch.", "torch.cuda.") if isinstance(name, str) and ".cuda." not in name else name

    return type_of


def _restorer(owner: Any, name: str) -> Callable[[], None]:
    if name in vars(owner):
        value = vars(owner)[name]
        return lambda: setattr(owner, name, value)
    return lambda: delattr(owner, name)  # inherited


class _DeviceIsCPU(TorchFunctionMode):
    """Takes every device "cuda…" in a call of PyTorch for the CPU, and leaves memory where it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return func(*("cpu" if _is_cuda(value) else value for value in args), **kwargs)


def _is_cuda(value: object) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")
