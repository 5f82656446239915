"""Answer selection: one document a question, a label at the end of each sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from mlray import configuration
from mlray.config import ConfigError, RunConfig
from mlray.corpus.fields import Record
from mlray.corpus.windows import Window
from mlray.evaluation import evaluate, labelling, ranking
from mlray.models import backbone, tokenizer
from mlray.objectives.answers import Answers
from mlray.schema import NO_TARGET
from tests.unit import test_labels, tiny

LABELS = {"answer": 0, "other": 1}


def encoder() -> tokenizer.Encoder:
    return tokenizer.encoder(tiny.tokens())


def test_the_end_of_each_sentence_says_whether_it_answers() -> None:
    cut = Answers(encoder(), LABELS, 64)
    (piece,) = cut(Window(0, ["a kettle"], ["1\nthe blanket\nboils water\nwarm"], [3], [8]))
    question, *parts = encoder().encode(["a kettle", "the blanket", "boils water", "warm"])
    start, end = encoder().start_id, encoder().end_id
    assert piece.tokens == [start, *question, end, *parts[0], end, *parts[1], end, *parts[2], end]
    none = [[NO_TARGET] * len(part) for part in (question, *parts)]
    assert piece.targets == [NO_TARGET, *none[0], NO_TARGET, *none[1], 1, *none[2], 0, *none[3], 1]
    assert (piece.language, piece.document) == (3, 8)


def test_many_sentences_go_on_after_the_question_in_the_next_row() -> None:
    sentences = tiny.texts("en", 20, seed=5)
    pair = "\n".join(["13", *sentences])
    pieces = Answers(encoder(), LABELS, 32)(Window(0, ["soft blanket"], [pair], [0], [0]))
    head = [encoder().start_id, *encoder().encode(["soft blanket"])[0], encoder().end_id]
    assert len(pieces) > 2
    assert all(piece.tokens[: len(head)] == head and len(piece.tokens) <= 32 for piece in pieces)
    found = [target for piece in pieces for target in piece.targets or [] if target != NO_TARGET]
    assert found == [1] * 13 + [0] + [1] * 6


def test_long_questions_and_sentences_are_cut_off_but_none_is_lost() -> None:
    pair = "\n".join(["0", "kettle " * 40, "water"])
    pieces = Answers(encoder(), LABELS, 16)(Window(0, ["warm " * 40], [pair], [0], [0]))
    assert all(len(piece.tokens) <= 16 for piece in pieces)
    assert [t for piece in pieces for t in piece.targets or [] if t != NO_TARGET] == [0, 1]


def test_what_is_cut_off_is_known() -> None:
    cutter = Answers(encoder(), LABELS, 16)

    def tokens(text: str) -> int:
        return len(encoder().encode([text])[0])

    def told(question: str, sentence: str) -> bool:
        pair = f"0\n{sentence}\nwater"
        kept = cutter(Window(0, [question], [pair], [0], [0]))
        # Less the start and end of each question, and the ends of two sentences.
        long = sum(len(piece.tokens) for piece in kept) - 2 * len(kept) - 2
        repeated = (len(kept) - 1) * tokens(question)
        whole = long - repeated == tokens(question) + tokens(sentence) + tokens("water")
        assert cutter.is_cut_off(question, pair) == (not whole)
        return not whole

    found = [told("warm " * a, "kettle " * b) for a in (1, 2, 3, 6) for b in (1, 2, 4, 8)]
    assert set(found) == {True, False}


@pytest.mark.parametrize("pair", ["", "one\ntwo", "2\na\nb", "-1\na"])
def test_what_is_no_question_with_sentences_is_named(pair: str) -> None:
    with pytest.raises(ConfigError, match=r"document 4: objective\.name=answer needs the number"):
        Answers(encoder(), LABELS, 32)(Window(0, ["why"], [pair], [0], [4]))


def test_labels_of_another_task_are_named() -> None:
    with pytest.raises(ConfigError, match="document 4: the label 'other' is none of the 2 of the training"):
        Answers(encoder(), {"O": 0, "B-LOC": 1}, 32)(Window(0, ["why"], ["1\nsoft\nwarm"], [0], [4]))


def test_scores_of_ranked_sentences() -> None:
    found = ranking.score(["2 0 1", "0 1 2", "1 2 0", ""], ["2", "1", "0", "0"], 50, ranking.OF_ANSWERS)
    assert found["accuracy"].value == pytest.approx(25)
    assert found["MRR"].value == pytest.approx(100 * (1 + 1 / 2 + 1 / 3 + 0) / 4)
    assert found["MRR"].n == 4
    assert found["MRR"].low <= found["MRR"].value <= found["MRR"].high


def test_a_model_ranks_the_sentences_of_each_question_as_each_alone(tmp_path: Path) -> None:
    model = test_labels.model("words", ["answer", "other"])
    backbone.export(model, tiny.tokens(), dict(model.named_parameters()), tmp_path)
    config = RunConfig.model_validate(
        {"objective": {"name": "answer"}, "model": {"family": "bert"}, "corpus": {"sequence_length": 48}}
    )
    pairs = ["\n".join(["0", *tiny.texts("en", count, seed=count)]) for count in (3, 9, 1)]
    rows = [Record(i, "en", f"kettle {i}", pair, "") for i, pair in enumerate(pairs)]
    judge = labelling.Judge(config, ["en"], tmp_path)
    together = judge.label(rows, "en")
    assert [sorted(map(int, ranked.split())) for ranked in together] == [[0, 1, 2], list(range(9)), [0]]
    assert together == [judge.label([row], "en")[0] for row in rows]
    # By hand: the first question's three sentences fit into one row that plain `transformers` reads.
    cut = Answers(encoder(), LABELS, 48)(Window(0, [rows[0].text], [rows[0].pair], [0], [0]))
    plain = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    scores: list[float] = []
    for piece in cut:
        logits_TK = plain(input_ids=torch.tensor([piece.tokens])).logits[0]
        marked = [i for i, target in enumerate(piece.targets or []) if target != NO_TARGET]
        scores += (logits_TK[marked, 0] - logits_TK[marked, 1]).tolist()
    assert together[0] == " ".join(str(i) for i in sorted(range(3), key=lambda i: -scores[i]))


def test_a_report_holds_ranks_against_the_number_of_the_right_sentence(tmp_path: Path) -> None:
    model = test_labels.model("words", ["answer", "other"])
    backbone.export(model, tiny.tokens(), dict(model.named_parameters()), tmp_path / "weights")
    sentences = tiny.texts("en", 4, seed=1)
    paragraph = {
        "context": " ".join(f"{text}." for text in sentences),
        "sentences": [f"{text}." for text in sentences],
        "qas": [{"question": "why", "answers": [{"answer_start": 0}]}],
    }
    body = {"data": [{"paragraphs": [paragraph]}]}
    (tmp_path / "en.json").write_text(json.dumps(body), encoding="utf-8")
    overrides = [
        "objective.name=answer",
        "model.family=bert",
        f"model.path={tmp_path}/weights",
        f"evaluation.sources=[{{uri: {tmp_path}/en.json, format: squad}}]",
        "corpus.sequence_length=64",
    ]
    found, (row,) = evaluate.evaluate(configuration.load(None, overrides))
    rank = row["prediction"].split().index("0") + 1
    assert row["reference"] == "0"
    assert found.cells["answer"]["en"]["MRR"].value == pytest.approx(100 / rank)
