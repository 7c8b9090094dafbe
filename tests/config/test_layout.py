"""The arithmetic of ranks."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.config import Layout, build_config, layout_dependence, layout_of
from moe_dist.config.layout import moe_layers, owner_of_expert

LAYOUTS = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


def layout_for(
    expert: int, expert_data: int, micro_batch_size: int, accumulation_steps: int, expert_tensor: int = 1
) -> Layout:
    num_ranks = expert * expert_data * expert_tensor
    config = build_config(
        {
            "parallel": {"expert": expert, "expert_tensor": expert_tensor},
            "moe": {"num_experts": 60, "ffn_size": 12},
            "engine": {"sharding": "replicate"},
            "training": {
                "global_batch_size": num_ranks * micro_batch_size * accumulation_steps,
                "micro_batch_size": micro_batch_size,
            },
        },
        num_ranks,
    )
    return layout_of(config, num_ranks)


@settings(deadline=None)
@given(LAYOUTS)
def test_sizes_multiply_to_the_whole(sizes):
    expert, expert_data, micro_batch_size, accumulation_steps, expert_tensor = sizes
    layout = layout_for(*sizes)
    assert (layout.expert, layout.expert_tensor, layout.expert_data) == (expert, expert_tensor, expert_data)
    assert layout.num_ranks == layout.data == expert * expert_tensor * expert_data
    assert (layout.micro_batch_size, layout.accumulation_steps) == (micro_batch_size, accumulation_steps)


@settings(deadline=None)
@given(LAYOUTS)
def test_all_kinds_of_groups_partition_the_data_ranks(sizes):
    layout = layout_for(*sizes)
    for groups, size in (
        (layout.expert_groups(), layout.expert * layout.expert_tensor),
        (layout.expert_tensor_groups(), layout.expert_tensor),
        (layout.expert_data_groups(), layout.expert_data),
    ):
        assert sorted(rank for group in groups for rank in group) == list(range(layout.data))
        assert {len(group) for group in groups} == {size}


@settings(deadline=None)
@given(LAYOUTS)
def test_groups_of_the_two_kinds_meet_in_one_rank(sizes):
    layout = layout_for(*sizes)
    for expert_group in layout.expert_groups():
        for place, expert_data_group in enumerate(layout.expert_data_groups()):
            assert set(expert_group) & set(expert_data_group) == {expert_group[place]}


def test_groups_by_hand():
    layout = layout_for(2, 3, 1, 1)
    assert layout.expert_groups() == [[0, 1], [2, 3], [4, 5]]
    assert layout.expert_data_groups() == [[0, 2, 4], [1, 3, 5]]
    layout = layout_for(2, 2, 1, 1, expert_tensor=2)
    assert layout.expert_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.expert_tensor_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.expert_data_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_without_a_micro_batch_size_nothing_is_accumulated():
    layout = layout_of(build_config({"training": {"global_batch_size": 12}}, 4), 4)
    assert (layout.micro_batch_size, layout.accumulation_steps) == (3, 1)


def test_without_a_number_of_ranks_there_are_as_many_as_needed():
    assert layout_of(build_config({"parallel": {"expert": 4}})).num_ranks == 4


def test_owners_of_experts():
    assert owner_of_expert(build_config({"moe": {"num_experts": 4}, "parallel": {"expert": 2}})) == [0, 0, 1, 1]
    given_map = {"expert": 2, "expert_map": [1, 0, 1]}
    assert owner_of_expert(build_config({"moe": {"num_experts": 3}, "parallel": given_map})) == [1, 0, 1]


def test_moe_layers():
    assert moe_layers(build_config({})) == [0, 1, 2, 3]
    assert moe_layers(build_config({"model": {"num_layers": 7, "num_dense_layers": 2, "moe_every": 2}})) == [2, 4, 6]


def dependence(routing: dict, accumulation_steps: int = 1) -> str:
    config = build_config({"routing": routing, "training": {"micro_batch_size": 16 // accumulation_steps}})
    return " ".join(layout_dependence(config, layout_of(config)))


def test_what_depends_on_the_layout_is_named():
    loss = {"coefficient": 0.01}
    assert dependence({}) == ""
    assert dependence({"capacity": {"factor": 1.5}}) == ""
    assert "routing.group: rank" in dependence({"capacity": {"factor": 1.5}, "group": "rank"})
    assert dependence({"losses": {"load_balance": loss}}) == ""
    assert "scope: micro_batch" in dependence({"losses": {"load_balance": {**loss, "scope": "micro_batch"}}})
    assert dependence({"losses": {"load_balance": {**loss, "scope": "global_batch"}}}) == ""
    assert "scope: global_batch" in dependence({"losses": {"load_balance": {**loss, "scope": "global_batch"}}}, 2)
