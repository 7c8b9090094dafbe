"""Which engine runs a config."""

import os

import torch

from moe_dist.config import Config, Layout
from moe_dist.config.support import require_package
from moe_dist.engines.engine import Engine
from moe_dist.engines.native import NativeEngine


def build_engine(config: Config, layout: Layout, device: torch.device, vocab_size: int) -> Engine:
    """The engine that `engine.name` says, of this rank; collective.

    Raises ConfigError if what it needs is not installed or not there.
    """
    require_package(config.engine.name, config.parallel.tensor)
    if config.engine.name == "deepspeed":
        if config.parallel.tensor > 1:
            from moe_dist.engines.megatron_groups import check_megatron

            check_megatron(config, device)
        os.environ.setdefault("DS_ACCELERATOR", device.type)  # read when deepspeed is imported
        from moe_dist.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, layout, device, vocab_size)
    if config.engine.name == "megatron":
        from moe_dist.engines.megatron_groups import check_megatron, quiet_import

        check_megatron(config, device)
        with quiet_import():
            from moe_dist.engines.megatron import MegatronEngine

        return MegatronEngine(config, layout, device, vocab_size)
    return NativeEngine(config, layout, device, vocab_size)
