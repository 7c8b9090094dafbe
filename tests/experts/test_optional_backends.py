"""Optional backends behind the registry: asked for, they compute, or say why not."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.nn import functional

from moe_dist import MoELayer
from moe_dist.config import ConfigError, load_config
from moe_dist.config.backends import LIMITS
from moe_dist.config.routing import RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.dispatch import Segments
from moe_dist.experts import Experts
from moe_dist.experts.backends import BACKENDS, choose_backend
from tests.support.expert_runs import F, H
from tests.support.stand_ins import installed_stand_ins
from tests.support.stand_ins.scaled_grouped_mm import scaled_grouped_mm


def test_the_schema_names_every_backend() -> None:
    assert set(get_args(MoEConfig.model_fields["backend"].annotation)) == {"auto", *BACKENDS}
    assert {name for name, backend in BACKENDS.items() if backend.why_not is not None} == set(LIMITS)


@pytest.mark.parametrize("name", LIMITS)
def test_auto_never_takes_one(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for device in ("cpu", "cuda"):
            assert choose_backend("auto", torch.device(device), dtype, (H, F), "swiglu") is not BACKENDS[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "transformer_engine",
            r"moe\.backend: transformer_engine: TransformerEngine is not installed; .*, or use auto",
        ),
        ("sonic", r"moe\.backend: sonic: SonicMoE is not installed; .*, or use auto"),
    ],
)
def test_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        choose_backend(name, torch.device("cuda"), torch.bfloat16, (H, F), "swiglu")


@pytest.mark.parametrize("name", LIMITS)
def test_refused_on_a_cpu_by_the_first_rows(name: str) -> None:
    experts = Experts(H, MoEConfig(num_experts=2, ffn_size=F, backend=name), 2)
    with pytest.raises(ValueError, match=rf"moe\.backend: {name}: .*, not on cpu; use auto"):
        experts(torch.zeros(3, H), Segments([1, 2], [0, 1]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["moe.backend=transformer_engine", "training.precision=float32"],
            "bfloat16 or float16, not in float32; use auto",
        ),
        (
            ["moe.backend=fp8", "training.precision=float64"],
            "fp8 computes experts in bfloat16, not in float64; use auto",
        ),
        (["moe.backend=sonic", "moe.activation=gelu"], "SonicMoE computes moe.activation: swiglu, not gelu; use auto"),
        (["moe.backend=fp8", "moe.ffn_size=24"], "fp8 needs a multiple of 16 as .* not 256 and 24; use auto"),
        (["moe.backend=sonic", "parallel.expert_tensor=64"], "a multiple of 8 as .* not 256 and 11; use auto"),
    ],
    ids=" ".join,
)
def test_a_configuration_that_it_cannot_compute_ends_before_the_run(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    config = tmp_path / "config.yaml"
    config.touch()
    with pytest.raises(ConfigError, match=rf"moe\.backend: {overrides[0].partition('=')[2]}: .*{message}"):
        load_config(config, overrides)


def layer_results(backend: str, autocast: bool) -> list[torch.Tensor]:
    """Output and all gradients of a layer, in float64 or, with autocast, in bfloat16."""
    moe = MoEConfig(num_experts=4, ffn_size=F, num_shared_experts=1, backend=backend)
    layer = MoELayer(H, moe, RoutingConfig(top_k=2, score="sigmoid", renormalise=True))
    layer.initialise(0, "layers.0", std=0.3)
    if not autocast:
        layer = layer.double()
    hidden = torch.randn(2, 9, H, generator=torch.Generator().manual_seed(0)).to(next(layer.parameters()).dtype)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(hidden)
    out.double().square().sum().backward()
    return [out.detach(), hidden.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize(
    ("name", "autocast", "tolerance"),
    [
        ("transformer_engine", False, 1e-12),
        ("sonic", False, 1e-12),
        ("fp8", True, 0.15),
    ],
)
def test_a_layer_is_the_same_as_with_the_loop(
    monkeypatch: pytest.MonkeyPatch, name: str, autocast: bool, tolerance: float
) -> None:
    monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], why_not=None))
    monkeypatch.setattr(functional, "scaled_grouped_mm", scaled_grouped_mm)
    with installed_stand_ins():
        actual = layer_results(name, autocast)
    for number, right in zip(actual, layer_results("loop", autocast), strict=True):
        assert (number - right).norm() <= tolerance * right.norm()
