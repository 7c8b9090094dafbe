"""`moe-dist audit` as a user meets it: the table, the bound, the exit codes, and how mistakes end."""

import dataclasses
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from moe_dist.cli.main import app
from moe_dist.config.methods import METHODS
from moe_dist.training import audit as experiment

EXPERT_CHOICE = ["routing.method=expert_choice"]
WEIGHT = "routing.capacity={factor: 1.25, policy: weight}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder that holds config.yaml with nothing but defaults: 4 MoE layers of 8 experts, top 2. Few trials."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "TRIALS", 10)
    (tmp_path / "config.yaml").touch()
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["audit", "config.yaml", *arguments], env={"COLUMNS": "200"})


def rows(result):
    """The first words of a line -> the rest of it, in columns."""
    lines = (line.split("  ") for line in result.stdout.splitlines() if line.strip())
    return {first: [word.strip() for word in rest if word.strip()] for first, *rest in lines}


def test_a_causal_router():
    result = run("--ranks", "1")
    assert result.exit_code == 0, result.output
    assert rows(result) == {
        "What the routing of a token depends on, with routing.method: top_k": [],
        "": ["training", "evaluation"],
        "later tokens of its sequence": ["no", "no"],
        "other sequences of the batch": ["no", "no"],
        "other ranks": ["not tried", "not tried"],
        "evaluation routes as training does": ["yes"],
        "What it tells of later tokens in training: 0 bits": [],
        "What it tells of later tokens in evaluation: 0 bits": [],
    }


def test_expert_choice():
    result = run(*EXPERT_CHOICE, "--ranks", "1")
    assert result.exit_code == 0, result.output
    found, evaluation = rows(result)["later tokens of its sequence"]
    assert found.startswith("yes (80% of 10 trials; first: token ")
    assert " changed experts {" in found
    assert evaluation == "no"
    assert rows(result)["evaluation routes as training does"][0].startswith("no (")
    # 8 (-1/4 log2 1/4 - 3/4 log2 3/4) = 6.4902, and 2 log2 3 = 3.1699
    assert "in training: at most 6.5 bits a token and layer, 25.97 in 4 MoE layers\n" in result.stdout
    assert "in evaluation: 0 bits\n" in result.stdout
    assert "arXiv 2408.15664 estimates more than 3.17 bits" in result.stdout


def test_two_ranks():
    """They are processes of their own; how `parallel` divides those of a run does not matter."""
    result = run(*EXPERT_CHOICE, "routing.group=global", "parallel.expert=8")
    assert result.exit_code == 0, result.output
    assert rows(result)["other ranks"][0].startswith("yes (80% of 10 trials; first: token ")
    assert rows(result)["other ranks"][1] == "no"


@pytest.mark.parametrize(
    ("method", "causal", "message"),
    [
        ("top_k", False, "top_k is documented as looking at later tokens in training, but no trial shows it"),
        ("expert_choice", True, "expert_choice is documented as causal in training, but its routing depends on later"),
    ],
)
def test_wrong_documentation_is_a_bug(monkeypatch, method, causal, message):
    monkeypatch.setitem(METHODS, method, dataclasses.replace(METHODS[method], causal=causal))
    result = run(f"routing.method={method}", "--ranks", "1")
    assert result.exit_code == 1
    assert f"This is a bug: routing.method: {message}" in result.stdout


@pytest.mark.parametrize("arguments", [[WEIGHT], ["routing.top_k=8", *EXPERT_CHOICE]], ids=str)
def test_what_is_no_bug(arguments):
    """A policy of capacity that looks ahead; experts that all take every token, so that nothing is left to depend."""
    result = run(*arguments, "--ranks", "1")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("minimum", "answer"), [(512, "no"), (128, "yes")])
def test_the_least_capacity_is_that_of_the_run(minimum, answer):
    """512 tokens in a sequence: with room for as many nothing is dropped, with room for a quarter something is."""
    capacity = f"routing.capacity={{factor: 0.1, policy: weight, minimum: {minimum}}}"
    result = run(capacity, "training.sequence_length=512", "--ranks", "1")
    assert rows(result)["later tokens of its sequence"][0].startswith(answer)


def test_zero_experts_and_groups_of_sequences():
    zero = ["routing.zero_experts={count: 2, target: 1.5}", "routing.bias.rule=sign"]
    result = run(WEIGHT, "routing.group.sequences=8", *zero, "--ranks", "1")
    assert result.exit_code == 0, result.output
    assert rows(result)["other sequences of the batch"][0].startswith("yes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["routing.top_k=9"], "routing.top_k: 9 is more than moe.num_experts = 8"),
        (["--ranks", "0"], "'--ranks': '0' is not valid; it should be an integer greater than 0"),
    ],
)
def test_mistakes(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("moe-dist: error: ")
    assert message in result.stderr
    assert result.stdout == ""


def test_mistakes_are_told_before_torch_is_loaded():
    code = (
        "import sys\nfrom moe_dist.cli.main import app\nsys.argv = ['moe-dist', 'audit', 'config.yaml', 'routing.top_k=9']\n"
        "try:\n    app()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "2 False\n"
