"""Optuna's search without repeats: trials are deterministic, so a setting that was drawn before has nothing to tell."""

from __future__ import annotations

import json
from typing import Any

from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

_TRIES = 50
"""Draws until a repeat is accepted: a small space is tried out at some time."""


class Distinct(OptunaSearch):  # type: ignore[misc]
    """Asks again where the sampler draws a setting that it has drawn before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drawn: set[str] = set()

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The setting of a trial; called again for the same trial, the same."""
        known = trial_id in self._ot_trials
        values: dict[str, Any] | None = super().suggest(trial_id)
        for _ in range(0 if known else _TRIES):
            if json.dumps(values, sort_keys=True) not in self._drawn:
                break
            self._ot_study.tell(
                self._ot_trials.pop(trial_id), state=TrialState.FAIL
            )  # TPE learns nothing from it
            values = super().suggest(trial_id)
        self._drawn.add(json.dumps(values, sort_keys=True))
        return values
