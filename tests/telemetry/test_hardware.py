"""Hardware counters, read from planted GPUs: a healthy one, one with a gap, a throttled one, a MIG instance, a lost one."""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moe_dist.telemetry import hardware
from moe_dist.telemetry.hardware import GPU_KEYS, THROTTLE_REASONS, HardwareSampler, gpu_uuid
from tests.support.stand_ins import installed_stand_ins


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, with a healthy GPU."""
    with installed_stand_ins():
        module = importlib.import_module("pynvml")
        module.gpus["GPU-healthy"] = dict(module.HEALTHY)
        clock = iter(range(100))
        monkeypatch.setattr(hardware.time, "monotonic", lambda: 2 * next(clock))  # every reading two seconds later
        yield module


def test_all_counters_in_their_units(nvml: Any) -> None:
    warnings: list[str] = []
    sampler = HardwareSampler("healthy", warnings.append)
    nvml.gpus["GPU-healthy"]["nvlink"] = {138: 3000, 139: 1500}
    sample = sampler.sample()
    assert {key: sample[key] for key in GPU_KEYS} == {
        "gpu_percent": 93,
        "gpu_memory_used": 30 * 2**30,
        "gpu_memory_total": 80 * 2**30,
        "power_watts": 512.345,
        "temperature_celsius": 61,
        "sm_clock_mhz": 1755,
        "memory_clock_mhz": 2619,
        "nvlink_bytes_per_second": (2000 + 1000) * 1024 / 2,
        "pcie_sent_bytes_per_second": 1_500_000,
        "pcie_received_bytes_per_second": 2_500_000,
        "ecc_errors": 0,
        "throttle_reasons": [],
    }
    assert 0 <= sample["cpu_percent"] <= 100
    assert 0 < sample["host_memory_percent"] < 100
    assert not warnings


def test_an_unsupported_query_is_null_and_not_asked_again(nvml: Any) -> None:
    warnings: list[str] = []
    gpu = nvml.gpus["GPU-healthy"]
    del gpu["ecc"], gpu["nvlink"]
    sampler = HardwareSampler("healthy", warnings.append)
    nvml.asked.clear()
    sample = sampler.sample()
    assert [key for key in GPU_KEYS if sample[key] is None] == ["nvlink_bytes_per_second", "ecc_errors"]
    assert not {("GPU-healthy", "ecc"), ("GPU-healthy", "nvlink")} & set(nvml.asked)
    assert not warnings


def test_a_query_that_fails_once_is_asked_again(nvml: Any) -> None:
    warnings: list[str] = []
    sampler = HardwareSampler("healthy", warnings.append)
    nvml.gpus["GPU-healthy"]["power"] = nvml.NVMLError_Timeout()
    assert sampler.sample()["power_watts"] is None
    nvml.gpus["GPU-healthy"]["power"] = 1000
    assert sampler.sample()["power_watts"] == 1
    assert not warnings


def test_a_package_that_lacks_a_query(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons")
    sample = HardwareSampler("healthy", pytest.fail).sample()
    assert [key for key in GPU_KEYS if sample[key] is None] == ["throttle_reasons"]


def test_a_throttled_gpu_says_why(nvml: Any) -> None:
    sampler = HardwareSampler("healthy", pytest.fail)
    for constant, reason in THROTTLE_REASONS.items():
        nvml.gpus["GPU-healthy"]["reasons"] = getattr(nvml, constant) | nvml.nvmlClocksEventReasonGpuIdle
        assert sampler.sample()["throttle_reasons"] == [reason]
    nvml.gpus["GPU-healthy"]["reasons"] = nvml.nvmlClocksEventReasonHwSlowdown | 0x40
    assert sampler.sample()["throttle_reasons"] == ["hardware_slowdown", "hardware_thermal"]


def test_a_lost_gpu_costs_one_line_and_no_more_queries(nvml: Any) -> None:
    warnings: list[str] = []
    sampler = HardwareSampler("healthy", warnings.append, first_of_node=False)
    nvml.gpus["GPU-healthy"]["lost"] = True
    nvml.asked.clear()
    for _ in range(3):
        sample = sampler.sample()
        assert all(sample[key] is None for key in GPU_KEYS)
        assert sample["host_memory_percent"] > 0
    assert len(nvml.asked) == 1
    assert warnings == ["no counters of the GPU from here on: GPU is lost"]


def test_a_gpu_that_was_lost_before(nvml: Any) -> None:
    warnings: list[str] = []
    nvml.gpus["GPU-healthy"]["lost"] = True
    sampler = HardwareSampler("healthy", warnings.append)
    assert all(sampler.sample()[key] is None for key in GPU_KEYS)
    assert warnings == ["no counters of the GPU from here on: GPU is lost"]


def test_each_rank_reads_its_own_gpu(nvml: Any) -> None:
    nvml.gpus["GPU-other"] = nvml.HEALTHY | {"temperature": 40}
    temperatures = [HardwareSampler(uuid, pytest.fail).sample()["temperature_celsius"] for uuid in ("healthy", "other")]
    assert temperatures == [61, 40]


def test_a_mig_instance_has_its_own_memory_and_the_rest_of_its_board(nvml: Any) -> None:
    nvml.gpus["MIG-slice"] = {"parent": "GPU-healthy", "memory": (10, 20)}
    del nvml.gpus["GPU-healthy"]["utilization"]  # not known of a board that is divided
    sample = HardwareSampler("slice", pytest.fail).sample()
    assert (sample["gpu_memory_used"], sample["gpu_memory_total"]) == (10, 20)
    assert sample["power_watts"] == 512.345
    assert sample["gpu_percent"] is None


def test_a_gpu_that_nvml_does_not_know(nvml: Any) -> None:
    warnings: list[str] = []
    HardwareSampler("unknown", warnings.append).sample()
    assert warnings == ["no counters of the GPU from here on: Not Found"]


@pytest.mark.parametrize("first_of_node", [True, False])
def test_a_missing_driver_costs_one_line_of_a_node(nvml: Any, first_of_node: bool) -> None:
    warnings: list[str] = []
    nvml.driver_loaded = False
    sampler = HardwareSampler("healthy", warnings.append, first_of_node)
    for _ in range(2):
        assert all(sampler.sample()[key] is None for key in GPU_KEYS)
    assert warnings == ["no counters of the GPU from here on: Driver Not Loaded"] * first_of_node


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    HardwareSampler("healthy", warnings.append).sample()
    assert warnings == [
        "no counters of the GPU from here on: the package nvidia-ml-py is not installed; `pip install nvidia-ml-py`"
    ]


def test_a_rank_on_a_cpu_has_no_keys_of_a_gpu_and_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert set(HardwareSampler(gpu_uuid(torch.device("cpu")), pytest.fail).sample()) == {
        "cpu_percent",
        "host_memory_percent",
    }


def test_the_constants_are_those_of_the_package() -> None:
    real = pytest.importorskip("pynvml")
    with installed_stand_ins():
        planted = importlib.import_module("pynvml")
    constants = {name: value for name, value in vars(planted).items() if name.startswith(("NVML_", "nvmlClocks"))}
    assert {name: getattr(real, name) for name in constants} == constants
    for number, kind in planted.NVMLError.numbers.items():
        assert (getattr(real, kind.__name__)().value, str(getattr(real, kind.__name__)())) == (number, str(kind()))
