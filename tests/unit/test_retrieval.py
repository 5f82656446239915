"""Search and its measures: against a slow ranking by hand, and on vectors whose order is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from mlray.config import ConfigError, Evaluation
from mlray.corpus.testsets import Case
from mlray.evaluation import predictions, ranking, retrieval, trec
from mlray.evaluation.retrieval import Finder


class Known:
    """An embedder that was told the vectors."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.vectors = vectors

    def embed(self, texts: list[str]) -> np.ndarray:
        return np.array([self.vectors[text] for text in texts], np.float32)


def finder(vectors: dict[str, list[float]], rows: dict[str, list[Case]]) -> Finder:
    known: Any = Known(vectors)
    return Finder(known, rows)


def test_top_k_is_that_of_a_full_sort_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)  # whole numbers: products are exact, and many are equal
    queries, candidates = (draw.integers(-9, 10, (rows, 8)).astype(np.float32) for rows in (37, 50))
    candidates[11] = candidates[7]  # of equals the lower number first
    scores = queries @ candidates.T
    order = np.argsort(-scores, axis=1, kind="stable")
    sorted_ = np.take_along_axis(scores, order, axis=1)
    clear = sorted_[:, 19] > sorted_[:, 20]  # else which of the equals at the last rank is kept is open
    assert 10 < clear.sum() < 37
    for block_bytes in (1, 1 << 20):
        monkeypatch.setattr(ranking, "_BLOCK_BYTES", block_bytes)
        numbers, products = ranking.top_k(queries, candidates, 20)
        assert (numbers[clear] == order[clear, :20]).all()
        assert (products == sorted_[:, :20]).all()
    assert ranking.top_k(queries, candidates[:3], 20)[0].shape == (37, 3)


@pytest.mark.parametrize("right", [{0}, {4}, {2, 9}, {1, 3, 5, 11}, {99}])
def test_measures_are_those_of_scikit_learn(right: set[int]) -> None:
    ranked = [3, 0, 7, 2, 5, 1, 9, 4, 8, 6, 10, 11]
    names = [str(one) for one in ranked]
    r1, r5, r10, inverse, gain, precision, first = ranking.measures(names, {str(one) for one in right})
    truth = np.array([[float(one in right) for one in ranked]])
    scores = np.array([[-float(place) for place in range(len(ranked))]])
    assert r1 == (ranked[0] in right) / len(right)
    assert first == (ranked[0] in right)
    assert r5 == len(right & set(ranked[:5])) / len(right)
    assert r10 == len(right & set(ranked[:10])) / len(right)
    if right & set(ranked):
        assert inverse == pytest.approx(1 / (1 + min(ranked.index(one) for one in right)))
        assert gain == pytest.approx(ndcg_score(truth, scores, k=10))
        assert precision == pytest.approx(average_precision_score(truth[0], scores[0]))
    else:
        assert (inverse, gain, precision) == (0.0, 0.0, 0.0)


def test_scores_are_means_over_the_queries() -> None:
    found = ranking.score(["0 1 2", "2 1 0", "1 0"], ["0", "1", "0 1"], 200)
    assert found["R@1"].value == pytest.approx(100 * (1 + 0 + 0.5) / 3)
    assert found["accuracy"].value == pytest.approx(100 * 2 / 3)
    assert found["MRR"].value == pytest.approx(100 * (1 + 1 / 2 + 1) / 3)
    assert found["nDCG@10"].value == pytest.approx(100 * (1 + 1 / math.log2(3) + 1) / 3)
    assert found["R@5"].value == 100.0
    assert (found["R@1"].n, found["R@1"].low < found["R@1"].value < found["R@1"].high) == (3, True)


def case(text: str, pair: str, row: int = 0) -> Case:
    return Case(text, pair, "test.tsv", row)


ROWS = {"de-en": [case("d1", "e1"), case("d2", "e2"), case("d1", "e3")], "fr-en": [case("f1", "e1")]}


def test_both_directions_are_asked() -> None:
    both = retrieval.both_ways(ROWS)
    assert list(both) == ["de-en", "en-de", "fr-en", "en-fr"]
    assert [row[:2] for row in both["en-de"]] == [("e1", "d1"), ("e2", "d2"), ("e3", "d1")]
    assert list(retrieval.both_ways({"de": [case("q", "a")]})) == ["de"]


def test_a_text_in_two_pairs_has_two_right_answers() -> None:
    assert retrieval.truths(ROWS["de-en"]) == ["0 2", "1", "0 2"]
    assert retrieval.truths(retrieval.both_ways(ROWS)["en-de"]) == ["0", "1", "0"]


def test_the_nearest_come_first() -> None:
    vectors = {"d1": [1, 0], "d2": [0, 1], "e1": [0.9, 0.1], "e2": [0.5, 0.5], "e3": [0.8, 0.3]}
    rows = {"de-en": ROWS["de-en"]}
    (part,) = finder(vectors, rows).find("de-en")
    assert part == ["0 2 1", "1 2 0", "0 2 1"]


