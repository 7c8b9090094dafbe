"""What each engine offers: the one table that the checks, `moe-dist config` and the docs read."""

from typing import Literal, get_args

EngineName = Literal["native", "deepspeed", "megatron"]

ENGINES: tuple[str, ...] = get_args(EngineName)
IMPLEMENTED = ("native", "megatron")
"""Engines that this version can run. The others are in the table so that a refusal can name them."""

SUPPORT: dict[str, dict[str, str]] = {
    # key                         engine -> "" where any value works, else why only 1 does
    "parallel.expert": {"native": "", "deepspeed": "", "megatron": ""},
    "parallel.expert_tensor": {
        "native": "",
        "deepspeed": "DeepSpeed's expert groups carry no expert tensor parallelism here",
        "megatron": "",
    },
    "parallel.tensor": {"native": "it does not split attention and dense layers", "deepspeed": "", "megatron": ""},
    "parallel.pipeline": {
        "native": "it has no pipeline stages",
        "deepspeed": "DeepSpeed's pipeline does not take MoE layers",
        "megatron": "",
    },
}


def engines_offering(key: str) -> list[str]:
    """Engines for which `key` may be above 1."""
    return [engine for engine in ENGINES if not SUPPORT[key][engine]]
