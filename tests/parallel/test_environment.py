"""Each launcher's variables, as it sets them."""

import os
import subprocess
from typing import Any

import pytest

from moe_dist.config import ConfigError
from moe_dist.parallel.environment import Environment, read_environment

MASTER = {"MASTER_ADDR": "node7", "MASTER_PORT": "1234"}
TORCHRUN = {**MASTER, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {**MASTER, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
ALLOCATION = {"SLURM_JOB_ID": "41234", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "node[7-8]"}
SRUN = {
    **ALLOCATION,
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node7",
}
SINGLE = Environment(0, 1, 0, 1, "127.0.0.1", 0, "single")


def fifth_of_eight(launcher: str, **changes: Any) -> Environment:
    values = {"master_address": "node7", "master_port": 1234, **changes}
    return Environment(rank=5, num_ranks=8, local_rank=1, local_num_ranks=4, launcher=launcher, **values)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param(TORCHRUN, fifth_of_eight("torchrun"), id="torchrun"),
        pytest.param(DEEPSPEED, fifth_of_eight("torchrun"), id="deepspeed"),
        pytest.param({**OPEN_MPI, **MASTER}, fifth_of_eight("openmpi"), id="openmpi"),
        pytest.param(
            {**OPEN_MPI, "MASTER_ADDR": "node7"}, fifth_of_eight("openmpi", master_port=29500), id="openmpi, no port"
        ),
        pytest.param(SRUN, fifth_of_eight("slurm", master_port=20000 + 41234 % 20000), id="srun"),
        pytest.param({**SRUN, **MASTER}, fifth_of_eight("slurm"), id="srun with MASTER_ADDR"),
        pytest.param({**ALLOCATION, **TORCHRUN}, fifth_of_eight("torchrun"), id="torchrun in salloc"),
        pytest.param({**SRUN, **TORCHRUN}, fifth_of_eight("torchrun"), id="torchrun started by srun on each node"),
        pytest.param({**ALLOCATION, "SLURM_PROCID": "0"}, SINGLE, id="salloc without srun"),
        pytest.param({}, SINGLE, id="single"),
        pytest.param({"PATH": "/bin", "WORLD_SIZE": "8"}, SINGLE, id="a stray WORLD_SIZE"),
    ],
)
def test_launchers(variables: dict[str, str], expected: Environment) -> None:
    assert read_environment(variables) == expected


@pytest.mark.parametrize(
    ("tasks", "node", "expected"),
    [("4", 0, 4), ("4", 1, 4), ("4(x2)", 1, 4), ("4(x2),3", 0, 4), ("4(x2),3", 1, 4), ("4(x2),3", 2, 3), ("4,3", 1, 3)],
)
def test_ranks_on_a_slurm_node(tasks: str, node: int, expected: int) -> None:
    variables = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)}
    assert read_environment(variables).local_num_ranks == expected


def test_the_step_is_asked_before_the_allocation() -> None:
    assert read_environment({**SRUN, "SLURM_NTASKS_PER_NODE": "16"}).local_num_ranks == 4


def test_without_a_local_size_all_ranks_are_here() -> None:
    variables = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert read_environment(variables).local_num_ranks == 8


def test_the_first_host_of_several_is_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="node7\nnode8\n")

    monkeypatch.setattr(subprocess, "run", run)
    variables = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}
    assert read_environment(variables).master_address == "node7"
    assert asked == [["scontrol", "show", "hostnames", "node[7-8]"]]


def test_without_scontrol_the_master_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    variables = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}
    with pytest.raises(ConfigError, match=r"MASTER_ADDR: not set, and scontrol cannot say .* 'node\[7-8\]'"):
        read_environment(variables)


def test_the_shell_of_an_allocation_is_no_rank() -> None:
    """Some clusters run the shell of `salloc` as a step of its own."""
    assert read_environment({**SRUN, "SLURM_STEP_ID": "4294967290"}).launcher == "single"


def test_all_tasks_of_a_job_derive_one_port() -> None:
    ports = {read_environment({**SRUN, "SLURM_PROCID": str(rank)}).master_port for rank in range(8)}
    assert len(ports) == 1
    assert 1024 < ports.pop() < 65536


@pytest.mark.parametrize(
    ("variables", "missing", "message"),
    [
        (TORCHRUN, "LOCAL_RANK", "LOCAL_RANK: not set, though RANK is"),
        (TORCHRUN, "WORLD_SIZE", "WORLD_SIZE: not set, though RANK is"),
        (TORCHRUN, "MASTER_ADDR", "MASTER_ADDR: not set; give the address of the host of rank 0"),
        (OPEN_MPI, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE: not set, though OMPI_COMM_WORLD_RANK is"),
        (OPEN_MPI, "MASTER_ADDR", "MASTER_ADDR: not set; give the address of the host of rank 0"),
        (SRUN, "SLURM_LOCALID", "SLURM_LOCALID: not set, though SLURM_PROCID is"),
        (SRUN, "SLURM_NTASKS", "SLURM_NTASKS: not set, though SLURM_PROCID is"),
    ],
)
def test_a_missing_variable_is_named(variables: dict[str, str], missing: str, message: str) -> None:
    """A rank that took itself for a single process would train alone beside the others."""
    with pytest.raises(ValueError, match=message):
        read_environment({name: value for name, value in variables.items() if name != missing})


def test_export_sets_what_torch_and_deepspeed_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    read_environment({**SRUN, **MASTER}).export()
    assert os.environ == {**TORCHRUN, "LOCAL_SIZE": "4"}
    assert read_environment(os.environ) == fifth_of_eight("torchrun")
