"""The script of docs/megatron.md runs as it stands there, on two CPU ranks, and learns."""

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


def test_the_script_of_the_guide_trains(tmp_path: Path) -> None:
    losses = train(script_of_the_guide(), tmp_path)
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1


def test_it_takes_sequence_parallelism_with_our_norm(tmp_path: Path) -> None:
    script = script_of_the_guide()
    for old, new in {
        "num_layers=2,": "num_layers=2, tensor_model_parallel_size=2, sequence_parallel=True,",
        "expert_model_parallel_size=dist.get_world_size()": "tensor_model_parallel_size=2, "
        "expert_model_parallel_size=2, expert_tensor_parallel_size=1",
        "torch.manual_seed(dist.get_rank())": "torch.manual_seed(0)",  # these ranks have the same tokens
        "    model = GPTModel(config, spec,": SPEC_WITH_NORMS + "    model = GPTModel(config, block,",
    }.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    losses = train(script, tmp_path)
    assert losses[-1] < losses[0] - 1


def script_of_the_guide() -> str:
    (script,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    return script


def train(script: str, tmp_path: Path) -> list[float]:
    (tmp_path / "pretrain.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = subprocess.run([*launch, tmp_path / "pretrain.py"], cwd=GUIDE.parents[1], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", output.stdout)]
