"""What a person sees of a sweep while it runs: a line a trial, a page that is rewritten, gauges for Grafana."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.logger import LoggerCallback
from ray.util.metrics import Gauge

from mlray import storage
from mlray.access import StorageError
from mlray.tuning import space
from mlray.tuning.board import Board, Row
from mlray.tuning.page import page
from mlray.tuning.trial import TRIALS

_WRITE_S, _ENDED_S = 10.0, 1.0
"""Between two versions of the page, each of some megabytes: while trials run, and where one has ended."""
_GAUGES = {
    "objective": "Objective of the sweep",
    "macro": "Mean over the languages",
    "worst": "Worst language",
    "step": "Steps made",
}


class Dashboard(tune.Callback):  # type: ignore[misc]
    """Told by Ray Tune of every trial; what it knows lies in `trials.json`, so a resumed sweep has it again."""

    def __init__(self, board: Board, root: str) -> None:
        self.board = board
        self.place, self._results = storage.join(root, "dashboard.html"), storage.join(root, TRIALS)
        self._written = 0.0
        self._gauges: dict[str, Gauge] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Gauges belong to a process."""
        return {**self.__dict__, "_gauges": {}}

    def setup(self, **_: Any) -> None:
        """Before the first trial, or the first after a resume."""
        self.read()

    def read(self) -> None:
        """Takes up what is known of trials: Ray Tune tells a copy of this object of them."""
        if storage.exists(self._results, self.board.config.storage):
            self.board.restore(json.loads(storage.read_bytes(self._results, self.board.config.storage)))

    def on_trial_result(self, trial: Any, result: dict[str, Any], **_: Any) -> None:
        """After each validation of a trial."""
        if "objective" in result:
            self._measure(self.board.told(str(trial.trial_id), result))
            self._refresh(_WRITE_S)

    def on_trial_complete(self, trial: Any, **_: Any) -> None:
        """When a trial has ended by itself or was stopped."""
        line = self.board.ended(str(trial.trial_id))
        wanted = space.wanted(self.board.config)
        print(f"{line}; {len(self.board.ended_trials())} of {wanted} ended", flush=True)
        self._refresh(_ENDED_S)

    def on_trial_error(self, trial: Any, **_: Any) -> None:
        """When a trial has failed."""
        name = str(trial.trial_id)
        self.board.states[name] = "failed"
        print(f"trial {name} failed", flush=True)
        self._refresh(_ENDED_S)

    def on_experiment_end(self, **_: Any) -> None:
        """What could not be written before; nothing comes after it."""
        self.write()

    def write(self) -> None:
        """Rewrites the page and what it is made of."""
        self._keep()
        storage.write_bytes(self.place, page(self.board).encode(), self.board.config.storage)
        self._written = time.monotonic()

    def _refresh(self, after_s: float) -> None:
        """Keeps what is known, and rewrites a page that is older than that.

        Should that fail, Ray Tune would take it for a failure of the trial that was told of.
        """
        try:
            if time.monotonic() - self._written > after_s:
                self.write()
            else:
                self._keep()
        except StorageError as error:
            print(f"{error}; the dashboard is written again later", flush=True)

    def _keep(self) -> None:
        body = json.dumps(self.board.state(), ensure_ascii=False, indent=1).encode()
        storage.write_bytes(self._results, body, self.board.config.storage)

    def _measure(self, row: Row) -> None:
        """Gauges that Ray exports to Prometheus; `grafana.json` draws them."""
        for key, text in _GAUGES.items():
            if key not in self._gauges:
                self._gauges[key] = Gauge(f"mlray_sweep_{key}", text, tag_keys=("sweep", "trial"))
            self._gauges[key].set(
                float(getattr(row, key)), tags={"sweep": self.board.name, "trial": row.trial}
            )


def forgiving(kind: type[LoggerCallback]) -> type[LoggerCallback]:
    """A kind of logger whose faults are told and fail no trial: Ray Tune would take them for the trial's own."""

    class Forgiving(kind):  # type: ignore[misc]
        def log_trial_start(self, trial: Any) -> None:
            _told(super().log_trial_start, trial)

        def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
            _told(super().log_trial_result, iteration, trial, result)

        def log_trial_end(self, trial: Any, failed: bool = False) -> None:
            _told(super().log_trial_end, trial, failed)

    return Forgiving


def _told(log: Callable[..., None], *told: Any) -> None:
    try:
        log(*told)
    except Exception as error:  # of whatever a logger writes to
        why = str(error).strip() or type(error).__name__
        print(f"{log.__qualname__}: {why.splitlines()[0]}; the trial goes on", flush=True)
