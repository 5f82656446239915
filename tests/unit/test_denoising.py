"""Denoising: how much is hidden and in what spans, that nothing is lost, that noise repeats, and that it is learnt."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mlray.config import ConfigError, Objective, Source, Storage, Tokenizer, Train
from mlray.corpus import packing, sources
from mlray.corpus.windows import Window
from mlray.models import tokenizer
from mlray.objectives import denoising
from mlray.objectives.checks import check_sources
from mlray.objectives.denoising import Noised
from mlray.objectives.table import OBJECTIVES, Task
from mlray.schema import NO_TARGET
from mlray.training import loop
from mlray.training.engine import Engine
from tests.unit import test_translation, tiny

pytestmark = tiny.DEEPSPEED_WARNINGS

LENGTH = 32
LANGUAGES = ["de", "en"]
SENTENCES = [
    "Der Wasserkocher ist leise. Hält die Decke warm? Bei 3.5 Grad! Ja.",
    "水很热。水壶很安静！是吗？是。",
    "पानी गरम है। केतली शांत है।",
    "هل الماء ساخن؟ نعم.",
]


@functools.cache
def tokens(algorithm: str = "unigram") -> Any:
    words = " ".join(word for words in tiny.WORDS.values() for word in words)
    size = {"unigram": 108, "bpe": 112}[algorithm]
    config = Tokenizer.model_validate({"algorithm": algorithm, "vocab_size": size, "character_coverage": 1.0})
    return tokenizer.train([*SENTENCES, words] * 30, config, LANGUAGES)


def cutter(length: int = LENGTH, seed: int = 0, trained: Any = None, **config: Any) -> Noised:
    trained = trained or tokens()
    task = Task(Objective(name="denoising", **config), tokenizer.vocabulary(trained), LANGUAGES, seed)
    found = task.cutter(tokenizer.encoder(trained), length)
    assert isinstance(found, Noised)
    return found


def window(number: int, texts: list[str]) -> Window:
    return Window(
        number, texts, [""] * len(texts), [i % 2 for i in range(len(texts))], list(range(len(texts)))
    )


def test_a_piece_by_hand() -> None:
    text = "der Wasserkocher ist leise und schnell im Alltag"
    cut = cutter(trained=test_translation.tokens())
    (piece,) = cut(window(3, [text]))
    der, was, serkocher, is_, quiet, *rest = cut.encoder.encode([text])[0]
    assert len(rest) == 5
    de, end, mask = cut.encoder.language_ids["de"], cut.encoder.end_id, cut.vocabulary.mask_id
    # 35 % of 10 tokens are 3.5, rounded to 3 here: one span, one mask, and padding up to the whole half.
    assert piece.tokens == [de, der, was, mask, *rest, end, cut.encoder.pad_id, cut.encoder.pad_id]
    assert piece.targets == [de, der, was, serkocher, is_, quiet, *rest, end]
    assert (piece.language, piece.document) == (0, 0)
    other = cut(window(3, ["leise", text]))[1]  # the second of its window: drawn anew
    assert (other.language, other.tokens[0]) == (1, cut.encoder.language_ids["en"])
    assert other.tokens[1:] != piece.tokens[1:]


def test_the_share_and_the_spans_are_those_asked_for() -> None:
    cut = cutter(length=1024, permute_sentences=False)
    hidden = whole = 0
    for number in range(300):
        ids = list(range(1000, 1000 + 3 + number % 40))  # no token is the mask
        damaged = cut.damage(ids, np.random.default_rng(number))
        kept = [i for i in damaged if i != cut.vocabulary.mask_id]
        assert kept == sorted(set(kept))
        hidden, whole = hidden + len(ids) - len(kept), whole + len(ids)
    assert hidden / whole == pytest.approx(0.35, rel=0.02)
    draw = np.random.default_rng(0)
    spans = np.concatenate([denoising._spans(350, 3.5, draw) for _ in range(40)])
    assert spans.sum() == 40 * 350
    assert spans.mean() == pytest.approx(3.5, rel=0.02)
    assert (spans == 0).mean() == pytest.approx(np.exp(-3.5), rel=0.2)  # masks that hide nothing
    assert spans.var() == pytest.approx(3.5, rel=0.1)


@pytest.mark.parametrize(("rate", "mean"), [(0.35, 3.5), (0.99, 0.1), (0.01, 50.0)])
def test_no_token_is_lost_or_doubled_and_no_piece_is_longer_than_a_row(rate: float, mean: float) -> None:
    cut = cutter(noise_rate=rate, span_length=mean)
    texts = ["der", " ".join(tiny.texts("de", 12, seed=1)), *tiny.texts("en", 40, seed=2)]
    pieces = cut(window(0, texts))
    assert len(pieces) > len(texts)
    for i, ids in enumerate(cut.encoder.encode(texts)):
        own = [piece for piece in pieces if piece.document == i]
        whole: list[int] = []
        for piece in own:
            assert len(piece.tokens) == len(piece.targets or []) <= LENGTH
            inside = [token for token in piece.targets or [] if token != NO_TARGET]
            assert inside[0] == piece.tokens[0] == cut.languages[i % 2]
            assert inside[-1] == cut.encoder.end_id
            left = Counter(piece.tokens[1:])
            assert left[cut.encoder.end_id] == 1
            kept = left - Counter({cut.vocabulary.mask_id: 99, cut.encoder.pad_id: 99})
            assert kept <= Counter(inside[1:])
            whole += inside[1:-1]
        assert whole == ids


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_sentences_are_found_in_every_script_and_all_kept(algorithm: str) -> None:
    cut = cutter(length=256, trained=tokens(algorithm), noise_rate=1e-9)
    encoded = cut.encoder.encode(SENTENCES)
    assert [len(cut.sentences(ids)) for ids in encoded] == [4, 4, 2, 2]
    parts = [tokens(algorithm).decode(ids).strip() for ids in cut.sentences(encoded[0])]
    assert parts == ["Der Wasserkocher ist leise.", "Hält die Decke warm?", "Bei 3.5 Grad!", "Ja."]
    orders = set()
    for seed in range(40):
        damaged = cut.damage(encoded[0], np.random.default_rng(seed))
        found = [tuple(ids) for ids in cut.sentences(damaged)]
        assert sorted(found) == sorted(tuple(ids) for ids in cut.sentences(encoded[0]))
        orders.add(tuple(found))
    assert len(orders) > 15  # of 24
    still = cutter(length=256, trained=tokens(algorithm), noise_rate=1e-9, permute_sentences=False)
    assert still.damage(encoded[0], np.random.default_rng(0)) == encoded[0]


def test_noise_repeats_and_is_another_in_another_window_place_or_run() -> None:
    text = " ".join(tiny.texts("de", 2, seed=4))
    first = cutter()(window(5, [text, text]))
    assert first == cutter()(window(5, [text, text]))
    half = len(first) // 2
    assert [piece.tokens[1:] for piece in first[:half]] != [piece.tokens[1:] for piece in first[half:]]
    assert first != cutter()(window(6, [text, text]))
    assert first != cutter(seed=1)(window(5, [text, text]))
    assert [piece.targets for piece in first] == [
        piece.targets for piece in cutter()(window(6, [text, text]))
    ]


def test_a_language_without_a_token_is_refused() -> None:
    encoder, vocabulary = tokenizer.encoder(tokens()), tokenizer.vocabulary(tokens())
    with pytest.raises(ConfigError, match="no token for the language 'fr', only for de, en; denoise those"):
        denoising.noised(encoder, vocabulary, ["de", "fr"], LENGTH, Objective(name="denoising"), 0)
    assert OBJECTIVES["denoising"].language_tokens(["en", "de"]) == LANGUAGES


def test_a_source_of_pairs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.en.txt").write_text("kettle\n", encoding="utf-8")
    (tmp_path / "a.de.txt").write_text("Kessel\n", encoding="utf-8")
    (tmp_path / "squad.json").write_text("{}", encoding="utf-8")

    def files(**values: str) -> list[sources.SourceFile]:
        source = Source.model_validate({"uri": f"{tmp_path}/a.en.txt", "language": "en-de", **values})
        return sources.list_files((source,), Storage())

    objective = Objective(name="denoising")
    check_sources(objective, files())
    for values in (
        {"pair": "x"},
        {"pair_uri": f"{tmp_path}/a.de.txt"},
        {"uri": f"{tmp_path}/squad.json", "format": "squad"},
    ):
        with pytest.raises(ConfigError) as caught:
            check_sources(objective, [*files(), *files(**values)])
        assert str(caught.value) == (
            f"objective.name=denoising reads texts alone, and {values.get('uri', f'{tmp_path}/a.en.txt')} is read for "
            "pairs; leave corpus.sources[].pair and pair_uri out, and name each half as a source of its own"
        )
        check_sources(Objective(name="masked"), files(**values))


def test_hidden_words_of_known_sentences_are_learnt() -> None:
    """Each sentence is one of eight, so what is left of it tells what is hidden."""
    known = tiny.texts("de", 8, seed=6)
    cut = cutter(trained=test_translation.tokens(), permute_sentences=False)
    draw = np.random.default_rng(0)
    tables = [
        packing.pack(window(number, list(draw.choice(known, size=200))), cut, LENGTH, seed=0)
        for number in range(30)
    ]
    config = Train.model_validate(
        {
            "steps": 150,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "lr": 3e-3,
            "warmup_steps": 20,
            "zero_stage": 0,
            "precision": "fp32",
            "schedule": "linear",
        }
    )
    objective = Objective(name="denoising", label_smoothing=0.0)
    task = Task(objective, tokenizer.vocabulary(test_translation.tokens()), LANGUAGES, 0)
    engine = Engine(test_translation.model("mbart", hidden_size=64), config, 1)
    batches = tiny.deal(pa.concat_tables(tables), 8)
    steps = list(loop.steps(engine, batches, task, config, start=0, seed=0))
    assert steps[0].loss > 4.0
    assert np.mean([step.loss for step in steps[-20:]]) < 0.25
