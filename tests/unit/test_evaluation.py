"""Scores equal sacreBLEU's own, the tokenizer follows the language, and nothing is silently skipped."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest
import sacrebleu
from rich.console import Console

from mlray import configuration
from mlray.config import ConfigError
from mlray.evaluation import evaluate, report, translation
from mlray.evaluation.report import Figure, Report

HYPOTHESES = ["the kettle boils water quickly", "a soft blanket keeps warm", "cold evenings come soon"]
REFERENCES = [
    "the kettle boils the water quickly",
    "a soft blanket keeps you warm",
    "cold evenings are coming",
]


def test_scores_are_those_of_sacrebleu() -> None:
    found = translation.score(HYPOTHESES, REFERENCES, "en", resamples=50)
    assert found["BLEU"].value == sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score
    assert found["chrF"].value == sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score
    assert found["TER"].value == sacrebleu.corpus_ter(HYPOTHESES, [REFERENCES]).score
    assert {figure.n for figure in found.values()} == {3}
    assert (
        found["BLEU"].signature
        == f"nrefs:1|bs:50|seed:12345|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    )
    for figure in found.values():
        assert figure.low <= figure.value <= figure.high
        assert figure.low < figure.high


@pytest.mark.parametrize(
    ("language", "reference", "hypothesis"),
    [
        ("zh", "这款水壶加热很快，而且非常安静。", "这款水壶加热很快，而且十分安静。"),
        ("ja", "このケトルはお湯がすぐに沸きます。", "このケトルはお湯がすぐ沸きます。"),
        ("th", "กาต้มน้ำนี้เดือดเร็วมากและเงียบ", "กาต้มน้ำนี้เดือดเร็วและเงียบ"),
    ],
)
def test_one_changed_word_does_not_cost_everything(language: str, reference: str, hypothesis: str) -> None:
    assert (
        sacrebleu.corpus_bleu([hypothesis], [[reference]]).score < 1e-6
    )  # the default tokenizer sees one word
    assert translation.score([hypothesis], [reference], language, 10)["BLEU"].value > 50
    assert translation.score([reference], [reference], language, 10)["BLEU"].value == pytest.approx(100)


def test_what_cannot_be_scored_is_named() -> None:
    with pytest.raises(ConfigError, match="3 hypotheses do not fit 2 references"):
        translation.score(HYPOTHESES, REFERENCES[:2], "en", 10)
    with pytest.raises(ConfigError, match="the reference of row 1 in 'de' is empty"):
        translation.score(["a", "b"], ["a", " "], "de", 10)


def figures(bleu: float, ter: float) -> dict[str, Figure]:
    return {"BLEU": Figure(bleu, bleu - 1, bleu + 1, 10, "x"), "TER": Figure(ter, ter, ter, 10, "x")}


def test_summary_tells_the_mean_the_worst_and_the_gap() -> None:
    found = Report(
        {}, {"translation": {"en-de": figures(30, 50), "en-fr": figures(50, 40), "en-cs": figures(22, 45)}}
    )
    summary = found.summary("translation")
    assert summary["BLEU"] == {"macro": 34.0, "worst": "en-cs", "gap": 12.0}
    assert summary["TER"] == {"macro": 45.0, "worst": "en-de", "gap": 5.0}
    body = json.loads(found.to_json())
    assert body["cells"]["translation"]["en-fr"]["BLEU"] == {
        "value": 50,
        "low": 49,
        "high": 51,
        "n": 10,
        "signature": "x",
    }
    console = Console(file=io.StringIO(), width=100)
    report.show(found, console)
    assert "30.0 ± 1.0" in console.file.getvalue()  # type: ignore[attr-defined]


def test_rows_of_a_test_set_are_all_read_or_the_bad_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.en.gz").write_bytes(gzip.compress(b"one\r\ntwo\n\nfour\n"))
    (tmp_path / "test.de").write_text("eins\nzwei\ndrei\nvier\n", encoding="utf-8")
    pair = f"{{uri: {tmp_path}/test.en.gz, pair_uri: {tmp_path}/test.de, language: en-de, format: text}}"
    config = configuration.load(None, [f"evaluation.sources=[{pair}]"])
    with pytest.raises(ConfigError, match=r"test\.en\.gz: row 2 cannot be scored: empty"):
        evaluate.read(config)
    (tmp_path / "test.en.gz").write_bytes(gzip.compress(b"one\r\ntwo\nthree\nfour\n"))
    rows = evaluate.read(config)
    assert [(row.text, row.pair) for row in rows["en-de"]] == [
        ("one", "eins"),
        ("two", "zwei"),
        ("three", "drei"),
        ("four", "vier"),
    ]
    (tmp_path / "test.de").write_text("eins\nzwei\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="have different numbers of lines"):
        evaluate.read(config)
    with pytest.raises(ConfigError, match=r"model\.path is empty"):
        evaluate.evaluate(config)
