"""Scores equal sacreBLEU's own, the tokenizer follows the language, and nothing is silently skipped."""

from __future__ import annotations

import functools
import gzip
import io
import itertools
import json
import re
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sacrebleu
import torch
import transformers
from nltk.translate.meteor_score import meteor_score
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.scheme import BILOU
from sklearn import metrics

from mlray import configuration, languages
from mlray.config import ConfigError, Evaluation, Storage
from mlray.corpus import testsets
from mlray.corpus.testsets import Case
from mlray.evaluation import (
    comparison,
    evaluate,
    labels,
    output,
    predictions,
    report,
    significance,
    texts,
    translation,
)
from mlray.evaluation.report import Figure, Report
from mlray.models import backbone
from mlray.training.checkpoint import Progress
from tests.unit import test_labels, tiny

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
        ("bo", "བོད་ཀྱི་སྐད་ཡིག་ནི་གལ་ཆེན་པོ་ཡིན།", "བོད་ཀྱི་སྐད་ཡིག་ནི་གལ་ཆེན་པོ་རེད།"),
        ("shn", "ၵႂၢမ်းတႆးပဵၼ်ၵႂၢမ်းၸိူဝ်ႉၶိူဝ်း", "ၵႂၢမ်းတႆးပဵၼ်ၵႂၢမ်းၸိူဝ်ႉၶိူင်း"),
        ("cdo", "這款水壺加熱很快而且非常安靜", "這款水壺加熱很快而且十分安靜"),
        ("ryu", "くぬケトルやゆーふちゅん", "くぬケトルやゆーふちゅさ"),
    ],
)
def test_one_changed_word_does_not_cost_everything(language: str, reference: str, hypothesis: str) -> None:
    assert (
        sacrebleu.corpus_bleu([hypothesis], [[reference]]).score < 1e-6
    )  # the default tokenizer sees one word
    assert translation.score([hypothesis], [reference], language, 10)["BLEU"].value > 50
    assert translation.score([reference], [reference], language, 10)["BLEU"].value == pytest.approx(100)
    ter = translation.score([hypothesis], [reference], language, 10)["TER"]
    assert 0 < ter.value < 30  # of one word it would be 100
    tokenizer = "zh" if language == "zh" else "char"
    assert ter.signature.endswith(f"|words:{tokenizer}")
    assert f"|tok:{tokenizer}|" in translation.score([reference], [reference], language, 10)["BLEU"].signature
    assert translation.score([reference], [reference], language, 10)["TER"].value == 0


KNOWN = {
    "en": (
        [
            "The kettle boils a litre of water in three minutes, quietly.",
            "A soft blanket for cold evenings - washable at 40 degrees.",
            "Free delivery on orders over $25.00; returns within 30 days.",
            '"Two cups, please", said the customer.',
            "The lamp lights the room.",
        ],
        [
            "The kettle quietly boils one litre of water in three minutes.",
            "A soft blanket for cold evenings, washable at 40 degrees.",
            "Free delivery for orders over $25.00; you can return them within 30 days.",
            '"Two cups, please," said the customer.',
            "This lamp lights up the whole room.",
        ],
    ),
    "zh": (
        [
            "这款水壶三分钟就能烧开一升水，很安静。",
            "适合寒冷夜晚的柔软毯子，可以用40度水洗。",
            "订单满25元免费送货；30天内可退货。",
            "这个台灯照亮整个房间。",
        ],
        [
            "这款水壶三分钟即可烧开一升水，而且十分安静。",
            "柔软的毯子适合寒冷的夜晚，可用40度水洗涤。",
            "订单满25元免费送货；30天内可以退货。",
            "这盏台灯能照亮整个房间。",
        ],
    ),
}


@pytest.mark.parametrize(
    ("language", "metric", "score", "half", "signature"),
    [
        ("en", "BLEU", 51.367330227, 14.1056105888, "case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"),
        ("en", "chrF", 75.6685054813, 10.9462814331, "case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0"),
        (
            "en",
            "TER",
            31.914893617,
            8.0693817139,
            "case:lc|tok:tercom|norm:no|punct:yes|asian:no|version:2.6.0",
        ),
        ("zh", "BLEU", 58.8642087943, 16.1103566292, "case:mixed|eff:no|tok:zh|smooth:exp|version:2.6.0"),
        ("zh", "chrF", 53.8379001474, 17.1988754272, "case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0"),
        (
            "zh",
            "TER",
            19.1780821918,
            7.8205137253,
            "case:lc|tok:tercom|norm:no|punct:yes|asian:no|version:2.6.0|words:zh",
        ),
    ],
)
def test_known_answers_keep_their_values_and_signatures(
    language: str, metric: str, score: float, half: float, signature: str
) -> None:
    """Frozen from sacreBLEU's command line 2.6.0, with these sentences as files.

    sacrebleu REFERENCES -i HYPOTHESES -m bleu chrf ter -tok 13a --confidence -w 10, and with `-tok zh`; the Chinese TER
    is that of files with a space around each character but the digits of a number.
    """
    found = translation.score(*KNOWN[language], language, resamples=1000)[metric]
    assert found.signature == f"nrefs:1|bs:1000|seed:12345|{signature}"
    assert found.value == pytest.approx(score, abs=1e-9)
    assert (found.high - found.value, found.value - found.low) == pytest.approx((half, half), abs=1e-9)


def test_intervals_of_many_rows_are_those_of_sacrebleu_in_little_memory() -> None:
    draw = np.random.default_rng(3)
    sides = [["".join(draw.choice(list("abcd "), size=9)) + "." for _ in range(1500)] for _ in range(2)]
    tracemalloc.start()
    found = translation.score(*sides, "en", resamples=400)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20e6  # all resamples of chrF's 18 counts would be 43 MB
    for name, metric in (("BLEU", sacrebleu.BLEU()), ("chrF", sacrebleu.CHRF()), ("TER", sacrebleu.TER())):
        expected = metric.corpus_score(sides[0], [sides[1]], n_bootstrap=400)
        assert found[name].value == expected.score
        assert found[name].high - found[name].value == pytest.approx(float(expected._ci), abs=1e-12)
        assert found[name].signature == str(metric.get_signature())


def test_an_interval_stays_inside_the_scale() -> None:
    good, bad = "we warm the milk slowly today", "nobody knows"
    found = translation.score([good, good, bad], [good, good, "a lamp for every room"], "en", resamples=200)
    assert found["BLEU"].high == found["chrF"].high == 100.0
    assert found["TER"].low == 0.0 < found["TER"].value
    worse = translation.score(["a b c d e f g h", "x"], ["y", "x"], "en", resamples=200)["TER"]
    assert worse.value == 400.0 < worse.high  # eight edits of two words


def test_ter_by_hand() -> None:
    # 4 edits (insert the, insert you, 2 for "are coming") of the 16 words of the references.
    found = translation.score(HYPOTHESES, REFERENCES, "en", resamples=10)
    assert found["TER"].value == pytest.approx(100 * 4 / 16)


