"""The learning rate of every step, against values worked out by hand."""

from __future__ import annotations

import pytest

from mlray.config import Train
from mlray.training.loop import learning_rate


def rates(schedule: str, **values: object) -> list[float]:
    """Rates of steps 0 to 13 of a run of 4 warm-up and 8 further steps."""
    settings = {
        "steps": 12,
        "warmup_steps": 4,
        "lr": 0.8,
        "min_lr_ratio": 0.25,
        "schedule": schedule,
        **values,
    }
    config = Train.model_validate(settings)
    return [learning_rate(config, step) for step in range(14)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_to_the_full_rate_in_equal_steps(schedule: str) -> None:
    assert rates(schedule)[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_linear_falls_to_the_smallest_rate_and_stays_there() -> None:
    # 0.8 - 0.6 * k / 8 for k = 0..8: the smallest rate is a quarter of 0.8.
    expected = [0.8, 0.725, 0.65, 0.575, 0.5, 0.425, 0.35, 0.275, 0.2, 0.2]
    assert rates("linear")[4:] == pytest.approx(expected)


def test_cosine_falls_along_half_a_wave_and_stays_at_the_smallest_rate() -> None:
    # 0.2 + 0.6 * (1 + cos(k * 22.5 degrees)) / 2, cosines from a table.
    cosines = [1, 0.9238795, 0.7071068, 0.3826834, 0, -0.3826834, -0.7071068, -0.9238795, -1, -1]
    assert rates("cosine")[4:] == pytest.approx([0.5 + 0.3 * cosine for cosine in cosines], abs=1e-7)


def test_constant_keeps_the_full_rate() -> None:
    assert rates("constant")[4:] == [0.8] * 10


def test_no_warm_up_begins_with_the_full_rate() -> None:
    assert rates("linear", warmup_steps=0, steps=4)[:5] == pytest.approx([0.8, 0.65, 0.5, 0.35, 0.2])


def test_a_smallest_rate_of_nothing_is_reached() -> None:
    assert rates("cosine", min_lr_ratio=0.0)[12] == pytest.approx(0.0, abs=1e-15)


def test_a_warm_up_longer_than_the_run_never_reaches_the_full_rate() -> None:
    assert rates("cosine", warmup_steps=20)[11] == pytest.approx(0.8 * 12 / 20)
