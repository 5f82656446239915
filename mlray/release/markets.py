"""Adapters of single markets in a bundle: what is found there is read by them, products and queries alike.

    adapters/<tag>/    an adapter on the bundle's weights, for the market of this tag and related ones without their own

A query is read by the adapter of the market in which it looks, whatever its own language: vectors of two adapters do
not lie in one space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlray import languages
from mlray.config import ConfigError
from mlray.corpus import vectors
from mlray.evaluation.report import Report
from mlray.objectives.embedding import TextEmbedder

FOLDER = "adapters"


def tags(about: Mapping[str, Any]) -> list[str]:
    """The markets that have an adapter, by what a bundle says of itself."""
    return list(about.get("adapters", ()))


def reader(embedder: TextEmbedder, known: Sequence[str]) -> vectors.Read:
    """Reads texts by the adapters of their markets, which are loaded."""

    def read(texts: Sequence[str], markets: Sequence[str]) -> np.ndarray:
        return embedder.embed(texts, [languages.nearest(market, known) for market in markets])

    return read


def take_over(stage: Path, tag: str, judged: Path) -> None:
    """Puts the evaluation of a market's adapter into that of the bundle, where the market is searched.

    Args:
        stage: the bundle that is being made; its `report.json` and `predictions.jsonl` are rewritten.
        tag: of the market.
        judged: folder with the adapter's own.

    Raises:
        ConfigError: the adapter was not judged on the market.
    """
    ours, theirs = Report.read(stage), Report.read(judged)
    taken = [
        (task, name)
        for task, table in theirs.cells.items()
        for name in table
        if languages.target(name) == tag and name in ours.cells.get(task, {})
    ]
    if not taken:
        raise ConfigError(
            f"the adapter for {tag} was not judged where the bundle was; evaluate it on the same rows"
        )
    replace(stage, judged, taken)


def replace(stage: Path, judged: Path, taken: Sequence[tuple[str, str]]) -> None:
    """Puts figures of one evaluation, and the rows behind them, into another.

    Args:
        stage: folder whose `report.json` and `predictions.jsonl` are rewritten.
        judged: folder with those of the other.
        taken: task and language of each cell that the other one gives.
    """
    ours, theirs = Report.read(stage), Report.read(judged)
    for task, name in taken:
        ours.cells.setdefault(task, {})[name] = theirs.cells[task][name]
    (stage / "report.json").write_text(ours.to_json(), encoding="utf-8")
    rows = [
        *(row for row in _rows(stage) if (row["task"], row["language"]) not in taken),
        *(row for row in _rows(judged) if (row["task"], row["language"]) in taken),
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (stage / "predictions.jsonl").write_text(text, encoding="utf-8")


def _rows(folder: Path) -> list[dict[str, str]]:
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]