@pytest.mark.parametrize(
    ("tag", "text", "tokenizer"),
    [
        ("zh", "", "zh"),
        ("zh-Hant", "", "zh"),
        ("zho", "", "zh"),
        ("eng-zho", "", "zh"),
        ("en-zh-Hans", "", "zh"),
        ("zh-Hans-en", "a kettle", "13a"),
        ("jpn", "USB", "char"),
        ("de-ja", "USB", "char"),
        ("ko", "물이 끓어요", "char"),
        ("pt-BR", "a chaleira", "13a"),
        ("de", "der Kessel heißt 水壶", "13a"),
        ("hak", "這款水壺很安靜 USB", "char"),
        ("hak", "Liá-chak súi-fù", "13a"),
        ("dz", "རྫོང་ཁ", "char"),
        ("nod", "ᨣᩤᩴᨾᩮᩬᩥᨦ", "char"),
        ("ii", "ꆈꌠꉙ", "char"),
        ("und", "กาต้มน้ำ", "char"),
        ("hi", "हिन्दी भाषा", "13a"),
        ("de", "100 %", "13a"),
    ],
)
def test_the_tokenizer_is_that_of_the_language_that_is_written(tag: str, text: str, tokenizer: str) -> None:
    assert languages.metric_tokenizer(languages.target(tag), [text]) == tokenizer


def test_what_cannot_be_scored_is_named() -> None:
    with pytest.raises(ConfigError, match="3 hypotheses do not fit 2 references"):
        translation.score(HYPOTHESES, REFERENCES[:2], "en", 10)
    with pytest.raises(ConfigError, match="the reference of row 1 in 'de' is empty"):
        translation.score(["a", "b"], ["a", " "], "de", 10)


def figures(bleu: float, ter: float) -> dict[str, Figure]:
    return {"BLEU": Figure(bleu, bleu - 1, bleu + 1, 10, "x"), "TER": Figure(ter, ter, ter, 10, "x")}


def test_a_bias_is_bad_either_way() -> None:
    signed = {"de": -30.0, "en": 20.0}
    cells = {name: {"language bias": Figure(value, value, value, 9, "")} for name, value in signed.items()}
    found = Report({}, {"mixed pool": cells})
    assert found.summary("mixed pool")["language bias"] == {"macro": -5.0, "worst": "de", "gap": 25.0}
    hues = re.findall(r"hsl\((\d+)", output.page(found))
    assert hues == ["87", "98"]


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


def test_what_a_figure_does_not_show_is_told_in_the_terminal_and_on_the_page() -> None:
    about = {
        "cut_off": {"de": 1200},
        "unfinished": {"en-zh": 3},
        "unknown_labels": {"fr": {"B-X": 2, "I-X": 1}},
        "left_out": ["a.txt: row 3 cannot be scored: empty", "a.txt: row 9 cannot be scored: empty"],
    }
    found = Report(about, {"answer": {"de": figures(30, 50)}})
    console = Console(file=io.StringIO(), width=200)
    report.show(found, console)
    page = output.page(found)
    for note in (
        "de: texts longer than a row, judged without their end: 1,200",
        "en-zh: texts that the model wrote without an end within evaluation.max_new_tokens: 3",
        "fr: labels that the training did not know count as wrong: B-X (2), I-X (1)",
        "bad rows left out: 2, the first: a.txt: row 3 cannot be scored: empty",
    ):
        assert f"{note}\n" in console.file.getvalue()  # type: ignore[attr-defined]
        assert f"<p>{note}</p>" in page
    assert "<p>" not in output.page(Report({}, found.cells))


def test_a_hostile_name_is_shown_as_it_is() -> None:
    name = "[/red]<b>x"
    found = Report({"left_out": [f"{name}: row 0"]}, {name: {name: figures(30, 50)}}, {name: {"de": name}})
    console = Console(file=io.StringIO(), width=100)
    report.show(found, console)
    assert console.file.getvalue().count(name) == 7  # type: ignore[attr-defined]
    page = output.page(found)
    assert "<b>" not in page
    assert page.count("[/red]&lt;b&gt;x") >= 4


