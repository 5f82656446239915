"""Hard negatives: what an encoder takes for the other half of a pair, and is not.

Near texts that are nearly as near as the right one may be right as well: they are left out by a margin relative to
the right one's similarity (the positive-aware filter of NV-Retriever, Moreira et al. 2024), as are copies and other
texts of the same item.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mlray import storage
from mlray.config import ConfigError, RunConfig
from mlray.corpus import lines, testsets, vectors
from mlray.corpus.testsets import Case
from mlray.evaluation import ranking
from mlray.models import backbone
from mlray.objectives import checks, contrastive
from mlray.schema import SEPARATOR
from mlray.training import placement
from mlray.training.folders import Folders
from mlray.tuning.embed import opener


def mine(
    config: RunConfig, model: str, output: str, *, count: int, margin: float, depth: int
) -> dict[str, Any]:
    """Writes the pairs of `corpus.sources` with hard negatives, as JSON lines that a source reads again.

    Each line has `text`, `pair`, `language`, `negatives`, the `item` where the source names it (as a number), and where
    they come from: `score` of the pair, `scores` and `ranks` of the negatives, the `model`, and `source`, the pair's
    file and row.

    Args:
        config: its `corpus.sources` are pairs; with `corpus.without_tests` those of the test sets are bad rows.
        model: folder or `s3://` prefix of the encoder.
        output: the file.
        count: negatives of a pair at most.
        margin: a negative's similarity is at most (1 - margin) times that of the pair.
        depth: nearest texts of the same language that are considered.

    Returns:
        Pairs, negatives, and what was left out: `too_near`, `same_item`, `bad_rows`.

    Raises:
        ConfigError: a limit is out of range, there are no pairs, or the model is no encoder.
        RunError: storage failed; then nothing is written.
    """
    if count < 1 or depth < 1 or not 0 <= margin < 1:
        raise ConfigError(
            f"--count {count} --depth {depth} --margin {margin}: count and depth are at least 1, margin 0 or more and "
            "below 1"
        )
    backbone.quiet()
    model = storage.absolute(model)
    opened = opener(config, model)
    pairs, bad = _pairs(config)
    placement.connect(config)
    told = {"pairs": 0, "negatives": 0, "too_near": 0, "same_item": 0, "bad_rows": bad}
    with storage.staging() as stage:
        path = stage / "mined.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for line in _lines(pairs, opened, (count, margin, depth), config, told):
                file.write(json.dumps({**line, "model": model}, ensure_ascii=False) + "\n")
        storage.upload(path, storage.absolute(output), config.storage)
    print(
        f"{told['pairs']:,} pairs with {told['negatives']:,} hard negatives; left out: {told['too_near']:,} too near, "
        f"{told['same_item']:,} of the same item, {told['bad_rows']:,} bad rows\nmined       {output}"
    )
    return told


def _lines(
    pairs: dict[str, list[Case]],
    opened: Callable[[], vectors.Embedder],
    limits: tuple[int, float, int],
    config: RunConfig,
    told: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """The pairs with their negatives, language after language; what was left out is added to `told`."""
    texts = list(dict.fromkeys(text for group in pairs.values() for case in group for text in case[:2]))
    place = {text: number for number, text in enumerate(texts)}
    vectors_NH = vectors.of_texts(texts, opened, config.cluster)
    ends = np.array([[place[case.text], place[case.pair]] for group in pairs.values() for case in group])
    about = np.array([case.item for group in pairs.values() for case in group])
    items_N = contrastive.with_items(ends, about, len(texts))
    for language, group in pairs.items():
        numbers = np.array([[place[case.text], place[case.pair]] for case in group])
        found = _found(numbers, vectors_NH, items_N, limits, config, told)
        for case, negatives in zip(group, found, strict=True):
            named = [texts[number] for number in negatives.pop("numbers")]
            shared = {"text": case.text, "pair": case.pair, "language": language, "negatives": named}
            if case.item:
                shared["item"] = str(case.item)
            yield {**shared, **negatives, "source": case.place}


def _pairs(config: RunConfig) -> tuple[dict[str, list[Case]], int]:
    found: dict[str, list[Case]] = {}
    bad = 0
    files = testsets.files_of(config.corpus.sources, config)
    for file in checks.guarded(files, config, Folders.of(config).corpus):
        try:
            for row, record in testsets.rows_of(file, config):
                pair = record.pair.split(SEPARATOR)[0]
                if record.reason or not pair or pair == record.text:
                    bad += 1
                else:
                    case = Case(record.text, pair, file.uri, row, record.key, record.item)
                    found.setdefault(record.language, []).append(case)
        except lines.BrokenChunk as error:
            raise ConfigError(f"{file.uri}: {error}") from error
    if not found:
        raise ConfigError("corpus.sources holds no pair to mine hard negatives for; name its column in pair")
    return found, bad


def _found(
    numbers: np.ndarray,
    vectors_NH: np.ndarray,
    items_N: np.ndarray,
    limits: tuple[int, float, int],
    config: RunConfig,
    told: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Of each pair (text numbers of both halves) its negatives, among the second halves of its language."""
    pool = np.unique(numbers[:, 1])
    near, products = vectors.nearest(
        vectors_NH[numbers[:, 0]], vectors_NH[pool], limits[2], ranking.top_k, config.cluster
    )
    for (query, right), found, scores in zip(numbers, pool[near], products, strict=True):
        score = float(vectors_NH[query] @ vectors_NH[right])
        chosen, counts = choose(found, scores, items_N, int(items_N[query]), score, limits[:2])
        told["pairs"] += 1
        told["negatives"] += len(chosen)
        for reason, number in counts.items():
            told[reason] += number
        yield {
            "numbers": found[chosen].tolist(),
            "score": round(score, 4),
            "scores": [round(float(one), 4) for one in scores[chosen]],
            "ranks": [int(one) + 1 for one in chosen],
        }


def choose(
    found: Sequence[int] | np.ndarray,
    scores: np.ndarray,
    items_N: np.ndarray,
    item: int,
    score: float,
    limits: tuple[int, float],
) -> tuple[np.ndarray, dict[str, int]]:
    """Which of the nearest texts are hard negatives: their places, and how many were left out and why.

    Args:
        found: text numbers, the nearest first.
        scores: their similarities.
        items_N: item of each text.
        item: that of the pair.
        score: similarity of the pair.
        limits: how many at most, and the margin.
    """
    count, margin = limits
    same = items_N[np.asarray(found)] == item
    near = ~same & (scores > score * (1 - margin) if score > 0 else scores > score * (1 + margin))
    chosen = np.flatnonzero(~same & ~near)[:count]
    last = int(chosen[-1]) + 1 if len(chosen) else len(scores)
    return chosen, {"too_near": int(near[:last].sum()), "same_item": int(same[:last].sum())}