def test_a_language_that_crowds_out_the_right_answer_is_told() -> None:
    """Of the German query's candidates, two German texts and one of the three others lie above the right one."""
    vectors = {
        "d1": [1.0, 0.0, 0.0],
        "d2": [0.9, 0.1, 0.0],
        "d3": [0.8, 0.2, 0.0],
        "e1": [0.5, 0.0, 0.5],
        "e2": [0.6, 0.0, 0.2],
        "e3": [0.1, 0.9, 0.0],
    }
    rows = {"de-en": [case("d1", "e1"), case("d2", "e2"), case("d3", "e3")]}
    found = finder(vectors, rows).mixed(100)["de"]
    above = {  # query: (own above of 2, others above of 2)
        "d1": (2, 1),  # right at 0.5; d2 .9, d3 .8; e2 .6, e3 .1
        "d2": (2, 0),  # right at 0.54; d1 .9, d3 .74; e1 .45, e3 .18
        "d3": (2, 2),  # right at 0.26; d1 .8, d2 .74; e1 .4, e2 .48
    }
    own, others = (100 * np.mean([counts[i] / 2 for counts in above.values()]) for i in (0, 1))
    assert found["own above"].value == pytest.approx(own)
    assert found["others above"].value == pytest.approx(others)
    assert found["language bias"].value == pytest.approx(own - others)
    assert found["R@1"].value == 0.0


def test_a_model_that_tells_nothing_apart_finds_nothing() -> None:
    rows = {"de-en": [case("d1", "e1"), case("d2", "e2"), case("d3", "e3")]}
    vectors = {text: [1.0, 0.0] for one in rows["de-en"] for text in one[:2]}
    found = finder(vectors, rows).mixed(100)["de"]
    told = {name: found[name].value for name in ("R@1", "own above", "others above", "language bias")}
    assert told == {"R@1": 0.0, "own above": 50.0, "others above": 50.0, "language bias": 0.0}


def test_translations_of_the_same_item_are_no_rivals() -> None:
    vectors = {"d1": [1.0, 0.0], "f1": [0.95, 0.05], "e1": [0.9, 0.1], "d2": [0.0, 1.0], "e2": [0.1, 0.9]}
    rows = {"de-en": [case("d1", "e1"), case("d2", "e2")], "fr-en": [case("f1", "e1")]}
    found = finder(vectors, rows).mixed(100)
    assert found["de"]["R@1"].value == 100.0
    assert found["de"]["own above"].value == 0.0


def test_run_and_qrels_files_give_the_scores_of_the_predictions(tmp_path: Path) -> None:
    rows = [
        {"task": "retrieval", "language": "de-en", "prediction": "4 0 2", "reference": "0"},
        {"task": "retrieval", "language": "de-en", "prediction": "1 3 0", "reference": "3 0"},
        {"task": "retrieval", "language": "en-de", "prediction": "0 1", "reference": "0"},
        {"task": "classification", "language": "de", "prediction": "a", "label": "a"},
    ]
    for name, text in trec.files(rows).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    config = Evaluation(resamples=50)
    found = trec.score(tmp_path / "run.trec", tmp_path / "qrels.trec", config)
    assert found.cells == predictions.score(tmp_path / "predictions.jsonl", config).cells
    assert found.cells["retrieval"]["de-en"]["R@1"].value == 0.0
    assert found.cells["retrieval"]["de-en"]["MRR"].value == 50.0


def test_a_run_is_ranked_by_its_scores(tmp_path: Path) -> None:
    run, qrels = tmp_path / "run", tmp_path / "qrels"
    run.write_text("q1 Q0 a 1 0.1 x\nq1 Q0 b 2 0.9 x\nq1 Q0 c 3 0.9 x\n")
    qrels.write_text("q1 0 a 1\nq1 0 b 0\nq2 0 z 1\n")
    first, second = trec.read(run, qrels)
    assert (first.prediction, first.truth, first.language) == ("c b a", "a", "und")
    assert (second.prediction, second.truth) == ("", "z")


@pytest.mark.parametrize(
    ("run", "qrels", "message"),
    [
        ("q1 Q0 a 1 0.1", "q1 0 a 1", "run: line 1 has 5 columns instead of 6"),
        ("q1 Q0 a 1 much x", "q1 0 a 1", "run: line 1: 'much' is no number"),
        ("q9 Q0 a 1 0.1 x", "q1 0 a 1", "the query 'q9' is not judged"),
        (
            "q1 Q0 a 1 0.1 x\nq1 Q0 a 2 0.1 x",
            "q1 0 a 1",
            "line 2: the document 'a' stands twice in the list of 'q1'",
        ),
        ("q1 Q0 a 1 0.1 x", "q1 0 a 3", "qrels: line 1: the grade 3 is neither 1 .right. nor 0"),
        ("q1 Q0 a 1 0.1 x", "q1 0 a 0", "no document is right for the query 'q1'"),
    ],
)
def test_a_bad_line_is_named(run: str, qrels: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run").write_text(run + "\n")
    (tmp_path / "qrels").write_text(qrels + "\n")
    with pytest.raises(ConfigError, match=message):
        trec.read(tmp_path / "run", tmp_path / "qrels")
