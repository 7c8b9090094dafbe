"""Which engine runs a config."""

import os

import torch

from moe_dist.config import Config, Layout
from moe_dist.config.support import require_package
from moe_dist.engines.engine import Engine
from moe_dist.engines.megatron_groups import check_megatron, quiet_import
from moe_dist.engines.native import NativeEngine


def check_engine(config: Config, device: torch.device) -> None:
    """Raise ConfigError if what the engine needs is not installed, or `device` is not what it runs on."""
    name, tensor = config.engine.name, config.parallel.tensor
    require_package(name, tensor)
    if name == "megatron" or (name == "deepspeed" and tensor > 1):
        check_megatron(config, device)


def build_engine(config: Config, layout: Layout, device: torch.device, vocab_size: int) -> Engine:
    """The engine that `engine.name` says, of this rank; collective.

    Raises ConfigError if what it needs is not installed or not there.
    """
    check_engine(config, device)
    if config.engine.name == "deepspeed":
        os.environ.setdefault("DS_ACCELERATOR", device.type)  # read when deepspeed is imported
        from moe_dist.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, layout, device, vocab_size)
    if config.engine.name == "megatron":
        with quiet_import():
            from moe_dist.engines.megatron import MegatronEngine

        return MegatronEngine(config, layout, device, vocab_size)
    return NativeEngine(config, layout, device, vocab_size)
