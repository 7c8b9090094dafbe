"""The script of docs/megatron.md runs as it stands there, on two CPU ranks, learns, and goes on in another layout."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

GUIDE = Path(__file__).parents[2] / "docs" / "megatron.md"


def run(script: Path, expert_parallel: int) -> list[tuple[float, ...]]:
    """Step, loss and learning rate of each step."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    words = [*launch, str(script.parent / "checkpoint"), str(expert_parallel)]
    output = subprocess.run(words, cwd=GUIDE.parents[1], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    found = re.findall(r"step (\d+) loss ([\d.]+) rate ([\d.]+)", output.stdout)
    return [tuple(map(float, of_step)) for of_step in found]


def test_the_script_of_the_guide_trains_and_goes_on(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (tmp_path / "pretrain.py").write_text(script)
    first, second = (run(tmp_path / "pretrain.py", expert_parallel) for expert_parallel in (2, 1))
    assert [step for step, _, _ in first + second] == list(range(40))
    assert first[-1][1] < first[0][1] - 1
    assert max(loss for _, loss, _ in second) < first[0][1] - 1
    for step, _, rate in first + second:
        progress = (step - 1) / 98
        expected = 1e-2 * (step + 1) / 2 if step < 2 else 1e-3 + 9e-3 * (1 + math.cos(math.pi * progress)) / 2
        assert rate == pytest.approx(expected, abs=1e-6)
