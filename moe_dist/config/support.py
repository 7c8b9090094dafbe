"""What each engine offers: the one table that the checks, `moe-dist config` and the docs read."""

from importlib.util import find_spec
from typing import Literal, get_args

from moe_dist.config.errors import ConfigError

EngineName = Literal["native", "deepspeed", "megatron"]

ENGINES: tuple[str, ...] = get_args(EngineName)
PACKAGES = {"deepspeed": ("deepspeed", "deepspeed"), "megatron": ("megatron.core", "megatron-core")}
"""What an engine needs beside PyTorch: the names under which it is imported and installed."""

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
    "parallel.pipeline": {
        "native": "it has no pipeline stages",
        "deepspeed": "DeepSpeed's pipeline does not take MoE layers",
        "megatron": "",
    },
}


def engines_offering(key: str) -> list[str]:
    """Engines for which `key` may be above 1."""
    return [engine for engine in ENGINES if not SUPPORT[key][engine]]


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
