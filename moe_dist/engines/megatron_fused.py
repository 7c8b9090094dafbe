"""Fused norms, Adam and attention for Megatron-Core: which of them this machine has, and which is taken.

TransformerEngine has all three, NVIDIA's Apex norms and Adam. Megatron-Core takes an Adam by itself, in the same order.
"""

import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn


def has_transformer_engine() -> bool:
    """Whether TransformerEngine is installed."""
    return find_spec("transformer_engine") is not None


def has_nvidia_apex() -> bool:
    """Whether `apex` is NVIDIA's: PyPI has an unrelated package of that name, which mostly cannot even be imported."""
    spec = find_spec("apex")
    folders = spec.submodule_search_locations if spec is not None else None
    return any((Path(folder) / "optimizers").is_dir() for folder in folders or ())


def missing_parts() -> str:
    """What is missing and what is taken instead, in one line; empty if nothing is missing."""
    if has_transformer_engine():
        return ""
    if has_nvidia_apex():
        return "TransformerEngine is not installed: norms and Adam are Apex's, attention is PyTorch's"
    line = "TransformerEngine and NVIDIA's Apex are not installed: norms, Adam and attention are PyTorch's"
    if find_spec("apex") is None:
        return line
    return f"{line} (the package apex that is installed is another one; NVIDIA's is built from github.com/NVIDIA/apex)"


@cache
def tell_what_is_missing(emulated: bool) -> None:
    """Once in a process, on standard error: whether CUDA is emulated, and which of the fused parts are not there."""
    if emulated:
        print("engine.emulate_cuda: Megatron-Core runs on the CPU, for trying and testing only", file=sys.stderr)
    if line := missing_parts():
        print(line, file=sys.stderr)


def rms_norm(emulated: bool = False) -> type:
    """What to put into the norms of a layer spec: TransformerEngine's or Apex's where installed, else PyTorch's.

    All of them take part in sequence parallelism, of which Megatron-Core's own use of PyTorch's knows nothing.

    Args:
        emulated: with CUDA emulated on a CPU there is PyTorch's only.
    """
    if not emulated and has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    if not emulated and has_nvidia_apex():
        from apex.normalization import FusedRMSNorm

        return _as_megatron_builds(FusedRMSNorm)
    return _as_megatron_builds(nn.RMSNorm)


@cache
def _as_megatron_builds(rms_norm: Any) -> type:
    class Norm(rms_norm):
        def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **ignored: Any) -> None:
            super().__init__(hidden_size, eps=eps)
            # Then each tensor-parallel rank has other tokens, and their gradients are summed.
            self.weight.sequence_parallel = config.sequence_parallel

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            """Any shape [..., H]; under autocast, hidden may be bfloat16."""
            return super().forward(hidden.to(torch.promote_types(hidden.dtype, self.weight.dtype)))

    return Norm
