"""Without deepspeed, megatron-core or CUDA: native trains, and what needs them says in one line what to do."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_dist.cli.main import app
from moe_dist.config.support import PACKAGES
from tests.support.runs import write_config

ON_CPU = "engine={name: megatron, emulate_cuda: true}"


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(write_config(tmp_path / "config"))


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python sees it: neither package is found, nor a part of it."""
    for module in [*sys.modules, "deepspeed", "megatron"]:
        if module.split(".")[0] in ("deepspeed", "megatron"):
            monkeypatch.setitem(sys.modules, module, None)


def said(*words: str) -> str:
    """What a command that a user got wrong says."""
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1
    return result.output.strip()


@pytest.mark.usefixtures("not_installed")
@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_commands_say_what_to_install(tiny: str, engine: str) -> None:
    package = PACKAGES[engine][1]
    message = (
        f"moe-dist: error: engine.name: {engine} needs the package {package}, which is not installed; "
        f"install it by `pip install {package}`, or use engine.name: native"
    )
    for ranks in ("1", "2"):
        assert said("train", tiny, "--ranks", ranks, f"engine.name={engine}") == message
    assert said("verify", tiny, "--engines", f"native,{engine}") == message


@pytest.mark.usefixtures("not_installed")
@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_a_script_that_imports_an_engine_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    for module in [name for name in sys.modules if name.startswith(f"moe_dist.engines.{engine}")]:
        monkeypatch.delitem(sys.modules, module)
    package = PACKAGES[engine][1]
    with pytest.raises(ImportError) as caught:
        importlib.import_module(f"moe_dist.engines.{engine}")
    message = str(caught.value)
    assert message.startswith(f"moe_dist.engines.{engine} needs the package {package}, which cannot be imported (")
    assert message.endswith(f"); install it by `pip install {package}`")


def test_without_both_native_trains(tiny: str, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules |= dict.fromkeys(['deepspeed', 'megatron']); from moe_dist.cli.main import app; app()"
    )
    arguments = ["train", tiny, "training.steps=2", "--output", str(tmp_path / "run")]
    ran = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "step 2/2" in ran.stdout


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_megatron_without_cuda_says_how_to_try_it(monkeypatch: pytest.MonkeyPatch, tiny: str, ranks: str) -> None:
    pytest.importorskip("megatron.core")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert said("train", tiny, "--ranks", ranks, "engine.name=megatron") == (
        "moe-dist: error: engine.name: megatron needs CUDA devices, and there is none for each rank; set "
        "engine.emulate_cuda: true to try it on CPUs, or use engine.name: native"
    )


def test_nothing_is_emulated_where_cuda_is(monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    pytest.importorskip("megatron.core")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert said("train", tiny, "--ranks", "2", ON_CPU) == (
        "moe-dist: error: engine.emulate_cuda: true is for machines without CUDA, and this one has it; leave it out"
    )
