"""The training loop: what happens in which order, on every rank alike.

Shape letters: N MoE layers, E experts.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_dist.config import Config, Layout
from moe_dist.config.methods import METHODS
from moe_dist.engines.batch import Batch
from moe_dist.engines.engine import StepResult
from moe_dist.engines.registry import build_engine
from moe_dist.telemetry.records import RecordFile
from moe_dist.training.checkpoint import load_checkpoint, save_checkpoint
from moe_dist.training.coactivation import counted_coactivation
from moe_dist.training.data import Data
from moe_dist.training.folder import RunFolder, prepare_folder
from moe_dist.training.hash_tables import set_tables
from moe_dist.training.records import all_biases, evaluation_record, load_record, metrics_record, summed_losses
from moe_dist.training.schedule import bias_rate, learning_rate
from moe_dist.training.screen import Screen
from moe_dist.training.signals import StopRequest


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why, and needs no traceback."""


@dataclass
class Progress:
    """Where a run stands."""

    step: int
    """Steps done."""
    stopped: int = 0
    """The signal that ended the run before its last step (SIGTERM, where only other ranks got it); 0: none did."""
    skipped: int = 0
    """Steps skipped since the run was started or resumed, because loss or gradient was not finite."""
    seconds: float = 0.0
    """Time in steps, without evaluations and checkpoints."""


