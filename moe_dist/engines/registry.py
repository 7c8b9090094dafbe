"""Which engine runs a config."""

import torch

from moe_dist.config import Config, Layout
from moe_dist.engines.engine import Engine
from moe_dist.engines.native import NativeEngine


def build_engine(config: Config, layout: Layout, device: torch.device, vocab_size: int) -> Engine:
    """The engine that `engine.name` says, of this rank; collective."""
    return NativeEngine(config, layout, device, vocab_size)
