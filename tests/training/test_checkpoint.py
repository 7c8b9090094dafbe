"""A run that is stopped and resumed is the run that was not stopped, on the same layout to the bit and on any other."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch.distributed.checkpoint as dcp

from moe_dist.config import ConfigError, dump_config, load_config
from moe_dist.telemetry.records import read_records
from moe_dist.training.checkpoint import complete_checkpoints, save_checkpoint
from moe_dist.training.folder import open_folder
from tests.support.distributed import run_ranks
from tests.support.runs import full_state, start, write_config

State = dict[str, npt.NDArray]

SGD = ["training.optimizer.name=sgd", "training.optimizer.momentum=0.9", "training.optimizer.learning_rate=0.1"]
BF16, REPLICATE, EP2 = "training.precision=bfloat16", "engine.sharding=replicate", "parallel.expert=2"
SLICES2 = "parallel.expert_tensor=2"
EXACT = {
    # number of ranks, overrides: each optimiser, precision and sharding with each other, whole and split experts
    "adamw, float32, full, EP 2": (2, [EP2]),
    "adamw, bfloat16, full, data 2": (2, [BF16]),
    "adamw, bfloat16, replicate, EP 2 x data 2": (4, [BF16, REPLICATE, EP2]),
    "sgd, float32, replicate, data 2": (2, [*SGD, REPLICATE]),
    "sgd, bfloat16, full, EP 2 x data 2": (4, [*SGD, BF16, EP2]),
    "adamw, float32, full, slices 2 x data 2": (4, [SLICES2]),
}
SHUFFLED = "parallel.expert_map=[1,0,0,1,0,1,1,0]"
LAYOUTS = {
    # number of ranks, overrides
    "EP 1": (1, []),
    "EP 2, contiguous": (2, [EP2]),
    "data 2": (2, []),
    "EP 4": (4, ["parallel.expert=4"]),
    "EP 2 x data 2, replicated": (4, [EP2, REPLICATE, "parallel.expert_map=[0,1,0,1,0,1,0,1]"]),
    "slices 2": (2, [SLICES2]),
    "slices 2 x data 2": (4, [SLICES2]),
    "EP 2 x slices 2, unequal": (4, [EP2, SLICES2, "parallel.expert_map=[0,1,0,0,0,0,0,1]"]),
}
WRITERS = {
    # number of ranks, overrides
    "adamw, EP 2": (2, [EP2, SHUFFLED]),
    "adamw, slices 2 x data 2": (4, [SLICES2]),
    "sgd, EP 2 x slices 2": (4, [EP2, SLICES2, SHUFFLED]),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("checkpoint"))


def without_speed(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what is not a function of the config."""
    timed = ("tokens_per_second", "seconds")
    return [{key: value for key, value in r.items() if key not in timed} for r in read_records(path)]


