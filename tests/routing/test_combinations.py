"""Each routing method with each way of balancing and each capacity: refused with the reason of the table, or it trains.

And what docs/routing.md and `moe-dist config` say of the methods is what the table says.
"""

import re
from functools import cache, reduce
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from moe_dist.cli.main import app
from moe_dist.config import ConfigError, build_config, load_config
from moe_dist.config.methods import FEATURES, METHODS, combinations_table, methods_table, refusal
from tests.support.distributed import run_ranks
from tests.support.equality import Tree, build_engine, changed, train_step

BASE: Tree = {
    "model": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 8, "init_std": 0.2},
    "moe": {"num_experts": 8, "ffn_size": 4},
    "routing": {"top_k": 2, "init_std": 0.5},
    "training": {
        "global_batch_size": 2,
        "sequence_length": 8,
        "optimizer": {"learning_rate": 0.03},
        "precision": "float64",
    },
    "engine": {"sharding": "replicate"},
}
METHOD_SETTINGS: dict[str, Tree] = {"base": {"top_k": 1}, "hash": {"hash": {"weights": "learned"}}}
GROUPS = {"expert_groups": {"count": 4}}

BALANCING: dict[str, tuple[Tree, tuple[str, ...]]] = {
    # name: what it adds to `routing`, and the features of the table that this asks for
    "none": ({}, ()),
    **{
        f"bias {rule}": ({"bias": {"rule": rule, "rate": 0.3}}, ("bias",))
        for rule in ("sign", "proportional", "multiplicative", "momentum", "quantile")
    },
    "load_balance": ({"losses": {"load_balance": {"coefficient": 0.1}}}, ("losses.load_balance",)),
    "device": ({"losses": {"device": {"coefficient": 0.1, "scope": "micro_batch"}}} | GROUPS, ("losses.device",)),
    "communication": (
        {"losses": {"communication": {"coefficient": 0.1, "scope": "global_batch"}}} | GROUPS,
        ("losses.communication",),
    ),
    **{
        name: ({"losses": {name: {"coefficient": 0.1}}}, (f"losses.{name}",))
        for name in ("importance", "load", "z", "simbal", "orthogonality")
    },
    "load_adjustment": ({"load_adjustment": {"strength": 1.0}}, ("load_adjustment",)),
    "zero_experts": (
        {"zero_experts": {"count": 2, "target": 0.5}, "bias": {"rule": "proportional"}},
        ("zero_experts", "bias"),
    ),
    "group limit": ({"expert_groups": {"count": 4, "keep": 1}}, ("expert_groups.keep",)),
}
CAPACITY: dict[str, tuple[Tree, tuple[str, ...]]] = {
    "none": ({}, ()),
    **{
        policy: ({"capacity": {"factor": 0.5, "policy": policy}}, ("capacity",))
        for policy in ("position", "weight", "random", "batch_priority")
    },
    "reroute": ({"capacity": {"factor": 1.0, "overflow": "reroute"}}, ("capacity", "capacity.overflow")),
    "auto": ({"capacity": {"factor": "auto", "pad": True}}, ("capacity",)),
}


def cell(method: str, balancing: str, capacity: str) -> tuple[Tree, dict[str, str]]:
    """The config, and the features that the table refuses in it, with the reasons."""
    routing = {"method": method, **METHOD_SETTINGS.get(method, {})}
    tree = changed(BASE, *({"routing": part} for part in (routing, BALANCING[balancing][0], CAPACITY[capacity][0])))
    features = BALANCING[balancing][1] + CAPACITY[capacity][1]
    refused = {feature: reason for feature in features if (reason := refusal(method, feature))}
    if "capacity" in refused:  # what goes with it is not told of
        refused.pop("capacity.overflow", None)
    return tree, refused


def train(tree: Tree) -> tuple[list[float], dict[str, np.ndarray]]:
    """On the only rank: losses of five steps, and what the model and its balancers are then."""
    engine, data = build_engine(tree)
    results = [train_step(engine, data, step) for step in range(5)]
    assert not any(result.skipped for result in results)
    return [result.loss for result in results], {
        name: value.detach().numpy() for name, value in engine.model.state_dict().items()
    }


@cache
def trained(method: str, balancing: str, capacity: str) -> dict[str, np.ndarray]:
    """The weights of a cell after training."""
    ((losses, state),) = run_ranks(1, train, cell(method, balancing, capacity)[0])
    assert np.isfinite(losses).all()
    assert all(np.isfinite(value).all() for value in state.values())
    return {name: value for name, value in state.items() if ".balance." not in name}


