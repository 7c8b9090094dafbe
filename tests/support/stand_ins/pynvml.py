"""Stand-in for nvidia-ml-py 13.615.71, pynvml.py: the queries of the hardware sampler, on GPUs that a test plants.

A GPU is a dictionary of what NVML knows of it; a query of what it lacks is not supported. Every query is written down in `asked`.
"""

from types import SimpleNamespace
from typing import Any, ClassVar

NVML_SUCCESS = 0
NVML_TEMPERATURE_GPU = 0
NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
NVML_PCIE_UTIL_TX_BYTES, NVML_PCIE_UTIL_RX_BYTES = 0, 1
NVML_VOLATILE_ECC = 0
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX = 138, 139
nvmlClocksEventReasonGpuIdle = 0x1
nvmlClocksEventReasonSwPowerCap = 0x4
nvmlClocksEventReasonHwSlowdown = 0x8
nvmlClocksEventReasonSyncBoost = 0x10
nvmlClocksEventReasonSwThermalSlowdown = 0x20
nvmlClocksEventReasonHwThermalSlowdown = 0x40
nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80


class NVMLError(Exception):
    """The class of an error is found by its number, as in the package."""

    numbers: ClassVar[dict[int, type["NVMLError"]]] = {}
    text = "Unknown Error"

    def __new__(cls, value: int) -> "NVMLError":
        return Exception.__new__(cls.numbers.get(value, cls))

    def __str__(self) -> str:
        return self.text


def _error(name: str, number: int, text: str) -> Any:
    kind = type(f"NVMLError_{name}", (NVMLError,), {"text": text, "__new__": lambda cls: Exception.__new__(cls)})
    NVMLError.numbers[number] = kind
    return kind


NVMLError_InvalidArgument = _error("InvalidArgument", 2, "Invalid Argument")
NVMLError_NotSupported = _error("NotSupported", 3, "Not Supported")
NVMLError_NoPermission = _error("NoPermission", 4, "Insufficient Permissions")
NVMLError_NotFound = _error("NotFound", 6, "Not Found")
NVMLError_DriverNotLoaded = _error("DriverNotLoaded", 9, "Driver Not Loaded")
NVMLError_Timeout = _error("Timeout", 10, "Timeout")
NVMLError_FunctionNotFound = _error("FunctionNotFound", 13, "Function Not Found")
NVMLError_GpuIsLost = _error("GpuIsLost", 15, "GPU is lost")

HEALTHY = {
    "utilization": 93,
    "memory": (30 * 2**30, 80 * 2**30),
    "power": 512_345,
    "temperature": 61,
    "clocks": {NVML_CLOCK_SM: 1755, NVML_CLOCK_MEM: 2619},
    "nvlink": {NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX: 1000, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX: 500},
    "pcie": {NVML_PCIE_UTIL_TX_BYTES: 1500, NVML_PCIE_UTIL_RX_BYTES: 2500},
    "ecc": 0,
    "reasons": nvmlClocksEventReasonGpuIdle,
}
"""In NVML's units: percent, bytes, milliwatts, degrees, MHz, KiB so far, KB/s."""

gpus: dict[str, dict[str, Any]] = {}
"""By UUID. A value that is an exception is raised; `lost` raises of every query; `parent` makes a MIG instance."""
asked: list[tuple[str, str]] = []
driver_loaded = True


def _ask(handle: str, name: str) -> Any:
    asked.append((handle, name))
    gpu = gpus[handle]
    if gpu.get("lost"):
        raise NVMLError_GpuIsLost()
    value = gpu.get(name, NVMLError_NotSupported())
    if isinstance(value, Exception):
        raise value
    return value


def nvmlInit() -> None:
    if not driver_loaded:
        raise NVMLError_DriverNotLoaded()


def nvmlDeviceGetHandleByUUID(uuid: str) -> str:
    if uuid not in gpus:
        raise NVMLError_NotFound()
    return uuid


def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(migDevice: str) -> str:
    return _ask(migDevice, "parent")


def nvmlDeviceGetUtilizationRates(handle: str) -> Any:
    return SimpleNamespace(gpu=_ask(handle, "utilization"))


def nvmlDeviceGetMemoryInfo(handle: str, version: Any = None) -> Any:
    used, total = _ask(handle, "memory")
    return SimpleNamespace(used=used, total=total)


def nvmlDeviceGetPowerUsage(handle: str) -> int:
    return _ask(handle, "power")


def nvmlDeviceGetTemperature(handle: str, sensor: int) -> int:
    assert sensor == NVML_TEMPERATURE_GPU
    return _ask(handle, "temperature")


def nvmlDeviceGetClockInfo(handle: str, type: int) -> int:
    return _ask(handle, "clocks")[type]


def nvmlDeviceGetFieldValues(handle: str, fieldIds: list[tuple[int, int]]) -> list[Any]:
    """A field that is not supported says so in its nvmlReturn; nothing is raised."""
    values = []
    for field, scope in fieldIds:
        assert scope == 2**32 - 1  # UINT_MAX: all links
        try:
            value, code = _ask(handle, "nvlink")[field], NVML_SUCCESS
        except NVMLError_NotSupported:
            value, code = 0, 3
        values.append(SimpleNamespace(nvmlReturn=code, value=SimpleNamespace(ullVal=value)))
    return values


def nvmlDeviceGetPcieThroughput(device: str, counter: int) -> int:
    return _ask(device, "pcie")[counter]


def nvmlDeviceGetTotalEccErrors(handle: str, errorType: int, counterType: int) -> int:
    assert (errorType, counterType) == (NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC)
    return _ask(handle, "ecc")


def nvmlDeviceGetCurrentClocksEventReasons(handle: str) -> int:
    return _ask(handle, "reasons")
