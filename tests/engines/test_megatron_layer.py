"""What the layer refuses of a script's own TransformerConfig."""

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

if find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

from moe_dist.engines.cuda_on_cpu import cuda_on_cpu

PLAIN = {
    "recompute_granularity": None,
    "recompute_modules": None,
}


@pytest.mark.parametrize(
    ("changes", "is_mtp_layer", "message"),
    [
        ({"recompute_granularity": "full"}, False, "recompute_granularity: .* use .*CheckpointedLayer"),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, False, "recompute_granularity: .*"),
        ({}, True, "multi-token prediction; use another mlp there"),
    ],
)
def test_what_it_does_not_do_is_refused(changes: dict[str, Any], is_mtp_layer: bool, message: str) -> None:
    with cuda_on_cpu():
        from moe_dist.engines.megatron_layer import _check
    _check(SimpleNamespace(**PLAIN), False)
    with pytest.raises(ValueError, match=message):
        _check(SimpleNamespace(**(PLAIN | changes)), is_mtp_layer)
