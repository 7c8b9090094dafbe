"""Expert backends against the plain loop, and the loop against the formula; forward and all gradients.

Shape letters: R rows, H hidden, L experts on this rank, F FFN width.
"""

import math

import pytest
import torch
from torch.nn import functional

from moe_dist.config.schema import MoEConfig
from moe_dist.dispatch import Segments
from moe_dist.experts import Experts, FeedForward
from moe_dist.experts.backends import BACKENDS, Activation, choose_backend, compute_loop

L, H, F = 3, 8, 16
SEGMENTS = {
    "one each": Segments([3, 2, 4], [0, 1, 2]),
    "an empty expert": Segments([3, 0, 4], [0, 1, 2]),
    "empty at the ends": Segments([0, 5, 0], [0, 1, 2]),
    "several each": Segments([3, 2, 4, 1, 5, 2], [0, 1, 2] * 2),
    "several each, some empty": Segments([0, 2, 0, 1, 0, 0, 3, 0, 0], [0, 1, 2] * 3),
    "an expert without segments": Segments([2, 3], [2, 0]),
    "no rows": Segments([0, 0, 0], [0, 1, 2]),
    "no rows from two ranks": Segments([0] * 6, [0, 1, 2] * 2),
}
ACTIVATIONS: list[Activation] = ["swiglu", "gelu"]
BUILT_IN = [name for name, backend in BACKENDS.items() if backend.why_not is None]


def make_inputs(segments: Segments, activation: Activation, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = 2 * F if activation == "swiglu" else F
    shapes = [(sum(segments.sizes), H), (L, H, width), (L, F, H)]
    draws = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]  # the same numbers in every format
    return [draw.to(dtype).requires_grad_() for draw in draws]


