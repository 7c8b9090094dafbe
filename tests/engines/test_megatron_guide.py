"""The script of docs/megatron.md runs as it stands there, on two CPU ranks, and learns."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

GUIDE = Path(__file__).parents[2] / "docs" / "megatron.md"


def test_the_script_of_the_guide_trains(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (tmp_path / "pretrain.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = subprocess.run([*launch, tmp_path / "pretrain.py"], cwd=GUIDE.parents[1], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output.stdout)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1
