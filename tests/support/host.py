"""What the host waits for."""

from typing import Any

from torch.overrides import TorchFunctionMode


class HostReads(TorchFunctionMode):
    """Notes each call whose result the host has to wait for where the tensor is on a GPU."""

    NAMES = frozenset({"tolist", "item", "nonzero", "cpu", "numpy", "unique", "__bool__", "__int__", "__index__"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.seen += [name] * (name in self.NAMES)
        return func(*args, **(kwargs or {}))
