"""The counters of one MoE layer."""

import time

import pytest
import torch

from moe_dist.telemetry.recorder import STAGES, LayerRecorder


@pytest.fixture
def recorder() -> LayerRecorder:
    return LayerRecorder(torch.device("cpu"))


def test_rows_add_up_by_expert_and_by_rank(recorder: LayerRecorder) -> None:
    # Segments in arrival order: an expert has several, and some none.
    recorder.add_rows([0, 1, 0, 1], [3, 0, 2, 4], sent=[5, 1], received=[3, 6], row_bytes=8)
    recorder.add_rows([0, 2], [1, 7], sent=[0, 6], received=[1, 7], row_bytes=8)
    assert dict(recorder.rows_of_expert) == {0: 6, 1: 4, 2: 7}
    assert recorder.rows_sent == [5, 7]
    assert recorder.rows_received == [4, 13]
    assert recorder.bytes_sent == 12 * 8
    assert recorder.rows_of_expert[9] == 0


def test_the_lists_given_to_it_stay_as_they_are(recorder: LayerRecorder) -> None:
    sent = [5, 1]
    for _ in range(2):
        recorder.add_rows([0], [6], sent, [5, 1], row_bytes=1)
    assert sent == [5, 1]
    assert recorder.rows_sent == [10, 2]


def test_losses_are_weighted_by_their_share_and_keep_no_graph(recorder: LayerRecorder) -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    recorder.add_losses({"z": weight * 3, "load_balance": weight}, share=0.25)
    recorder.add_losses({"z": weight}, share=torch.tensor(0.75))
    assert {name: loss.item() for name, loss in recorder.losses.items()} == {"z": 3.0, "load_balance": 0.5}
    assert not any(loss.requires_grad for loss in recorder.losses.values())


def test_each_stage_is_timed_on_its_own(recorder: LayerRecorder) -> None:
    began = time.perf_counter()
    for _ in range(2):
        with recorder.stage("dispatch"):
            time.sleep(0.01)
    elapsed = time.perf_counter() - began
    seconds = recorder.seconds()
    assert set(seconds) == set(STAGES)
    assert 0.02 <= seconds["dispatch"] <= elapsed
    assert seconds["route"] == seconds["experts"] == seconds["combine"] == 0


def test_reset_starts_all_counters_anew(recorder: LayerRecorder) -> None:
    with recorder.stage("route"):
        recorder.add_rows([0], [6], [5, 1], [6, 0], row_bytes=4)
        recorder.add_losses({"z": torch.ones(())}, share=1.0)
    recorder.bytes_between_nodes += 9
    recorder.reset()
    assert not recorder.rows_of_expert
    assert recorder.rows_sent == recorder.rows_received == []
    assert recorder.bytes_sent == recorder.bytes_between_nodes == 0
    assert recorder.losses == {}
    assert set(recorder.seconds().values()) == {0.0}
