"""Stand-ins for optional packages: the released version's exact signatures, computed with plain torch on any device.

They hold what the real functions demand of their inputs as assertions. `RELEASED` says where each signature was read; a test
compares it with the stand-in, and with the real package where one is installed.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class Released(NamedTuple):
    """Where a signature was read."""

    distribution: str
    version: str
    source: str
    signature: str


RELEASED = {
    ("transformer_engine.pytorch.cpp_extensions", "general_grouped_gemm"): Released(
        "transformer_engine",
        "2.20.2",
        "transformer_engine/pytorch/cpp_extensions/gemm.py",
        "(A, B, out, quantization_params, out_dtype, layout='TN', m_splits=None, gelu=False, grad=False, accumulate=False, "
        "bias=None, use_bias=False, use_split_accumulator=False, D_dtype=None, single_output=False)",
    ),
    ("sonicmoe", "moe_general_routing_inputs"): Released(
        "sonic-moe",
        "0.1.2.post1",
        "sonicmoe/functional/__init__.py",
        "(x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id, activation_type, "
        "is_inference_mode_enabled=False, concat_layout=False)",
    ),
    ("deep_ep", "Buffer"): Released(
        "deep_ep",
        "1.2.1",
        "deep_ep/buffer.py",
        "(group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24, "
        "allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=False, comm=None)",
    ),
    ("deep_ep", "Buffer.get_dispatch_layout"): Released(
        "deep_ep",
        "1.2.1",
        "deep_ep/buffer.py",
        "(self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False)",
    ),
    ("deep_ep", "Buffer.dispatch"): Released(
        "deep_ep",
        "1.2.1",
        "deep_ep/buffer.py",
        "(self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None, "
        "num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0, "
        "config=None, previous_event=None, async_finish=False, allocate_on_comm_stream=False)",
    ),
    ("deep_ep", "Buffer.combine"): Released(
        "deep_ep",
        "1.2.1",
        "deep_ep/buffer.py",
        "(self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None, async_finish=False, "
        "allocate_on_comm_stream=False)",
    ),
    **{
        ("pynvml", name): Released("nvidia-ml-py", "13.615.71", "pynvml.py", signature)
        for name, signature in {
            "nvmlInit": "()",
            "nvmlDeviceGetHandleByUUID": "(uuid)",
            "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": "(migDevice)",
            "nvmlDeviceGetUtilizationRates": "(handle)",
            "nvmlDeviceGetMemoryInfo": "(handle, version=None)",
            "nvmlDeviceGetPowerUsage": "(handle)",
            "nvmlDeviceGetTemperature": "(handle, sensor)",
            "nvmlDeviceGetClockInfo": "(handle, type)",
            "nvmlDeviceGetFieldValues": "(handle, fieldIds)",
            "nvmlDeviceGetPcieThroughput": "(device, counter)",
            "nvmlDeviceGetTotalEccErrors": "(handle, errorType, counterType)",
            "nvmlDeviceGetCurrentClocksEventReasons": "(handle)",
        }.items()
    },
}
_PACKAGES = {module.partition(".")[0] for module, _ in RELEASED}


@contextmanager
def installed_stand_ins() -> Iterator[None]:
    """In this block the stand-ins are what is imported; what was imported before is there again afterwards."""
    before = _take_out()
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        yield
    finally:
        sys.path.remove(str(Path(__file__).parent))
        _take_out()
        sys.modules.update(before)


def _take_out() -> dict[str, Any]:
    """Forget the loaded modules of the optional packages."""
    names = [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]
    return {name: sys.modules.pop(name) for name in names}


def bare_signature(function: Callable[..., Any]) -> str:
    """Names, kinds and defaults of the arguments, without annotations."""
    empty = inspect.Parameter.empty
    parameters = inspect.signature(function).parameters.values()
    return str(inspect.Signature([parameter.replace(annotation=empty) for parameter in parameters]))
