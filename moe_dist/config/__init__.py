"""What a run is: one strict, documented schema; YAML in; dotted overrides."""

from moe_dist.config.errors import ConfigError
from moe_dist.config.layout import Layout, layout_dependence, layout_of
from moe_dist.config.load import build_config, dump_config, load_config
from moe_dist.config.routing import (
    BiasConfig,
    CapacityConfig,
    CoefficientConfig,
    LoadBalanceLossConfig,
    LossesConfig,
    RoutingConfig,
)
from moe_dist.config.schema import Config, ModelConfig, MoEConfig

__all__ = [
    "BiasConfig",
    "CapacityConfig",
    "CoefficientConfig",
    "Config",
    "ConfigError",
    "Layout",
    "LoadBalanceLossConfig",
    "LossesConfig",
    "MoEConfig",
    "ModelConfig",
    "RoutingConfig",
    "build_config",
    "dump_config",
    "layout_dependence",
    "layout_of",
    "load_config",
]