def is_close(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return all(np.allclose(first[name], value, rtol=0, atol=1e-9) for name, value in second.items())


@pytest.mark.parametrize("capacity", CAPACITY)
@pytest.mark.parametrize("balancing", BALANCING)
@pytest.mark.parametrize("method", METHODS)
def test_cell(method, balancing, capacity):
    tree, refused = cell(method, balancing, capacity)
    if refused:
        assert_refused(tree, refused)
        return
    weights = trained(method, balancing, capacity)
    # Whatever is not refused does something.
    if balancing != "none":
        assert not is_close(weights, trained(method, "none", capacity))
    if capacity != "none":
        # Slots that are padded to what is needed change nothing.
        assert is_close(weights, trained(method, balancing, "none")) == (capacity == "auto")


def assert_refused(tree: Tree, refused: dict[str, str]) -> None:
    """Each feature with key, reason and a remedy; the remedies together make the config valid."""
    with pytest.raises(ConfigError) as caught:
        build_config(tree)
    message = str(caught.value)
    for feature, reason in refused.items():
        key = "bias.rule" if feature == "bias" else feature
        said = f"routing.{key}: is not for routing.method: {tree['routing']['method']}: {reason}; use routing."
        assert said in message
    remedies = re.findall(r"use (routing\.[\w.]+=[^\s,]+)", message)
    assert len(remedies) == len(message.splitlines())
    build_config(changed(tree, *map(as_tree, remedies)))


def as_tree(override: str) -> Tree:
    key, _, value = override.partition("=")
    return reduce(lambda tree, name: {name: tree}, reversed(key.split(".")), yaml.safe_load(value))


def test_every_feature_of_the_table_has_a_cell():
    assert set(FEATURES) == {
        feature for _, features in [*BALANCING.values(), *CAPACITY.values()] for feature in features
    }


# What the table says is what users read.

GUIDE = (Path(__file__).parents[2] / "docs" / "routing.md").read_text()


@pytest.mark.parametrize(("name", "table"), [("methods", methods_table), ("combinations", combinations_table)])
def test_tables_of_the_guide(name, table):
    (written,) = re.findall(rf"<!-- {name}: begin.*?-->\n(.*?)\n<!-- {name}: end -->", GUIDE, re.DOTALL)
    assert written == table()


def test_the_table_of_combinations():
    """By the registry itself, cell by cell."""
    heading, _, *rows = [line[2:-2].split(" | ") for line in combinations_table().splitlines() if line.startswith("|")]
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", combinations_table(), re.MULTILINE))
    assert heading[1:] == list(FEATURES.values())
    assert [row[0] for row in rows] == [f"`{method}`" for method in METHODS]
    for method, (_, *answers) in zip(METHODS, rows, strict=True):
        for feature, answer in zip(FEATURES, answers, strict=True):
            number = re.fullmatch(r"yes|no \((\d+)\)", answer)[1]
            assert METHODS[method].refused.get(feature) == (number and reasons[number])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_section_with_a_command(method):
    (section,) = [text for text in GUIDE.split("\n### ")[1:] if method in text.splitlines()[0].split(" ")]
    section = section.split("\n## ")[0]
    assert re.search(r"```bash\nmoe-dist ", section)
    assert method == "top_k" or f"routing.method={method} " in section
    assert ("Not causal" in section) == (not METHODS[method].causal)
    assert ("Not causal, exact" in section) == METHODS[method].exact


def recipes():
    """The overrides of each published model in the guide."""
    (table,) = re.findall(r"<!-- recipes: begin -->\n(.*?)\n<!-- recipes: end -->", GUIDE, re.DOTALL)
    for row in table.splitlines()[2:]:
        yield pytest.param(re.findall(r"`((?:model|moe|routing)[\w.]*=.*?)`", row), id=row.split(" | ")[0][2:])


@pytest.mark.parametrize("overrides", list(recipes()))
def test_recipes_are_valid(overrides, tmp_path):
    (tmp_path / "config.yaml").touch()
    load_config(tmp_path / "config.yaml", overrides)


def test_config_prints_what_holds_for_the_method(tmp_path):
    (tmp_path / "config.yaml").touch()

    def lines(*overrides: str) -> list[str]:
        result = CliRunner().invoke(app, ["config", str(tmp_path / "config.yaml"), *overrides])
        assert result.exit_code == 0, result.output
        return [" ".join(line.split()) for line in result.stdout.splitlines()]

    shown = lines("routing.method=expert_choice")
    for line in (
        "method expert_choice",
        "experts of a token 2 on average",
        "causal in training no, by routing.method: expert_choice",
        "equal loads yes, in every routing group",
        "refuses bias, load_adjustment: every expert takes equally many",
        "load: it needs the noise of noisy_top_k",
    ):
        assert line in shown
    assert "in evaluation as in training" in lines("routing.method=sinkhorn", "routing.evaluation=as_trained")
    shown = lines("routing.capacity={factor: 1.25, policy: weight}")
    assert "causal in training no, by routing.capacity.policy: weight" in shown
    shown = lines("routing.method=hash", "routing.capacity={factor: 1.25}")
    assert "causal in training yes" in shown
    assert "equal loads no" in shown
    assert "weights constant: routing.score and routing.renormalise are not used" in shown
