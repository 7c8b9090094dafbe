"""The command line as a user meets it: what `moe-dist config` prints, and how every mistake ends."""

import subprocess
import sys
from types import ModuleType

import pytest
from typer.testing import CliRunner

from moe_dist.cli.main import app
from moe_dist.config import Config, dump_config

WRONG = [
    # options and overrides after CONFIG, what the message names
    (["training.stps=3"], "training.stps: unknown key; did you mean training.steps?"),
    (["trainig.steps=3"], "trainig: unknown key; did you mean training?"),
    (["lr=3e-4"], "lr: unknown key; did you mean training.optimizer.learning_rate?"),
    (["training.steps"], "'training.steps': an override has the form section.key=value"),
    (["training.steps=[1"], "training.steps: '[1' is not valid YAML"),
    (["training.steps=-5"], "training.steps: -5 is not valid; it should be an integer greater than 0"),
    (["training.steps=ten"], "training.steps: 'ten' is not valid"),
    (["training.precision=float16"], "training.precision: 'float16' is not valid; it should be 'auto', 'float32'"),
    (["training.optimizer.learning_rate=0"], "training.optimizer.learning_rate: 0 is not valid"),
    (["training.global_batch_size=10", "--ranks", "4"], "training.global_batch_size: 10 is not a multiple of the 4"),
    (["training.micro_batch_size=5"], "training.micro_batch_size: 5 does not divide 16"),
    (["routing.top_k=9"], "routing.top_k: 9 is more than moe.num_experts = 8"),
    (["routing.capacity.factor=-1"], "routing.capacity.factor: -1 is not valid; it should be a number greater than 0"),
    (["routing.capacity.pad=true"], "routing.capacity.factor: required, but not given"),
    (["routing.group=glob"], "routing.group: 'glob' is not valid; it should be 'global', 'rank' or"),
    (["moe.num_experts=0"], "moe.num_experts: 0 is not valid"),
    (["parallel.expert=3"], "parallel.expert: 3 does not divide moe.num_experts = 8"),
    (["parallel.expert=2", "--ranks", "3"], "--ranks: 3 is not valid; it should be 2 or a multiple of it"),
    (["parallel.expert_map=[0]"], "parallel.expert_map: has 1 entries"),
    (["parallel.tensor=2"], "parallel.tensor: 2 is not offered by engine.name: native"),
    (["engine.name=megatron", "parallel.tensor=3"], "parallel.tensor: 3 does not divide the 4 key-value heads"),
    (["model.num_heads=3"], "model.num_heads: 3 does not divide model.hidden_size = 256"),
    (["data.source=files", "data.paths=[nowhere]"], "data.paths: there is no file or folder 'nowhere'"),
    (["training.optimizer.momentum=0.9"], "training.optimizer.momentum: 0.9 has no effect"),
    (["--ranks", "two"], "'--ranks': 'two' is not valid; it should be an integer greater than 0"),
    (["--ranks", "0"], "'--ranks': '0' is not valid; it should be an integer greater than 0"),
    (["--ranks"], "'--ranks' requires an argument"),
    (["--rank", "2"], "No such option: --rank"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder that holds config.yaml with nothing but defaults; no launcher."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "config.yaml").touch()
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def assert_refused(result, message):
    """Exit code 2, and one readable message on stderr that names what is wrong."""
    assert result.exit_code == 2
    assert result.stderr.startswith("moe-dist: error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["config", "train"])
@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_mistakes(command, arguments, message):
    assert_refused(run(command, "config.yaml", *arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "confg.yaml"], "CONFIG: there is no file 'confg.yaml'; did you mean 'config.yaml'?"),
        (["config"], "Missing argument 'CONFIG'"),
        (["trian", "config.yaml"], "No such command 'trian'. Did you mean 'train'?"),
        (["--frob"], "No such option: --frob"),
        (["train", "config.yaml", "--output"], "'--output' requires an argument"),
    ],
)
def test_mistakes_before_the_config(arguments, message):
    assert_refused(run(*arguments), message)


def test_several_mistakes_are_a_list():
    result = run("config", "config.yaml", "routing.top_k=9", "model.num_heads=3")
    assert result.exit_code == 2
    first, *others = result.stderr.splitlines()
    assert first == "moe-dist: error:"
    assert [line.split(":")[0] for line in others] == ["  model.num_heads", "  routing.top_k"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "config.yaml", "parallel.expert=3", "--ranks", "3"], "parallel.expert: 3 does not divide"),
        (["config", "nowhere.yaml"], "CONFIG: there is no file 'nowhere.yaml'"),
        (["config", "config.yaml", "--ranks", "x"], "'--ranks': 'x' is not valid"),
    ],
)
def test_mistakes_in_a_process_of_their_own(arguments, message):
    result = subprocess.run([sys.executable, "-m", "moe_dist", *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("moe-dist: error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_command_line_does_not_import_torch():
    code = "import sys, moe_dist.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_config_prints_yaml_that_means_the_same(folder):
    result = run("config", "config.yaml", "moe.num_experts=16", f"data.suffixes={['.py', '.txt', '.md']}")
    assert result.exit_code == 0
    assert result.stdout.startswith(dump_config(Config()).replace("num_experts: 8", "num_experts: 16"))


def test_config_does_not_wrap_long_values(folder):
    path = folder / ("a" * 200)
    path.touch()
    result = run("config", "config.yaml", "data.source=files", f"data.paths=[{path}]")
    assert f"  - {path}\n" in result.stdout


def lines_of(result):
    assert result.exit_code == 0, result.output
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_config_prints_the_layout():
    lines = lines_of(run("config", "config.yaml", "parallel.expert=2", "training.micro_batch_size=2", "--ranks", "4"))
    for line in (
        "16 sequences a step = 4 data-parallel ranks x micro-batch 2 x 2 accumulation steps",
        "Layout of 4 ranks",
        "data parallel 4 [0-3]",
        "expert parallel 2 [0-1] [2-3]",
        "expert data parallel 2 [0, 2] [1, 3]",
        "0 0, 2 0-3",
        "1 1, 3 4-7",
        "What depends on the layout: nothing",
    ):
        assert line in lines


def test_config_prints_an_uneven_expert_map():
    lines = lines_of(run("config", "config.yaml", "parallel.expert=2", "parallel.expert_map=[0,1,1,0,1,1,1,1]"))
    assert "0 0 0, 3" in lines
    assert "1 1 1-2, 4-7" in lines


def test_config_prints_the_groups_of_hierarchical_dispatch():
    keys = ("parallel.expert=4", "parallel.dispatch=hierarchical")
    lines = lines_of(run("config", "config.yaml", *keys, "parallel.ranks_per_node=2", "--ranks", "8"))
    assert "inside a node 2 [0-1] [2-3] [4-5] [6-7]" in lines
    assert "between nodes 2 [0, 2] [1, 3] [4, 6] [5, 7]" in lines
    lines = lines_of(run("config", "config.yaml", *keys))
    assert "inside a node as launched" in lines
    assert "between nodes as launched" in lines


def test_config_prints_slices_of_experts():
    lines = lines_of(
        run("config", "config.yaml", "parallel.expert=2", "parallel.expert_tensor=2", "--ranks", "8", "moe.ffn_size=64")
    )
    for line in (
        "data parallel 8 [0-7]",
        "expert parallel 2 x 2 [0-3] [4-7]",
        "expert tensor parallel 2 [0-1] [2-3] [4-5] [6-7]",
        "expert data parallel 2 [0, 4] [1, 5] [2, 6] [3, 7]",
        "0 0-1, 4-5 0-3",
        "1 2-3, 6-7 4-7",
        "parallel.expert_tensor above 1 yes no yes",
    ):
        assert line in lines


def test_config_prints_tensor_parallel_groups_and_interleaved_stages():
    engine = ["engine={name: megatron, sequence_parallel: true}", "model.num_layers=8"]
    sizes = "parallel={tensor: 2, pipeline: 2, pipeline_interleaving: 2}"
    lines = lines_of(run("config", "config.yaml", *engine, sizes, "--ranks", "8"))
    for line in (
        "16 sequences a step = 2 data-parallel ranks x micro-batch 4 x 2 accumulation steps",
        "tensor and sequence parallel 2 [0-1] [2-3] [4-5] [6-7]",
        "pipeline stages 2 [0-3] [4-7]",
        "0 [0-1] [4-5]",
        "1 [2-3] [6-7]",
    ):
        assert line in lines


def test_config_prints_context_parallel_groups():
    lines = lines_of(
        run("config", "config.yaml", "engine.name=megatron", "parallel={context: 2, tensor: 2}", "--ranks", "8")
    )
    for line in (
        "data parallel 2 [0, 4] [1, 5] [2, 6] [3, 7]",
        "tensor parallel 2 [0-1] [2-3] [4-5] [6-7]",
        "context parallel 2 [0, 2] [1, 3] [4, 6] [5, 7]",
    ):
        assert line in lines


def test_config_abbreviates_large_layouts():
    sizes = ["parallel.expert=32", "moe.num_experts=64", "training.global_batch_size=640", "--ranks", "640"]
    lines = lines_of(run("config", "config.yaml", *sizes, "engine.sharding=replicate"))
    assert "expert parallel 32 [0-31] [32-63] ... [608-639]" in lines
    assert "0 0, 32, ..., 608 0-1" in lines
    assert "31 31, 63, ..., 639 62-63" in lines


def test_config_prints_sizes_and_support():
    lines = lines_of(run("config", "config.yaml"))
    assert "routed experts 17,301,504 4,325,376" in lines
    assert "parallel.tensor above 1 no yes yes" in lines


def test_config_prints_what_depends_on_the_layout():
    lines = lines_of(run("config", "config.yaml", "routing.group=rank", "routing.capacity.factor=1.5"))
    assert lines[lines.index("What depends on the layout:") + 1].startswith("routing.group: rank")


def test_without_a_command_there_is_help():
    result = run()
    assert result.exit_code == 0
    assert "config" in result.stdout
    assert "train" in result.stdout


class Calls(ModuleType):
    """Stands in for moe_dist.cli.train."""

    def __init__(self):
        super().__init__("moe_dist.cli.train")
        self.arguments = None

    def train(self, *arguments):
        self.arguments = arguments


@pytest.fixture
def calls(monkeypatch):
    module = Calls()
    monkeypatch.setitem(sys.modules, "moe_dist.cli.train", module)
    return module


def test_train_passes_its_arguments_on(calls, folder):
    result = run(
        "train", "config.yaml", "training.steps=3", "--ranks", "2", "--output", "out", "--resume", "moe.num_experts=4"
    )
    assert result.exit_code == 0, result.output
    config, overrides, ranks, output, resume = calls.arguments
    assert (str(config), overrides, ranks) == ("config.yaml", ["training.steps=3", "moe.num_experts=4"], 2)
    assert (str(output), resume) == ("out", True)


@pytest.mark.parametrize("option", ["--local_rank=0", "--local_rank 0", "--local-rank=0", "--local-rank 0"])
@pytest.mark.parametrize(
    "place",
    [
        "{} train config.yaml",
        "train {} config.yaml",
        "train config.yaml training.steps=3 {}",
    ],  # the deepspeed launcher's first
)
def test_a_launchers_local_rank_is_ignored(calls, option, place):
    assert run(*place.format(option).split()).exit_code == 0
    assert calls.arguments is not None


@pytest.fixture
def worker(monkeypatch):
    """The environment of rank 1 of 4 under torchrun."""
    for name, value in {
        "RANK": 1,
        "WORLD_SIZE": 4,
        "LOCAL_RANK": 1,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("ranks", [[], ["--ranks", "4"]])
def test_in_a_worker_the_launcher_says_how_many_ranks(calls, worker, ranks):
    assert run("train", "config.yaml", *ranks).exit_code == 0
    assert calls.arguments[2] == 4


def test_in_a_worker_another_number_of_ranks_is_refused(worker):
    assert_refused(run("train", "config.yaml", "--ranks", "2"), "--ranks: 2 is not valid; the launcher started 4 ranks")


def test_a_launcher_without_world_size_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert_refused(run("train", "config.yaml"), "WORLD_SIZE: not set, though RANK is")