class Training:
    """One run on this rank. Rank 0 writes metrics.jsonl and the screen, every rank its load records."""

    def __init__(self, config: Config, layout: Layout, device: torch.device, data: Data, folder: RunFolder) -> None:
        self.config, self.layout, self.data, self.folder = config, layout, data, folder
        self.engine = build_engine(config, layout, device, config.model.vocab_size or data.vocab_size)
        set_tables(self.engine, data)
        self.progress = Progress(load_checkpoint(folder.checkpoint, self.engine) if folder.checkpoint else 0)
        if dist.get_rank() == 0:
            prepare_folder(folder, config, self.progress.step)
        dist.barrier()
        self.metrics = RecordFile(folder.metrics) if dist.get_rank() == 0 else None
        self.load_records = RecordFile(folder.load_records(dist.get_rank()))
        self.screen: Screen | None = None
        self.final_load_NE: torch.Tensor | None = None
        """Load over the last tenth of the steps, all ranks."""
        self._skipped_in_a_row = 0
        self._recorded = (self.progress.step, 0.0)
        self._saved_step = self.progress.step if folder.checkpoint else None

    def run(self) -> Progress:
        """Train to `training.steps`, or to the step at which a signal comes to any rank; save at the end."""
        num_steps, progress = self.config.training.steps, self.progress
        with StopRequest() as stop, self._on_screen():
            while progress.step < num_steps:
                began = time.perf_counter()
                batches = self.data.micro_batches(progress.step, self.engine.data_rank, self.layout)
                num_targets, num_tokens, stop_requests = self.engine.sum_over_ranks(
                    [sum(b.num_targets() for b in batches), sum(b.num_tokens() for b in batches), stop.number]
                )
                if stop_requests:
                    progress.stopped = stop.number or signal.SIGTERM
                    break
                self._step(batches, num_targets, num_tokens, began)
            if self._saved_step != progress.step:
                self._save()
        return progress

    def _step(self, batches: list[Batch], num_targets: int, num_tokens: int, began: float) -> None:
        """One optimiser step, and what is due after it."""
        training = self.config.training
        rate = learning_rate(training, self.progress.step)
        for recorder in self.engine.recorders.values():
            recorder.losses.clear()
        result = self.engine.train_step(
            batches,
            num_targets,
            num_tokens,
            rate,
            bias_rate(self.config.routing.bias, training.steps, self.progress.step),
            step=self.progress.step,
            observe=self._is_due(self.config.telemetry.interval, self.progress.step + 1),
        )
        self.progress.step += 1
        self.progress.seconds += time.perf_counter() - began
        self._count_skipped(result, batches)
        if self.progress.step > training.steps - max(1, training.steps // 10):
            self.final_load_NE = result.load_NE + (0 if self.final_load_NE is None else self.final_load_NE)
        if self.screen:
            self.screen.advance(self.progress.step)
        if self._is_due(self.config.telemetry.interval):
            self._record(result, rate)
        if self._is_due(training.evaluation.interval):
            self._evaluate()
        if self._is_due(training.checkpoint.interval):
            self._save()

    def _is_due(self, interval: int | None, step: int | None = None) -> bool:
        """Every `interval` steps and after the last one; never if None. `step`: by default, how many are done."""
        step = self.progress.step if step is None else step
        return interval is not None and (step % interval == 0 or step == self.config.training.steps)

    def _record(self, result: StepResult, rate: float) -> None:
        step, seconds = self.progress.step, self.progress.seconds
        num_steps, duration = step - self._recorded[0], seconds - self._recorded[1]
        self._recorded = (step, seconds)
        losses, biases = summed_losses(self.engine), all_biases(self.engine)
        self.load_records.write(load_record(self.engine, step, num_steps))
        for recorder in self.engine.recorders.values():
            recorder.reset()
        tokens_per_step = self.config.training.global_batch_size * self.config.training.sequence_length
        speed = num_steps * tokens_per_step / duration
        if self.metrics is not None:
            self._write(metrics_record(result, losses, biases, step, step * tokens_per_step, speed, rate))

    def _evaluate(self) -> None:
        num_tokens = self.config.training.evaluation.tokens
        batches = self.data.evaluation_batches(self.engine.data_rank, self.layout, num_tokens)
        is_last = self.progress.step == self.config.training.steps
        shown_in = self.folder.path if is_last and self.config.telemetry.report else None
        with counted_coactivation(self.engine, self.progress.step, shown_in):
            loss_sum, num_targets, load_NE = self.engine.evaluate(batches)
        num_bytes = self.data.evaluation_bytes(num_tokens)
        record = evaluation_record(self.progress.step, loss_sum, num_targets, num_bytes, load_NE)
        routing = self.config.routing
        if METHODS[routing.method].uses_group and routing.evaluation == "causal":
            loss_sum, _, _ = self.engine.evaluate(batches, as_trained=True)
            record["val_loss_as_trained"] = loss_sum / max(1, num_targets)
            record["train_eval_gap"] = record["val_loss"] - record["val_loss_as_trained"]
        self._write(record)

    def _write(self, record: dict[str, object]) -> None:
        if self.metrics:
            self.metrics.write(record)
        if self.screen:
            self.screen.show(record)

    def _save(self) -> None:
        save_checkpoint(self.folder.checkpoints, self.engine, self.config, self.progress.step)
        self._saved_step = self.progress.step

    def _count_skipped(self, result: StepResult, batches: list[Batch]) -> None:
        """Raise TrainingError after training.max_nonfinite_steps skipped steps in a row."""
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if result.skipped else 0
        self.progress.skipped += result.skipped
        if not result.skipped:
            return
        if self.screen:
            self.screen.warn(
                f"step {self.progress.step} skipped: loss {result.loss}, gradient norm {result.grad_norm}; weights unchanged"
            )
        if self._skipped_in_a_row == self.config.training.max_nonfinite_steps:
            raise TrainingError(
                f"loss or gradient was not finite in {self._skipped_in_a_row} steps in a row, up to step "
                f"{self.progress.step}; the first value that is not finite: {self.engine.first_nonfinite(batches)}. Lower "
                "training.optimizer.learning_rate, or go on from an earlier checkpoint with --resume"
            )

    @contextmanager
    def _on_screen(self) -> Iterator[None]:
        if dist.get_rank() != 0:
            yield
            return
        with Screen(self.config.training.steps, self.progress.step) as self.screen:
            yield
