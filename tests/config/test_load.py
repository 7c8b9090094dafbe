"""YAML files, dotted overrides, and the way back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.config import Config, ConfigError, build_config, dump_config, load_config
from moe_dist.config.routing import SequenceGroup


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes config.yaml in an empty folder and loads it with overrides."""
    monkeypatch.chdir(tmp_path)

    def load(text, *overrides, num_ranks=None):
        (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config("config.yaml", list(overrides), num_ranks)

    return load


def test_an_empty_file_means_the_defaults(write):
    assert write("") == write("# nothing\n") == Config()


def test_overrides_win_over_the_file(write):
    config = write("training: {steps: 7, seed: 3}", "training.steps=9", "model.num_layers=2")
    assert (config.training.steps, config.training.seed, config.model.num_layers) == (9, 3, 2)


def test_the_last_override_wins(write):
    assert write("", "training.steps=1", "training.steps=2").training.steps == 2


def test_override_values_are_yaml(write):
    config = write(
        "",
        "training.optimizer.learning_rate=3e-4",
        "training.optimizer.max_grad_norm=null",
        "model.activation_checkpointing=[0, 2]",
        "moe.num_shared_experts=1",
        "moe.shared_gate=true",
        "routing.capacity={factor: 1.5}",
    )
    assert config.training.optimizer.learning_rate == 3e-4
    assert config.training.optimizer.max_grad_norm is None
    assert config.model.activation_checkpointing == [0, 2]
    assert config.moe.shared_gate is True
    assert config.routing.capacity is not None
    assert config.routing.capacity.factor == 1.5


def test_an_override_of_a_section_replaces_it(write):
    config = write("routing: {bias: {rule: sign, rate: 0.01}}", "routing.bias={}")
    assert config.routing.bias == Config().routing.bias


def test_an_override_may_turn_a_word_into_a_section(write):
    config = write("routing: {group: rank, capacity: {factor: 1.5}}", "routing.group.sequences=2")
    assert config.routing.group == SequenceGroup(sequences=2)


def test_a_config_cannot_change():
    with pytest.raises(ValueError, match="frozen"):
        Config().training.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("training: {steps: 1", [], r"CONFIG: 'config.yaml' is not valid YAML: .*line 1"),
        ("training:\n  steps: 1\n  steps: 2", [], r"CONFIG: .*: 'steps' is given twice in \"config.yaml\", line 3"),
        ("day: 2024-13-45", [], r"CONFIG: 'config.yaml' is not valid YAML: month must be in 1..12"),
        (b"\xff\xfe\x80", [], r"CONFIG: 'config.yaml' is not valid YAML: 'utf-8' codec"),
        ("- 1", [], r"CONFIG: 'config.yaml' holds a list; it should hold sections of keys"),
        ("", ["training.steps"], r"'training.steps': an override has the form section.key=value, such as parallel."),
        ("", ["=3"], r"'=3': an override has the form"),
        ("", ["training..steps=3"], r"'training..steps=3': an override has the form"),
        ("", ["training.steps=[3"], r"training.steps: '\[3' is not valid YAML"),
        ("", ["training.step=3"], r"training.step: unknown key; did you mean training.steps\?"),
        ("", ["trainig.steps=3"], r"trainig: unknown key; did you mean training\?"),
        ("", ["training.steps.x=3"], r"training.steps: {'x': 3} is not valid; it should be an integer greater than 0"),
        ("", ["training.steps="], r"training.steps: null is not valid; it should be an integer greater than 0"),
    ],
)
def test_what_cannot_be_read(write, text, overrides, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        write(text, *overrides)


def test_a_missing_file_names_the_nearest(write, tmp_path):
    (tmp_path / "quickstart.yaml").touch()
    with pytest.raises(
        ConfigError, match=r"CONFIG: there is no file 'quikstart.yaml'; did you mean 'quickstart.yaml'?"
    ):
        load_config("quikstart.yaml")


def test_a_missing_file_far_from_any_lists_them(write, tmp_path):
    (tmp_path / "quickstart.yaml").touch()
    with pytest.raises(ConfigError, match=r"CONFIG: there is no file 'zzz'; '\.' holds quickstart.yaml"):
        load_config("zzz")


@settings(deadline=None)
@given(
    tree=st.fixed_dictionaries(
        {
            "model": st.fixed_dictionaries(
                {
                    "num_kv_heads": st.sampled_from([None, 1, 2, 4]),
                    "activation_checkpointing": st.sampled_from(["none", "all", [], [0, 3]]),
                }
            ),
            "routing": st.fixed_dictionaries(
                {
                    "group": st.sampled_from(["rank", {"sequences": 1}, {"sequences": 2}]),
                    "capacity": st.fixed_dictionaries({"factor": st.floats(1e-300, 4.0), "pad": st.booleans()}),
                }
            ),
            "training": st.fixed_dictionaries(
                {
                    "seed": st.integers(0, 2**40),
                    "optimizer": st.fixed_dictionaries(
                        {
                            "learning_rate": st.floats(1e-30, 1e30),
                            "betas": st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
                        }
                    ),
                }
            ),
        }
    )
)
def test_a_dumped_config_loads_equal(tmp_path_factory, tree):
    config = build_config(tree)
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
