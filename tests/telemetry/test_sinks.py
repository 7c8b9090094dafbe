"""Sinks that fail, at their start, in mid-run or at the end, cost a warning and nothing else."""

import errno
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import Config, ConfigError, build_config, support
from moe_dist.config.schema import PrometheusConfig, TelemetryConfig
from moe_dist.telemetry.interval import Interval
from moe_dist.telemetry.sinks import Guarded, make_sinks
from tests.support.telemetry_runs import intervals, write_run

FULL = OSError(errno.ENOSPC, "No space left on device")


class Planted:
    """A sink that fails where it is told to."""

    def __init__(self, key: str, fails: Callable[[str], bool] = lambda call: False) -> None:
        self.key, self.fails, self.calls = key, fails, []  # type: ignore[var-annotated]

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.fails(name):
            raise FULL

    def write(self, interval: Interval) -> None:
        self._call("write")

    def close(self) -> None:
        self._call("close")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def test_a_failing_sink_is_told_of_once_closed_and_dropped(run: Path) -> None:
    warnings: list[str] = []
    broken, healthy = Planted("telemetry.broken", lambda call: True), Planted("telemetry.healthy")
    guarded = Guarded([broken, healthy], warnings.append)
    for interval in intervals(run)[:3]:
        guarded.write(interval)
    guarded.close()
    guarded.close()
    assert warnings == [
        "telemetry.broken has stopped; training goes on without it: OSError: [Errno 28] No space left on device"
    ]
    assert broken.calls == ["write", "close"]
    assert healthy.calls == ["write", "write", "write", "close"]


def test_a_sink_that_fails_at_its_end(run: Path) -> None:
    warnings: list[str] = []
    sink = Planted("telemetry.sink", lambda call: call == "close")
    guarded = Guarded([sink], warnings.append)
    guarded.write(intervals(run)[0])
    guarded.close()
    assert len(warnings) == 1
    assert sink.calls == ["write", "close"]


def test_a_full_disk_in_mid_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    threads = threading.active_count()
    sinks = make_sinks(TelemetryConfig(tensorboard=True), tmp_path, 0, 0, warnings.append)
    guarded, open_file = Guarded(sinks, warnings.append), Path.open
    lines = intervals(run)
    guarded.write(lines[0])

    def full(path: Path, *args: Any) -> Any:
        return open_file(Path("/dev/full") if "tfevents" in path.name else path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        guarded.write(lines[1])
    guarded.write(lines[2])
    guarded.close()
    assert len(warnings) == 1
    assert warnings[0].startswith("telemetry.tensorboard has stopped")
    assert "No space left on device" in warnings[0]
    assert threading.active_count() == threads


def test_a_sink_that_cannot_be_made_is_left_out(run: Path, tmp_path: Path) -> None:
    warnings: list[str] = []
    (tmp_path / "tensorboard").touch()
    assert make_sinks(TelemetryConfig(tensorboard=True), tmp_path, 0, 0, warnings.append) == []
    assert len(warnings) == 1
    assert warnings[0].startswith("telemetry.tensorboard has stopped; training goes on without it: FileExistsError")


def test_sinks_are_off_by_default_and_global_ones_on_rank_0_alone(tmp_path: Path) -> None:
    assert make_sinks(Config().telemetry, tmp_path, 0, 0, pytest.fail) == []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = build_config({"telemetry": {"tensorboard": True, "prometheus": {}, "wandb": {}}}).telemetry
    config = config.model_copy(update={"prometheus": PrometheusConfig(port=port - 1)})
    (sink,) = make_sinks(config, tmp_path, 3, 1, pytest.fail)
    sink.close()
    assert sink.key == "telemetry.prometheus"
    assert sink.port == port


@pytest.mark.parametrize(
    ("name", "value", "package", "off"),
    [
        ("tensorboard", True, "tensorboard", "false"),
        ("prometheus", {}, "prometheus-client", "null"),
        ("wandb", {}, "wandb", "null"),
    ],
)
def test_a_package_that_is_not_installed(
    name: str, value: object, package: str, off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "find_spec", lambda module: None)
    support.require_sinks(Config().telemetry)
    with pytest.raises(ConfigError) as caught:
        support.require_sinks(build_config({"telemetry": {name: value}}).telemetry)
    assert str(caught.value) == (
        f"telemetry.{name}: needs the package {package}, which is not installed; "
        f"install it by `pip install {package}`, or use telemetry.{name}: {off}"
    )


def test_a_folder_named_wandb_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(support, "SINK_PACKAGES", [("wandb", "no_such_package", "wandb")])
    with pytest.raises(ConfigError, match="pip install wandb"):
        support.require_sinks(build_config({"telemetry": {"wandb": {}}}).telemetry)


@pytest.mark.parametrize(
    ("telemetry", "message"),
    [
        (
            {"prometheus": {"port": 70000}},
            "telemetry.prometheus.port: 70000 is not valid; it should be an integer greater than 0 and at most 65535",
        ),
        (
            {"prometheus": {"address": "localhost"}},
            "telemetry.prometheus.address: 'localhost' is not valid; it should be an IP address, such as 127.0.0.1 "
            "(this machine alone) or 0.0.0.0 (any)",
        ),
        (
            {"prometheus": True},
            "telemetry.prometheus: true is not valid; it should be null or a section with port, address",
        ),
        ({"tensorboard": 1}, "telemetry.tensorboard: 1 is not valid; it should be true or false"),
        ({"wandb": {"mode": "on"}}, "telemetry.wandb.mode: 'on' is not valid; it should be 'online' or 'offline'"),
        (
            {"wandb": {"project": ""}},
            "telemetry.wandb.project: '' is not valid; it should be text of length at least 1",
        ),
    ],
)
def test_wrong_keys(telemetry: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"telemetry": telemetry})
    assert str(caught.value) == message
