"""Optuna's search without repeats."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from ray import tune

from mlray.tuning.distinct import Distinct

SPACE: dict[str, Any] = {"train.lr": [0.1, 0.2, 0.3], "adapter.targets": [["query"], ["query", "value"], []]}


def search(**settings: Any) -> Distinct:
    domains = {key: tune.choice(values) for key, values in SPACE.items()}
    return Distinct(domains, **{"metric": "objective", "mode": "max", "seed": 3, **settings})


def draw(found: Distinct, first: int, last: int) -> list[str]:
    """Settings of trials that end one after the other; the first learning rate is the best by far."""
    drawn = []
    for number in range(first, last):
        values = found.suggest(f"t{number}")
        assert values is not None
        assert found.suggest(f"t{number}") == values
        drawn.append(json.dumps(values, sort_keys=True))
        found.on_trial_complete(f"t{number}", {"objective": -values["train.lr"], "worst": 0.0})
    return drawn


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution:UserWarning")
@pytest.mark.parametrize("settings", [{}, {"metric": ["objective", "worst"], "mode": ["max", "max"]}])
def test_no_setting_is_drawn_twice_until_all_were(settings: dict[str, Any]) -> None:
    found = search(**settings)
    first = draw(found, 0, 5)
    found = pickle.loads(pickle.dumps(found))  # as Ray Tune keeps it for a resume
    assert len({*first, *draw(found, 5, 9)}) == 9
    assert len(draw(found, 9, 11)) == 2  # a small space does not end the search
