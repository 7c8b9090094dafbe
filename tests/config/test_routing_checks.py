"""Every message on routing settings that are wrong together: the whole text, and that what it advises is valid.

Which method refuses which way of balancing or limiting is tried cell by cell in tests/routing/test_combinations.py.
"""

import re

import pytest

from moe_dist.config import ConfigError, RoutingConfig, load_config
from moe_dist.config.routing_checks import check_routing

SIGN = "routing.bias.rule=sign"
HASH = "routing.method=hash"
OT = "routing.method=optimal_transport"
LEARNED = "routing.hash.weights=learned"
GROUPS = "routing.expert_groups={count: 4}"
LIMITED = "routing.expert_groups={count: 4, keep: 1}"
ZERO = "routing.zero_experts={count: 2, target: 1.5}"
CAPACITY = "routing.capacity={factor: 1.25}"
AUTO = "routing.capacity={factor: auto, pad: true}"
LOAD_BALANCE = "routing.losses.load_balance.coefficient=0.01"
ADAPTIVE = "routing.losses.load_balance={coefficient: 0.01, adaptive: {}}"

MESSAGES = [
    # overrides, the whole message as a regular expression, what it advises
    # Weights
    (
        ["routing.top_k=1", "routing.score=softmax_top_k"],
        r"routing\.score: softmax_top_k with routing\.top_k = 1 gives a constant weight and no gradient; use softmax",
        ["routing.score=softmax"],
    ),
    (
        ["routing.top_k=1", "routing.renormalise=true"],
        r"routing\.renormalise: true with routing\.top_k = 1 gives a constant weight and no gradient; use false",
        ["routing.renormalise=false"],
    ),
    (
        ["routing.score=softmax_top_k", "routing.renormalise=true"],
        r"routing\.renormalise: true has no effect with routing\.score: softmax_top_k, which sums to 1; use false",
        ["routing.renormalise=false"],
    ),
    (
        ["routing.logit_normalisation=1.0", "routing.temperature=0.5"],
        r"routing\.temperature: 0\.5 has no effect with routing\.logit_normalisation, which cancels it; use 1, or change "
        r"logit_normalisation instead",
        ["routing.temperature=1"],
    ),
    (
        ["routing.top_k=9"],
        r"routing\.top_k: 9 is more than moe\.num_experts = 8; use at most that",
        ["routing.top_k=8"],
    ),
    (
        ["routing.top_k=11", ZERO, SIGN],
        r"routing\.top_k: 11 is more than moe\.num_experts \+ routing\.zero_experts\.count = 10; use at most that",
        ["routing.top_k=10"],
    ),
    # What a method cannot be combined with
    (
        [OT, SIGN],
        r"routing\.bias\.rule: is not for routing\.method: optimal_transport: its prices balance every step exactly already; "
        r"use routing\.bias\.rule=none",
        ["routing.bias.rule=none"],
    ),
    (
        [OT, LOAD_BALANCE],
        r"routing\.losses\.load_balance: is not for routing\.method: optimal_transport: all loads are equal, .*; "
        r"use routing\.losses\.load_balance\.coefficient=0",
        ["routing.losses.load_balance.coefficient=0"],
    ),
    (
        [OT, "routing.load_adjustment={strength: 1.0}"],
        r"routing\.load_adjustment: is not for routing\.method: optimal_transport: .*; use routing\.load_adjustment=null",
        ["routing.load_adjustment=null"],
    ),
    (
        ["routing.method=gatepro", ZERO, SIGN],
        r"routing\.zero_experts: is not for routing\.method: gatepro: .*; use routing\.zero_experts=null",
        ["routing.zero_experts=null"],
    ),
    (
        [OT, "routing.capacity={factor: 1.25, overflow: reroute}"],
        r"routing\.capacity: is not for routing\.method: optimal_transport: .*; use routing\.capacity=null",
        ["routing.capacity=null"],
    ),
    (
        [HASH, "routing.capacity={factor: 1.25, overflow: reroute}"],
        r"routing\.capacity\.overflow: is not for routing\.method: hash: .*; use routing\.capacity\.overflow=drop",
        ["routing.capacity.overflow=drop"],
    ),
    (
        ["routing.method=sinkhorn", LIMITED, "routing.losses.device.coefficient=0.01"],
        r"routing\.expert_groups\.keep: is not for routing\.method: sinkhorn: .*; use routing\.expert_groups\.keep=null",
        ["routing.expert_groups.keep=null"],
    ),
    (
        ["routing.method=sinkhorn", LIMITED],
        r"routing\.expert_groups\.keep: is not for .*\nrouting\.expert_groups: nothing uses them; .*",
        ["routing.expert_groups=null"],
    ),
    # Settings of a method
    (
        ["routing.method=base"],
        r"routing\.top_k: 2 is not for routing\.method: base, which gives each token one expert; use 1, or routing\.method: "
        r"optimal_transport",
        ["routing.top_k=1"],
    ),
    (
        ["routing.method=expert_choice", "routing.expert_choice.max_experts=1"],
        r"routing\.expert_choice\.max_experts: 1 is not valid; it should be from routing\.top_k = 2, which tokens get on "
        r"average, to moe\.num_experts = 8",
        ["routing.expert_choice.max_experts=2"],
    ),
    (
        ["routing.method=expert_choice", "routing.expert_choice.max_experts=9"],
        r"routing\.expert_choice\.max_experts: 9 is not valid; .*",
        ["routing.expert_choice.max_experts=8"],
    ),
    (
        ["routing.method=gatepro", "routing.gatepro={start_step: 5, stop_step: 5}"],
        r"routing\.gatepro\.stop_step: 5 is not after start_step = 5",
        ["routing.gatepro.stop_step=6"],
    ),
    (
        ["routing.evaluation=as_trained"],
        r"routing\.evaluation: as_trained has no effect with routing\.method: top_k, which routes alike in both; use causal",
        ["routing.evaluation=causal"],
    ),
    (
        ["routing.dual_decay=0.5"],
        r"routing\.dual_decay: 0\.5 has no effect with routing\.method: top_k, which has no prices; use 0\.9, the default",
        ["routing.dual_decay=0.9"],
    ),
    (
        ["routing.method=gatepro_ot", "routing.router_bias=true"],
        r"routing\.router_bias: true is not for routing\.method: gatepro_ot, which has no parameters; use false",
        ["routing.router_bias=false"],
    ),
    # Hash layers
    (
        [HASH, "routing.hash.multi=true", "routing.top_k=3"],
        r"routing\.hash\.multi: true needs blocks of equally many experts; routing\.top_k = 3 does not divide moe\.num_experts "
        r"= 8",
        ["routing.top_k=4"],
    ),
    *(
        (
            [HASH, f"routing.losses.{name}.coefficient=0.01"],
            rf"routing\.losses\.{name}: is not for routing\.hash\.weights: constant: there is no router weight that it could "
            rf"change; use routing\.losses\.{name}\.coefficient=0, or routing\.hash\.weights=learned",
            remedy,
        )
        for name in ("z", "simbal", "orthogonality", "importance")
        for remedy in ([f"routing.losses.{name}.coefficient=0"], [LEARNED])
    ),
    *(
        (
            [HASH, f"routing.{key}={value}"],
            rf"routing\.{key}: has no effect with routing\.hash\.weights: constant; leave it out, or use learned",
            [LEARNED],
        )
        for key, value in {
            "router_bias": "true",
            "input_jitter": "0.01",
            "similarity": "cosine",
            "temperature": "0.5",
            "logit_normalisation": "1.0",
        }.items()
    ),
    *(
        (
            [HASH, f"routing.capacity={{factor: 1.0, policy: {policy}}}"],
            rf"routing\.capacity\.policy: {policy} has no effect with routing\.hash\.weights: constant, where no weight is "
            r"higher than another; use position or random, or routing\.hash\.weights=learned",
            remedy,
        )
        for policy in ("weight", "batch_priority")
        for remedy in (["routing.capacity.policy=position"], ["routing.capacity.policy=random"], [LEARNED])
    ),
    # Balancing
    *(
        (
            [f"routing.losses.{name}.coefficient=0.01"],
            rf"routing\.losses\.{name}: needs groups of experts; set routing\.expert_groups={{count: n}}",
            [GROUPS],
        )
        for name in ("device", "communication")
    ),
    (
        [ADAPTIVE],
        r"routing\.losses\.load_balance\.adaptive: follows the drop rate; set routing\.capacity, or use null",
        [CAPACITY],
    ),
    (
        ["routing.losses.load_balance.adaptive={}", CAPACITY],
        r"routing\.losses\.load_balance\.adaptive: starts from routing\.losses\.load_balance\.coefficient, and 0 switches the "
        r"loss off; set the coefficient above 0, or use null",
        [LOAD_BALANCE],
    ),
    (
        ["routing.zero_experts={count: 2, target: 2.0}", SIGN],
        r"routing\.zero_experts\.target: 2\.0 should be less than routing\.top_k = 2",
        ["routing.zero_experts.target=1.9"],
    ),
    *(
        (
            [ZERO, f"routing.bias.rule={rule}"],
            rf"routing\.bias\.rule: {rule} does not hold routing\.zero_experts\.target; use proportional, sign, momentum or "
            r"quantile",
            [f"routing.bias.rule={remedy}"],
        )
        for rule, remedy in (
            ("none", "proportional"),
            ("none", "sign"),
            ("multiplicative", "momentum"),
            ("multiplicative", "quantile"),
        )
    ),
    *(
        (
            [ZERO, SIGN, f"routing.losses.{name}.coefficient=0.01", *needs],
            rf"routing\.losses\.{name}: is not for routing\.zero_experts, which are balanced by the bias; use "
            rf"routing\.losses\.{name}\.coefficient=0",
            [f"routing.losses.{name}.coefficient=0", *(["routing.expert_groups=null"] if needs else [])],
        )
        for name, needs in (("load_balance", []), ("device", [GROUPS]), ("communication", [GROUPS]), ("importance", []))
    ),
    (
        [ZERO, SIGN, "routing.load_adjustment={strength: 1.0}"],
        r"routing\.load_adjustment: is not for routing\.zero_experts, which are balanced by the bias; use "
        r"routing\.load_adjustment=null",
        ["routing.load_adjustment=null"],
    ),
    # Groups of experts
    (
        ["routing.expert_groups={count: 3, keep: 1}"],
        r"routing\.expert_groups\.count: 3 does not divide moe\.num_experts = 8",
        ["routing.expert_groups.count=2"],
    ),
    (
        ["routing.expert_groups={count: 4, keep: 5}"],
        r"routing\.expert_groups\.keep: 5 is more than routing\.expert_groups\.count = 4",
        ["routing.expert_groups.keep=4"],
    ),
    (
        [LIMITED, "routing.top_k=3"],
        r"routing\.expert_groups\.keep: 1 groups have 2 experts, fewer than routing\.top_k = 3",
        ["routing.expert_groups.keep=2"],
    ),
    (
        [LIMITED, ZERO, SIGN],
        r"routing\.expert_groups\.keep: is not for routing\.zero_experts, which are in no group; use null",
        ["routing.zero_experts=null"],
    ),
    *(
        (
            [GROUPS],
            r"routing\.expert_groups: nothing uses them; use routing\.expert_groups=null, or set keep, the coefficient of "
            r"routing\.losses\.device or communication, or routing\.capacity\.level: expert_group",
            remedy,
        )
        for remedy in (
            ["routing.expert_groups=null"],
            ["routing.expert_groups.keep=1"],
            ["routing.losses.device.coefficient=0.01"],
            ["routing.losses.communication.coefficient=0.01"],
            ["routing.capacity={factor: 1.25, level: expert_group}"],
        )
    ),
    # Capacity
    (
        ["routing.top_k=1", "routing.capacity={factor: 1.25, renormalise: true}"],
        r"routing\.capacity\.renormalise: true has no effect with routing\.top_k = 1, where a dropped token has no other "
        r"expert; use false",
        ["routing.capacity.renormalise=false"],
    ),
    (
        ["routing.capacity={factor: 1.25, maximum_factor: 2.0}"],
        r"routing\.capacity\.maximum_factor: bounds factor: auto only; leave it out, or use routing\.capacity\.factor=auto",
        ["routing.capacity.factor=auto"],
    ),
    (
        ["routing.capacity={factor: 1.25, level: expert_group}"],
        r"routing\.capacity\.level: expert_group needs groups of experts; set routing\.expert_groups={count: n}",
        [GROUPS],
    ),
    *(
        (
            [GROUPS, "routing.capacity={factor: 1.25, level: expert_group, pad: true}"],
            r"routing\.capacity\.pad: true needs a capacity of each expert; use routing\.capacity\.level=expert, or pad=false",
            remedy,
        )
        for remedy in (
            ["routing.capacity.level=expert", "routing.expert_groups=null"],
            ["routing.capacity.pad=false"],
        )
    ),
    *(
        (
            [f"routing.capacity={{factor: {factor}, evaluation_factor: {evaluation_factor}}}"],
            rf"routing\.capacity\.{key}: auto drops nothing without routing\.capacity\.maximum_factor, and pads nothing without "
            r"routing\.capacity\.pad; set one of these, or a number",
            remedy,
        )
        for key, factor, evaluation_factor in (("factor", "auto", "2.0"), ("evaluation_factor", "1.25", "auto"))
        for remedy in (
            ["routing.capacity.maximum_factor=2.0"],
            ["routing.capacity.pad=true"],
            [f"routing.capacity.{key}=1.5"],
        )
    ),
    (
        [ADAPTIVE, AUTO],
        r"routing\.losses\.load_balance\.adaptive: follows the drop rate, which is 0 with routing\.capacity\.factor: auto; set "
        r"routing\.capacity\.maximum_factor, or use null",
        ["routing.capacity.maximum_factor=1.25"],
    ),
    *(
        (
            [AUTO, f"routing.capacity.{key}={value}"],
            rf"routing\.capacity\.{key}: {shown} has no effect with routing\.capacity\.factor: auto, which drops nothing; use "
            rf"{default}, or set routing\.capacity\.maximum_factor",
            remedy,
        )
        for key, value, shown, default in (
            ("policy", "weight", "'weight'", "'position'"),
            ("overflow", "reroute", "'reroute'", "'drop'"),
            ("renormalise", "true", "true", "false"),
        )
        for remedy in ([f"routing.capacity.{key}={default}"], ["routing.capacity.maximum_factor=1.25"])
    ),
]

