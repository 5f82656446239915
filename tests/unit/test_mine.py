"""Which of the nearest texts are hard negatives."""

from __future__ import annotations

import numpy as np
import pytest

from mlray.config import ConfigError, RunConfig
from mlray.tuning import mine

ITEMS = np.array([0, 1, 2, 3, 0, 4])
SCORES = np.array([0.99, 0.90, 0.84, 0.80, 0.70, 0.10])


@pytest.mark.parametrize(
    ("count", "margin", "places", "too_near", "same_item"),
    [
        (2, 0.05, [2, 3], 1, 1),  # 0.9 * 0.95 = 0.855: 0.90 is too near, 0.99 is the item itself
        (2, 0.0, [1, 2], 0, 1),
        (9, 0.1, [3, 5], 2, 2),
        (9, 0.95, [], 4, 2),
    ],
)
def test_negatives_are_near_and_of_another_item(
    count: int, margin: float, places: list[int], too_near: int, same_item: int
) -> None:
    chosen, told = mine.choose([0, 1, 2, 3, 4, 5], SCORES, ITEMS, 0, 0.9, (count, margin))
    assert chosen.tolist() == places
    assert told == {"too_near": too_near, "same_item": same_item}


def test_a_pair_that_is_far_apart_has_a_margin_as_well() -> None:
    scores = np.array([-0.1, -0.15, -0.25, -0.3])
    chosen, told = mine.choose([1, 2, 3, 5], scores, ITEMS, 0, -0.2, (9, 0.1))
    assert chosen.tolist() == [2, 3]  # at most -0.22
    assert told["too_near"] == 2


@pytest.mark.parametrize("limits", [{"count": 0}, {"depth": -1}, {"margin": -0.1}, {"margin": 1.0}])
def test_limits_out_of_range_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="count and depth are at least 1, margin 0 or more and below 1"):
        mine.mine(RunConfig(), "model", "output", **{"count": 4, "depth": 50, "margin": 0.05, **limits})  # type: ignore[arg-type]
