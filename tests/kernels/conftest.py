"""The tests that take a `device` run twice: interpreted on the CPU (`test_interpreted.py` starts them so, in a process of
their own), and compiled where there is a GPU. They import kernels only after asking for the device."""

import os
import platform
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["test_compiled.py", "test_interpreted.py", "test_reference.py"] if INTERPRETED else []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # of the whole session
        ours = Path(__file__).parent in item.path.parents
        if ours and "device" in getattr(item, "fixturenames", ()) and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    if find_spec("triton") is None:
        pytest.skip(f"triton is not installed ({platform.system()})")
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; test_interpreted.py runs this test interpreted")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


@pytest.fixture(scope="session")
def far(device: torch.device) -> torch.Tensor:
    """More float16 elements than 32 bits count: for rows 2^30 elements apart. Only what is used takes memory on the CPU."""
    return torch.empty(2**31 + 2**10, dtype=torch.float16, device=device)
