"""Ranked lists and judgements as trec_eval reads them: run and qrels files.

A line of a run is `query Q0 document rank score tag`, one of the judgements `query 0 document relevance`. Queries are
called `<language>:<number>`, so that a file holds every direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlray import languages
from mlray.config import ConfigError, Evaluation
from mlray.evaluation.predictions import Row, report_of
from mlray.evaluation.report import Report

TASK = "retrieval"


def files(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """`run.trec` and `qrels.trec` of the rows of `predictions.jsonl` that are ranked lists; none without any."""
    run, judged, numbers = list[str](), list[str](), dict[str, int]()
    for row in rows:
        if row["task"] != TASK:
            continue
        number = numbers[row["language"]] = numbers.get(row["language"], -1) + 1
        query = f"{row['language']}:{number}"
        ranked = row["prediction"].split()
        run += [f"{query} Q0 {one} {rank} {1 / rank:.6f} mlray" for rank, one in enumerate(ranked, start=1)]
        judged += [f"{query} 0 {one} 1" for one in row["reference"].split()]
    if not run:
        return {}
    return {"run.trec": "\n".join(run) + "\n", "qrels.trec": "\n".join(judged) + "\n"}


def read(run: Path, qrels: Path) -> list[Row]:
    """A row for each judged query; one without ranked documents has found nothing.

    Documents come by falling score, and of equals by falling name, as trec_eval takes them; the rank is not looked at.

    Raises:
        ConfigError: a file cannot be read, a line is none of its kind, a grade is above 1, a list has a document
            twice, a query has no right document; it is named.
    """
    right = _judged(qrels)
    found: dict[str, dict[str, float]] = {}
    for place, (query, _, document, _, score, _) in _lines(run, 6):
        if query not in right:
            raise ConfigError(f"{place}: the query {query!r} is not judged in {qrels}")
        if document in found.setdefault(query, {}):
            raise ConfigError(f"{place}: the document {document!r} stands twice in the list of {query!r}")
        found[query][document] = _number(score, place)
    rows = []
    for query, documents in right.items():
        if not documents:
            raise ConfigError(f"{qrels}: no document is right for the query {query!r}")
        scores = found.get(query, {})
        ranked = sorted(scores, key=lambda document: (scores[document], document), reverse=True)
        language = query.rpartition(":")[0] or languages.UNKNOWN
        rows.append(Row(TASK, language, " ".join(ranked), " ".join(documents), str(qrels)))
    return rows


def _judged(qrels: Path) -> dict[str, list[str]]:
    right: dict[str, list[str]] = {}
    for place, (query, _, document, relevance) in _lines(qrels, 4):
        right.setdefault(query, [])
        grade = _number(relevance, place)
        if not (grade <= 0 or grade == 1):
            raise ConfigError(
                f"{place}: the grade {relevance} is neither 1 (right) nor 0, and no other is scored"
            )
        if grade > 0:
            right[query].append(document)
    return right


def score(run: Path, qrels: Path, config: Evaluation) -> Report:
    """The report on a run.

    Raises:
        ConfigError: as `read`.
    """
    return report_of(read(run, qrels), {"run": str(run), "qrels": str(qrels)}, config)


def _lines(path: Path, columns: int) -> Iterable[tuple[str, list[str]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        cells = line.split()
        if len(cells) != columns:
            raise ConfigError(f"{path}: line {number} has {len(cells)} columns instead of {columns}")
        yield f"{path}: line {number}", cells


def _number(text: str, place: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{place}: {text!r} is no number") from None
