"""What each engine offers: the one table that the checks, `moe-dist config` and the docs read."""

from importlib.util import find_spec
from typing import Literal, get_args

from moe_dist.config.errors import ConfigError
from moe_dist.config.schema import TelemetryConfig

EngineName = Literal["native", "deepspeed", "megatron"]

ENGINES: tuple[str, ...] = get_args(EngineName)
PACKAGES = {"deepspeed": ("deepspeed", "deepspeed"), "megatron": ("megatron.core", "megatron-core")}
"""What an engine needs beside PyTorch: the names under which it is imported and installed."""
SINK_PACKAGES = [
    ("tensorboard", "tensorboard", "tensorboard"),
    ("prometheus", "prometheus_client", "prometheus-client"),
    ("wandb", "wandb", "wandb"),
    ("wandb", "PIL", "pillow"),
]
"""What the sinks of `telemetry` need: the key, and the names under which a package is imported and installed."""

SUPPORT: dict[str, dict[str, str]] = {
    # key                         engine -> "" where any value works, else why only 1 does
    "parallel.expert": {"native": "", "deepspeed": "", "megatron": ""},
    "parallel.expert_tensor": {
        "native": "",
        "deepspeed": "DeepSpeed's expert groups carry no expert tensor parallelism here",
        "megatron": "",
    },
    "parallel.tensor": {
        "native": "it does not split attention and dense layers",
        "deepspeed": "",
        "megatron": "",
    },
    "parallel.context": {
        "native": "it does not split sequences",
        "deepspeed": "it does not split sequences",
        "megatron": "",
    },
    "parallel.pipeline": {
        "native": "it has no pipeline stages",
        "deepspeed": "DeepSpeed's pipeline does not take MoE layers",
        "megatron": "",
    },
    "parallel.pipeline_interleaving": {
        "native": "it has no pipeline stages",
        "deepspeed": "DeepSpeed's pipeline does not take MoE layers",
        "megatron": "",
    },
}


def engines_offering(key: str) -> list[str]:
    """Engines for which `key` may be above 1."""
    return [engine for engine in ENGINES if not SUPPORT[key][engine]]


def cannot_import(engine: str, error: ImportError) -> ImportError:
    """What a script is told that imports the module of an engine whose package is not there."""
    package = PACKAGES[engine][1]
    return ImportError(
        f"moe_dist.engines.{engine} needs the package {package}, which cannot be imported ({error}); install it by "
        f"`pip install {package}`"
    )


def require_package(engine: str, tensor: int = 1) -> None:
    """Raise ConfigError if what an engine needs is not installed. Imports no more than the package's parent.

    Args:
        tensor: parallel.tensor; above 1, the deepspeed engine uses Megatron-Core's groups.
    """
    _require(engine, f"engine.name: {engine}", "engine.name: native")
    if engine == "deepspeed" and tensor > 1:
        _require("megatron", f"engine.name: deepspeed with parallel.tensor: {tensor}", "parallel.tensor: 1")


def _require(engine: str, subject: str, instead: str) -> None:
    if engine not in PACKAGES:
        return
    module, package = PACKAGES[engine]
    if find_spec(module.partition(".")[0]) is None or find_spec(module) is None:
        raise ConfigError(
            f"{subject} needs the package {package}, which is not installed; "
            f"install it by `pip install {package}`, or use {instead}"
        )


def require_sinks(telemetry: TelemetryConfig) -> None:
    """Raise ConfigError if what a telemetry sink needs is not installed. Imports none of it."""
    for name, module, package in SINK_PACKAGES:
        if not getattr(telemetry, name):
            continue
        spec = find_spec(module)
        if spec is None or spec.origin is None:  # without an origin: a mere folder of that name, as wandb itself makes
            off = "false" if name == "tensorboard" else "null"
            raise ConfigError(
                f"telemetry.{name}: needs the package {package}, which is not installed; "
                f"install it by `pip install {package}`, or use telemetry.{name}: {off}"
            )
