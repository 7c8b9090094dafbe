"""Learning rate and bias rate as functions of the step."""

import math

import pytest

from moe_dist.config.routing import BiasConfig
from moe_dist.config.schema import TrainingConfig
from moe_dist.training.schedule import bias_rate, learning_rate


def rates(steps: int, **schedule: object) -> list[float]:
    """The learning rate of every step, for a peak of 2."""
    config = {"steps": steps, "optimizer": {"learning_rate": 2.0}, "schedule": schedule}
    training = TrainingConfig.model_validate(config)
    return [learning_rate(training, step) for step in range(steps)]


def test_constant_is_the_peak_at_every_step() -> None:
    assert rates(5, name="constant") == [2.0] * 5


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_warm_up_rises_in_equal_parts_to_the_peak(name: str) -> None:
    assert rates(20, name=name, warmup_steps=4)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_cosine_falls_from_the_peak_to_the_final_fraction_at_the_last_step() -> None:
    found = rates(9, name="cosine", final_fraction=0.2)
    expected = [0.4 + 1.6 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    assert found == pytest.approx(expected)
    assert found[0] == 2.0
    assert found[4] == pytest.approx(1.2)
    assert found[-1] == pytest.approx(0.4)


def test_cosine_after_a_warm_up_still_ends_at_the_final_fraction() -> None:
    found = rates(30, name="cosine", warmup_steps=10, final_fraction=0.1)
    assert max(found) == found[9] == found[10] == 2.0
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[-1] == pytest.approx(0.2)


def test_runs_of_a_step_or_of_nothing_but_warm_up_have_rates() -> None:
    assert rates(1, name="cosine") == [2.0]
    assert rates(3, name="cosine", warmup_steps=3) == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert rates(2, name="cosine", warmup_steps=10) == pytest.approx([0.2, 0.4])


def test_beyond_the_last_step_the_rate_stays() -> None:
    training = TrainingConfig.model_validate({"steps": 10, "optimizer": {"learning_rate": 1.0}})
    assert learning_rate(training, 9) == learning_rate(training, 25) == pytest.approx(0.1)


def test_bias_rate_stays_or_falls_linearly_to_the_last_step() -> None:
    assert {bias_rate(BiasConfig(rule="sign", rate=0.5), 5, step) for step in range(5)} == {0.5}
    falling = BiasConfig(rule="sign", rate=0.5, final_rate=0.1)
    assert [bias_rate(falling, 5, step) for step in range(6)] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    assert bias_rate(falling, 1, 0) == 0.5
    assert bias_rate(BiasConfig(rule="sign", rate=0.5, final_rate=0.0), 3, 2) == 0
