"""Translation: packed pairs, the told language, a copy task that is learnt, and what the model then writes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers

from mlray.config import Adapter, ConfigError, Evaluation, Model, Objective, Tokenizer, Train
from mlray.corpus import packing
from mlray.corpus.windows import Window
from mlray.models import adapters, backbone, tokenizer, translator
from mlray.models.generation import Writer, _by_length
from mlray.objectives import translation
from mlray.objectives.checks import check_family
from mlray.objectives.table import Task
from mlray.schema import NO_TARGET, PackedBatch
from mlray.training import loop
from mlray.training.engine import Engine
from tests.unit import tiny

pytestmark = tiny.DEEPSPEED_WARNINGS

DIRECTIONS = ["de-de", "de-en"]
"""To German: a copy. To English: the words in reverse."""
LENGTH = 32


@functools.cache
def tokens() -> Any:
    """Whole words as tokens, and a token for each language."""
    words = sorted({word for words in tiny.WORDS.values() for word in words})
    return tokenizer.train([" ".join(words)] * 50, Tokenizer(algorithm="bpe", vocab_size=140), ["de", "en"])


def window(number: int, pairs: int) -> Window:
    """Short German sentences, in turn with their copy and their reverse."""
    draw = np.random.default_rng([7, number])
    texts = [" ".join(draw.choice(tiny.WORDS["de"][:8], size=draw.integers(1, 5))) for _ in range(pairs)]
    targets = [" ".join(text.split()[:: 1 if i % 2 == 0 else -1]) for i, text in enumerate(texts)]
    return Window(number, texts, targets, [i % 2 for i in range(pairs)], list(range(pairs)))


def cutter() -> translation.Pairs:
    return translation.pairs(tokenizer.encoder(tokens()), DIRECTIONS, LENGTH)


def model(family: str = "m2m_100", hidden_size: int = 16, seed: int = 0) -> translator.Translator:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": hidden_size,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 2 * hidden_size,
    }
    config = Model.model_validate({"family": family, "max_positions": 64, "dropout": 0.0, **sizes})
    return translator.build(config, tokens())


def test_a_pair_shares_its_columns_and_begins_with_its_languages() -> None:
    found = cutter()(Window(0, ["der Alltag"], ["Alltag der"], [1], [5]))
    encoder = tokenizer.encoder(tokens())
    (left, right) = encoder.encode(["der Alltag", "Alltag der"])
    (piece,) = found
    assert piece.tokens[: len(left) + 2] == [encoder.language_ids["de"], *left, encoder.end_id]
    assert piece.targets is not None
    assert piece.targets[: len(right) + 2] == [encoder.language_ids["en"], *right, encoder.end_id]
    assert len(piece.tokens) == len(piece.targets) == max(len(left), len(right)) + 2
    assert (piece.language, piece.document) == (1, 5)
    long = cutter()(Window(0, ["der " * 99], ["der"], [0], [0]))[0]
    assert len(long.tokens) == len(long.targets or []) == LENGTH
    assert (long.targets or [])[3:] == [NO_TARGET] * (LENGTH - 3)
    cut = cutter()(Window(0, ["der"], ["der " * 99], [0], [0]))[0].targets or []
    assert len(cut) == LENGTH
    assert cut[-1] == NO_TARGET  # the model must not learn to stop where the row ends
    assert encoder.end_id not in cut


def test_the_decoder_is_told_the_language_and_predicts_the_rest() -> None:
    pieces = [
        packing.Piece([9, 8, 2, 0], 0, 0, [7, 6, 5, 2]),
        packing.Piece([9, 8, 4, 2], 1, 1, [3, 2, -100, -100]),
    ]
    batch = packing.unpack(packing.pack_pieces(pieces, 0, 10, 0, seed=0))
    assert batch.targets_BT is not None
    first = 0 if batch.documents_D[0] == 0 else 1
    none = np.zeros(10, bool)
    vocabulary = tokenizer.Vocabulary(10, -1, 2, 0, none, none, np.zeros(10, np.int32), none)
    inputs, targets_N = translation.collate(batch, vocabulary)
    decoder = [[2, 7, 6, 5], [2, 3, 2, 0]]
    assert inputs["target_BT"].tolist() == [[*decoder[first], *decoder[1 - first], 0, 0]]
    predicted = [([1, 2, 3], [6, 5, 2]), ([1], [2])]
    (here, these), (there, those) = predicted[first], predicted[1 - first]
    assert inputs["predicted_N"].tolist() == [*here, *(4 + place for place in there)]
    assert targets_N.tolist() == [*these, *those]


@pytest.mark.parametrize("family", ["m2m_100", "mbart"])
def test_packed_pairs_have_the_logits_of_each_pair_alone(family: str) -> None:
    network = model(family).eval()
    batch = packing.unpack(packing.pack(window(0, 24), cutter(), LENGTH, seed=0))
    inputs, _ = translation.collate(batch, tokenizer.vocabulary(tokens()))
    everywhere = torch.arange(batch.tokens_BT.size)
    compared = 0
    with torch.no_grad():
        logits = network(**{**inputs, "predicted_N": everywhere}).view(*batch.tokens_BT.shape, -1)
        for row, segments in enumerate(batch.segments_BT):
            for number in range(1, segments.max() + 1):
                columns = np.flatnonzero(segments == number)
                source = inputs["source_BT"][row, columns]
                source = source[source != tokens().pad_token_id]
                target = inputs["target_BT"][row, columns]
                alone = network.model(input_ids=source[None], decoder_input_ids=target[None]).logits[0]
                real = (target != tokens().pad_token_id).numpy()
                assert torch.allclose(logits[row, columns][real], alone[real], atol=1e-5)
                compared += 1
    assert compared == 24
    assert len(batch) < 12  # several a row


def test_smoothed_loss_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]])
    log = torch.log_softmax(logits.double(), -1)
    expected = -(0.7 * log[0, 1] + 0.1 * log[0].sum()) - (0.7 * log[1, 2] + 0.1 * log[1].sum())
    found = translation.loss(logits, torch.tensor([1, 2]), Objective(name="translation", label_smoothing=0.3))
    assert float(found) == pytest.approx(float(expected), abs=1e-5)


def test_what_is_no_direction_or_has_no_token_is_refused() -> None:
    encoder = tokenizer.encoder(tokens())
    with pytest.raises(ConfigError, match="in a language such as en-de, and a source is in 'de'"):
        translation.pairs(encoder, ["en-de", "de"], LENGTH)
    with pytest.raises(ConfigError, match="a source is in 'pt-BR'"):
        translation.pairs(encoder, ["pt-BR"], LENGTH)
    assert translation.directions(["en-zh-Hans", "pt-BR-de"]) == [("en", "zh-Hans"), ("pt-BR", "de")]
    with pytest.raises(ConfigError, match="no token for the language 'fr', only for de, en"):
        translation.pairs(encoder, ["de-fr"], LENGTH)
    for name, family, fitting in (
        ("translation", "bert", "m2m_100, mbart"),
        ("denoising", "gpt2", "m2m_100, mbart"),
        ("masked", "mbart", "bert, xlm-roberta, modernbert"),
    ):
        with pytest.raises(
            ConfigError, match=f"family={family} does not fit objective.name={name}; .* {fitting}"
        ):
            check_family(Objective.model_validate({"name": name}), Model.model_validate({"family": family}))


@pytest.mark.parametrize("name", ["pad", "eos"])
def test_a_tokenizer_with_other_special_tokens_than_the_checkpoint_is_refused(
    name: str, tmp_path: Path
) -> None:
    network = model()
    backbone.export(network, tokens(), dict(network.named_parameters()), tmp_path)
    config = Model(family="m2m_100", path=str(tmp_path))
    translator.build(config, tokenizer.load(tmp_path), tmp_path)
    other = tokenizer.load(tmp_path)
    setattr(other, f"{name}_token", "<unk>")
    with pytest.raises(
        ConfigError, match=rf"has the {name} token \d+ and the tokenizer {other.unk_token_id}; set"
    ):
        translator.build(config, other, tmp_path)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[loop.Step], Path]:
    """Steps of the copy task, and the exported model."""
    network = model(hidden_size=64)
    config = Train.model_validate(
        {
            "steps": 300,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "lr": 3e-3,
            "warmup_steps": 30,
            "zero_stage": 0,
            "precision": "fp32",
            "schedule": "linear",
        }
    )
    tables = [packing.pack(window(number, 200), cutter(), LENGTH, seed=0) for number in range(80)]
    batches: list[PackedBatch] = tiny.deal(pa.concat_tables(tables), 8)
    objective = Objective(name="translation", label_smoothing=0.0)
    task = Task(objective, tokenizer.vocabulary(tokens()), DIRECTIONS, 0)
    steps = list(loop.steps(Engine(network, config, 1), batches, task, config, start=0, seed=0))
    folder = tmp_path_factory.mktemp("translator")
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    backbone.export(network, tokens(), weights, folder)
    return steps, folder


def test_the_copy_task_is_learnt(learnt: tuple[list[loop.Step], Path]) -> None:
    steps, _ = learnt
    assert steps[0].loss > 4.0
    assert np.mean([step.loss for step in steps[-20:]]) < 0.1


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_language_token_decides_what_is_written(
    learnt: tuple[list[loop.Step], Path], num_beams: int
) -> None:
    writer = Writer(learnt[1])
    texts = ["der Wasserkocher ist leise", "leise", "und schnell und"]
    config = Evaluation(num_beams=num_beams, max_new_tokens=32, batch_tokens=16)
    assert writer.translate(texts, "de", "de", config) == texts
    assert writer.unfinished == 0
    writer.translate(texts, "de", "de", Evaluation(num_beams=num_beams, max_new_tokens=3))
    assert writer.unfinished == 2  # "leise" and its end, behind the token of the language, are three
    told = json.loads((learnt[1] / "generation_config.json").read_text(encoding="utf-8"))
    habits = {
        **told,
        "decoder_start_token_id": tokens().convert_tokens_to_ids("__de__"),
        "repetition_penalty": 9.0,
    }
    (learnt[1] / "generation_config.json").write_text(json.dumps(habits), encoding="utf-8")
    assert (
        Writer(learnt[1]).translate(texts, "de", "de", config) == texts
    )  # as it was trained, not as the file says
    backwards = [" ".join(reversed(text.split())) for text in texts]
    assert writer.translate(texts, "de", "en", config) == backwards
    with pytest.raises(ConfigError, match="no token for the language 'fr', only for de, en"):
        writer.translate(texts, "de", "fr", config)


def test_batches_are_of_like_length_and_hold_every_row_once() -> None:
    rows = [[0] * length for length in (3, 9, 1, 4, 4, 2, 20)]
    batches = list(_by_length(rows, 12))
    assert sorted(place for batch in batches for place in batch) == list(range(7))
    assert batches == [[6], [1], [3, 4, 0], [5, 2]]


def test_the_bias_of_the_logits_is_written_with_the_weights(tmp_path: Path) -> None:
    network = model("mbart")
    network.model.final_logits_bias[0, 7] = 5.0  # a buffer: nothing trains it
    backbone.export(network, tokens(), dict(network.named_parameters()), tmp_path)
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    config = Model(family="mbart", path=str(tmp_path), dropout=0.0)
    for opened in (plain, translator.build(config, tokens(), tmp_path).model):
        assert opened.final_logits_bias[0, 7] == 5.0
        assert opened.final_logits_bias.abs().sum() == 5.0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers")
@pytest.mark.parametrize(("family", "kind"), [("m2m_100", "lora"), ("m2m_100", "ia3"), ("mbart", "dora")])
def test_adapters_of_both_stacks_are_trained_saved_opened_by_the_writer_and_merged(
    family: str, kind: str, tmp_path: Path
) -> None:
    fresh = model(family)
    backbone.export(fresh, tokens(), dict(fresh.named_parameters()), tmp_path / "base")
    config = Model.model_validate({"family": family, "path": str(tmp_path / "base")})
    network = translator.build(config, tokens(), tmp_path / "base")
    digest = adapters.digest(network)
    wrapped = adapters.add(network, Adapter.model_validate({"kind": kind}))
    moving = {name for name, one in network.named_parameters() if one.requires_grad}
    assert not [name for name in moving if "lm_head" in name or "shared" in name]
    for place in (
        "encoder.layers.0.self_attn",
        "decoder.layers.1.self_attn",
        "decoder.layers.1.encoder_attn",
    ):
        assert [name for name in moving if place in name], place
    settings = tiny.train(steps=5, lr=3e-2, warmup_steps=0)
    table = packing.pack(window(0, 200), cutter(), LENGTH, seed=0).slice(0, 8)
    task = Task(Objective(name="translation"), tokenizer.vocabulary(tokens()), DIRECTIONS, 0)
    list(loop.steps(Engine(network, settings, 1), tiny.deal(table, 8) * 5, task, settings, start=0, seed=0))
    weights = {name: one.detach() for name, one in network.named_parameters() if one.requires_grad}
    adapters.export(wrapped, digest, "translation", tokens(), weights, tmp_path / "adapter")
    inputs, _ = translation.collate(packing.unpack(table), tokenizer.vocabulary(tokens()))
    writer = Writer(tmp_path / "base", tmp_path / "adapter")
    with torch.no_grad():
        expected = network.eval()(**inputs)
        assert float((fresh.eval()(**inputs) - expected).abs().max()) > 1e-2
        assert torch.equal(translator.Translator(writer._model)(**inputs), expected)
        network.model = adapters.merge(wrapped)
        assert not [name for name, _ in network.named_parameters() if "lora" in name or "ia3" in name]
        assert torch.allclose(network(**inputs), expected, atol=1e-5)
    plain = {name: one.detach() for name, one in network.named_parameters()}
    backbone.export(network, tokens(), plain, tmp_path / "merged")
    asked = Evaluation(num_beams=1, max_new_tokens=8)
    texts = ["der Wasserkocher ist leise", "und"]
    merged = Writer(tmp_path / "merged").translate(texts, "de", "en", asked)
    assert merged == writer.translate(texts, "de", "en", asked)