def test_rows_of_a_test_set_are_all_read_or_the_bad_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.en.gz").write_bytes(gzip.compress(b"one\r\ntwo\n\nfour\n"))
    (tmp_path / "test.de").write_text("eins\nzwei\ndrei\nvier\n", encoding="utf-8")
    pair = f"{{uri: {tmp_path}/test.en.gz, pair_uri: {tmp_path}/test.de, language: en-de, format: text}}"
    config = configuration.load(None, [f"evaluation.sources=[{pair}]"])
    with pytest.raises(ConfigError, match=r"test\.en\.gz: row 2 cannot be scored: empty"):
        testsets.read(config)
    allowed = configuration.load(None, [f"evaluation.sources=[{pair}]", "evaluation.max_bad_rows=1"])
    rows, left_out = testsets.read(allowed)
    assert [row.text for row in rows["en-de"]] == ["one", "two", "four"]
    assert left_out == [f"{tmp_path}/test.en.gz: row 2 cannot be scored: empty"]
    (tmp_path / "test.en.gz").write_bytes(gzip.compress(b"one\r\ntwo\ndrei\nfour\n"))
    with pytest.raises(ConfigError, match=r"row 2 cannot be scored: the same text on both sides"):
        testsets.read(config, distinct=True)
    assert [row.text for row in testsets.read(allowed, distinct=True)[0]["en-de"]] == ["one", "two", "four"]
    (tmp_path / "test.en.gz").write_bytes(gzip.compress(b"one\r\ntwo\nthree\nfour\n"))
    rows, left_out = testsets.read(config)
    assert left_out == []
    assert [(row.text, row.pair) for row in rows["en-de"]] == [
        ("one", "eins"),
        ("two", "zwei"),
        ("three", "drei"),
        ("four", "vier"),
    ]
    (tmp_path / "test.de").write_text("eins\nzwei\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="have different numbers of lines"):
        testsets.read(config)
    with pytest.raises(ConfigError, match=r"model\.path is empty"):
        evaluate.evaluate(config)


def test_scores_of_texts_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(3)
    truth = [str(label) for label in draw.choice(["a", "b", "c"], size=90, p=[0.6, 0.3, 0.1])]
    found = [label if draw.random() < 0.7 else "a" for label in truth]
    scores = labels.score_texts(found, truth, resamples=200)
    assert scores["accuracy"].value == pytest.approx(100 * metrics.accuracy_score(truth, found))
    assert scores["macro F1"].value == pytest.approx(100 * metrics.f1_score(truth, found, average="macro"))
    assert scores["MCC"].value == pytest.approx(100 * metrics.matthews_corrcoef(truth, found))
    for figure in scores.values():
        assert figure.n == 90
        assert figure.low < figure.value < figure.high
    # A mean of 90 draws: the interval is near value +- 1.96 standard errors.
    p = scores["accuracy"].value / 100
    assert scores["accuracy"].high - scores["accuracy"].low == pytest.approx(
        392 * (p * (1 - p) / 90) ** 0.5, rel=0.25
    )
    resampled = [(np.array(truth)[rows], np.array(found)[rows]) for rows in drawn(90, 200)]
    for name, oracle in (
        ("macro F1", lambda t, p: metrics.f1_score(t, p, average="macro")),
        ("MCC", metrics.matthews_corrcoef),
    ):
        spread = [100 * oracle(t, p) for t, p in resampled]
        low, high = np.percentile(spread, [2.5, 97.5])
        assert (scores[name].low, scores[name].high) == pytest.approx((low, high))


def test_scores_where_labels_are_missing_on_either_side() -> None:
    truth, found = ["a", "a", "b", "c"], ["a", "d", "b", "b"]
    scores = labels.score_texts(found, truth, resamples=50)
    assert scores["macro F1"].value == pytest.approx(
        100 * metrics.f1_score(truth, found, average="macro", zero_division=0.0)
    )
    assert scores["MCC"].value == pytest.approx(100 * metrics.matthews_corrcoef(truth, found))
    alone = labels.score_texts(["a", "a"], ["a", "a"], resamples=50)
    assert (alone["accuracy"].value, alone["macro F1"].value, alone["MCC"].value) == (100.0, 100.0, 0.0)


def test_invented_labels_cost_no_memory_and_stay_those_of_scikit_learn() -> None:
    truth = [f"label {i % 2000}" for i in range(4000)]
    found = [label if i % 4 else f"invented {i}" for i, label in enumerate(truth)]
    tracemalloc.start()
    scores = labels.score_texts(found, truth, resamples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20  # one count of every pair of the 3,000 labels is 72 MB
    assert scores["accuracy"].value == 75.0
    assert scores["macro F1"].value == pytest.approx(
        100 * metrics.f1_score(truth, found, average="macro", zero_division=0.0)
    )
    assert scores["MCC"].value == pytest.approx(100 * metrics.matthews_corrcoef(truth, found))


def drawn(n: int, resamples: int) -> np.ndarray:
    """Rows of each resample, at once."""
    return np.random.default_rng(labels.SEED).integers(0, n, size=(resamples, n))


def test_resamples_in_parts_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found = list("aabbcabc"), list("aabbbbca")
    words = [sentence.split() for sentence in ("B-A O", "O B-A", "B-A I-A", "O O")]

    def scores() -> list[object]:
        return [
            labels.score_texts(found, truth, 33),
            labels.score_words(words, words[::-1], 33),
            texts.score(["a b", "c", "a"], ["a c", "c", "b"], "en", 33),
        ]

    whole = scores()
    monkeypatch.setattr(labels, "_AT_ONCE", 50)  # four resamples a part
    assert scores() == whole
    assert [len(rows) for rows in labels.draws(8, 33, width=12)] == [*[4] * 8, 1]
    assert (np.concatenate(list(labels.draws(8, 33, width=12))) == drawn(8, 33)).all()


def test_scores_of_spans_are_those_of_seqeval() -> None:
    truth = [
        ["B-PER", "I-PER", "O", "B-LOC"],
        ["O", "B-ORG", "I-ORG", "I-ORG"],
        ["O", "O"],
        ["B-LOC", "B-LOC"],
    ]
    found = [
        ["B-PER", "I-PER", "O", "B-ORG"],
        ["O", "B-ORG", "I-ORG", "O"],
        ["O", "B-PER"],
        ["B-LOC", "B-LOC"],
    ]
    scores = labels.score_words(found, truth, resamples=100)
    assert scores["span F1"].value == pytest.approx(100 * f1_score(truth, found))
    assert scores["precision"].value == pytest.approx(100 * precision_score(truth, found))
    assert scores["recall"].value == pytest.approx(100 * recall_score(truth, found))
    assert scores["span F1"].n == 4


SENTENCES = {
    "I- after O and after another type": (
        ["I-PER I-PER O I-LOC", "B-LOC I-PER O O", "O O I-ORG B-ORG"],
        ["I-PER B-PER O B-LOC", "I-LOC B-PER O O", "O I-ORG I-ORG B-ORG"],
    ),
    "BIOES": (
        ["B-PER I-PER E-PER S-LOC", "S-LOC O B-ORG E-ORG", "O O S-PER O"],
        ["B-PER E-PER S-PER S-LOC", "S-ORG O B-ORG E-ORG", "O S-LOC S-PER O"],
    ),
}


@pytest.mark.parametrize("sentences", SENTENCES.values(), ids=SENTENCES)
def test_spans_of_every_scheme_and_their_intervals_are_those_of_seqeval(
    sentences: tuple[list[str], list[str]],
) -> None:
    truth, found = ([tags.split() for tags in side] for side in sentences)
    scores = labels.score_words(found, truth, resamples=60)
    oracles = {
        "span F1": f1_score,
        "macro span F1": functools.partial(f1_score, average="macro", zero_division=0),
        "precision": precision_score,
        "recall": recall_score,
    }
    assert list(scores) == list(oracles)
    for name, oracle in oracles.items():
        assert scores[name].value == pytest.approx(100 * oracle(truth, found))
        assert 0 < scores[name].value < 100
        spread = [
            100 * oracle([truth[i] for i in rows], [found[i] for i in rows]) for rows in drawn(len(truth), 60)
        ]
        assert (scores[name].low, scores[name].high) == pytest.approx(
            tuple(np.percentile(spread, [2.5, 97.5]))
        )


def test_bilou_is_scored_as_seqeval_does_by_its_scheme() -> None:
    truth = [["B-PER", "I-PER", "L-PER", "U-LOC"], ["U-LOC", "U-LOC", "B-ORG", "L-ORG"]]
    found = [["B-PER", "L-PER", "U-PER", "U-LOC"], ["U-LOC", "O", "B-ORG", "L-ORG"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # seqeval warns of tags that it does not know
        scores = labels.score_words(found, truth, resamples=10)
    for name, average in (("span F1", "micro"), ("macro span F1", "macro")):
        oracle = f1_score(truth, found, average=average, mode="strict", scheme=BILOU)
        assert scores[name].value == pytest.approx(100 * oracle)


def test_spans_of_two_languages_are_scored_apart(tmp_path: Path) -> None:
    rows = {
        "de": [("B-PER I-PER O", "B-PER O O"), ("B-LOC O B-ORG", "B-LOC O B-ORG")],
        "fr": [("O B-LOC", "O B-PER"), ("B-LOC O", "B-LOC O"), ("O O", "O O")],
    }
    lines = [
        {"task": "tagging", "language": language, "reference": truth, "prediction": found}
        for language, own in rows.items()
        for truth, found in own
    ]
    scored = predictions.score(write(tmp_path / "p.jsonl", lines[::-1]), Evaluation(resamples=20))
    for language, own in rows.items():
        truth, found = ([tags.split() for tags in side] for side in zip(*own, strict=True))
        cell = scored.cells["tagging"][language]
        assert cell["span F1"].value == pytest.approx(100 * f1_score(truth, found))
        macro = f1_score(truth, found, average="macro", zero_division=0)
        assert cell["macro span F1"].value == pytest.approx(100 * macro)
        assert next(iter(cell)) == "span F1"
        assert cell["span F1"].n == len(own)


def test_tags_of_words_are_scored_by_the_words(tmp_path: Path) -> None:
    draw = np.random.default_rng(5)
    names = ["NOUN", "ORG", "LOC", "O"]
    truth = [list(draw.choice(names, size=n)) for n in draw.integers(1, 9, size=30)]
    found = [[tag if draw.random() < 0.7 else "ORG" for tag in tags] for tags in truth]
    scores = labels.score_words(found, truth, 80, spans=False)
    oracles = {
        "accuracy": metrics.accuracy_score,
        "macro F1": lambda t, p: metrics.f1_score(t, p, average="macro"),
    }
    assert list(scores) == list(oracles)
    for name, oracle in oracles.items():
        whole = oracle([t for tags in truth for t in tags], [t for tags in found for t in tags])
        assert scores[name].value == pytest.approx(100 * whole)
        spread = [
            100 * oracle([t for i in rows for t in truth[i]], [t for i in rows for t in found[i]])
            for rows in drawn(30, 80)
        ]
        assert (scores[name].low, scores[name].high) == pytest.approx(
            tuple(np.percentile(spread, [2.5, 97.5]))
        )
    lines = [
        {"task": "tagging pos", "language": language, "reference": t, "prediction": p}
        for language, sentences in (("de", zip(truth, found, strict=True)), ("fr", [(["O"], ["O"])]))
        for t, p in sentences
    ]
    place = write(tmp_path / "p.jsonl", lines)
    scored = predictions.score(place, Evaluation(resamples=20)).cells["tagging pos"]
    assert scored["de"]["accuracy"].value == pytest.approx(scores["accuracy"].value)
    assert list(scored["fr"]) == list(oracles)  # its one tag alone could be either
    better = write(tmp_path / "b.jsonl", [{**line, "prediction": line["reference"]} for line in lines])
    compared = comparison.compare(place, better, trials=200).cells
    assert set(compared) == {"tagging pos de accuracy", "tagging pos fr accuracy"}
    cell = compared["tagging pos de accuracy"]
    assert (cell.first, cell.second) == pytest.approx((scores["accuracy"].value, 100))
    assert cell.p < 0.05


@pytest.mark.parametrize(
    ("reference", "prediction", "complaint"),
    [
        ([0, 3, 4], [0, 3, 4], r"line 2 has the tag '0', and a number does not say .* label_map="),
        (
            "O B-PER NOUN",
            "O B-PER O",
            r"line 2 has the tag 'NOUN', which marks no span, and .* line 1 has 'B-LOC'",
        ),
        ("O B-PER O", "O PER O", r"line 2 has the tag 'PER', which marks no span"),
    ],
)
def test_tags_that_cannot_be_scored_are_named(
    tmp_path: Path, reference: object, prediction: object, complaint: str
) -> None:
    lines = [
        {"task": "tagging", "language": "de", "reference": "B-LOC O", "prediction": "B-LOC O"},
        {"task": "tagging", "language": "fr", "reference": reference, "prediction": prediction},
    ]
    place = write(tmp_path / "p.jsonl", lines)
    with pytest.raises(ConfigError, match=rf"p\.jsonl: {complaint}"):
        predictions.score(place, Evaluation(resamples=20))
    with pytest.raises(ConfigError, match=rf"p\.jsonl: {complaint}"):
        comparison.compare(place, place, trials=20)


def test_a_test_set_of_mixed_tags_is_refused_before_the_model_is_opened(tmp_path: Path) -> None:
    settings = tagged(tmp_path, [("der Alltag", "O B-LOC"), ("im Alltag", "O NOUN")])
    settings[2] = "model.path=runs/nowhere/weights"
    config = configuration.load(None, settings)
    rows, left_out = testsets.read(config)
    with pytest.raises(ConfigError, match=r"de\.jsonl: row 1 has the tag 'NOUN', which marks no span"):
        evaluate.evaluate(config, (rows, left_out))


def test_a_model_is_judged_on_every_row_in_its_order(tmp_path: Path) -> None:
    texts = tiny.texts("de", 30, seed=5)
    texts[3] = " ".join(texts)  # longer than several rows
    tags = [" ".join("B-LOC" if word == "Alltag" else "O" for word in text.split()) for text in texts]
    body = ""
    for text, row in zip(texts, tags, strict=True):
        words = enumerate(zip(text.split(), row.split(), strict=True))
        body += "".join(f"{i}\t{word}\t{tag}\n" for i, (word, tag) in words) + "\n"
    (tmp_path / "de.conllu").write_text(body, encoding="utf-8")
    network = test_labels.model("words", test_labels.TAGS)
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    backbone.export(network, tiny.tokens(), weights, tmp_path / "weights")
    overrides = [
        "objective.name=tagging",
        "model.family=bert",
        f"model.path={tmp_path}/weights",
        "corpus.sequence_length=32",
        f"evaluation.sources=[{{uri: {tmp_path}/de.conllu, text: '1', pair: '2'}}]",
        "evaluation.resamples=10",
    ]
    found, rows = evaluate.evaluate(configuration.load(None, overrides))
    assert [row["text"] for row in rows] == texts
    assert [row["reference"] for row in rows] == tags
    for row in rows:
        assert len(row["prediction"].split()) == len(row["text"].split())
    split = [[row[side].split() for row in rows] for side in ("reference", "prediction")]
    assert found.cells["tagging"]["de"]["span F1"].value == pytest.approx(100 * f1_score(*split))
    # Word by word what plain transformers says of a short sentence alone.
    short = min(range(30), key=lambda i: len(texts[i]))
    plain = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "weights").eval()
    parts = test_labels.encoder().encode(texts[short].split())
    ids = [test_labels.encoder().start_id, *[i for part in parts for i in part], test_labels.encoder().end_id]
    with torch.no_grad():
        best = plain(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
    firsts = np.cumsum([1, *map(len, parts)])[:-1]
    assert rows[short]["prediction"].split() == [test_labels.TAGS[best[first]] for first in firsts]
    with pytest.raises(ConfigError, match=r"objective\.name=masked has no test; take one of translation"):
        evaluate.evaluate(configuration.load(None, [f"model.path={tmp_path}/weights"]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The kettle's 2nd boil!", ["the", "kettle", "s", "2nd", "boil"]),
        ("Чайник кипит", ["чайник", "кипит"]),
        ("这款水壶很安静。", list("这款水壶很安静")),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("กา๑๐๐ ๕", ["ก", "า", "๑๐๐", "๕"]),
        ("ລ໑໐", ["ລ", "໑໐"]),
        ("၁၀၀က", ["၁၀၀", "က"]),
        ("១០០ ក", ["១០០", "ក"]),
        ("第10课", ["第", "10", "课"]),
    ],
)
def test_words_of_any_script(text: str, expected: list[str]) -> None:
    assert languages.words(text) == expected


def meteor(prediction: str, truth: str) -> float:
    """NLTK's, of lower-case words with spaces between, without stems and synonyms."""
    synonyms, stems = SimpleNamespace(synsets=lambda _: []), SimpleNamespace(stem=lambda word: word)
    found: float = meteor_score([truth.split()], prediction.split(), stemmer=stems, wordnet=synonyms)
    return found


def test_rouge_and_meteor_by_hand_and_in_every_script() -> None:
    found = texts.score(["the cat sat"], ["the cat sat on mats"], "en", 10)
    assert found["ROUGE-1"].value == pytest.approx(100 * 2 * 3 / (3 + 5))
    assert found["ROUGE-2"].value == pytest.approx(100 * 2 * 2 / (2 + 4))
    assert found["ROUGE-L"].value == pytest.approx(100 * 2 * 3 / (3 + 5))
    # METEOR: precision 1, recall 3/5, mean P R / (0.9 P + 0.1 R); one chunk of three matches costs 0.5 (1/3)^3.
    assert found["METEOR"].value == pytest.approx(100 * 0.6 / (0.9 + 0.06) * (1 - 0.5 / 27))
    assert found["exact match"].value == 0
    assert "stages:exact+stem" in found["METEOR"].signature
    for language, text in (
        ("ru", "Чайник кипит тихо и быстро"),
        ("zh", "这款水壶加热很快"),
        ("th", "กาต้มน้ำ"),
    ):
        same = texts.score([text], [text], language, 10)
        assert same["ROUGE-1"].value == same["exact match"].value == 100
        assert same["METEOR"].value > 95
    stems = texts.score(["die Wasserkochern waren"], ["der Wasserkocher war"], "de", 10)
    assert (
        stems["METEOR"].value
        > texts.score(["die Wasserkochern waren"], ["der Wasserkocher war"], "xx", 10)["METEOR"].value
    )


def test_meteor_is_that_of_nltk_also_of_equal_texts() -> None:
    pairs = [
        ("the cat sat on the mat", "on the mat sat the cat"),
        ("a lamp lights the room", "this lamp lights up the whole room"),
        ("kettle", "kettle"),
        ("green tea", "green tea"),
        ("the kettle boils", "the kettle boils"),
        ("cold", "warm evenings"),
    ]
    found = [texts.score([p], [t], "xx", 2)["METEOR"].value for p, t in pairs]
    assert found == pytest.approx([100 * meteor(p, t) for p, t in pairs])
    assert found[2:] == pytest.approx([50, 100 * (1 - 0.5 / 8), 100 * (1 - 0.5 / 27), 0])
    whole = texts.score(*map(list, zip(*pairs, strict=True)), "xx", 2)["METEOR"]
    assert whole.value == pytest.approx(sum(found) / 6)


def test_another_number_costs_in_every_script() -> None:
    found = texts.score(["ราคา ๑๐๐ บาท"], ["ราคา ๙๙๙ บาท"], "th", 10)
    assert found["ROUGE-1"].value == pytest.approx(100 * 2 * 7 / (8 + 8))  # the number is one of eight words
    assert found["METEOR"].value < 90


def test_equal_texts_without_words_are_right() -> None:
    found = texts.score(["...", "👍🎉", "!", "..."], ["...", "👍🎉", "?", "warm"], "en", 10)
    assert {figure.value for figure in found.values()} == {
        50.0
    }  # the first two; of the others nothing is right


@pytest.mark.parametrize(
    ("tags", "stems"),
    [
        (("de", "deu", "ger", "de-AT", "deu-Latn"), "exact+stem"),
        (("no", "nor", "nb", "nob", "nb-NO"), "exact+stem"),
        (("ar", "arb-Arab", "pt-BR", "por", "ron", "zh-Hans-en"), "exact+stem"),
        (("nn", "pl", "sw", "zho"), "exact"),
    ],
)
def test_every_code_of_a_language_has_its_stemmer(tags: tuple[str, ...], stems: str) -> None:
    for tag in tags:
        found = texts.score(["a b"], ["a c"], languages.target(tag), 2)["METEOR"]
        assert found.signature.endswith(f"|stages:{stems}")
    same = [texts.score(["die Decken"], ["die Decke"], tag, 2)["METEOR"].value for tag in ("de", "deu")]
    assert same[0] == same[1] > texts.score(["die Decken"], ["die Decke"], "xx", 2)["METEOR"].value


def test_randomisation_by_counting_every_assignment() -> None:
    first, second = np.array([[1.0], [1.0], [1.0], [0.0]]), np.array([[0.0], [0.0], [0.0], [0.0]])
    # Of the 16 assignments of 4 pairs those with all three ones on one side are as extreme: 4 of 16.
    p = significance.paired(first, second, lambda sums: sums[..., 0], 20_000)
    assert p == pytest.approx(0.25, abs=0.02)
    assert significance.paired(first, first, lambda sums: sums[..., 0], 50) == 1.0


def test_holm_by_hand() -> None:
    assert significance.holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx(
        {"a": 0.06, "b": 0.03, "c": 0.06}
    )
    assert significance.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_predictions_of_other_editors_are_read_and_what_is_no_text_is_named(tmp_path: Path) -> None:
    row = {"language": "de", "prediction": "a b a", "label": "a"}
    path = tmp_path / "p.jsonl"
    path.write_text(f"\ufeff{json.dumps(row)}\r\n{json.dumps(row)}\r\n\r\n", encoding="utf-8")
    assert [found.place.rpartition(": ")[2] for found in predictions.read(path)] == ["line 1", "line 2"]
    for key, value, complaint in (
        ("task", "\ud800", "line 1 holds half of a surrogate pair"),
        ("label", "\u200b", "line 1 has an empty label"),
        ("task", "answer", r"line 1 names a candidate twice in its prediction"),
    ):
        path.write_text(json.dumps(row | {key: value}), encoding="utf-8")
        with pytest.raises(ConfigError, match=complaint):
            predictions.read(path)


def test_ready_predictions_are_scored_without_a_model(tmp_path: Path) -> None:
    rows = [{"language": "en-zh", "prediction": "我很好", "reference": "我很好"}]
    rows += [{"language": "de", "prediction": label, "label": "a"} for label in "aab"]
    found = predictions.score(write(tmp_path / "p.jsonl", rows), Evaluation(resamples=20))
    assert found.cells["classification"]["de"]["accuracy"].value == pytest.approx(200 / 3)
    assert "tok:zh" in found.cells["text"]["en-zh"]["BLEU"].signature
    assert found.cells["text"]["en-zh"]["exact match"].value == 100
    html = output.page(found)
    assert html.count("<table>") == 3  # all tasks, and each
    overview = html.split("</table>")[0]
    assert "classification<br>accuracy" in overview
    assert "<small>n 3</small>" in overview
    assert "0.0<small>n 1</small></td>" in overview  # of one row there is no interval
    assert "text<br>BLEU" in overview
    assert overview.count('<td class="empty">not of this task</td>') == 2
    assert "66.7" in html
    assert "http" not in html  # nothing is fetched
    found.empty["text"] = {"ar-zh": "no test rows"}
    overview = output.page(found).split("</table>")[0]  # what has no figure comes last
    assert re.findall("<td>([a-z-]+)</td>", overview) == ["de", "en-zh", "ar-zh"]
    (tmp_path / "bad.jsonl").write_text(
        '{"language": "de", "prediction": "x", "reference": "y"}\n{"prediction": 1}\n'
    )
    with pytest.raises(ConfigError, match=r"bad\.jsonl: line 2 is no object with prediction, language, and"):
        predictions.read(tmp_path / "bad.jsonl")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"none\.jsonl is empty"):
        predictions.read(tmp_path / "none.jsonl")
    deep = '{"text": ' + "[" * 100_000
    (tmp_path / "deep.jsonl").write_text(json.dumps(rows[0]) + f"\n{deep}\n")
    with pytest.raises(ConfigError, match=r"deep\.jsonl: line 2 is JSON that is nested too deeply"):
        predictions.read(tmp_path / "deep.jsonl")
    tags = [{"task": "tagging", "language": "de", "prediction": "O", "reference": "O O"}]
    with pytest.raises(ConfigError, match=r"t\.jsonl: line 1 has 1 predicted tags and 2 true ones"):
        predictions.score(write(tmp_path / "t.jsonl", tags), Evaluation(resamples=20))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ([], "is no object"),
        (
            {"prediction": "a", "language": "de"},
            "is no object with prediction, language, and reference or label",
        ),
        (
            {"prediction": None, "language": "de", "label": "a"},
            "has a prediction that is no text but NoneType",
        ),
        (
            {"prediction": "a", "language": "de", "reference": None},
            "has a reference that is no text but NoneType",
        ),
        ({"prediction": ["a"], "language": "de", "label": "a"}, "has a prediction that is no text but list"),
        ({"prediction": "a", "language": None, "label": "a"}, "has the language None, which is no tag"),
        (
            {"prediction": "a", "language": "German!", "label": "a"},
            "has the language 'German!', which is no tag",
        ),
        (
            {"task": "NER", "prediction": "O", "language": "de", "reference": "O"},
            "is of the task 'NER'; take one of",
        ),
    ],
)
def test_a_prediction_that_is_none_is_named(tmp_path: Path, row: object, complaint: str) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"p\.jsonl: line 1 {complaint}"):
        predictions.read(tmp_path / "p.jsonl")


