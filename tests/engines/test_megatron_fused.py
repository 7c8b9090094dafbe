"""Fused parts: what is missing is said in one line, NVIDIA's Apex is told from another package of that name, and both run.

Stand-ins, in folders of their own: no machine of these tests has TransformerEngine or Apex.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_dist.engines import megatron_fused
from tests.support.equality import changed, trace

pytest.importorskip("megatron.core")

from tests.engines.test_megatron import FLOAT32, MEGATRON

if find_spec("apex") or find_spec("transformer_engine"):
    pytest.skip("the stand-ins would stand beside the real ones", allow_module_level=True)

OTHER = {"apex/__init__.py": "from pyramid.session import UnencryptedCookieSessionFactoryConfig\n"}
"""As PyPI's does, which is a toolkit for web pages."""
ADAM = """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                mean = state["exp_avg"].lerp_(p.grad, 1 - first) / (1 - first ** group["step"])
                square = state["exp_avg_sq"].lerp_(p.grad.square(), 1 - second) / (1 - second ** group["step"])
                p.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]))

class FusedSGD: ...
"""
NVIDIA = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": ADAM,
    "apex/normalization/__init__.py": "from torch.nn import RMSNorm\nclass FusedRMSNorm(RMSNorm): ...\n",
}
RUN = """
import sys, torch, torch.distributed as dist
from tests.engines.test_megatron import FLOAT32, MEGATRON
from tests.support.equality import build_engine, changed, train_step

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
engine, data = build_engine(changed(FLOAT32, MEGATRON))
print(*(train_step(engine, data, step).loss for step in range(3)))
print(*{type(part.optimizer).__module__ for part in engine.optimizer.chained_optimizers})
print(engine.state()["optimizer.updates"].item())
"""
ROOT = Path(__file__).parents[2]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, "TransformerEngine and NVIDIA's Apex are not installed: norms, Adam and attention are PyTorch's"),
        (
            OTHER,
            "TransformerEngine and NVIDIA's Apex are not installed: norms, Adam and attention are PyTorch's (the package apex "
            "that is installed is another one; NVIDIA's is built from github.com/NVIDIA/apex)",
        ),
        (NVIDIA, "TransformerEngine is not installed: norms and Adam are Apex's, attention is PyTorch's"),
        ({"transformer_engine/__init__.py": ""}, ""),
        (OTHER | {"transformer_engine/__init__.py": ""}, ""),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], line: str
) -> None:
    write(tmp_path, files)
    monkeypatch.syspath_prepend(tmp_path)
    assert megatron_fused.missing_parts() == line
    assert "apex" not in sys.modules


def test_apex_norm_is_taken_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, NVIDIA)
    monkeypatch.syspath_prepend(tmp_path)
    config = SimpleNamespace(sequence_parallel=True)
    norms = [megatron_fused.rms_norm(emulated)(config, 6) for emulated in (False, True)]
    assert [type(norm).__mro__[1].__name__ for norm in norms] == ["FusedRMSNorm", "RMSNorm"]
    assert all(norm.weight.sequence_parallel for norm in norms)
    hidden = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norms[0](hidden.bfloat16()), norms[1](hidden.bfloat16().float()))
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(("files", "module"), [(OTHER, "torch.optim.adamw"), (NVIDIA, "apex.optimizers")])
def test_it_trains_alike_with_either_apex(tmp_path: Path, files: dict[str, str], module: str) -> None:
    write(tmp_path, files)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(tmp_path / "store")]
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    losses, modules, updates = output.stdout.splitlines()
    assert (modules, updates) == (module, "3.0")
    expected = trace(changed(FLOAT32, MEGATRON), 1, 3).losses
    assert [float(loss) for loss in losses.split()] == pytest.approx(expected, abs=1e-5)
    assert output.stderr.count("not NVIDIA's") + output.stderr.count("is another one") == (files is OTHER)
