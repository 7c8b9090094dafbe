"""What a layer writes down while it runs. Nothing here makes the host wait for the device until it is read.

Shape letters: E experts.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

STAGES = ("route", "dispatch", "experts", "combine")


class LayerRecorder:
    """Counters of one MoE layer since they were last read: rows moved, rows computed, time by stage, auxiliary losses."""

    def __init__(self, device: torch.device, ranks_per_node: int = 1) -> None:
        self.device, self.ranks_per_node = device, ranks_per_node
        self.reset()

    def reset(self) -> None:
        """Start all counters anew."""
        self.rows_of_expert: dict[int, int] = defaultdict(int)
        self.rows_sent: list[int] = []
        self.rows_received: list[int] = []
        self.bytes_sent = 0
        self.bytes_between_nodes = 0
        self.losses: dict[str, torch.Tensor] = {}
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of the forward pass: by device events on a GPU, by the clock on a CPU."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - began

    def add_rows(
        self, experts: list[int], sizes: list[int], sent: list[int], received: list[int], row_bytes: int
    ) -> None:
        """Count one dispatch: rows of each segment with its expert (place in this rank's stack), rows to and from each rank."""
        for expert, size in zip(experts, sizes, strict=True):
            self.rows_of_expert[expert] += size
        self.rows_sent = _add(self.rows_sent, sent)
        self.rows_received = _add(self.rows_received, received)
        self.bytes_sent += sum(sent) * row_bytes

    def add_losses(self, losses: dict[str, torch.Tensor], share: float | torch.Tensor) -> None:
        """Add a micro-batch's auxiliary losses, weighted by its share of the optimiser step."""
        for name, loss in losses.items():
            value = loss.detach() * share
            self.losses[name] = self.losses[name] + value if name in self.losses else value

    def seconds(self) -> dict[str, float]:
        """Seconds by stage. Waits for the device."""
        if self._events:
            self._events[-1][2].synchronize()
            for name, start, end in self._events:
                self._seconds[name] += start.elapsed_time(end) / 1000
            self._events.clear()
        return dict(self._seconds)


def _add(total: list[int], more: list[int]) -> list[int]:
    return [a + b for a, b in zip(total, more, strict=True)] if total else list(more)