def run(backend: str, segments: Segments, activation: Activation, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output and the gradients of rows and weights."""
    inputs = make_inputs(segments, activation, dtype)
    out = BACKENDS[backend].compute(inputs[0], segments, inputs[1], inputs[2], activation)
    out.backward(torch.linspace(-1, 1, out.numel()).bfloat16().view(out.shape).to(dtype))
    return [out.detach(), *(x.grad for x in inputs)]


def formula(x: list[float], w_in: list[list[float]], w_out: list[list[float]], activation: Activation) -> list[float]:
    """One row, one number at a time."""

    def product(row: list[float], matrix: list[list[float]]) -> list[float]:
        return [sum(a * line[i] for a, line in zip(row, matrix, strict=True)) for i in range(len(matrix[0]))]

    pre = product(x, w_in)
    if activation == "gelu":
        active = [z * 0.5 * (1 + math.erf(z / math.sqrt(2))) for z in pre]
    else:
        active = [gate / (1 + math.exp(-gate)) * up for gate, up in zip(pre[:F], pre[F:], strict=True)]
    return product(active, w_out)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_loop_is_the_formula(activation: Activation) -> None:
    segments = SEGMENTS["several each"]
    rows, w_in, w_out = make_inputs(segments, activation, torch.float64)
    out = compute_loop(rows, segments, w_in, w_out, activation)
    expert_of_row = [e for size, e in zip(segments.sizes, segments.experts, strict=True) for _ in range(size)]
    for row, expert, x in zip(out.tolist(), expert_of_row, rows.tolist(), strict=True):
        assert row == pytest.approx(formula(x, w_in[expert].tolist(), w_out[expert].tolist(), activation), rel=1e-11)


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"), [("cpu", torch.float64, 1e-13), ("grouped_mm", torch.float32, 2e-5)]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", SEGMENTS)
def test_backends_equal_the_loop(
    name: str, activation: Activation, backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    actual, expected = (run(b, SEGMENTS[name], activation, dtype) for b in (backend, "loop"))
    for number, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(number, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cpu_backend_passes_finite_differences(activation: Activation) -> None:
    segments = SEGMENTS["several each, some empty"]
    rows, w_in, w_out = make_inputs(segments, activation, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, a, b: BACKENDS["cpu"].compute(x, segments, a, b, activation), (rows, w_in, w_out), fast_mode=True
    )


@pytest.mark.parametrize("backend", BUILT_IN)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", SEGMENTS)
def test_bfloat16_is_close_to_float32(name: str, activation: Activation, backend: str) -> None:
    """Within a few of its roundings of 2^-8, relative to the largest number of each tensor."""
    narrow, wide = (run(backend, SEGMENTS[name], activation, dtype) for dtype in (torch.bfloat16, torch.float32))
    for number, right in zip(narrow, wide, strict=True):
        assert number.dtype == torch.bfloat16
        scale = right.abs().max().clamp(min=1e-6) if right.numel() else 1
        torch.testing.assert_close(number.float() / scale, right / scale, rtol=0, atol=0.03)


@pytest.mark.parametrize("backend", BUILT_IN)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("num_segments", [L, 2 * L])
def test_without_rows_every_weight_gets_a_gradient_of_zeros(
    backend: str, activation: Activation, num_segments: int
) -> None:
    experts = make_experts(backend, activation)
    rows = torch.zeros(0, H, requires_grad=True)
    out = experts(rows, Segments([0] * num_segments, list(range(L)) * (num_segments // L)))
    out.backward(torch.zeros(0, H))
    assert rows.grad.shape == (0, H)
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def make_experts(backend: str = "auto", activation: Activation = "swiglu", num_local: int = L) -> Experts:
    torch.manual_seed(0)
    experts = Experts(H, MoEConfig(num_experts=L, ffn_size=F, activation=activation, backend=backend), num_local)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def test_a_rank_without_experts() -> None:
    experts = make_experts("cpu", num_local=0)
    out = experts(torch.zeros(0, H, requires_grad=True), Segments([], []))
    out.sum().backward()
    assert out.shape == (0, H)


@pytest.mark.parametrize("backend", ["cpu", "loop"])  # torch's grouped_mm refuses such a gradient
def test_an_upstream_gradient_of_any_layout_is_taken(backend: str) -> None:
    """sum() sends back one number expanded over the rows."""
    experts, segments = make_experts(backend), SEGMENTS["several each"]
    rows = make_inputs(segments, "swiglu", torch.float32)[0]
    experts(rows, segments).sum().backward()
    summed = [p.grad.clone() for p in experts.parameters()]
    experts.zero_grad()
    experts(rows, segments).backward(torch.ones_like(rows))
    for parameter, grad in zip(experts.parameters(), summed, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("backend", BUILT_IN)
@pytest.mark.parametrize("frozen", ["rows", "weights"])
def test_what_needs_no_gradient_gets_none(backend: str, frozen: str) -> None:
    experts, segments = make_experts(backend), SEGMENTS["one each"]
    rows = make_inputs(segments, "swiglu", torch.float32)[0].requires_grad_(frozen != "rows")
    experts.requires_grad_(frozen != "weights")
    experts(rows, segments).square().sum().backward()
    assert (rows.grad is None) == (frozen == "rows")
    assert all((p.grad is None) == (frozen == "weights") for p in experts.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_weights_of_are_views_by_unpacked_names(activation: Activation) -> None:
    experts = make_experts(activation=activation)
    rows = torch.randn(2, H)
    views = experts.weights_of(1, lambda p: p.data)
    assert {key: tuple(view.shape) for key, view in views.items()} == {
        **({"w_gate": (H, F)} if activation == "swiglu" else {}),
        "w_up": (H, F),
        "w_down": (F, H),
    }
    up = rows @ views["w_up"]
    swiglu = activation == "swiglu"
    active = functional.silu(rows @ views["w_gate"]) * up if swiglu else functional.gelu(up)
    torch.testing.assert_close(experts(rows, Segments([0, 2, 0], [0, 1, 2])), active @ views["w_down"])
    for view in views.values():
        view.zero_()
    assert not experts(rows, Segments([0, 2, 0], [0, 1, 2])).any()
    assert experts(rows, Segments([2, 0, 0], [0, 1, 2])).any()


@pytest.mark.parametrize(
    ("device", "dtype", "backend"),
    [
        ("cpu", torch.float32, "cpu"),
        ("cpu", torch.float64, "cpu"),
        ("cpu", torch.bfloat16, "cpu"),
        ("cuda", torch.bfloat16, "grouped_mm"),
        ("cuda", torch.float32, "loop"),
        ("cuda", torch.float64, "loop"),
    ],
)
def test_auto_takes_the_fast_backend_that_the_device_has(device: str, dtype: torch.dtype, backend: str) -> None:
    assert choose_backend("auto", torch.device(device), dtype, (H, F)) is BACKENDS[backend]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_backend_asked_for_is_the_one_taken(name: str) -> None:
    assert choose_backend(name, torch.device("cpu"), torch.float32, (H, F)) is BACKENDS[name]


@pytest.mark.parametrize(
    ("device", "dtype", "width"),
    [("cpu", torch.float64, F), ("cuda", torch.float32, F), ("cuda", torch.bfloat16, 12)],
    ids=["float64", "float32 on a GPU", "rows of 24 bytes"],
)
def test_grouped_mm_is_refused_where_torch_has_none(device: str, dtype: torch.dtype, width: int) -> None:
    with pytest.raises(
        ValueError, match=rf"moe\.backend: grouped_mm does not compute {dtype} .* on {device}; use auto"
    ):
        choose_backend("grouped_mm", torch.device(device), dtype, (H, width))
    assert choose_backend("auto", torch.device(device), dtype, (H, width)) is not BACKENDS["grouped_mm"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward_is_its_formula(activation: Activation, gated: bool) -> None:
    shared = FeedForward(H, F, activation, gated).double()
    x = torch.randn(4, H, dtype=torch.float64)
    up = shared.w_up(x)
    if activation == "swiglu":
        gate = shared.w_gate(x)
        active = gate / (1 + (-gate).exp()) * up
    else:
        active = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
    expected = shared.w_down(active)
    if gated:
        expected = expected / (1 + (-shared.output_gate(x)).exp())
    torch.testing.assert_close(shared(x), expected, rtol=1e-12, atol=1e-13)
