"""What a run does with its records beside writing them: sinks, alarms, faults, checkpoints, and nothing at all."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from moe_dist.telemetry.interval import Interval
from moe_dist.telemetry.records import RecordFile, read_records
from moe_dist.training import loop
from moe_dist.training.loop import Training
from moe_dist.training.summary import finish
from moe_dist.training.telemetry import _is_timed
from tests.support.distributed import run_ranks
from tests.support.runs import start, write_config

EP2 = "parallel.expert=2"
EVERY_2 = ["telemetry.interval=2", "training.steps=5"]
ALARM = {"version": 1, "time": 0.0, "alarm": "planted", "state": "raised", "layer": 1, "expert": 3, "rank": None}
ALARM |= {"value": 2.0, "limit": 1.0, "message": "expert 3 was planted", "remedy": "pull it out"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("telemetry"))


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.intervals: list[Interval] = []
        self.closed = False

    def write(self, interval: Interval) -> None:
        self.intervals.append(interval)

    def close(self) -> None:
        self.closed = True


class Broken(Kept):
    """One that breaks at step 4."""

    def write(self, interval: Interval) -> None:
        super().write(interval)
        if interval.own["step"] == 4:
            raise PermissionError(13, "Permission denied", "events")


def lines(path: Path) -> list[dict[str, Any]]:
    return list(read_records(path))


def warnings_of(run: Training) -> list[str]:
    """Where the warnings of its telemetry go instead of the screen."""
    warnings: list[str] = []
    run.telemetry.worker._warn = warnings.append
    return warnings


def with_sinks(tiny: Path, folder: Path) -> dict[str, Any]:
    run = start(tiny, [EP2, *EVERY_2], folder)
    whole, broken = Kept(), Broken()
    telemetry, rank = run.telemetry, dist.get_rank()
    telemetry.sinks = [broken, whole]
    telemetry.sample = lambda: {"cpu_percent": 10.0 + rank, "gpu_percent": None, "throttle_reasons": ["thermal"]}
    telemetry.judge = lambda interval: [{**ALARM, "step": interval.own["step"]}] if interval.own["step"] == 4 else []
    shown: list[dict[str, Any]] = []
    run.screen.alarm = shown.append  # type: ignore[method-assign]
    warnings = warnings_of(run)
    run.run()
    intervals = [vars(interval) for interval in whole.intervals]
    counts = {"calls": len(broken.intervals), "closed": whole.closed}
    return {"intervals": intervals, "warnings": warnings, "shown": shown, **counts}


def test_sinks_get_every_interval_of_their_rank(tiny: Path, tmp_path: Path) -> None:
    results = run_ranks(2, with_sinks, tiny, tmp_path)
    own = [lines(tmp_path / f"load/rank_{rank:05d}.jsonl") for rank in range(2)]
    metrics = [record for record in lines(tmp_path / "metrics.jsonl") if "loss" in record]
    alarms = lines(tmp_path / "alarms.jsonl")
    assert alarms == [{**ALARM, "step": 4}]
    for rank, result in enumerate(results):
        assert [interval["own"] for interval in result["intervals"]] == own[rank]
        assert [record["hardware"]["cpu_percent"] for record in own[rank]] == [10.0 + rank] * 3
        assert [interval["alarms"] for interval in result["intervals"]] == ([[], alarms, []] if rank == 0 else [[]] * 3)
        assert result["closed"]
        assert result["calls"] == 2  # the broken one: of step 2, and of step 4, where it broke
        assert result["shown"] == (alarms if rank == 0 else [])
        assert result["warnings"] == [
            "telemetry: Broken failed, and training goes on without it: [Errno 13] Permission denied: 'events'"
        ]
    assert [interval["metrics"] for interval in results[0]["intervals"]] == metrics
    assert {interval[key] for interval in results[1]["intervals"] for key in ("metrics", "ranks")} == {None}
    for number, interval in enumerate(results[0]["intervals"]):
        for rank, summary in enumerate(interval["ranks"]):
            line = own[rank][number]
            assert summary["rank"] == rank
            assert summary["seconds"] == line["seconds"]
            assert summary["hardware"] == line["hardware"]
            for layer, found in summary["layers"].items():
                assert found["computed"] == sum(line["layers"][layer]["computed"])
                assert found["bytes_between_nodes"] == line["layers"][layer]["bytes_between_nodes"]
                assert found["seconds"] == pytest.approx(line["layers"][layer]["seconds"])


def full_disk(tiny: Path, folder: Path) -> tuple[list[float], list[str]]:
    run = start(tiny, [EP2, *EVERY_2], folder)
    name = "metrics.jsonl" if dist.get_rank() == 0 else "load records"
    run.telemetry.files[name] = RecordFile(Path("/dev/full"))
    kept = Kept()
    run.telemetry.sinks = [kept]
    warnings = warnings_of(run)
    assert run.run().step == 5
    return [interval.own["step"] for interval in kept.intervals], warnings


def test_a_full_disk_costs_its_lines_and_one_warning(tiny: Path, tmp_path: Path) -> None:
    for rank, (steps, warnings) in enumerate(run_ranks(2, full_disk, tiny, tmp_path)):
        assert steps == [2, 4, 5]
        name = "load records" if rank else "metrics.jsonl"
        message = "failed, and training goes on without it: [Errno 28] No space left on device"
        assert warnings == [f"telemetry: {name} {message}"]
    assert [record["step"] for record in lines(tmp_path / "load/rank_00000.jsonl")] == [2, 4, 5]


def unreachable(tiny: Path, folder: Path) -> list[str]:
    run = start(tiny, [EP2, *EVERY_2], folder)

    def fail(taken: object) -> Any:
        raise RuntimeError("Connection closed by peer")

    run.telemetry._sum = fail  # type: ignore[method-assign]
    warnings = warnings_of(run)
    assert run.run().step == 5
    return warnings


def test_without_an_answer_of_other_ranks_the_own_numbers_go_on(tiny: Path, tmp_path: Path) -> None:
    message = "telemetry: the collection over ranks failed, and training goes on without it: Connection closed by peer"
    assert run_ranks(2, unreachable, tiny, tmp_path) == [[message]] * 2
    for rank in range(2):
        records = lines(tmp_path / f"load/rank_{rank:05d}.jsonl")
        assert [record["step"] for record in records] == [2, 4, 5]
        assert [record["layers"]["1"]["padded"] for record in records] == [None] * 3
        assert all(sum(record["layers"]["1"]["routed"]) == 128 * record["steps"] for record in records)
    metrics = [record for record in lines(tmp_path / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in metrics] == [2, 4, 5]
    assert {"max_vio_global", "load"}.isdisjoint(metrics[0]["balance"]["layers"]["1"])
    assert metrics[0]["balance"]["layers"]["1"]["max_vio_batch"] > 0


def lines_at_checkpoints(tiny: Path, folder: Path) -> list[tuple[int, list[int]]]:
    overrides = [EP2, *EVERY_2, "training.checkpoint.interval=2"]
    run, found = start(tiny, overrides, folder), []
    gate = delayed(run)
    save = loop.save_checkpoint

    def look(*arguments: Any) -> Any:
        records = lines(folder / f"load/rank_{dist.get_rank():05d}.jsonl")
        found.append((arguments[-1], [record["step"] for record in records]))
        return save(*arguments)

    loop.save_checkpoint = look  # type: ignore[assignment]
    try:
        run.run()
    finally:
        loop.save_checkpoint = save
    assert gate.is_set()
    return found


def delayed(run: Training) -> threading.Event:
    """Let the thread begin only when training already waits for it."""
    gate, flush = threading.Event(), run.telemetry.flush

    def open_and_flush() -> None:
        gate.set()
        flush()

    run.telemetry.worker.submit("the gate", gate.wait)
    run.telemetry.flush = open_and_flush  # type: ignore[method-assign]
    return gate


def test_lines_up_to_a_checkpoint_are_on_disk_before_it(tiny: Path, tmp_path: Path) -> None:
    for found in run_ranks(2, lines_at_checkpoints, tiny, tmp_path):
        assert found == [(2, [2]), (4, [2, 4]), (5, [2, 4, 5])]


def switched_off(tiny: Path, folder: Path) -> dict[str, Any]:
    overrides = [EP2, "telemetry.interval=null", "training.steps=4", "training.evaluation={interval: 2, tokens: 64}"]
    run = start(tiny, overrides, folder)
    calls = spy_on(run.telemetry.worker.submit)
    run.telemetry.worker.submit = calls.function  # type: ignore[method-assign]
    run.run()
    if dist.get_rank() == 0:
        finish(run)
    layers = run.engine.moe_layers.values()
    return {"recorders": run.engine.recorders, "of layers": [layer.recorder for layer in layers], "tasks": calls.number}


class spy_on:
    def __init__(self, original: Callable[..., Any]) -> None:
        self.number, self.original = 0, original

    def function(self, *arguments: Any) -> Any:
        self.number += 1
        return self.original(*arguments)


def test_switched_off_nothing_is_counted_and_evaluations_stay(tiny: Path, tmp_path: Path) -> None:
    for rank, result in enumerate(run_ranks(2, switched_off, tiny, tmp_path)):
        # The evaluations are rank 0's.
        assert result == {"recorders": {}, "of layers": [None, None], "tasks": 2 if rank == 0 else 0}
    assert [(record["step"], "val_loss" in record) for record in lines(tmp_path / "metrics.jsonl")] == [(2, 1), (4, 1)]
    assert not (tmp_path / "load").exists()
    assert not (tmp_path / "alarms.jsonl").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["loss"] is None


def peak_given(tiny: Path, folder: Path) -> None:
    start(tiny, [*EVERY_2, "telemetry.peak_flops=1.0e+9", "telemetry.timed_steps=2"], folder).run()


def test_times_and_utilisation(tiny: Path, tmp_path: Path) -> None:
    run_ranks(1, peak_given, tiny, tmp_path)
    for record, line in zip(lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "load/rank_00000.jsonl"), strict=True):
        flops = 6 * PARAMETERS_OF_A_TOKEN + 12 * 3 * 32 * 16
        assert record["model_flops_utilisation"] == pytest.approx(flops * record["tokens_per_second"] / 1e9, rel=1e-3)
        assert record["tokens_per_second"] == pytest.approx(128 * record["steps"] / record["seconds"], abs=0.1)
        assert record["seconds"] == line["seconds"]
        assert 0 < line["recorder_seconds"] < line["seconds"]
        assert line["tokens"] == 128 * line["steps"]
        assert line["memory"]["device_peak"] is None
        assert line["memory"]["host"] > 10**7
        assert {layer["timed_steps"] for layer in line["layers"].values()} == {line["steps"]}
        assert all(seconds > 0 for layer in line["layers"].values() for seconds in layer["seconds"].values())


ATTENTION, NORMS = 4 * 32 * 32, (2 * 3 + 1) * 32
EXPERTS = 2 * (8 * 32 + 3 * 3 * 32 * 16 + 32)  # router, two routed experts and a shared one with its gate, of 2 layers
PARAMETERS_OF_A_TOKEN = 3 * ATTENTION + 3 * 32 * 48 + EXPERTS + 257 * 32 + NORMS


def test_timed_steps_are_before_the_last_of_a_line() -> None:
    def timed(length: int, steps: int) -> list[int]:
        return [place for place in range(length) if _is_timed(place, length, steps)]

    assert [timed(length, 1) for length in (1, 2, 3, 10)] == [[0], [0], [1], [8]]
    assert [timed(length, 3) for length in (1, 2, 3, 4, 10)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2], [6, 7, 8]]
