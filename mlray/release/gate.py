"""The gate: whether a challenger may follow the champion. A pure function of two reports and of paired tests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from mlray.config import ConfigError, Release
from mlray.evaluation import comparison
from mlray.evaluation.report import Report

_SLACK = 1e-9
"""Of figures that went through a sum in another order."""


@dataclass(frozen=True)
class Line:
    """One language of one task."""

    task: str
    language: str
    metric: str
    champion: float
    best: float
    """Of the champion and those before it on these rows: small losses do not add up over promotions."""
    challenger: float | None
    """None: it was not judged on this language."""
    tolerance: float
    p: float | None
    """Of the paired test, corrected for their number; None: there was none."""
    refused: str | None
    """Why; None if it may pass."""


@dataclass(frozen=True)
class Verdict:
    """What the gate says, and about what."""

    lines: tuple[Line, ...]
    macro: dict[str, tuple[float, float]]
    """Task -> mean over the champion's languages, of the champion and of the challenger."""
    refusals: tuple[str, ...]
    """Sentences; none: the challenger may follow."""

    @property
    def passed(self) -> bool:
        """Whether the challenger may follow."""
        return not self.refusals

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


Cell = tuple[str, str, str]
"""Task, language, metric."""


def best(verdict: Mapping[str, Any] | None) -> dict[Cell, float]:
    """The highest figures up to the bundle that a verdict has let pass; none for the first champion.

    Args:
        verdict: as `Verdict.to_dict` has written it.
    """
    found = {}
    for line in verdict["lines"] if verdict else ():
        highest = max(line.get("best", line["champion"]), line["challenger"])
        # Let pass as chance, a loss is none that the next one has to make good.
        by_chance = highest - line["challenger"] > line["tolerance"] + _SLACK
        found[line["task"], line["language"], line["metric"]] = line["challenger"] if by_chance else highest
    return found


def judge(
    champion: Report,
    challenger: Report,
    p_values: Mapping[str, float],
    settings: Release,
    reached: Mapping[Cell, float] = MappingProxyType({}),
) -> Verdict:
    """Compares task by task and language by language.

    A challenger passes if on every task the mean over the languages gains at least `min_gain` and no language is more
    than its tolerance below the best that a champion has had in it. A task whose figures are all as they were, such as
    that of a model beside the main one, need not gain if another does. With `confirmed_only` a loss that was tested
    counts only where it is none of chance.

    Args:
        champion: whose tasks and languages must all be there.
        challenger: may have more.
        p_values: `<task> <language> <metric>` -> p of the paired test, as `Comparison.cells` are called.
        settings: the limits, in points.
        reached: the best of champions on the same rows, see `best`.

    Raises:
        ConfigError: a limit is for a language that the champion was not judged on.
    """
    _check_tolerances(champion, settings)
    lines, macro, short = list(_lines(champion, challenger, p_values, settings, reached)), {}, {}
    for task in dict.fromkeys(line.task for line in lines):
        own = [line for line in lines if line.task == task]
        shared = [(line.champion, line.challenger) for line in own if line.challenger is not None]
        if not shared:
            continue
        before, after = (sum(side) / len(shared) for side in zip(*shared, strict=True))
        macro[task] = (before, after)
        if after - before < settings.min_gain - _SLACK:
            short[task] = (
                f"{task}: the mean {own[0].metric} goes from {before:.2f} to {after:.2f}, and release.min_gain asks "
                f"for {settings.min_gain:+g}"
            )
    refusals = [line.refused for line in lines if line.refused]
    moved = {line.task for line in lines if line.champion != line.challenger}
    refusals += [sentence for task, sentence in short.items() if task in moved or not moved]
    if not lines:
        refusals.append("the champion's report holds nothing that could be compared")
    return Verdict(tuple(lines), macro, tuple(refusals))


def _lines(
    champion: Report,
    challenger: Report,
    p_values: Mapping[str, float],
    settings: Release,
    reached: Mapping[Cell, float],
) -> Iterator[Line]:
    for task, table in champion.cells.items():
        metrics = next(iter(table.values()))
        metric = comparison.metric_of(task, metrics)
        if metric not in metrics:  # such as the language bias, which no gate is made of
            continue
        sides = table, challenger.cells.get(task, {})
        for language in sorted(table):
            cell, p = (task, language, metric), p_values.get(f"{task} {language} {metric}")
            pair = tuple(float(side[language][metric].value) for side in sides if language in side)
            yield _line(cell, pair, reached.get(cell, -math.inf), p, settings)


def _check_tolerances(champion: Report, settings: Release) -> None:
    known = {language for table in champion.cells.values() for language in table}
    if unknown := sorted(settings.tolerances.keys() - known):
        raise ConfigError(
            f"release.tolerances names {unknown[0]}, and the champion was judged on {', '.join(sorted(known))}"
        )


def _line(cell: Cell, pair: tuple[float, ...], earlier: float, p: float | None, settings: Release) -> Line:
    """One of the verdict's; `pair` is the champion's figure, and the challenger's if it has one."""
    (task, language, metric), before = cell, pair[0]
    after = pair[1] if len(pair) > 1 else None
    tolerance, best = settings.tolerances.get(language, settings.tolerance), max(before, earlier)
    refused = None
    if after is None:
        refused = f"{task}, {language}: the challenger was not judged on this language"
    elif not math.isfinite(before - after):
        refused = f"{task}, {language}: {metric} goes from {before} to {after}, which is no figure"
    elif best - after > tolerance + _SLACK:
        by_now = before - after <= tolerance + _SLACK  # the champion has lost some of it already
        tested = None if by_now else p
        test = "no paired test" if tested is None else f"p = {tested:.4f}"
        whose = f"{best:.2f}, an earlier champion's," if by_now else f"{best:.2f}"
        by_chance = tested is not None and tested >= settings.significance  # what was not tested may be none
        if not (settings.confirmed_only and by_chance):
            refused = (
                f"{task}, {language}: {metric} falls by {best - after:.2f} from {whose} to {after:.2f} ({test}), and "
                f"its tolerance is {tolerance:g}"
            )
    return Line(task, language, metric, before, best, after, tolerance, p, refused)


def show(verdict: Verdict, console: Console) -> None:
    """Prints the verdict: a row for each language, the means, and each refusal as a sentence."""
    table = Table(title="Gate", title_justify="left")
    for heading in (
        "task",
        "language",
        "metric",
        "best",
        "champion",
        "challenger",
        "change",
        "tolerance",
        "p (Holm)",
        "",
    ):
        side: JustifyMethod = "left" if heading in {"task", "language", "metric", ""} else "right"
        table.add_column(heading, justify=side, overflow="fold")
    for line in verdict.lines:
        after, change = "-", "-"
        if line.challenger is not None:
            after, change = f"{line.challenger:.2f}", f"{line.challenger - line.champion:+.2f}"
        p = "-" if line.p is None else f"{line.p:.4f}"
        mark = "[bold red]refused[/]" if line.refused else "ok"
        names = (escape(line.task), escape(line.language), line.metric)
        so_far = (f"{line.best:.2f}", f"{line.champion:.2f}")
        table.add_row(*names, *so_far, after, change, f"{line.tolerance:g}", p, mark)
    for task, (before, after_mean) in verdict.macro.items():
        table.add_section()
        table.add_row(
            escape(task), "mean", "", "", f"{before:.2f}", f"{after_mean:.2f}", f"{after_mean - before:+.2f}"
        )
    console.print(table)
    for sentence in verdict.refusals:
        console.print(f"refused: {sentence}", markup=False, highlight=False)
    if verdict.passed:
        console.print("passed: no language pays for the mean")
