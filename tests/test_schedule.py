"""The schedule: learning rates worked out by hand, and what it refuses."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from edgekit.schedule import Augment, Schedule


def factors(steps: int, **choices: object) -> list[float]:
    schedule = Schedule.model_validate(choices)
    return [schedule.rate_factor(step, steps) for step in range(steps)]


def test_the_warm_up_is_a_share_of_the_steps_or_a_number_of_them() -> None:
    assert factors(8, warm_up=0.5, decay="constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert factors(5, warm_up=2, decay="constant") == [0.5, 1, 1, 1, 1]
    assert factors(3, warm_up=10, decay="constant") == pytest.approx([1 / 3, 2 / 3, 1], abs=1e-15)
    assert factors(4, warm_up=0, decay="constant") == [1, 1, 1, 1]


def test_cosine_begins_at_the_whole_and_goes_towards_nothing() -> None:
    assert factors(4, warm_up=0) == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)], abs=1e-15)
    assert factors(5, warm_up=1) == pytest.approx([1, *factors(4, warm_up=0)], abs=1e-15)


def test_step_divides_by_ten_after_a_half_and_three_quarters() -> None:
    assert factors(8, warm_up=0, decay="step") == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01], abs=1e-15)


@pytest.mark.parametrize("decay", ["cosine", "step", "constant"])
@pytest.mark.parametrize("warm_up", [0, 0.05, 0.99, 1, 7, 100])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_a_rate_is_never_0_nor_above_the_whole(decay: str, warm_up: float, steps: int) -> None:
    assert all(0 < factor <= 1 for factor in factors(steps, warm_up=warm_up, decay=decay))


def test_steps_follow_from_epochs_or_stand_alone() -> None:
    assert Schedule().total_steps(10) == 30
    assert Schedule(epochs=2).total_steps(10) == 20
    assert Schedule(steps=7).total_steps(10) == 7
    assert Schedule(steps=7).total_steps(None) == 7
    assert Schedule(epochs=2).total_steps(None) is None


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"epochs": 2, "steps": 5}, "epochs = 2 and steps = 5: give one of them"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"steps": -1}, "greater than or equal to 1"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"learning_rate": math.inf}, "finite number"),
        ({"weight_decay": -1e-4}, "greater than or equal to 0"),
        ({"warm_up": 1.5}, "warm_up = 1.5: expected a share below 1, or a whole number of steps"),
        ({"warm_up": math.nan}, "finite number"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"accumulate": 0}, "greater than or equal to 1"),
        ({"clip_norm": -1}, "greater than or equal to 0"),
        ({"optimizer": "lion"}, "'adamw' or 'sgd'"),
        ({"decay": "linear"}, "'cosine', 'step' or 'constant'"),
        ({"mixed_precision": "fp8"}, "'no', 'bf16' or 'fp16'"),
        ({"track": "mlflow"}, "'tensorboard', 'wandb' or 'none'"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"patience": -1}, "greater than or equal to 0"),
        ({"momentum": 0.9}, "Extra inputs are not permitted"),
    ],
)
def test_mistakes_are_refused(choices: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Schedule.model_validate(choices)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(steps=5, decay="step"), Schedule(epochs=1, patience=2)])
def test_it_comes_back_from_a_record(schedule: Schedule) -> None:
    assert Schedule.model_validate_json(schedule.model_dump_json()) == schedule


def test_augmentation_is_off_unless_asked_for() -> None:
    assert Augment() == Augment(flip=False, crop=0)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Augment(crop=-1)
