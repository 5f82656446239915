"""Where a result goes: the terminal, JSON on standard output, and a folder with JSON, one HTML page and predictions."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from mlray import storage
from mlray.config import Storage
from mlray.console import wide
from mlray.evaluation import comparison, leakage, report, trec
from mlray.evaluation.comparison import Comparison
from mlray.evaluation.leakage import Leakage
from mlray.evaluation.report import Figure, Report

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;margin:1rem 0 2rem}th,td{padding:.35rem .7rem;text-align:right;border:1px solid #d8dee4}
th:first-child,td:first-child{text-align:left}td small{color:#57606a;display:block}
td.empty{text-align:left;color:#57606a}th{background:#f6f8fa}
caption{text-align:left;font-weight:600;padding:.4rem 0}pre{background:#f6f8fa;padding:1rem;overflow:auto}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}th,pre{background:#161b22}
th,td{border-color:#30363d}td small,td.empty{color:#9198a1}}
"""


def tell(
    result: Report | Comparison | Leakage,
    rows: Sequence[dict[str, Any]],
    folder: str | None,
    settings: Storage,
    *,
    as_json: bool,
) -> None:
    """Prints a result as tables or JSON, and keeps it in a folder (also an `s3://` prefix) if one is named.

    Raises:
        StorageError: the folder cannot be written.
    """
    if folder:
        name = {Leakage: "leakage.json", Comparison: "comparison.json"}.get(type(result), "report.json")
        files = {name: result.to_json() + "\n"}
        if isinstance(result, Report):
            files["report.html"] = page(result)
        files |= trec.files(rows)
        if rows:
            files["predictions.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for name, text in files.items():
            storage.write_bytes(storage.join(storage.absolute(folder), name), text.encode(), settings)
    if as_json:
        print(result.to_json())
    elif isinstance(result, Report):
        report.show(result, wide())
    elif isinstance(result, Leakage):
        leakage.show(result, wide())
    else:
        comparison.show(result, wide())


def page(result: Report) -> str:
    """One self-contained HTML page: a heat map of all tasks where there are several, and one of each task."""
    tables = _overview(result) if len(result.cells) > 1 else ""
    tables += "".join(_heat_map(result, task) for task in result.cells)
    tables += "".join(
        f"<p>{html.escape(f'{task}, {language}: {reason}')}</p>"
        for task, reasons in result.empty.items()
        if task not in result.cells
        for language, reason in reasons.items()
    )
    tables += "".join(f"<p>{html.escape(note)}</p>" for note in result.notes())
    about = html.escape(json.dumps(result.about, ensure_ascii=False, indent=1))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>Evaluation</title><style>{STYLE}</style></head><body>'
        f"<h1>Evaluation per language</h1>{tables}<h2>What was judged</h2><pre>{about}</pre></body></html>\n"
    )


def _overview(result: Report) -> str:
    """A language a row and a task a column, with the first metric of each; languages without a figure come last."""
    metrics = {task: next(iter(next(iter(table.values())))) for task, table in result.cells.items()}
    head = "".join(f"<th>{html.escape(task)}<br>{html.escape(metrics[task])}</th>" for task in metrics)
    body = ""
    names = {name for table in result.cells.values() for name in table}
    for language in [*sorted(names), *sorted(set[str]().union(*result.empty.values()) - names)]:
        body += f"<tr><td>{html.escape(language)}</td>"
        for task, metric in metrics.items():
            table = result.cells[task]
            if language in table:
                body += _cell(table[language][metric], metric, sized=True)
            else:
                reason = result.empty.get(task, {}).get(language, "not of this task")
                body += f'<td class="empty">{html.escape(reason)}</td>'
        body += "</tr>"
    return (
        "<table><caption>all tasks</caption><thead><tr><th>language</th>"
        f"{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _heat_map(result: Report, task: str) -> str:
    table, summary = result.cells[task], result.summary(task)
    metrics = list(next(iter(table.values())))
    head = "".join(f"<th>{html.escape(metric)}</th>" for metric in metrics)
    body = ""
    for language, figures in sorted(table.items()):
        cells = "".join(_cell(figures[metric], metric) for metric in metrics)
        body += f"<tr><td>{html.escape(language)}</td>{cells}<td>{figures[metrics[0]].n:,}</td></tr>"
    for language, reason in result.empty.get(task, {}).items():
        body += (
            f"<tr><td>{html.escape(language)}</td>"
            f'<td class="empty" colspan="{len(metrics)}">{html.escape(reason)}</td><td>0</td></tr>'
        )
    means = "".join(f"<th>{summary[metric]['macro']:.1f}</th>" for metric in metrics)
    worst = "".join(f"<th>{html.escape(summary[metric]['worst'])}</th>" for metric in metrics)
    gaps = "".join(f"<th>{summary[metric]['gap']:.1f}</th>" for metric in metrics)
    return (
        f"<table><caption>{html.escape(task)}</caption><thead><tr><th>language</th>{head}<th>n</th></tr></thead>"
        f"<tbody>{body}</tbody><tfoot><tr><th>mean</th>{means}<th></th></tr>"
        f"<tr><th>worst</th>{worst}<th></th></tr><tr><th>gap</th>{gaps}<th></th></tr></tfoot></table>"
    )


def _cell(figure: Figure, metric: str, *, sized: bool = False) -> str:
    """One scale for all cells, so that like figures have like colours: 0 is red and 100 green."""
    lower = metric in report.LOWER_IS_BETTER
    share = min(max(abs(figure.value) / 100 if lower else figure.value / 100, 0.0), 1.0)
    share = 1.0 - share if lower else share
    hue = 10 + 110 * share  # red to green; the figures say the same without colour
    notes = [f"{figure.low:.1f} to {figure.high:.1f}"] if figure.n > 1 else []  # one row has no spread
    notes += [f"n {figure.n:,}"] if sized else []
    return (
        f'<td style="background:hsl({hue:.0f} 70% 50% / .28)" title="{html.escape(figure.signature)}">'
        f"{figure.value:.1f}{''.join(f'<small>{note}</small>' for note in notes)}</td>"
    )
