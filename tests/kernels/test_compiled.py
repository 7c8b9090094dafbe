"""All kernels are compiled for an H100, which needs none: what the interpreter lets pass, the compiler may not."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_for_h100.py")
SHARED_MEMORY = 227 * 2**10
"""Bytes that a program may have on an H100."""


@pytest.mark.skipif(platform.system() != "Linux", reason="triton runs on Linux only")
def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, PROGRAM], env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr
    kernels = [line.split() for line in run.stdout.splitlines()]
    assert len({(module, name) for module, name, *_ in kernels}) == 12
    for module, name, shared, tensor_cores in kernels:
        assert int(shared) <= SHARED_MEMORY, (module, name)
        assert tensor_cores == ("True" if module == "grouped_gemm" else "False"), (module, name)