def test_predictions_are_read_as_they_are_meant(tmp_path: Path) -> None:
    rows = [
        {"language": "zh_CN", "prediction": True, "label": "true"},
        {"task": "intent", "language": "de", "prediction": 3, "label": "3"},
        {"task": "tagging ner", "language": "de", "prediction": ["O", "B-LOC"], "reference": "O B-LOC"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = predictions.read(tmp_path / "p.jsonl")
    assert [(row.task, row.language, row.prediction == row.truth) for row in found] == [
        ("classification", "zh-CN", True),
        ("classification intent", "de", True),
        ("tagging ner", "de", True),
    ]


def test_two_models_are_compared_on_the_same_rows(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    truth = [str(label) for label in draw.choice(["a", "b"], size=200)]
    good = [label if draw.random() < 0.9 else "x" for label in truth]
    poor = [label if draw.random() < 0.5 else "x" for label in truth]
    files = []
    for name, labels_of in (("good", good), ("poor", poor), ("again", good)):
        rows = [
            {"language": "de" if i % 2 else "fr", "prediction": p, "label": t}
            for i, (p, t) in enumerate(zip(labels_of, truth, strict=True))
        ]
        files.append(write(tmp_path / f"{name}.jsonl", rows))
    found = comparison.compare(files[0], files[1], trials=500)
    assert set(found.cells) == {
        f"classification {language} {metric}"
        for language in ("de", "fr")
        for metric in ("accuracy", "macro F1", "MCC")
    }
    for cell in found.cells.values():
        assert cell.n == 100
        assert cell.first > cell.second
        assert cell.p < 0.05
    of_gate = comparison.compare(files[0], files[1], trials=500, for_gate=True).cells
    # Two tests, not six: the least that 500 trials can say, times two.
    assert {name: cell.p for name, cell in of_gate.items()} == pytest.approx(
        {f"classification {language} accuracy": 2 / 501 for language in ("de", "fr")}
    )
    assert all(cell.p == 1.0 for cell in comparison.compare(files[0], files[2], trials=50).cells.values())
    other = write(tmp_path / "other.jsonl", [{"language": "de", "prediction": "a", "label": "z"}])
    with pytest.raises(
        ConfigError, match=r"classification, de: .* has 100 rows and .* 1; a paired test needs the same"
    ):
        comparison.compare(files[0], other, trials=50)
    texts_a = [
        {"language": "en", "prediction": h, "reference": r}
        for h, r in zip(HYPOTHESES, REFERENCES, strict=True)
    ]
    texts_b = [{**row, "prediction": row["reference"]} for row in texts_a]
    cell = comparison.compare(
        write(tmp_path / "a.jsonl", texts_a), write(tmp_path / "b.jsonl", texts_b), trials=100
    ).cells["text en BLEU"]
    assert cell.first == pytest.approx(sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score)
    assert cell.second == pytest.approx(100)
    same = comparison.compare(tmp_path / "a.jsonl", tmp_path / "a.jsonl", trials=100).cells["text en BLEU"]
    assert same.p == 1.0
    one_changed = [texts_b[0], *texts_a[1:]]
    nearly = comparison.compare(tmp_path / "a.jsonl", write(tmp_path / "c.jsonl", one_changed), trials=100)
    assert nearly.cells["text en BLEU"].p == 1.0  # every swap gives the same difference, or its negative
    asked = [{**row, "text": f"question {i}"} for i, row in enumerate(texts_a)]
    other = [{**row, "text": f"question {i + 1}"} for i, row in enumerate(texts_a)]
    with pytest.raises(ConfigError, match=r"x\.jsonl: line 1 and .*y\.jsonl: line 1 are different rows"):
        comparison.compare(write(tmp_path / "x.jsonl", asked), write(tmp_path / "y.jsonl", other), trials=100)
    unlabelled = write(tmp_path / "z.jsonl", [{"language": "en", "prediction": "x", "label": ""}])
    with pytest.raises(ConfigError, match=r"z\.jsonl: line 1 has an empty label"):
        comparison.compare(unlabelled, unlabelled, trials=100)


def test_macro_f1_and_correlation_are_compared_by_a_paired_bootstrap(tmp_path: Path) -> None:
    draw = np.random.default_rng(7)
    truth = [str(label) for label in draw.choice(["a", "b"], size=120, p=[0.9, 0.1])]
    sides = ["a"] * 120, [label if draw.random() < 0.9 else "ab"[label == "a"] for label in truth]
    files = [
        write(
            tmp_path / f"{number}.jsonl",
            [{"language": "de", "prediction": p, "label": t} for p, t in zip(side, truth, strict=True)],
        )
        for number, side in enumerate(sides)
    ]
    found = comparison.compare(*files, trials=300).cells
    oracles = {
        "macro F1": lambda t, p: metrics.f1_score(t, p, average="macro"),
        "MCC": metrics.matthews_corrcoef,
    }
    raw = {}
    for metric, oracle in oracles.items():
        cell = found[f"classification de {metric}"]
        values = [oracle(truth, list(side)) for side in sides]
        assert (cell.first, cell.second) == pytest.approx(tuple(100 * value for value in values))
        observed = values[1] - values[0]
        apart = [
            oracle(np.array(truth)[rows], np.array(sides[1])[rows])
            - oracle(np.array(truth)[rows], np.array(sides[0])[rows])
            for rows in drawn(120, 300)
        ]
        raw[metric] = (1 + sum(abs(d - observed) >= abs(observed) - 1e-12 for d in apart)) / 301
        assert raw[metric] < 0.05  # by accuracy, the one that always says "a" is as good
    accuracy = found["classification de accuracy"]
    assert abs(accuracy.first - accuracy.second) < 2
    assert accuracy.p > 0.5
    least = min(raw, key=lambda name: raw[name])
    assert found[f"classification de {least}"].p == pytest.approx(3 * raw[least])  # Holm of three tests
    console = Console(file=io.StringIO(), width=120)
    comparison.show(comparison.compare(*files, trials=20), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert [line.split("│")[2].strip() for line in shown.splitlines() if "classification de" in line] == [
        "accuracy",
        "macro F1",
        "MCC",
    ]


def test_every_metric_of_written_texts_is_compared_as_by_counting_all_assignments(tmp_path: Path) -> None:
    truth = [
        "the kettle boils water",
        "a soft blanket keeps you warm",
        "cold evenings are coming",
        "the lamp lights the room",
        "two cups of green tea",
        "free returns within a month",
        "wash it at forty degrees",
        "the cable is two metres long",
    ]
    good = [*truth[:4], "two cups of tea", "free returns in a month", "wash at forty", truth[7]]
    poor = [
        "the kettle boils",
        "soft blankets keep warm",
        "evenings are cold",
        *truth[3:5],
        "free",
        "wash it",
        "it",
    ]
    files = [
        write(
            tmp_path / f"{number}.jsonl",
            [{"language": "xx", "prediction": p, "reference": t} for p, t in zip(side, truth, strict=True)],
        )
        for number, side in enumerate((poor, good))
    ]
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"])

    def mean(worth: Callable[[str, str], float]) -> Callable[[list[str]], float]:
        return lambda side: 100 * sum(map(worth, side, truth)) / len(truth)

    oracles: dict[str, Callable[[list[str]], float]] = {
        "BLEU": lambda side: sacrebleu.corpus_bleu(side, [truth]).score,
        "chrF": lambda side: sacrebleu.corpus_chrf(side, [truth]).score,
        "TER": lambda side: sacrebleu.corpus_ter(side, [truth]).score,
        "ROUGE-1": mean(lambda p, t: rouge.score(t, p)["rouge1"].fmeasure),
        "ROUGE-2": mean(lambda p, t: rouge.score(t, p)["rouge2"].fmeasure),
        "ROUGE-L": mean(lambda p, t: rouge.score(t, p)["rougeL"].fmeasure),
        "METEOR": mean(meteor),
        "exact match": mean(lambda p, t: float(p == t)),
    }
    cells = comparison.compare(*files, trials=4000).cells
    assert list(cells) == [f"text xx {metric}" for metric in oracles]
    exact = {}
    for metric, oracle in oracles.items():
        cell = cells[f"text xx {metric}"]
        assert (cell.first, cell.second, cell.n) == pytest.approx((oracle(poor), oracle(good), 8))
        apart = []
        for swaps in itertools.product([False, True], repeat=8):
            pairs = [(g, p) if swap else (p, g) for p, g, swap in zip(poor, good, swaps, strict=True)]
            one, other = (list(side) for side in zip(*pairs, strict=True))
            apart.append(abs(oracle(other) - oracle(one)))
        exact[metric] = sum(value >= apart[0] - 1e-9 for value in apart) / len(apart)
    assert len(set(exact.values())) > 3
    corrected = significance.holm(exact)
    for metric, p in corrected.items():
        assert cells[f"text xx {metric}"].p == pytest.approx(p, abs=0.06), metric


def tagged(tmp_path: Path, sentences: list[tuple[str, str]]) -> list[str]:
    """A model of tags, and a test set of these sentences."""
    lines = [json.dumps({"text": text, "tags": tags}) + "\n" for text, tags in sentences]
    (tmp_path / "de.jsonl").write_text("".join(lines), encoding="utf-8")
    network = test_labels.model("words", test_labels.TAGS)
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    backbone.export(network, tiny.tokens(), weights, tmp_path / "weights")
    return [
        "objective.name=tagging",
        "model.family=bert",
        f"model.path={tmp_path}/weights",
        f"evaluation.sources=[{{uri: {tmp_path}/de.jsonl, pair: tags}}]",
        "evaluation.resamples=10",
        "corpus.sequence_length=32",
    ]


@pytest.mark.parametrize(
    ("tags", "complaint"),
    [
        ("O B-PER", r"de\.jsonl: row 2: the label 'B-PER' is none of the 2 of the training"),
        ("O", r"de\.jsonl: row 2 has 2 words and 1 tags"),
        ("", r"de\.jsonl: row 2 cannot be scored: empty"),
        ("\u200b", r"de\.jsonl: row 2 cannot be scored: empty"),
    ],
)
def test_a_row_that_does_not_fit_the_model_is_named(tmp_path: Path, tags: str, complaint: str) -> None:
    sentences = [("der Alltag", "O B-LOC"), ("die Decke", "O O"), ("im Alltag", tags)]
    with pytest.raises(ConfigError, match=complaint):
        evaluate.evaluate(configuration.load(None, tagged(tmp_path, sentences)))


def test_unknown_labels_may_count_as_wrong(tmp_path: Path) -> None:
    sentences = [("der Alltag", "O B-LOC"), ("im Alltag", "O B-PER")]
    settings = [*tagged(tmp_path, sentences), "evaluation.unknown_labels=wrong"]
    found, rows = evaluate.evaluate(configuration.load(None, settings))
    assert found.cells["tagging"]["de"]["span F1"].n == 2
    of_each = labels.score_words(
        [row["prediction"].split() for row in rows], [["O", "B-LOC"], ["O", "B-PER"]], resamples=1
    )
    assert (
        found.cells["tagging"]["de"]["recall"].value == of_each["recall"].value < 100
    )  # one cannot be found
    assert [row["reference"] for row in rows] == ["O B-LOC", "O B-PER"]
    # Training would have read it as B-LOC, which it knew.
    other = [*tagged(tmp_path, [("der Alltag", "O I-LOC")]), "evaluation.unknown_labels=wrong"]
    assert "unknown_labels" not in evaluate.evaluate(configuration.load(None, other))[0].about
    tagged(tmp_path, sentences)
    assert found.about["unknown_labels"] == {"de": {"B-PER": 1}}
    console = Console(file=io.StringIO(), width=200)
    report.show(found, console)
    told = "de: labels that the training did not know count as wrong: B-PER (1)"
    assert told in console.file.getvalue()  # type: ignore[attr-defined]
    known = [*tagged(tmp_path, [sentences[0], ("im Alltag", "O O")])]
    assert [row["prediction"] for row in evaluate.evaluate(configuration.load(None, known))[1]] == [
        row["prediction"] for row in rows
    ]


def test_a_test_set_without_references_or_rows_is_refused(tmp_path: Path) -> None:
    settings = tagged(tmp_path, [("der Alltag", "O B-LOC")])
    settings[3] = settings[3].replace(", pair: tags", "")
    with pytest.raises(ConfigError, match=r"de\.jsonl: row 0 has no reference or label; name its column"):
        evaluate.evaluate(configuration.load(None, settings))
    rows = [{"language": "en", "prediction": "a", "reference": text} for text in ("a", " ")]
    with pytest.raises(ConfigError, match=r"p\.jsonl: line 2 has an empty reference"):
        predictions.score(write(tmp_path / "p.jsonl", rows), Evaluation(resamples=20))


def test_rows_are_counted_through_a_file_of_several_parts(tmp_path: Path) -> None:
    table = pa.table({"text": ["eins", "zwei", "drei", "", "fünf"]})
    pq.write_table(table, tmp_path / "de.parquet", row_group_size=2)
    settings = [f"evaluation.sources=[{{uri: {tmp_path}/de.parquet}}]"]
    with pytest.raises(ConfigError, match=r"de\.parquet: row 3 cannot be scored: empty"):
        testsets.read(configuration.load(None, settings))
    pq.write_table(table.take([0, 1, 2, 4]), tmp_path / "de.parquet", row_group_size=1)
    cases = testsets.read(configuration.load(None, settings))[0]["de"]
    assert [(case.text, case.row) for case in cases] == [("eins", 0), ("zwei", 1), ("drei", 2), ("fünf", 3)]


def test_an_empty_cell_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        *tagged(tmp_path, [("der Alltag", "O B-LOC"), ("warm", "O")]),
        "corpus.languages=[fr, de, cs]",
    ]
    found, rows = evaluate.evaluate(configuration.load(None, settings))
    reason = "no test rows: the corpus has it, and evaluation.sources holds no row in it"
    assert found.empty == {"tagging": {"cs": reason, "fr": reason}}
    assert set(found.cells["tagging"]) == {"de"}
    assert found.summary("tagging")["span F1"]["worst"] == "de"
    body = json.loads(found.to_json())
    assert body["empty"] == {"tagging": {"cs": reason, "fr": reason}}
    assert f'<td>fr</td><td class="empty" colspan="4">{reason}</td><td>0</td>' in output.page(found)
    output.tell(found, rows, str(tmp_path / "out"), Storage(), as_json=False)
    printed = capsys.readouterr().out
    assert "tagging, cs, fr: no test rows" in printed
    rows_of_tasks = [
        *(
            {"language": language, "prediction": "a", "label": label}
            for language in ("de", "fr")
            for label in "ab"
        ),
        {"language": "de-ba", "prediction": "a", "label": "a"},  # a dialect, which no translation lacks
        {"language": "en-de", "prediction": "warm", "reference": "warm"},
        {"task": "tagging", "language": "de", "prediction": "O", "reference": "O"},
    ]
    scored = predictions.score(write(tmp_path / "p.jsonl", rows_of_tasks), Evaluation(resamples=20))
    assert {task: list(reasons) for task, reasons in scored.empty.items()} == {
        "classification": [],
        "tagging": ["de-ba", "fr"],
        "text": [],
    }


def test_texts_beside_translations_lack_what_those_have(tmp_path: Path) -> None:
    rows = [{"language": tag, "prediction": "warm", "reference": "warm"} for tag in ("en", "en-de")]
    rows += [{"task": "translation", "language": "en-fr", "prediction": "chaud", "reference": "chaud"}]
    found = predictions.score(write(tmp_path / "p.jsonl", rows), Evaluation(resamples=20))
    reason = "no test rows: only other tasks have some in this language"
    assert found.empty == {"text": {"en-fr": reason}, "translation": {"en-de": reason}}


def test_a_language_that_only_the_names_of_the_corpus_tell_has_a_cell(tmp_path: Path) -> None:
    settings = tagged(tmp_path, [("der Alltag", "O B-LOC")])
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "he.jsonl").write_text('{"text": "a", "tags": "O"}\n')
    corpus = (
        f"corpus.sources=[{{uri: {tmp_path}/corpus, pair: tags}}, {{uri: {tmp_path}/corpus, language: cs}}]"
    )
    found, _ = evaluate.evaluate(configuration.load(None, [*settings, corpus]))
    assert set(found.empty["tagging"]) == {"cs", "he"}
    gone = corpus.replace("/corpus", "/gone")  # the corpus of a model from elsewhere
    found, _ = evaluate.evaluate(configuration.load(None, [*settings, gone]))
    assert set(found.empty["tagging"]) == {"cs"}


def test_a_test_set_of_bad_rows_alone_has_an_empty_cell(tmp_path: Path) -> None:
    settings = tagged(tmp_path, [("der Alltag", "O B-LOC")])
    (tmp_path / "fr.jsonl").write_text('{"text": "", "tags": "O"}\n', encoding="utf-8")
    settings[3] = f"evaluation.sources=[{{uri: {tmp_path}, files: '*.jsonl', pair: tags}}]"
    found, _ = evaluate.evaluate(configuration.load(None, [*settings, "evaluation.max_bad_rows=1"]))
    assert found.empty["tagging"] == {"fr": "no test rows: its files hold none that can be scored"}
    console = Console(file=io.StringIO(), width=200)
    report.show(found, console)
    assert "bad rows left out: 1, the first: " in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_language_of_a_column_whose_rows_are_all_bad_has_an_empty_cell(tmp_path: Path) -> None:
    settings = tagged(tmp_path, [("der Alltag", "O B-LOC")])
    rows = [
        {"lang": "de", "text": "der Alltag", "tags": "O B-LOC"},
        {"lang": "sw", "text": "", "tags": "O"},
        {"lang": "?", "text": "der", "tags": "O"},
    ]
    (tmp_path / "de.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings[3] = settings[3].replace("pair: tags", "pair: tags, language: 'column:lang'")
    found, _ = evaluate.evaluate(configuration.load(None, [*settings, "evaluation.max_bad_rows=2"]))
    assert found.empty["tagging"] == {"sw": "no test rows: its files hold none that can be scored"}
    assert [reason.rpartition(": ")[2] for reason in found.about["left_out"]] == [
        "empty",
        "no language tag in the language column",
    ]


def test_every_language_that_the_training_has_counted_has_a_cell(tmp_path: Path) -> None:
    settings = tagged(tmp_path, [("der Alltag", "O B-LOC")])
    progress, trained = tmp_path / "progress.json", tmp_path / "config.yaml"
    progress.write_text(Progress(documents={"de": 3.0, "th": 2.0}).to_json())
    reason = "no test rows: the corpus has it, and evaluation.sources holds no row in it"
    for name, told in (("tagging", {"th": reason}), ("masked", {})):
        trained.write_text(f"objective: {{name: {name}}}\n")
        assert evaluate.evaluate(configuration.load(None, settings))[0].empty == {"tagging": told}
    trained.write_text("objective: {name: tagging}\n")
    progress.rename(tmp_path / "report.json")  # of a run, beside its merged model
    assert evaluate.evaluate(configuration.load(None, settings))[0].empty == {"tagging": {"th": reason}}
    progress.write_text("[]")  # somebody else's
    (tmp_path / "report.json").write_text('{"weights": "x"}')
    assert evaluate.evaluate(configuration.load(None, settings))[0].empty == {"tagging": {}}


def test_one_task_of_several_is_not_asked_for_the_languages_of_the_others(tmp_path: Path) -> None:
    documents = {"ner:de": 3.0, "ner:th": 2.0, "slots:de": 4.0, "slots:sw": 1.0}
    (tmp_path / "progress.json").write_text(Progress(documents=documents).to_json())
    (tmp_path / "config.yaml").write_text(
        "objective: {name: multitask, tasks: [{name: ner, objective: tagging}]}\n"
    )
    asked = [
        f"model.path={tmp_path}/weights",
        "objective.name=multitask",
        "objective.tasks=[{name: ner, objective: tagging}]",
    ]
    rows = {"ner:de": [Case("der Alltag", "O O", "f", 0)]}
    assert list(testsets.without_rows(configuration.load(None, asked), rows)) == ["ner:th"]
    (tmp_path / "progress.json").unlink()
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    ner, slots = (
        f"{{uri: {tmp_path}/x.jsonl, language: {language}, task: {task}}}"
        for task, language in (("ner", "ja"), ("slots", "ko"))
    )
    of_both = configuration.load(None, [*asked, f"corpus.sources=[{ner}, {slots}]"])
    assert list(testsets.without_rows(of_both, rows)) == ["ner:ja"]


def test_a_model_without_the_head_is_refused(tmp_path: Path) -> None:
    settings = tagged(tmp_path, [("der Alltag", "O B-LOC")])
    masked = tiny.encoder()
    backbone.export(masked, tiny.tokens(), dict(masked.named_parameters()), tmp_path / "masked")
    for folder, objective, holds in (
        ("masked", "tagging", "BertForMaskedLM"),
        ("weights", "classification", "BertForTokenClassification"),
    ):
        told = [*settings, f"model.path={tmp_path}/{folder}", f"objective.name={objective}"]
        with pytest.raises(ConfigError, match=f"holds {holds} and not a model For.*: it was not fine-tuned"):
            evaluate.evaluate(configuration.load(None, told))
    with pytest.raises(
        ConfigError, match=r"model\.family=gpt2 does not fit objective\.name=tagging; take one of bert"
    ):
        evaluate.evaluate(configuration.load(None, [*settings, "model.family=gpt2"]))
    with pytest.raises(ConfigError, match=r"adapter\.language_path lies below the adapter of a task"):
        evaluate.evaluate(configuration.load(None, [*settings, "adapter.language_path=x"]))


def test_the_bar_counts_rows_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "de": [Case("a", "a", "f", i) for i in range(5)],
        "en": [Case("b", "b", "f", i) for i in range(2)],
    }
    parts = [["1", "2"], ["3", "4", "5"], ["6", "7"]]
    assert list(evaluate._watched(iter(parts), rows, show=True)) == [["1", "2", "3", "4", "5"], ["6", "7"]]
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        evaluate, "Console", lambda stderr: Console(stderr=stderr, force_terminal=True, width=80)
    )
    for group in evaluate._watched(iter(parts), rows, show=True):
        assert group
    shown = capsys.readouterr().err
    assert "7/7" in shown
    assert shown.endswith("\x1b[2K")  # the line is wiped
    assert list(evaluate._watched(iter(parts), rows, show=False))
    assert capsys.readouterr().err == ""
