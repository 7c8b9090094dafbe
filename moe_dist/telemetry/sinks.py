"""Who gets the records beside the files of DIR: TensorBoard, Prometheus, Weights & Biases. None of them can stop a run."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from moe_dist.config.schema import TelemetryConfig
from moe_dist.telemetry.interval import Interval


class Sink(Protocol):
    """Takes intervals until it is closed. Both may raise whatever they like: `Guarded` calls them."""

    key: str
    """The config key that switches it on, for warnings."""

    def write(self, interval: Interval) -> None: ...

    def close(self) -> None: ...


class Guarded:
    """Calls sinks, and never raises: one that does is told of by `warn`, once, and dropped."""

    def __init__(self, sinks: list[Sink], warn: Callable[[str], None]) -> None:
        self._sinks, self._warn = list(sinks), warn

    def write(self, interval: Interval) -> None:
        """Hand one interval to every sink that still works."""
        for sink in list(self._sinks):
            try:
                sink.write(interval)
            except Exception as error:
                self._sinks.remove(sink)
                self._warn(_stopped(sink.key, error))
                with suppress(Exception):  # it may hold a port, a thread or a process
                    sink.close()

    def close(self) -> None:
        """Close every sink that still works; later calls do nothing."""
        while self._sinks:
            sink = self._sinks.pop()
            try:
                sink.close()
            except Exception as error:
                self._warn(_stopped(sink.key, error))


def make_sinks(
    config: TelemetryConfig, folder: Path, rank: int, local_rank: int, warn: Callable[[str], None]
) -> list[Sink]:
    """The sinks of this rank, ready to be written to; `folder` is DIR, with its config.yaml.

    One that cannot be made (a port in use, a folder that cannot be written) is told of by `warn` and left out.
    """
    sinks = []
    for key, make in _makers(config, folder, rank, local_rank):
        try:
            sinks.append(make())
        except Exception as error:
            warn(_stopped(key, error))
    return sinks


def _makers(
    config: TelemetryConfig, folder: Path, rank: int, local_rank: int
) -> Iterator[tuple[str, Callable[[], Sink]]]:
    """Key and constructor of each sink that this rank should have. What a sink imports is imported by its constructor."""
    if config.tensorboard and rank == 0:
        from moe_dist.telemetry.tensorboard import TensorBoard

        yield TensorBoard.key, lambda: TensorBoard(folder / "tensorboard")
    if prometheus := config.prometheus:
        from moe_dist.telemetry.prometheus import Prometheus

        port = prometheus.port + local_rank
        yield Prometheus.key, lambda: Prometheus(rank, prometheus.address, port)
    if (wandb := config.wandb) and rank == 0:
        from moe_dist.telemetry.wandb import WeightsAndBiases

        yield WeightsAndBiases.key, lambda: WeightsAndBiases(folder, wandb)


def _stopped(key: str, error: Exception) -> str:
    return f"{key} has stopped; training goes on without it: {type(error).__name__}: {' '.join(str(error).split())}"
