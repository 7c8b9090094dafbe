"""The counters of one MoE layer."""

import time

import pytest
import torch

from moe_dist.telemetry.recorder import STAGES, LayerRecorder


def recorder_of_4_experts(counts_tokens: bool = True) -> LayerRecorder:
    """With the last two of them here."""
    return LayerRecorder(torch.device("cpu"), 4, 2, counts_tokens=counts_tokens)


@pytest.fixture
def recorder() -> LayerRecorder:
    return recorder_of_4_experts()


def test_rows_add_up_by_expert_and_by_rank(recorder: LayerRecorder) -> None:
    # Segments in arrival order: an expert has several, and some none.
    recorder.add_computed([0, 1, 0, 1], [3, 0, 2, 4])
    recorder.add_computed([0], [1])
    recorder.add_rows([4, 6], sent=[5, 1], received=[3, 6], row_bytes=8)
    recorder.add_rows([6, 7], sent=[2, 0], received=[0, 9], row_bytes=8)
    recorder.add_bytes(100, 10)
    recorder.add_bytes(1, 2)
    counts = recorder.take()
    assert counts.computed == [6, 4]
    assert counts.peers == {4: [5, 3, 40, 24], 6: [3, 6, 24, 48], 7: [0, 9, 0, 72]}
    assert (counts.bytes_inside_node, counts.bytes_between_nodes) == (101, 12)


def test_pairs_add_up_by_expert(recorder: LayerRecorder) -> None:
    load_E, dropped_E = torch.tensor([5, 0, 1, 2]), torch.tensor([1, 0, 0, 0])
    recorder.add_pairs(load_E, dropped_E, torch.tensor([0, 3, 0, 2, 4, 3, 4]))  # 4 is vacant
    recorder.add_pairs(load_E, None, None)
    assert recorder.take().pairs_3E.tolist() == [[10, 0, 2, 4], [1, 0, 0, 0], [2, 0, 1, 2]]
    assert load_E.tolist() == [5, 0, 1, 2]


def test_pairs_are_counted_once_for_ranks_that_hold_the_same_tokens() -> None:
    recorder = recorder_of_4_experts(counts_tokens=False)
    recorder.add_pairs(torch.ones(4, dtype=torch.int64), None, torch.zeros(4, dtype=torch.int64))
    assert recorder.take().pairs_3E.sum() == 0


def test_losses_are_weighted_by_their_share_and_keep_no_graph(recorder: LayerRecorder) -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    recorder.add_losses({"z": weight * 3, "load_balance": weight}, share=0.25)
    recorder.add_losses({"z": weight}, share=torch.tensor(0.75))
    assert {name: loss.item() for name, loss in recorder.losses.items()} == {"z": 3.0, "load_balance": 0.5}
    assert not any(loss.requires_grad for loss in recorder.losses.values())


def test_losses_are_those_of_one_step_and_kept_where_asked_for(recorder: LayerRecorder) -> None:
    recorder.begin_step(timed=False, keep_losses=True)
    recorder.add_losses({"z": torch.ones(())}, share=1.0)
    assert recorder.losses == {"z": 1}
    recorder.begin_step(timed=False, keep_losses=False)
    recorder.add_losses({"z": torch.ones(())}, share=1.0)
    assert recorder.losses == {}


def test_each_stage_is_timed_on_its_own(recorder: LayerRecorder) -> None:
    began = time.perf_counter()
    for _ in range(2):
        recorder.begin_step(timed=True, keep_losses=False)
        with recorder.stage("dispatch"):
            sum(range(1000))
    elapsed = time.perf_counter() - began
    counts = recorder.take()
    seconds = counts.stage_seconds()
    assert counts.timed_steps == 2
    assert set(seconds) == set(STAGES)
    assert 0 < seconds["dispatch"] <= elapsed
    assert seconds["route"] == seconds["experts"] == seconds["combine"] == 0


def test_the_time_spent_here_is_told(recorder: LayerRecorder) -> None:
    began = time.perf_counter()
    with recorder.measured():
        sum(range(1000))
    assert 0 < recorder.own_seconds <= time.perf_counter() - began


def test_what_is_taken_is_left_alone_and_all_starts_anew(recorder: LayerRecorder) -> None:
    for _ in range(2):
        recorder.begin_step(timed=True, keep_losses=False)
        with recorder.stage("route"):
            recorder.add_computed([0], [6])
            recorder.add_rows([0, 1], [5, 1], [6, 0], row_bytes=4)
            recorder.add_pairs(torch.arange(4), None, None)
            recorder.add_bytes(9, 9)
        counts = recorder.take()
        assert counts.computed == [6, 0]
        assert counts.peers[0] == [5, 6, 20, 24]
        assert counts.pairs_3E[0].tolist() == [0, 1, 2, 3]
        assert (counts.bytes_inside_node, counts.timed_steps) == (9, 1)
    assert recorder.take().stage_seconds() == dict.fromkeys(STAGES, 0.0)
