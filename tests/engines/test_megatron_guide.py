"""The script of docs/megatron.md runs as it stands there, on two CPU ranks, learns, and goes on in another layout."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

GUIDE = Path(__file__).parents[2] / "docs" / "megatron.md"
SPEC_WITH_NORMS = """
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from moe_dist.engines.megatron import rms_norm
    norm = rms_norm(emulated=True)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    block = TransformerBlockSubmodules(layer_specs=[spec] * config.num_layers, layer_norm=norm)
"""


def script_of_the_guide() -> str:
    (script,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    return script


def run(script: str, folder: Path, expert_parallel: int) -> list[tuple[float, ...]]:
    """Step, loss and learning rate of each step."""
    (folder / "pretrain.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launch, str(folder / "pretrain.py"), str(folder / "checkpoint"), str(expert_parallel)]
    output = subprocess.run(words, cwd=GUIDE.parents[1], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    found = re.findall(r"step (\d+) loss ([\d.]+) rate ([\d.]+)", output.stdout)
    return [tuple(map(float, of_step)) for of_step in found]


def test_the_script_of_the_guide_trains_and_goes_on(tmp_path: Path) -> None:
    first, second = (run(script_of_the_guide(), tmp_path, expert_parallel) for expert_parallel in (2, 1))
    assert [step for step, _, _ in first + second] == list(range(40))
    assert first[-1][1] < first[0][1] - 1
    assert max(loss for _, loss, _ in second) < first[0][1] - 1
    for step, _, rate in first + second:
        progress = (step - 1) / 98
        expected = 1e-2 * (step + 1) / 2 if step < 2 else 1e-3 + 9e-3 * (1 + math.cos(math.pi * progress)) / 2
        assert rate == pytest.approx(expected, abs=1e-6)


def test_it_takes_sequence_parallelism_with_our_norm(tmp_path: Path) -> None:
    script = script_of_the_guide()
    for old, new in {
        "num_layers=2,": "num_layers=2, tensor_model_parallel_size=2, sequence_parallel=True,",
        "expert_model_parallel_size=expert_parallel": "tensor_model_parallel_size=2, "
        "expert_model_parallel_size=expert_parallel, expert_tensor_parallel_size=1",
        "torch.manual_seed(dist.get_rank())": "torch.manual_seed(0)",  # these ranks have the same tokens
        "    model = GPTModel(config, spec,": SPEC_WITH_NORMS + "    model = GPTModel(config, block,",
    }.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    steps = run(script, tmp_path, 2)
    assert steps[-1][1] < steps[0][1] - 1