VALID = [
    ["routing.method=expert_choice", "routing.expert_choice.max_experts=2", "routing.evaluation=as_trained"],
    ["routing.method=sinkhorn", "routing.dual_decay=0.5", "routing.group=global"],
    ["routing.method=base", "routing.top_k=1", "routing.score=sigmoid"],
    ["routing.method=expert_threshold", "routing.top_k=1", "routing.capacity={factor: 1.25, renormalise: true}"],
    [HASH, "routing.hash.multi=true", CAPACITY],
    [HASH, LEARNED, "routing.score=sqrt_softplus", "routing.losses.z.coefficient=0.001"],
    ["routing.top_k=10", ZERO, SIGN],
    ["routing.bias={rule: none, rate: 0.5}", "routing.hash.multi=true", "routing.losses.scaling=paper"],
    ["routing.expert_groups={count: 4, keep: 2, score: max}", SIGN, LOAD_BALANCE],
    ["routing.capacity={factor: 1.25, evaluation_factor: auto, pad: true, policy: weight}"],
    [AUTO, "routing.capacity.evaluation_factor=2.0", "routing.capacity.policy=weight"],
]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads the defaults with some overrides, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").touch()
    return lambda overrides: load_config("config.yaml", overrides)


@pytest.mark.parametrize(
    ("overrides", "message", "remedy"), MESSAGES, ids=lambda part: " ".join(part) if isinstance(part, list) else ""
)
def test_message(load, overrides, message, remedy):
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)
    load([*overrides, *remedy])


@pytest.mark.parametrize("overrides", VALID, ids=" ".join)
def test_right_settings_pass(load, overrides):
    load(overrides)


def test_independent_problems_are_told_together(load):
    with pytest.raises(ConfigError) as caught:
        load([OT, SIGN, LOAD_BALANCE, "routing.score=softmax_top_k", "routing.renormalise=true", CAPACITY])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "routing.renormalise",
        "routing.losses.load_balance",
        "routing.bias.rule",
        "routing.capacity",
    ]


def test_a_layer_alone_is_checked_alike():
    with pytest.raises(ConfigError, match=r"^routing\.top_k: 5 is more than moe\.num_experts = 4; use at most that$"):
        check_routing(RoutingConfig(top_k=5), num_experts=4)
    check_routing(RoutingConfig(top_k=4), num_experts=4)