def names_in(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a checkpoint."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {name: tuple(tensor.size) for name, tensor in metadata.items()}


# The same layout


def train_and_resume(tiny: Path, overrides: list[str], folder: Path) -> tuple[State, State]:
    """Eight steps in one run, and the last four of them in another; the state after each."""
    whole = start(tiny, [*overrides, "training.checkpoint.interval=4"], folder / "whole")
    whole.run()
    resumed = start(tiny, overrides, folder / "resumed", folder / "whole/checkpoints/step_00000004")
    assert resumed.progress.step == 4
    resumed.run()
    return full_state(whole.engine), full_state(resumed.engine)


@pytest.mark.parametrize("case", EXACT)
def test_resume_is_exact_to_the_bit(case: str, tiny: Path, tmp_path: Path) -> None:
    num_ranks, overrides = EXACT[case]
    for whole, resumed in run_ranks(num_ranks, train_and_resume, tiny, overrides, tmp_path):
        assert whole.keys() == resumed.keys()
        assert not [name for name in whole if not np.array_equal(whole[name], resumed[name])]
    whole, resumed = (without_speed(tmp_path / name / "metrics.jsonl") for name in ("whole", "resumed"))
    assert [record["step"] for record in whole] == list(range(1, 9))
    assert whole[4:] == resumed
    assert all(layer["bias_range"] > 0 for record in whole for layer in record["balance"]["layers"].values())


NO_BALANCING = ["routing.bias.rule=none", "routing.losses={}"]
STATEFUL = {
    "momentum": ["routing.bias.rule=momentum"],
    "quantile": ["routing.bias={rule: quantile, decay: 0.5}"],
    "load adjustment": ["routing.load_adjustment={strength: 0.5}"],
    "adaptive": ["routing.losses.load_balance.adaptive={decay: 0.5}", "routing.capacity={factor: 1.0}"],
    "noisy_top_k": ["routing.method=noisy_top_k", *NO_BALANCING],
    "hash": ["routing.method=hash", *NO_BALANCING],
    "sinkhorn": ["routing.method=sinkhorn", *NO_BALANCING],
    "optimal_transport": ["routing.method=optimal_transport", *NO_BALANCING],
    "gatepro_ot": ["routing.method=gatepro_ot", *NO_BALANCING],
    "expert_threshold": ["routing.method=expert_threshold", *NO_BALANCING],
}
"""What a balancer keeps beside a bias, by which routing goes on as it would have."""


@pytest.mark.parametrize("case", STATEFUL)
def test_what_a_balancer_keeps_is_in_the_checkpoint(case: str, tiny: Path, tmp_path: Path) -> None:
    overrides = [*STATEFUL[case], "training.evaluation={interval: 4, tokens: 64}"]
    ((whole, resumed),) = run_ranks(1, train_and_resume, tiny, overrides, tmp_path)
    assert not [name for name in whole if not np.array_equal(whole[name], resumed[name])]
    records = [without_speed(tmp_path / name / "metrics.jsonl") for name in ("whole", "resumed")]
    assert [r for r in records[0] if r["step"] > 4] == records[1]


# Another layout


def train_and_save(tiny: Path, overrides: list[str], folder: Path) -> State:
    """Four steps and a checkpoint; the state in it. Then four more."""
    run = start(tiny, [*overrides, "training.steps=4"], folder)
    run.run()
    saved = full_state(run.engine)
    start(tiny, overrides, folder / "rest", folder / "checkpoints/step_00000004").run()
    return saved


def load_and_train(tiny: Path, overrides: list[str], folder: Path, checkpoint: Path) -> State:
    """The state that is loaded; then four steps."""
    run = start(tiny, overrides, folder, checkpoint)
    loaded = full_state(run.engine)
    run.run()
    return loaded


def joined(states: list[State]) -> State:
    """The state of all ranks together; what several have is the same on each."""
    whole: State = {}
    for state in states:
        for name, tensor in state.items():
            assert np.array_equal(tensor, whole.setdefault(name, tensor)), name
    return whole


@pytest.fixture(scope="module", params=WRITERS)
def written(request, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, State]:
    """Precision and optimiser, folder and saved state of a run of each of WRITERS, in float64."""
    num_ranks, layout = WRITERS[request.param]
    overrides = ["training.precision=float64", *(SGD if "sgd" in request.param else [])]
    folder = tmp_path_factory.mktemp("written")
    states = run_ranks(num_ranks, train_and_save, tiny, [*overrides, *layout], folder)
    return overrides, folder, joined(states)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_reads_it_and_goes_on_with_equal_losses(layout: str, written, tiny: Path, tmp_path) -> None:
    overrides, folder, saved = written
    num_ranks, more = LAYOUTS[layout]
    checkpoint = folder / "checkpoints/step_00000004"
    states = run_ranks(num_ranks, load_and_train, tiny, [*overrides, *more], tmp_path, checkpoint)
    loaded = joined(states)
    assert loaded.keys() == saved.keys() == names_in(checkpoint).keys()
    assert not [name for name in saved if not np.array_equal(saved[name], loaded[name])]
    expected, found = (list(read_records(path / "metrics.jsonl")) for path in (folder / "rest", tmp_path))
    assert [record["step"] for record in found] == [5, 6, 7, 8]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], abs=1e-8, rel=0)


def test_every_weight_and_moment_of_an_expert_has_a_key_of_its_own(written) -> None:
    overrides, folder, saved = written
    moments = ["optimizer.momentum_buffer"] if SGD[0] in overrides else ["optimizer.exp_avg", "optimizer.exp_avg_sq"]
    shapes = {"w_gate": (32, 16), "w_up": (32, 16), "w_down": (16, 32)}
    expected = {
        f"{what}.layers.{layer}.experts.{expert}.{weight}": shape
        for what in ("model", *moments)
        for layer in (1, 2)
        for expert in range(8)
        for weight, shape in shapes.items()
    }
    found = names_in(folder / "checkpoints/step_00000004")
    assert {name: shape for name, shape in found.items() if ".experts." in name} == expected
    assert {name for name in found if "expert" in name} == expected.keys()
    assert found["balance.1.bias"] == found["balance.2.bias"] == (8,)
    assert saved["optimizer.updates"] == (0 if SGD[0] in overrides else 4)  # SGD does not count them


def test_the_map_of_experts_is_in_the_checkpoint(written) -> None:
    """As data: which expert-parallel rank has which expert, and in how many slices."""
    _, folder, _ = written
    checkpoint = folder / "checkpoints/step_00000004"
    parallel = load_config(checkpoint / "config.yaml").parallel
    assert json.loads((checkpoint / "run.json").read_text()) == {
        "format": 1,
        "step": 4,
        "owner_of_expert": [1, 0, 0, 1, 0, 1, 1, 0] if parallel.expert == 2 else [0] * 8,
        "expert_tensor": parallel.expert_tensor,
    }


# Which checkpoints there are


