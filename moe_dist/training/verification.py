"""`moe-dist verify`: train the same steps as one rank does by other engines and layouts, and compare.

The reference is trained by rank 0 alone, while the others wait; then all ranks train each row. Gradients of later steps
are compared from the same state, which the reference leaves as a checkpoint and each row reads.

Shape letters: B sequences of a micro-batch, S sequence length.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from moe_dist.config import Config, ConfigError, Layout, layout_of
from moe_dist.config.verification import Case
from moe_dist.engines.batch import IGNORED, Batch
from moe_dist.engines.engine import Engine
from moe_dist.engines.registry import build_engine
from moe_dist.training.checkpoint import load_checkpoint, save_checkpoint
from moe_dist.training.comparison import Verdict, judge
from moe_dist.training.data import Data
from moe_dist.training.hash_tables import set_tables
from moe_dist.training.tracing import Trace, gather, record, weights_of

TARGETS = 1
"""Sets the random numbers of the targets apart from others of the same seed, step and sequence."""


class RaggedTargets:
    """Data of which other positions count in every sequence, so that it shows by how many targets each rank divides.

    A quarter of the sequences, in a row, has no target at all.
    """

    def __init__(self, data: Data, config: Config) -> None:
        self.vocab_size = data.vocab_size
        self._data, self._training = data, config.training

    def training_stream(self) -> npt.NDArray[np.integer[Any]]:
        """See Data."""
        return self._data.training_stream()

    def micro_batches(self, step: int, data_rank: int, layout: Layout) -> list[Batch]:
        """See Data. Which targets count is a function of (seed, step, sequence)."""
        batches = self._data.micro_batches(step, data_rank, layout)
        return [replace(batch, target_BS=self._ragged(step, batch)) for batch in batches]

    def evaluation_batches(self, data_rank: int, layout: Layout, num_tokens: int) -> list[Batch]:
        """See Data."""
        return self._data.evaluation_batches(data_rank, layout, num_tokens)

    def evaluation_bytes(self, num_tokens: int) -> int:
        """See Data."""
        return self._data.evaluation_bytes(num_tokens)

    def _ragged(self, step: int, batch: Batch) -> torch.Tensor:
        counts_BS = torch.stack([self._counts(step, number) for number in batch.sequence_B.tolist()])
        return torch.where(counts_BS, batch.target_BS, IGNORED)

    def _counts(self, step: int, number: int) -> torch.Tensor:
        """bool [S]."""
        size, length = self._training.global_batch_size, self._training.sequence_length
        if size // 2 <= number < size // 2 + size // 4:
            return torch.zeros(length, dtype=torch.bool)
        generator = np.random.Generator(np.random.PCG64([self._training.seed, step, number, TARGETS]))
        return torch.from_numpy(generator.random(length) < generator.random())


@dataclass(frozen=True)
class Outcome:
    """What a row came to."""

    case: Case
    verdict: Verdict | None
    """None: not run, or not rank 0."""
    reason: str = ""
    """Why it was not run."""


def replayed_steps(num_steps: int) -> tuple[int, ...]:
    """Later steps whose gradients are compared: from the middle of the run, and its last."""
    return tuple(sorted({num_steps // 2, num_steps - 1} - {0}))


def run_reference(config: Config, device: torch.device, data: Data, states: Path) -> Trace:
    """Train the reference on this rank alone, and leave its states in a folder."""
    engine, data = _build(config, 1, device, data)
    weights, num_steps = weights_of(engine), config.training.steps
    replays = replayed_steps(num_steps)

    def save(step: int) -> None:
        if step in replays:
            save_checkpoint(states, engine, config, step)

    trace = record(engine, data, range(num_steps), (0, *replays), before_step=save)
    trace.weights = weights
    whole = gather(trace)
    assert whole is not None
    return whole


def run_row(config: Config, device: torch.device, data: Data, states: Path) -> tuple[Trace, list[Trace]] | None:
    """Train a row on all ranks: freely, then single steps from the states of the reference. None on ranks but 0."""
    engine, data = _build(config, dist.get_world_size(), device, data)
    weights, num_steps = weights_of(engine), config.training.steps
    free = record(engine, data, range(num_steps), (0,))
    free.weights = weights
    traces = [gather(free)]
    for step in replayed_steps(num_steps):
        load_checkpoint(states / f"step_{step:08d}", engine)
        traces.append(gather(record(engine, data, range(step, step + 1), (step,))))
    found = [trace for trace in traces if trace is not None]
    return (found[0], found[1:]) if found else None


def verify(
    cases: list[Case],
    reference: Trace | None,
    device: torch.device,
    data: Data,
    states: Path,
    tell: Callable[[Case], None],
) -> list[Outcome]:
    """Run and judge all cases; collective. `reference` is that of rank 0, which alone has verdicts."""
    outcomes = []
    for case in cases:
        if case.config is None:
            outcomes.append(Outcome(case, None, case.reason))
            continue
        tell(case)
        try:
            traces = run_row(case.config, device, data, states)
        except ConfigError as error:  # all ranks alike: an engine that is not installed, for instance
            outcomes.append(Outcome(case, None, str(error)))
            continue
        verdict = None
        if traces is not None:
            assert reference is not None
            verdict = judge(*traces, reference, case.config.training.precision)
        outcomes.append(Outcome(case, verdict))
        gc.collect()  # engines hold themselves in circles, and the next needs the memory
    return outcomes


def _build(config: Config, num_ranks: int, device: torch.device, data: Data) -> tuple[Engine, Data]:
    engine = build_engine(config, layout_of(config, num_ranks), device, config.model.vocab_size or data.vocab_size)
    data = RaggedTargets(data, config)
    set_tables(engine, data)
    return engine, data
