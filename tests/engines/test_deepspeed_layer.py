"""The MoE layer in a training script of one's own, and the script that docs/deepspeed.md shows."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from torch import nn

from moe_dist.config import MoEConfig, RoutingConfig
from tests.engines.test_deepspeed import LAYOUTS  # noqa: F401  skips where deepspeed is not installed
from tests.support.distributed import run_ranks

SCRIPT = Path(__file__).parents[2] / "docs/examples/deepspeed_moe.py"


def run_script() -> str:
    """What it prints on this rank."""
    printed = io.StringIO()
    with patch.object(sys, "argv", [str(SCRIPT), "--local_rank=0"]), contextlib.redirect_stdout(printed):
        runpy.run_path(str(SCRIPT))
    return printed.getvalue()


def test_the_script_of_the_docs_learns_and_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 60
    first, second = run_ranks(2, run_script)
    assert second == ""
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", first)]
    loads = [sum(map(int, load.split(","))) for load in re.findall(r"load \[([\d, ]+)\]", first)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1
    assert set(loads) == {2 * 2 * 2 * 4 * 16}  # experts of a token, ranks, micro-batches, sequences, tokens


def refused(expert_parallel: int, num_experts: int) -> str:
    from moe_dist.engines.deepspeed import moe_layer

    with pytest.raises(ValueError, match="expert_parallel") as caught:
        moe_layer(8, MoEConfig(num_experts=num_experts, ffn_size=4), RoutingConfig(top_k=1), expert_parallel)
    return str(caught.value)


@pytest.mark.parametrize(("expert_parallel", "num_experts"), [(3, 3), (2, 3)])
def test_ranks_or_experts_that_do_not_divide_are_refused(expert_parallel: int, num_experts: int) -> None:
    said = f"expert_parallel: {expert_parallel} must divide the 2 ranks and moe.num_experts = {num_experts}"
    assert run_ranks(2, refused, expert_parallel, num_experts) == [said, said]


def grouped(expert_parallel: int) -> list[tuple[str, bool, float, list[tuple[int, ...]]]]:
    from moe_dist.engines.deepspeed import moe_layer, parameter_groups

    moe = MoEConfig(num_experts=4, ffn_size=6)
    model = nn.Sequential(nn.RMSNorm(8), moe_layer(8, moe, RoutingConfig(top_k=1), expert_parallel))
    return [
        (group["name"], group.get("moe", False), group["weight_decay"], [tuple(p.shape) for p in group["params"]])
        for group in parameter_groups(model, weight_decay=0.1)
    ]


def test_experts_have_their_own_parameter_group() -> None:
    router, norm, experts = (4, 8), (8,), [(2, 8, 12), (2, 6, 8)]
    for groups in run_ranks(2, grouped, 2):
        assert groups == [
            ("matrices", False, 0.1, [router]),
            ("vectors", False, 0.0, [norm]),
            ("ep_size_2", True, 0.1, experts),
        ]
    for groups in run_ranks(2, grouped, 1):
        assert groups == [
            ("matrices", False, 0.1, [router, (4, 8, 12), (4, 6, 8)]),
            ("vectors", False, 0.0, [norm]),
        ]
