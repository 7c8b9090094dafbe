"""The same config under torchrun and under DeepSpeed's launcher, on two "nodes" of this machine, ends with the same loss.

Each node is a launcher of its own, as where it may not use ssh. To start one takes ten seconds, so all start at once.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.runs import write_config
from tests.training.test_command import kill_all

if find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[1]
TIMEOUT = 600
"""Seconds after which the test gives up: many times what it takes."""
OVERRIDES = {
    "native": ["engine.name=native"],
    "deepspeed": ["engine.name=deepspeed", "engine.zero_stage=2"],
}


def torchrun(node: int, port: int, folder: Path) -> list[str]:
    settings = f"--nnodes 2 --node-rank {node} --nproc-per-node 1 --master-addr 127.0.0.1 --master-port {port}"
    return ["torch.distributed.run", *settings.split(), "-m", "moe_dist"]


def deepspeed(node: int, port: int, folder: Path) -> list[str]:
    hostfile = folder / "hostfile"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    settings = f"--no_ssh --num_nodes 2 --node_rank {node} --master_addr 127.0.0.1 --master_port {port} --module"
    return ["deepspeed.launcher.runner", "--hostfile", str(hostfile), *settings.split(), "moe_dist"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def final_losses(engine: str, folder: Path) -> dict[str, list[float]]:
    """The losses by launcher; all nodes of all launchers run at the same time."""
    launchers, config = {"torchrun": torchrun, "deepspeed": deepspeed}, write_config(folder / "config")
    words = ["train", str(config), *OVERRIDES[engine], "parallel.expert=2", "training.steps=4"]
    outer = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = outer | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes: dict[Path, subprocess.Popen] = {}
    for launcher, command in launchers.items():
        port = free_port()
        for node in range(2):
            arguments = [*command(node, port, folder), *words, "--output", str(folder / launcher)]
            log = folder / f"{launcher}_{node}.log"
            with log.open("w") as said:
                pipes = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": subprocess.STDOUT}
                processes[log] = subprocess.Popen([sys.executable, "-m", *arguments], env=environment, **pipes)
    try:
        for log, process in processes.items():
            assert process.wait(TIMEOUT) == 0, log.read_text()
    finally:
        for process in processes.values():
            kill_all(process)
    lines = {launcher: (folder / launcher / "metrics.jsonl").read_text().splitlines() for launcher in launchers}
    return {launcher: [json.loads(line)["loss"] for line in found] for launcher, found in lines.items()}


def documented() -> Iterator[str]:
    """The lines of the documents that call DeepSpeed's launcher."""
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL):
            yield from (line for line in block.splitlines() if line.startswith("deepspeed "))


def test_the_documented_commands_are_deepspeeds() -> None:
    from deepspeed.launcher.runner import parse_args

    commands = [parse_args(shlex.split(line.replace("_rank N", "_rank 1"))[1:]) for line in documented()]
    assert len(commands) >= 4
    for command in commands:
        assert (command.module, command.user_script, command.user_args[0]) == (True, "moe_dist", "train")
    assert {command.num_gpus for command in commands} == {-1, 8}
    assert any(command.no_ssh and command.node_rank == 1 and command.hostfile == "hostfile" for command in commands)


@pytest.mark.parametrize("engine", OVERRIDES)
def test_two_nodes_end_with_the_same_loss(engine: str, tmp_path: Path) -> None:
    losses = final_losses(engine, tmp_path)
    assert len(losses["torchrun"]) == 4
    assert losses["deepspeed"] == losses["torchrun"]
