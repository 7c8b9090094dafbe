"""What a layer writes down while it runs. Nothing here makes the host wait for the device until it is read.

Shape letters: E experts, P pairs.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

STAGES = ("route", "dispatch", "experts", "combine")
PEER_KEYS = ("rows_sent", "rows_received", "bytes_sent", "bytes_received")

Events = tuple[str, torch.cuda.Event, torch.cuda.Event]


@dataclass(eq=False)
class Counts:
    """Sums of one MoE layer over the training forwards of some steps."""

    pairs_3E: torch.Tensor
    """int64, on the device: pairs of this rank's tokens by expert: chosen, dropped by capacity, and, where every expert has
    a fixed number of slots, those that fill one (0 elsewhere)."""
    computed: list[int]
    """Rows computed by each expert of this rank, empty ones included."""
    peers: dict[int, list[int]] = field(default_factory=dict)
    """By global rank: the four numbers of PEER_KEYS."""
    bytes_inside_node: int = 0
    bytes_between_nodes: int = 0
    timed_steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    events: list[Events] = field(default_factory=list)

    def stage_seconds(self) -> dict[str, float]:
        """Seconds by stage in the timed steps. Waits for the device."""
        seconds = dict(self.seconds)
        if self.events:
            self.events[-1][2].synchronize()
        for name, start, end in self.events:
            seconds[name] += start.elapsed_time(end) / 1000
        return seconds


class LayerRecorder:
    """Counters of one MoE layer since they were last taken.

    Attributes:
        timed: whether this step's stages are timed.
        losses: auxiliary losses of this step, if they are kept.
        own_seconds: time the training thread has spent here.
    """

    def __init__(
        self,
        device: torch.device,
        num_experts: int,
        num_own_experts: int,
        ranks_per_node: int = 1,
        counts_tokens: bool = True,
    ) -> None:
        """
        Args:
            num_experts: E, over all ranks.
            num_own_experts: of this rank.
            counts_tokens: False on all but one of the ranks that hold the same tokens.
        """
        self.device, self.ranks_per_node, self.counts_tokens = device, ranks_per_node, counts_tokens
        self._shape = num_experts, num_own_experts
        self.own_seconds = 0.0
        self.counts = self._nothing()
        self.timed = self._keep_losses = True
        self.losses: dict[str, torch.Tensor] = {}

    def begin_step(self, timed: bool, keep_losses: bool) -> None:
        """Before the forward passes of an optimiser step: time its stages, keep its auxiliary losses?"""
        self.timed, self._keep_losses = timed, keep_losses
        self.losses = {}
        self.counts.timed_steps += timed

    def take(self) -> Counts:
        """The sums so far, which are the caller's; all starts anew."""
        taken, self.counts = self.counts, self._nothing()
        return taken

    def _nothing(self) -> Counts:
        num_experts, num_own = self._shape
        return Counts(torch.zeros(3, num_experts, dtype=torch.int64, device=self.device), [0] * num_own)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Count the time of the block as the recorder's own."""
        began = time.perf_counter()
        yield
        self.own_seconds += time.perf_counter() - began

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of the forward pass: by device events on a GPU, by the clock on a CPU."""
        if self.device.type == "cuda":
            with self.measured():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
            yield
            with self.measured():
                end.record()
                self.counts.events.append((name, start, end))
        else:
            began = time.perf_counter()
            yield
            self.counts.seconds[name] += time.perf_counter() - began

    def add_pairs(
        self, load_E: torch.Tensor, dropped_E: torch.Tensor | None, filled_expert_P: torch.Tensor | None
    ) -> None:
        """Count the choices of one forward.

        Args:
            load_E: int64, pairs before any drop.
            dropped_E: int64, pairs that capacity removed; None: none can be.
            filled_expert_P: the expert of each pair that travels, E for vacant ones, where slots are padded; else None.
        """
        if not self.counts_tokens:
            return
        routed_E, lost_E, filled_E = self.counts.pairs_3E
        routed_E += load_E
        if dropped_E is not None:
            lost_E += dropped_E
        if filled_expert_P is not None:
            count_E1 = filled_E.new_zeros(len(filled_E) + 1)
            filled_E += count_E1.scatter_add_(0, filled_expert_P, torch.ones_like(filled_expert_P))[:-1]

    def add_computed(self, experts: list[int], sizes: list[int]) -> None:
        """Count the rows of each segment for its expert (place in this rank's stack)."""
        for expert, size in zip(experts, sizes, strict=True):
            self.counts.computed[expert] += size

    def add_rows(self, ranks: list[int], sent: list[int], received: list[int], row_bytes: int) -> None:
        """Count rows on their way to the experts: to and from each of these global ranks."""
        for rank, out, back in zip(ranks, sent, received, strict=True):
            numbers = self.counts.peers.setdefault(rank, [0] * len(PEER_KEYS))
            for place, more in enumerate((out, back, out * row_bytes, back * row_bytes)):
                numbers[place] += more

    def add_bytes(self, inside_node: int, between_nodes: int) -> None:
        """Count what was given to all-to-alls for other ranks."""
        self.counts.bytes_inside_node += inside_node
        self.counts.bytes_between_nodes += between_nodes

    def add_losses(self, losses: dict[str, torch.Tensor], share: float | torch.Tensor) -> None:
        """Add a micro-batch's auxiliary losses, weighted by its share of the optimiser step."""
        if not self._keep_losses:
            return
        for name, loss in losses.items():
            value = loss.detach() * share
            self.losses[name] = self.losses[name] + value if name in self.losses else value
