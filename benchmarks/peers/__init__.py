"""What benchmarks/layer.py times: one problem, its plain reference, its limit, and the layers that solve it."""

from collections.abc import Callable
from functools import partial

from .competitor import Competitor, UnavailableError
from .deepspeed_moe import AutoEP, DeepSpeed
from .hugging_face import HuggingFace
from .limit import EXCHANGE, EXCHANGE_AS_ROUTED, Limit
from .megatron import Megatron
from .ours import Ours
from .problem import LOADS, PRESETS, Problem, Shape, loads, make_problem, reference
from .torchtitan_moe import TorchTitan

OURS: dict[str, Callable[[Problem], Competitor]] = {
    "moe_dist": Ours,
    "moe_dist_cpu": partial(Ours, backend="cpu"),
    "moe_dist_grouped_mm": partial(Ours, backend="grouped_mm"),
    "moe_dist_loop": partial(Ours, backend="loop"),
    "moe_dist_recompute": partial(Ours, recompute="experts"),
}
"""The keys beside the class are those of the config's section `moe`."""

COMPETITORS = OURS | {
    "megatron": Megatron,
    "megatron_fused": partial(Megatron, fused=True),
    "megatron_grouped": partial(Megatron, grouped=True),
    "megatron_allgather": partial(Megatron, dispatcher="allgather"),
    "megatron_allgather_fused": partial(Megatron, dispatcher="allgather", fused=True),
    "deepspeed": DeepSpeed,
    "deepspeed_autoep": AutoEP,
    "hf_eager": partial(HuggingFace, implementation="eager"),
    "hf_grouped_mm": partial(HuggingFace, implementation="grouped_mm"),
    "torchtitan": TorchTitan,
}

__all__ = [
    "COMPETITORS",
    "EXCHANGE",
    "EXCHANGE_AS_ROUTED",
    "LOADS",
    "OURS",
    "PRESETS",
    "Competitor",
    "Limit",
    "Problem",
    "Shape",
    "UnavailableError",
    "loads",
    "make_problem",
    "reference",
]
