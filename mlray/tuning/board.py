"""The trials of a sweep and how they stand: ranks, the Pareto set, what early stopping has saved."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import JustifyMethod
from rich.markup import escape
from rich.table import Table

from mlray.config import RunConfig
from mlray.tuning import space


@dataclass(frozen=True)
class Row:
    """One validation of one trial."""

    trial: str
    step: int
    objective: float
    macro: float
    worst: float
    worst_language: str
    below: tuple[str, ...]
    languages: dict[str, float]
    run: str
    """The folder: that of the trial, or of what it became as a clone."""
    cloned_from: str = ""
    """The checkpoint of another trial that this one went on from."""


@dataclass
class Board:
    """All validations of all trials."""

    name: str
    config: RunConfig
    languages: tuple[str, ...]
    held_out: int = 0
    """Rows that a language is judged by, of the one with the fewest; 0: not known."""
    rows: list[Row] = field(default_factory=list)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Trial -> its settings, the last where it was cloned."""
    states: dict[str, str] = field(default_factory=dict)
    """Trial -> runs, done, stopped or failed."""
    over: bool = False
    """Whether no trial will come any more."""

    @property
    def keys(self) -> list[str]:
        """What was searched."""
        return list(self.config.sweep.space)

    def told(self, trial: str, result: dict[str, Any]) -> Row:
        """Keeps a validation as `trial.run` reports it, in the place of what was told of this step before."""
        metric, step, run = self.config.sweep.metric, int(result["step"]), str(result["run"])
        self.values[trial], self.states[trial] = dict(result["values"]), "runs"
        self.rows = [row for row in self.rows if row.run != run or row.step < step]
        languages = {name: float(result["languages"][name][metric]) for name in self.languages}
        objective, macro, worst = (float(result[key]) for key in ("objective", "macro", "worst"))
        told = (objective, macro, worst, str(result["worst_language"]), tuple(result["below_floor"]))
        self.rows.append(Row(trial, step, *told, languages, run, str(result["cloned_from"])))
        return self.rows[-1]

    def report(self, trial: str) -> dict[str, Any] | None:
        """What a trial that has ended told last, the reverse of `told`; None for any other."""
        if self.states.get(trial) not in {"done", "stopped"} or trial not in self.last():
            return None
        last, metric = self.last()[trial], self.config.sweep.metric
        own = ("step", "objective", "macro", "worst", "worst_language", "run", "cloned_from")
        return {
            **{key: getattr(last, key) for key in own},
            "below_floor": list(last.below),
            "languages": {language: {metric: value} for language, value in last.languages.items()},
            "values": self.values[trial],
        }

    def ended_trials(self) -> set[str]:
        """Those that will report no more."""
        return {name for name, state in self.states.items() if state != "runs"}

    def ended(self, trial: str) -> str:
        """A sentence on a trial that has ended by itself or was stopped."""
        last = self.last().get(trial)
        step = last.step if last else 0
        self.states[trial] = "done" if step >= self.config.train.steps else "stopped"
        figures = "no validation"
        if last:
            figures = f"objective {last.objective:.4f}, worst {last.worst_language} {last.worst:.4f}"
        return f"trial {trial} {self.states[trial]} at step {step:,}: {figures}"

    def state(self) -> dict[str, Any]:
        """What a resumed sweep goes on with."""
        return {"rows": [asdict(row) for row in self.rows], "values": self.values, "states": self.states}

    def restore(self, state: dict[str, Any]) -> None:
        """The reverse of `state`."""
        self.rows = [Row(**{**row, "below": tuple(row["below"])}) for row in state["rows"]]
        self.values, self.states = dict(state["values"]), dict(state["states"])

    def last(self) -> dict[str, Row]:
        """The newest validation of each trial."""
        return {row.trial: row for row in self.rows}

    def ranked(self) -> list[Row]:
        """The newest validation of each trial, the best first: those that ended before those that were stopped."""

        def order(row: Row) -> tuple[bool, bool, float]:
            return bool(row.below), row.step < self.config.train.steps, -row.objective

        return sorted(
            (row for row in self.last().values() if self.states.get(row.trial) != "failed"), key=order
        )

    def best(self) -> Row | None:
        """The winner so far; None if no trial keeps all floors."""
        return next((row for row in self.ranked() if not row.below), None)

    def pareto(self) -> set[str]:
        """Trials that no other beats in both the mean and the worst language; without those that cannot win."""
        sign = -1.0 if self.config.sweep.metric == "loss" else 1.0
        points = {row.trial: (sign * row.macro, sign * row.worst) for row in self.ranked() if not row.below}
        return {
            name
            for name, one in points.items()
            if not any(
                other != one and other[0] >= one[0] and other[1] >= one[1] for other in points.values()
            )
        }

    def spent(self) -> tuple[int, int, int | None]:
        """Steps that were made, steps without early stopping, and those of the whole grid (None: it has no size)."""
        steps, size = self.config.train.steps, space.size(self.config)
        made = sum(self._made(run) for run in {row.run for row in self.rows})
        return made, steps * len(self.values), None if size is None else steps * size

    def saved(self) -> float:
        """Of the steps of the trials that have ended, the share that stopping has saved."""
        ended = [name for name, state in self.states.items() if state in {"done", "stopped"}]
        left = sum(self.config.train.steps - self.last()[name].step for name in ended if name in self.last())
        return left / max(self.config.train.steps * len(ended), 1)

    def keep(self, trials: Collection[str]) -> None:
        """Forgets all but these trials."""
        self.rows = [row for row in self.rows if row.trial in trials]
        self.values = {name: one for name, one in self.values.items() if name in trials}
        self.states = {name: one for name, one in self.states.items() if name in trials}

    def _made(self, run: str) -> int:
        """Steps of a run; those of its donor are not its own."""
        own = [row.step for row in self.rows if row.run == run]
        cloned = any(row.run == run and row.cloned_from for row in self.rows)
        return max(own) - (min(own) - self.config.train.validate_every if cloned else 0)

    def heading(self) -> str:
        """The sweep in a sentence."""
        made, _, grid = self.spent()
        states = list(self.states.values())
        known = ("done", "stopped", "runs", "failed")
        told = ", ".join(f"{states.count(one)} {one}" for one in known if one in states)
        if not made:
            return f"{told}. No step yet"
        whole = f"; the whole grid takes {grid:,}" if grid else ""
        if grid and self.over:
            whole += f", {grid / made:.1f} times as many"
        by = f". A language is judged by {self.held_out:,} rows or more" if self.held_out else ""
        return f"{told}. {made:,} steps made, and {self.saved():.0%} saved by stopping{whole}{by}"

    def leaders(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The leader board: heads, and a row for each trial, the best first; figures before settings."""
        heads, front = ("trial", "objective", "mean", "worst", "steps", "state", *self.keys), self.pareto()
        rows = []
        for row in self.ranked():
            values = (shown(self.values[row.trial].get(key)) for key in self.keys)
            worst = f"{row.worst:.4f} {row.worst_language}"
            figures = (f"{row.objective:.4f}", f"{row.macro:.4f}", worst, f"{row.step:,}")
            rows.append((row.trial, *figures, self.remark(row, front), *values))
        return heads, rows

    def table(self) -> Table:
        """The leader board on a terminal."""
        found = Table(title=f"Trials of {escape(self.name)}", title_justify="left")
        heads, rows = self.leaders()
        for head in ("", *heads):
            side: JustifyMethod = "left" if head in {"trial", "state"} else "right"
            found.add_column(head, justify=side, overflow="fold")
        for rank, row in enumerate(rows, start=1):
            found.add_row(str(rank), *map(escape, row))
        return found

    def remark(self, row: Row, front: set[str]) -> str:
        """What is to be said of a trial beside its figures."""
        told = [self.states.get(row.trial, "")]
        if row.trial in front:
            told.append("Pareto")
        if row.cloned_from:
            *_, trial, _, step = row.cloned_from.split("/")
            told.append(f"cloned from {trial} at {step}")
        if row.below:
            told.append(f"below the floor: {', '.join(row.below)}")
        return ", ".join(told)


def shown(value: Any) -> str:
    """A value of a setting, short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
