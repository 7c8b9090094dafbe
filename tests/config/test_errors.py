"""What pydantic finds wrong is told in one line a key."""

import pytest

from moe_dist.config import ConfigError, build_config

MESSAGES = [
    # Unknown keys: the nearest sibling, then the nearest anywhere, else what is valid here.
    ({"modle": {}}, "modle: unknown key; did you mean model?"),
    ({"model": {"hiden_size": 8}}, "model.hiden_size: unknown key; did you mean model.hidden_size?"),
    (
        {"training": {"optimizer": {"lr": 1}}},
        "training.optimizer.lr: unknown key; did you mean training.optimizer.learning_rate?",
    ),
    ({"training": {"lr": 1}}, "training.lr: unknown key; did you mean training.optimizer.learning_rate?"),
    (
        {"training": {"batch_size": 1}},
        "training.batch_size: unknown key; did you mean training.global_batch_size or training.micro_batch_size?",
    ),
    ({"steps": 3}, "steps: unknown key; did you mean training.steps?"),
    ({"moe": {"top_k": 2}}, "moe.top_k: unknown key; did you mean routing.top_k?"),
    (
        {"moe": {"capacity_factor": 2}},
        "moe.capacity_factor: unknown key; did you mean routing.capacity.factor, routing.capacity.maximum_factor or "
        "routing.capacity.evaluation_factor?",
    ),
    (
        {"routing": {"group": {"sequence": 1}}},
        "routing.group.sequence: unknown key; did you mean routing.group.sequences?",
    ),
    (
        {"parallel": {"data": 2}},
        "parallel.data: unknown key; valid keys here: expert, expert_tensor, tensor, pipeline, dispatch, ranks_per_node, "
        "overlap_chunks, expert_map",
    ),
    (
        {3: 4},
        "3: unknown key; valid keys here: model, moe, routing, parallel, data, training, telemetry, engine",
    ),
    # Values of one type.
    ({"training": {"steps": 0}}, "training.steps: 0 is not valid; it should be an integer greater than 0"),
    ({"training": {"steps": 2.0}}, "training.steps: 2.0 is not valid; it should be an integer greater than 0"),
    ({"training": {"steps": "1e3"}}, "training.steps: '1e3' is not valid; it should be an integer greater than 0"),
    ({"training": {"steps": None}}, "training.steps: null is not valid; it should be an integer greater than 0"),
    (
        {"training": {"seed": True}},
        "training.seed: true is not valid; it should be an integer of at least 0 and at most 9223372036854775807",
    ),
    (
        {"model": {"rope_theta": -1.5}},
        "model.rope_theta: -1.5 is not valid; it should be a number greater than 0",
    ),
    (
        {"model": {"rope_theta": float("inf")}},
        "model.rope_theta: inf is not valid; it should be a finite number",
    ),
    (
        {"data": {"holdout_fraction": 0.9}},
        "data.holdout_fraction: 0.9 is not valid; it should be a number of at least 0 and at most 0.5",
    ),
    ({"model": {"compile": 1}}, "model.compile: 1 is not valid; it should be true or false"),
    (
        {"routing": {"score": "relu"}},
        "routing.score: 'relu' is not valid; it should be 'softmax', 'softmax_top_k', 'sigmoid' or 'sqrt_softplus'",
    ),
    (
        {"routing": {"method": "topk"}},
        "routing.method: 'topk' is not valid; it should be 'top_k', 'noisy_top_k', 'expert_choice', 'hash', 'sinkhorn', "
        "'optimal_transport', 'base', 'gatepro', 'gatepro_ot', 'expert_threshold', 'force_balanced' or 'random'",
    ),
    # Lists.
    ({"data": {"paths": "books"}}, "data.paths: 'books' is not valid; it should be a list of text"),
    ({"data": {"paths": ["books", 3]}}, "data.paths.1: 3 is not valid; it should be text"),
    (
        {"training": {"optimizer": {"betas": 0.9}}},
        "training.optimizer.betas: 0.9 is not valid; it should be a list of 2 numbers of at least 0 and less than 1",
    ),
    (
        {"training": {"optimizer": {"betas": [0.9, 1]}}},
        "training.optimizer.betas.1: 1 is not valid; it should be a number of at least 0 and less than 1",
    ),
    (
        {"training": {"optimizer": {"betas": [0.9]}}},
        "training.optimizer.betas.1: required, but not given; it should be a number of at least 0 and less than 1",
    ),
    # Values of several types: still one line.
    (
        {"routing": {"group": "glob"}},
        "routing.group: 'glob' is not valid; it should be 'global', 'rank' or a section with sequences",
    ),
    (
        {"routing": {"group": {"sequences": 0}}},
        "routing.group.sequences: 0 is not valid; it should be an integer greater than 0",
    ),
    (
        {"model": {"activation_checkpointing": "al"}},
        "model.activation_checkpointing: 'al' is not valid; "
        "it should be 'none', 'all' or a list of integers of at least 0",
    ),
    (
        {"model": {"activation_checkpointing": [0, -1]}},
        "model.activation_checkpointing.1: -1 is not valid; it should be an integer of at least 0",
    ),
    (
        {"model": {"head_size": 0}},
        "model.head_size: 0 is not valid; it should be null or an integer greater than 0",
    ),
    # Sections.
    (
        {"training": {"checkpoint": 3}},
        "training.checkpoint: 3 is not valid; it should be a section with interval, keep",
    ),
    (
        {"routing": {"capacity": 1.25}},
        "routing.capacity: 1.25 is not valid; it should be null or a section with factor, maximum_factor, minimum, "
        "evaluation_factor, policy, overflow, level, renormalise, pad",
    ),
    (
        {"routing": {"capacity": {"pad": True}}},
        "routing.capacity.factor: required, but not given; it should be a number greater than 0 or 'auto'",
    ),
]


@pytest.mark.parametrize(("tree", "message"), MESSAGES, ids=[message.split(":")[0] for _, message in MESSAGES])
def test_message(tree, message):
    with pytest.raises(ConfigError) as caught:
        build_config(tree)
    assert str(caught.value) == message


def test_every_wrong_key_has_its_line():
    with pytest.raises(ConfigError) as caught:
        build_config({"trainin": {}, "training": {"steps": 0}, "moe": {"num_experts": 0}})
    assert {line.split(":")[0] for line in str(caught.value).splitlines()} == {
        "trainin",
        "training.steps",
        "moe.num_experts",
    }


def test_long_values_are_shortened():
    with pytest.raises(ConfigError) as caught:
        build_config({"training": {"steps": "9" * 10000}})
    assert len(str(caught.value)) < 200
