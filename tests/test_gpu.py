"""What only a GPU can show: the device's own paths give what the CPU gives."""

from copy import deepcopy

import pytest
import torch

from moe_dist import MoELayer
from moe_dist.config.methods import METHOD_NAMES
from moe_dist.config.routing import CapacityConfig, RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.routing import Tokens, build_router
from moe_dist.telemetry.recorder import STAGES, LayerRecorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(device: str, capacity: CapacityConfig | None, autocast: bool) -> list[torch.Tensor]:
    """Output, input gradient and weight gradients of one layer, on the CPU in float32."""
    routing = RoutingConfig(score="sigmoid", renormalise=True, init_std=1.0, capacity=capacity)
    layer = MoELayer(64, MoEConfig(num_experts=8, ffn_size=32, num_shared_experts=1), routing).to(device)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 32, 64, generator=generator).to(device).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        out = layer(hidden)
    out.float().square().sum().backward()
    return [tensor.float().cpu() for tensor in (out.detach(), hidden.grad, *(p.grad for p in layer.parameters()))]


@pytest.mark.parametrize(
    "capacity", [None, CapacityConfig(factor=1.0, pad=True)], ids=["dropless", "padded to capacity"]
)
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-4), (True, 5e-2)], ids=["float32", "bfloat16"])
def test_the_layer_is_that_of_the_cpu(capacity: CapacityConfig | None, autocast: bool, tolerance: float) -> None:
    for theirs, ours in zip(run("cpu", capacity, autocast), run("cuda", capacity, autocast), strict=True):
        assert (theirs - ours).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("recompute", ["activation", "experts"])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("grouped_mm", torch.bfloat16, 3e-2),
        ("triton", torch.bfloat16, 3e-2),
        ("triton", torch.float16, 5e-3),
        ("triton", torch.float32, 1e-5),
    ],
)
def test_backends_are_the_loop(backend: str, dtype: torch.dtype, tolerance: float, recompute: str) -> None:
    found = []
    for name in ("loop", backend):
        moe = MoEConfig(
            num_experts=8, ffn_size=48, backend=name, recompute=recompute if name == backend else "activation"
        )
        layer = MoELayer(64, moe, RoutingConfig(init_std=1.0)).cuda()
        layer.initialise(seed=0, name="layers.0", std=0.2)
        layer.experts.to(dtype)
        hidden = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).to("cuda", dtype).requires_grad_()
        out = layer(hidden)
        out.float().square().sum().backward()
        gradients = [p.grad.float() for p in layer.parameters()]
        found.append([out.detach().float(), hidden.grad.float(), *gradients])
    for expected, actual in zip(*found, strict=True):
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_stages_are_timed_by_the_device() -> None:
    layer = MoELayer(64, MoEConfig(num_experts=8, ffn_size=32), RoutingConfig()).cuda()
    layer.recorder = LayerRecorder(torch.device("cuda"), 8, 8)
    layer(torch.randn(4, 32, 64, device="cuda"))
    seconds = layer.recorder.take().stage_seconds()
    assert set(seconds) == set(STAGES)
    assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_routers_decide_alike_on_gpu_and_cpu(method: str) -> None:
    top_k = 1 if method == "base" else 2
    config = RoutingConfig.model_validate({"method": method, "top_k": top_k, "init_std": 1.0, "score": "sigmoid"})
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(64, 16, dtype=torch.float64, generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        router = build_router(16, 8, config, vocab_size=32).to(device)
        tokens = Tokens(id_T=torch.arange(64, device=device) % 32, num_sequences=2)
        routing = router(hidden_TH.to(device), tokens)
        found.append([x.detach().cpu() for x in (routing.token_P, routing.expert_P, routing.load_E, routing.weight_P)])
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


STATIC = {
    "capacity": {"capacity": {"factor": 1.0, "pad": True}},
    "renormalised": {"capacity": {"factor": 1.0, "pad": True, "renormalise": True}, "renormalise": True},
    "by weight": {"capacity": {"factor": 1.25, "pad": True, "policy": "weight"}, "losses": {"z": {"coefficient": 0.1}}},
    "input": {"capacity": {"factor": 1.0, "pad": True}, "weight_on": "input"},
    "loss-free": {"capacity": {"factor": 1.0, "pad": True}, "score": "sigmoid", "bias": {"rule": "sign"}},
    "expert_choice": {"method": "expert_choice"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STATIC)
def test_a_cuda_graph_holds_forward_and_backward_of_a_static_layer(name: str, dtype: torch.dtype) -> None:
    """Nothing waits for the device, and a replay on other inputs gives what the layer itself gives for them."""
    config = RoutingConfig.model_validate({"top_k": 2, "init_std": 1.0, **STATIC[name]})
    layer = MoELayer(64, MoEConfig(num_experts=8, ffn_size=32, num_shared_experts=1), config).cuda()
    eager = deepcopy(layer)
    inputs = [torch.randn(4, 32, 64, device="cuda") for _ in range(3)]
    target = torch.randn(4, 32, 64, device="cuda")
    static = inputs[0].clone().requires_grad_()

    def step(layer: MoELayer, hidden: torch.Tensor) -> list[torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
            out = layer(hidden)
        return [out, *torch.autograd.grad(out, [hidden, *layer.parameters()], target.to(out.dtype))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(layer, static)  # makes once what later steps find made
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(layer, static)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, static)
    for hidden in inputs:
        static.data.copy_(hidden)
        graph.replay()
        for ours, theirs in zip(captured, step(eager, hidden.clone().requires_grad_()), strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_the_debug_mode_shows_what_waits() -> None:
    layer = MoELayer(64, MoEConfig(num_experts=8, ffn_size=32), RoutingConfig()).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            layer(torch.randn(4, 32, 64, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["capacity", "renormalised", "expert_choice"])
def test_a_static_layer_compiles_without_graph_breaks(name: str) -> None:
    config = RoutingConfig.model_validate({"top_k": 2, "init_std": 1.0, **STATIC[name]})
    layer = MoELayer(64, MoEConfig(num_experts=8, ffn_size=32), config).cuda()
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        hidden = torch.randn(
            4, 32, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(0)
        ).requires_grad_()
        out = function(hidden)
        results.append([out, *torch.autograd.grad(out.square().sum(), [hidden, *layer.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
