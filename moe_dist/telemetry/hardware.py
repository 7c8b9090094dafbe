"""Counters of the GPU by NVML (nvidia-ml-py), and of the CPU and its memory by psutil; docs/monitoring.md explains each."""

import importlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

import psutil
import torch

Result = TypeVar("Result")

GPU_KEYS = (
    "gpu_percent",
    "gpu_memory_used",
    "gpu_memory_total",
    "power_watts",
    "temperature_celsius",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "nvlink_bytes_per_second",
    "pcie_sent_bytes_per_second",
    "pcie_received_bytes_per_second",
    "ecc_errors",
    "throttle_reasons",
)
THROTTLE_REASONS = {
    "nvmlClocksEventReasonSwPowerCap": "power_cap",
    "nvmlClocksEventReasonHwSlowdown": "hardware_slowdown",
    "nvmlClocksEventReasonSyncBoost": "sync_boost",
    "nvmlClocksEventReasonSwThermalSlowdown": "thermal",
    "nvmlClocksEventReasonHwThermalSlowdown": "hardware_thermal",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power_brake",
}
"""NVML's bits that mean the GPU is slower than it could be. Idleness and clocks that a person has set are none."""

_ALL_LINKS = 2**32 - 1
"""Scope of an NVLink counter: the sum over the links (nvml.h, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX)."""


def gpu_uuid(device: torch.device) -> str | None:
    """UUID of a CUDA device as this process sees it, whatever CUDA_VISIBLE_DEVICES holds; None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


class HardwareSampler:
    """Reads the counters of one rank. Nothing it meets raises; what cannot be read is None.

    Args:
        uuid: of the GPU, as gpu_uuid gives it; None: the rank has none, and the sample no keys of a GPU.
        warn: told in one line, once, if counters of the GPU cannot be read: no package, no driver, or the GPU is lost.
        first_of_node: whether this rank is the one that tells of a missing package or driver, which all of the node miss.
    """

    def __init__(self, uuid: str | None, warn: Callable[[str], None], first_of_node: bool = True) -> None:
        self._keys = () if uuid is None else GPU_KEYS
        self._warn = warn
        self._gpu: _Gpu | None = None
        psutil.cpu_percent()  # the share since the call before, which the first does not have
        if uuid is None:
            return
        try:
            nvml = _nvml()
        except Exception as error:  # NVMLError, which is known only once the package is there
            if first_of_node:
                self._give_up(error)
        else:
            self._gpu = self._guarded(lambda: _Gpu(nvml, uuid))

    def sample(self) -> dict[str, Any]:
        """CPU and GPU now; rates and shares since the last sample. Takes some 50 ms on a GPU, most of it without the GIL."""
        gpu = self._guarded(self._gpu.sample) or {} if self._gpu else {}
        return {
            "cpu_percent": psutil.cpu_percent(),
            "host_memory_percent": psutil.virtual_memory().percent,
            **{key: gpu.get(key) for key in self._keys},
        }

    def _guarded(self, action: Callable[[], Result]) -> Result | None:
        try:
            return action()
        except Exception as error:
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        self._gpu = None
        self._warn(f"no counters of the GPU from here on: {error}")


def _nvml() -> Any:
    """The package, initialised. Raises NVMLError without a driver, ModuleNotFoundError without the package."""
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the package nvidia-ml-py is not installed; `pip install nvidia-ml-py`") from None
    nvml.nvmlInit()
    return nvml


class _Gpu:
    """Queries of one GPU. Raises NVMLError if it is not there, or lost."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        try:
            self._memory_owner = self._board = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except nvml.NVMLError_NotFound:
            # A MIG instance has its own memory; power, temperature, clocks and links are those of the whole board.
            self._memory_owner = nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
            self._board = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self._memory_owner)
        self._queries: dict[str, Callable[[], Any]] = self._all_queries()
        self._nvlink_before: tuple[float, int] | None = None
        self.sample()  # rates are since the last sample

    def sample(self) -> dict[str, Any]:
        """All that the GPU answers; a query that it does not support is not asked again."""
        nvml, values = self._nvml, {}
        unsupported = (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_FunctionNotFound,
            nvml.NVMLError_NoPermission,
            nvml.NVMLError_InvalidArgument,
            AttributeError,  # an older package
        )
        for key, query in list(self._queries.items()):
            try:
                values[key] = query()
            except nvml.NVMLError_GpuIsLost:
                raise
            except unsupported:
                del self._queries[key]
            except nvml.NVMLError:
                continue  # a timeout, say: it may answer the next time
        return values

    def _all_queries(self) -> dict[str, Callable[[], Any]]:
        nvml, board = self._nvml, self._board
        return {
            "gpu_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(board).gpu,
            "gpu_memory_used": lambda: nvml.nvmlDeviceGetMemoryInfo(self._memory_owner).used,
            "gpu_memory_total": lambda: nvml.nvmlDeviceGetMemoryInfo(self._memory_owner).total,
            "power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(board) / 1000,
            "temperature_celsius": lambda: nvml.nvmlDeviceGetTemperature(board, nvml.NVML_TEMPERATURE_GPU),
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(board, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(board, nvml.NVML_CLOCK_MEM),
            "nvlink_bytes_per_second": self._nvlink,
            "pcie_sent_bytes_per_second": lambda: self._pcie(nvml.NVML_PCIE_UTIL_TX_BYTES),
            "pcie_received_bytes_per_second": lambda: self._pcie(nvml.NVML_PCIE_UTIL_RX_BYTES),
            "ecc_errors": lambda: nvml.nvmlDeviceGetTotalEccErrors(
                board, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            ),
            "throttle_reasons": self._throttle_reasons,
        }

    def _pcie(self, direction: int) -> int:
        return self._nvml.nvmlDeviceGetPcieThroughput(self._board, direction) * 1000  # given in KB/s, of the last 20 ms

    def _nvlink(self) -> float | None:
        """Payload sent and received over all links since the last sample; None the first time."""
        nvml = self._nvml
        fields = (nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX)
        values = nvml.nvmlDeviceGetFieldValues(self._board, [(field, _ALL_LINKS) for field in fields])
        for value in values:
            if value.nvmlReturn != nvml.NVML_SUCCESS:
                raise nvml.NVMLError(value.nvmlReturn)
        now, total = time.monotonic(), 1024 * sum(value.value.ullVal for value in values)
        before, self._nvlink_before = self._nvlink_before, (now, total)
        return (total - before[1]) / (now - before[0]) if before else None

    def _throttle_reasons(self) -> list[str]:
        bits = self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._board)
        return [name for constant, name in THROTTLE_REASONS.items() if bits & getattr(self._nvml, constant)]
