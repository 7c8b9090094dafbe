"""What changes over the steps, as pure functions of the step (0 is the first)."""

import math

from moe_dist.config.routing import BiasConfig
from moe_dist.config.schema import TrainingConfig


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Linear warm-up, then constant, or a cosine from the peak down to final_fraction of it at the last step."""
    schedule, peak = training.schedule, training.optimizer.learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    progress = (step - schedule.warmup_steps) / max(1, training.steps - 1 - schedule.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * cosine)


def bias_rate(bias: BiasConfig, num_steps: int, step: int) -> float:
    """The rate of the loss-free bias: falling linearly to final_rate at the last step, 0 from stop_step on."""
    if bias.stop_step is not None and step >= bias.stop_step:
        return 0.0
    if bias.final_rate is None:
        return bias.rate
    return bias.rate + (bias.final_rate - bias.rate) * min(1.0, step / max(1, num_steps - 1))