def save_and_fail(tiny: Path, folder: Path) -> list[str]:
    """Save after steps 1 and 2, then fail at step 3 after the tensors are written and once more after that."""
    run = start(tiny, [], folder)
    checkpoints = run.folder.checkpoints
    for step in (1, 2):
        save_checkpoint(checkpoints, run.engine, run.config, step)
    rename = Path.rename

    def fail(path: Path, target: Path) -> None:
        if path.name.endswith(".partial"):
            raise OSError("disk full")
        rename(path, target)

    Path.rename = fail  # type: ignore[method-assign, assignment]
    try:
        for _ in range(2):  # the second time over the remains of the first
            with pytest.raises(OSError, match="disk full"):
                save_checkpoint(checkpoints, run.engine, run.config, 3)
    finally:
        Path.rename = rename  # type: ignore[method-assign]
    found = [path.name for path in complete_checkpoints(checkpoints)]
    save_checkpoint(checkpoints, run.engine, run.config, 3)
    return found


def test_a_checkpoint_that_was_not_finished_is_never_used_and_is_written_over(tiny: Path, tmp_path: Path) -> None:
    assert run_ranks(1, save_and_fail, tiny, tmp_path) == [["step_00000001", "step_00000002"]]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000003"]  # keep: 2


def test_complete_checkpoints_are_in_order_of_their_steps(tmp_path: Path) -> None:
    for name in ("step_00000020", "step_00000003", "step_100000000", "step_00000100.partial", "step_7", "other"):
        (tmp_path / name).mkdir()
    steps = [path.name for path in complete_checkpoints(tmp_path)]
    assert steps == ["step_00000003", "step_00000020", "step_100000000"]
    assert complete_checkpoints(tmp_path / "nowhere") == []


def test_a_run_goes_on_from_the_last_complete_checkpoint_or_from_its_start(tiny: Path, tmp_path: Path) -> None:
    config = load_config(tiny)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "checkpoints/step_00000008.partial").mkdir(parents=True)
    assert open_folder(tmp_path, config, resume=True).checkpoint is None
    (tmp_path / "checkpoints/step_00000004").mkdir()
    assert open_folder(tmp_path, config, resume=True).checkpoint == tmp_path / "checkpoints/step_00000004"
    with pytest.raises(ConfigError, match="holds a run; give --resume"):
        open_folder(tmp_path, config, resume=False)


def train(tiny: Path, overrides: list[str], folder: Path) -> None:
    start(tiny, overrides, folder).run()


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_ones_are_kept(keep: int, tiny: Path, tmp_path: Path) -> None:
    overrides = ["training.steps=5", "training.checkpoint.interval=1", f"training.checkpoint.keep={keep}"]
    run_ranks(2, train, tiny, overrides, tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step_{step:08d}" for step in range(6 - keep, 6)]
    for name in names:  # the config that wrote it, as it was
        config = load_config(tmp_path / "checkpoints" / name / "config.yaml")
        assert config == load_config(tiny, overrides)


# Checkpoints of something else


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    run_ranks(2, train, tiny, ["training.steps=1", EP2], folder)
    return folder / "checkpoints/step_00000001"


def refusal(tiny: Path, overrides: list[str], folder: Path, checkpoint: Path) -> str:
    try:
        start(tiny, overrides, folder, checkpoint)
    except ConfigError as error:
        return str(error)
    return "accepted"


REFUSED = {
    # override -> what the message names
    "moe.num_experts=16": r"router\S* .*shape \(8, 32\), this config gives \(16, 32\)",
    "moe.num_experts=4": r"router\S* .*shape \(8, 32\), this config gives \(4, 32\)",
    "moe.ffn_size=8": r"w_\S* .*shape \(\d+, \d+\), this config gives \(\d+, \d+\)",
    "moe.num_shared_experts=2": r"shared\S* .*shape \(16, 32\), this config gives \(32, 32\)",
    "moe.shared_gate=false": r"has model.layers\.1\.moe\.shared\S*gate",
    "moe.activation=gelu": r"has model\.\S*w_gate",
    "model.num_layers=4": r"has no model\.layers\.3\.",
    "model.num_layers=2": r"has model\.layers\.2\.",
    "model.hidden_size=16": r"shape \(257, 32\), this config gives \(257, 16\)",
    "model.tie_embeddings=false": r"has no model\.output",
    "training.optimizer.name=sgd": r"has optimizer\.exp_avg",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_checkpoint_of_another_model_is_refused(override: str, checkpoint: Path, tiny: Path, tmp_path: Path) -> None:
    (message,) = run_ranks(1, refusal, tiny, [override], tmp_path, checkpoint)
    assert message.startswith("--resume: ")
    assert str(checkpoint) in message
    assert re.search(REFUSED[override], message)
    assert not tmp_path.joinpath("config.yaml").exists()


def test_other_formats_are_refused(checkpoint: Path, tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    about = copy / "run.json"
    about.write_text(about.read_text().replace('"format": 1', '"format": 9'))
    messages = run_ranks(2, refusal, tiny, [EP2], tmp_path, copy)
    assert messages == [f"--resume: {copy} has format 9; this version reads 1"] * 2
