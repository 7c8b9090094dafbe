"""Small training runs: a config with some text beside it, and a whole run on one rank of run_ranks."""

import random
from pathlib import Path

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moe_dist.config import layout_of, load_config
from moe_dist.engines.native import NativeEngine
from moe_dist.training.data import TextData
from moe_dist.training.folder import RunFolder
from moe_dist.training.loop import Training

CONFIG = """
model: {hidden_size: 32, num_layers: 3, num_heads: 2, num_dense_layers: 1, ffn_size: 48}
moe: {num_experts: 8, ffn_size: 16, num_shared_experts: 1, shared_gate: true}
routing:
  score: sigmoid
  renormalise: true
  init_std: 0.5
  bias: {rule: sign, rate: 5.0e-3}
  losses: {load_balance: {coefficient: 0.01}, z: {coefficient: 0.001}}
data: {source: files, paths: [TEXT], holdout_fraction: 0.25}
training:
  steps: 8
  global_batch_size: 8
  sequence_length: 16
  precision: float32
  optimizer: {learning_rate: 4.0e-3}
  schedule: {name: constant}
telemetry: {interval: 1}
"""


def write_config(folder: Path) -> Path:
    """A config of 2 MoE layers of 8 experts, and the text that it reads; returns the path of the config."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(1, 6))) for _ in range(50)]
    text = folder / "text"
    text.mkdir(parents=True)
    for number in range(12):
        (text / f"{number}.txt").write_text(" ".join(generator.choices(words, k=100)))
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.replace("TEXT", str(text)))
    return path


def start(path: Path, overrides: list[str], output: Path, checkpoint: Path | None = None) -> Training:
    """A run on the ranks of this process group, from its start or from a checkpoint; collective."""
    num_ranks = dist.get_world_size()
    config = load_config(path, overrides, num_ranks)
    folder = RunFolder(output, checkpoint)
    return Training(config, layout_of(config, num_ranks), torch.device("cpu"), TextData(config), folder)


def full_state(engine: NativeEngine) -> dict[str, npt.NDArray]:
    """What this rank has of the state of a checkpoint, by global name, each tensor whole; collective."""
    state = engine.state()
    whole = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
    return {name: tensor.numpy(force=True).copy() for name, tensor in whole.items()}
