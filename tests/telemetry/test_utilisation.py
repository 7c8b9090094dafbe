"""Model FLOP/s utilisation against a count by hand."""

import pytest

from moe_dist.config import build_config
from moe_dist.config.size import flops_per_token
from moe_dist.telemetry.utilisation import peak_flops, utilisation


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_a_token_are_those_of_its_matrices(tied: bool) -> None:
    model = {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "num_dense_layers": 1,
        "ffn_size": 48,
    }
    model |= {"vocab_size": 300, "tie_embeddings": tied}
    moe, routing = {"num_experts": 8, "ffn_size": 16, "num_shared_experts": 1}, {"top_k": 2}
    config = build_config({"model": model, "moe": moe, "routing": routing, "training": {"sequence_length": 64}})
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    norms = 3 * 2 * 32 + 32
    weights = 3 * attention + 3 * 32 * 48 + 2 * (8 * 32 + (2 + 1) * 3 * 32 * 16) + 32 * 300 + norms
    scores = 3 * 2 * 64 * 32  # of each layer: one product with the keys, one with the values, 2 FLOPs each, 3 passes
    assert flops_per_token(config) == 6 * weights + 2 * 3 * scores


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", None),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("cpu", None),
    ],
)
def test_peaks_are_of_known_devices_in_bfloat16(name: str, peak: float | None) -> None:
    assert peak_flops(name, "bfloat16") == peak
    assert peak_flops(name, "float32") is None
    assert peak_flops(name, "float32", 5e12) == peak_flops(name, "bfloat16", 5e12) == 5e12


def test_utilisation_is_of_all_devices() -> None:
    assert utilisation(1e9, 2e5, 4, 1e14) == pytest.approx(0.5)
    assert utilisation(1e9, 2e5, 4, None) is None
