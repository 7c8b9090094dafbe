"""All tests of kernels once more, with triton interpreting them on the CPU.

In a process of its own: TRITON_INTERPRET counts only if it is set before triton is imported, and then for all of it.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.skipif(platform.system() != "Linux", reason="triton runs on Linux only")
def test_interpreted_kernels_equal_their_references() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-W", "ignore", str(FOLDER)]
    inner = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert inner.returncode == 0, inner.stdout + inner.stderr
    assert "skipped" not in inner.stdout, inner.stdout
