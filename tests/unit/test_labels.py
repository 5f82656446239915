"""Labels of words and texts: where the targets stand, packed logits, and a model that learns and is opened again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from seqeval.metrics.sequence_labeling import get_entities

from mlray.config import ConfigError, Contrastive, Model, Objective, RunConfig, Source, Storage, Tokenizer
from mlray.corpus import packing, sources
from mlray.corpus.windows import Window
from mlray.models import backbone, embedder, labeller, tokenizer
from mlray.objectives import labels
from mlray.objectives.checks import check_family, check_places, check_sources
from mlray.objectives.table import HEADS, Task
from mlray.schema import NO_TARGET, PackedBatch
from mlray.training import contents, loop
from mlray.training.engine import Engine
from mlray.training.folders import Folders
from tests.cluster.corpus import sentences
from tests.unit import tiny
from tests.unit.test_manifest import BuildManifest

pytestmark = tiny.DEEPSPEED_WARNINGS

TAGS = ["B-LOC", "O"]
LENGTH = 32


def encoder() -> tokenizer.Encoder:
    return tokenizer.encoder(tiny.tokens())


def model(kind: str, names: list[str], family: str = "bert", folder: Path | None = None, **sizes: Any) -> Any:
    torch.manual_seed(0)
    common = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "dropout": 0.0}
    config = Model.model_validate({"family": family, "max_positions": 64, **common, **sizes})
    build = {"words": labeller.build_words, "texts": labeller.build_texts}[kind]
    return build(config, tiny.tokens(), folder, names)


def test_the_first_piece_of_a_word_carries_its_label() -> None:
    cut = labels.Words(encoder(), labels.numbered(TAGS), LENGTH)
    (piece,) = cut(Window(0, ["im kalten Wetter"], ["O O B-LOC"], [1], [7]))
    parts = encoder().encode(["im", "kalten", "Wetter"])
    assert piece.tokens == [encoder().start_id, *parts[0], *parts[1], *parts[2], encoder().end_id]
    rest = [[NO_TARGET] * (len(part) - 1) for part in parts]
    assert piece.targets == [NO_TARGET, 1, *rest[0], 1, *rest[1], 0, *rest[2], NO_TARGET]
    assert (piece.language, piece.document) == (1, 7)


def test_a_long_sentence_goes_on_at_the_end_of_a_word() -> None:
    words = tiny.texts("de", 12, seed=3)
    text = " ".join(words)
    tags = " ".join("B-LOC" if i % 3 == 0 else "O" for i in range(len(text.split())))
    pieces = labels.Words(encoder(), labels.numbered(TAGS), LENGTH)(Window(0, [text], [tags], [0], [0]))
    assert len(pieces) > 3
    assert all(len(piece.tokens) == len(piece.targets or []) <= LENGTH for piece in pieces)
    found = [target for piece in pieces for target in piece.targets or [] if target != NO_TARGET]
    assert [TAGS[number] for number in found] == tags.split()
    inside = [token for piece in pieces for token in piece.tokens[1:-1]]
    assert inside == [token for part in encoder().encode(text.split()) for token in part]


def test_a_text_has_one_label_at_its_start_and_is_cut_off() -> None:
    cut = labels.Texts(encoder(), labels.numbered(["bad", "good"]), 8)
    short, long = cut(Window(0, ["warm", "kettle " * 20], ["good", "bad"], [0, 0], [0, 1]))
    assert short.targets == [1, *[NO_TARGET] * (len(short.tokens) - 1)]
    assert (len(long.tokens), long.tokens[-1], (long.targets or [])[0]) == (8, encoder().end_id, 0)


def test_tags_are_the_likeliest_of_the_sequences_that_mark_spans() -> None:
    names = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
    draw = np.random.default_rng(4)
    repaired = 0
    for _ in range(40):
        logits_NK = draw.normal(size=(4, len(names))) * 2
        sequences = [
            path
            for path in itertools.product(range(len(names)), repeat=4)
            if all(
                not names[k].startswith("I-")
                or (i > 0 and names[path[i - 1]] in {names[k], f"B-{names[k][2:]}"})
                for i, k in enumerate(path)
            )
        ]
        expected = max(sequences, key=lambda path: sum(logits_NK[i, k] for i, k in enumerate(path)))
        assert labels.tags(logits_NK, names) == list(expected)
        repaired += list(expected) != logits_NK.argmax(axis=1).tolist()
    assert repaired > 10
    free = draw.normal(size=(5, 3))
    assert labels.tags(free, ["NOUN", "VERB", "I-X"]) == free.argmax(axis=1).tolist()


def test_tags_of_iob1_are_read_as_the_same_spans_of_iob2() -> None:
    names = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("LOC", "PER"))]
    changed = 0
    for tags in itertools.chain.from_iterable(itertools.product(names, repeat=n) for n in (1, 2, 3)):
        found = labels.begun(tags)
        assert set(get_entities(found)) == set(get_entities(list(tags)))
        for before, tag in itertools.pairwise(["O", *found]):
            assert not tag.startswith("I-") or before in {tag, f"B-{tag[2:]}"}
        changed += found != list(tags)
    assert changed > 100
    text, iob1 = "im kalten Alltag", "I-PER I-PER B-PER"
    assert HEADS["tagging"].labels_of(text, iob1) == ["B-PER", "I-PER", "B-PER"]
    numbers = {"B-PER": 0, "I-PER": 1, "O": 2}
    (piece,) = labels.Words(encoder(), numbers, LENGTH)(Window(0, [text], [iob1], [0], [0]))
    assert [target for target in piece.targets or [] if target != NO_TARGET] == [0, 1, 0]


def test_a_model_of_iob1_says_what_it_has_learnt() -> None:
    names = ["B-LOC", "I-LOC", "I-PER", "O"]  # no two persons stood side by side
    logits_NK = 5 * np.eye(4)[[3, 2, 3, 1, 0]]
    assert [names[k] for k in labels.tags(logits_NK, names)] == ["O", "I-PER", "O", "I-LOC", "B-LOC"]
    cut = labels.Words(encoder(), labels.numbered(names), LENGTH)
    (piece,) = cut(Window(0, ["im Alltag"], ["O I-PER"], [0], [0]))
    assert [target for target in piece.targets or [] if target != NO_TARGET] == [3, 2]


@pytest.mark.parametrize(
    ("tags", "complaint"),
    [
        ([0, 3], r"row 1 has the tag '0', and a number does not say whether it marks a span; .* label_map="),
        (
            "O NOUN",
            r"row 1 has the tag 'NOUN', which marks no span, and .*de\.jsonl: row 0 has 'B-LOC', which does",
        ),
        ("O I-LOC", ""),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_tags_that_cannot_be_scored_are_not_learnt(
    tmp_path: Path, build_manifest: BuildManifest, tags: object, complaint: str, *, several: bool
) -> None:
    rows = [{"text": ["im", "Wald"], "y": ["O", "B-LOC"]}, {"text": ["der", "Alltag"], "y": tags}]
    if isinstance(tags, str):
        rows[1] = {"text": "der Alltag", "y": tags}
    (tmp_path / "de.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "fr.jsonl").write_text('{"text": "froid", "y": "7"}\n', encoding="utf-8")  # a label of a text
    named = [{"uri": f"{tmp_path}/de.jsonl", "pair": "y", "task": "ner"}]
    task = {"name": "tagging"}
    if several:
        named.append({"uri": f"{tmp_path}/fr.jsonl", "pair": "y", "task": "mood"})
        heads = [("ner", "tagging"), ("mood", "classification")]
        tasks = [{"name": name, "objective": objective} for name, objective in heads]
        task = {"name": "multitask", "tasks": tasks}
    config = RunConfig.model_validate(
        {"corpus": {"sources": named}, "objective": task, "run": {"storage_uri": f"{tmp_path}/runs"}}
    )
    manifest = build_manifest(config.corpus.sources, config.corpus)
    if complaint:
        with pytest.raises(ConfigError, match=rf"de\.jsonl: {complaint}"):
            contents.keep_labels(config, manifest, resumes=False)
        return
    contents.keep_labels(config, manifest, resumes=False)
    found = json.loads(Path(Folders.of(config).labels).read_text(encoding="utf-8"))
    assert found == (["mood:7", "ner:B-LOC", "ner:O"] if several else ["B-LOC", "O"])


def test_what_does_not_fit_is_named() -> None:
    words = labels.Words(encoder(), labels.numbered(TAGS), LENGTH)
    with pytest.raises(ConfigError, match="document 9 has 2 words and 3 tags"):
        words(Window(0, ["im Alltag"], ["O O O"], [0], [9]))
    with pytest.raises(ConfigError, match="document 9: the label 'B-PER' is none of the 2"):
        words(Window(0, ["im Alltag"], ["O B-PER"], [0], [9]))
    with pytest.raises(
        ConfigError, match=r"model\.family=mbart does not fit objective\.name=tagging; take one of"
    ):
        check_family(Objective(name="tagging"), Model(family="mbart"))
    with pytest.raises(
        ConfigError, match=r"model\.num_layers=0 .* objective\.name=tagging of xlm-roberta needs at least 1"
    ):
        check_family(Objective(name="tagging"), Model(num_layers=0))
    check_family(Objective(name="contrastive"), Model(num_layers=0))
    check_family(Objective(name="tagging"), Model(token_dropout=0.1))
    with pytest.raises(ConfigError, match=r"model\.token_dropout=0\.1 is for heads of labels, and"):
        check_family(Objective(name="translation"), Model(family="mbart", token_dropout=0.1))


def test_a_checkpoint_that_is_not_there_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "runs" / "a" / "step-1" / "weights"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text("{}", encoding="utf-8")
    for found in (
        str(weights),
        "runs/a/step-1/weights",
        "bert-base",
        "owner/bert-base",
    ):  # the last two: of a hub
        check_places(RunConfig.model_validate({"model": {"path": found}}))
    for section, path, complaint in (
        ("model", "runs/nope", r"model\.path=runs/nope: there is no such folder"),
        ("tokenizer", "runs/a/b/c", r"tokenizer\.path=runs/a/b/c: there is no such folder"),
        (
            "model",
            "runs/a/step-1",
            r"model\.path=runs/a/step-1 holds no checkpoint .*; take runs/a/step-1/weights",
        ),
        ("model", "runs/a", r"model\.path=runs/a holds no checkpoint .*\(config\.json\); name its weights"),
        (
            "adapter",
            "runs/a/step-1/weights",
            r"adapter\.path=.* holds no checkpoint .*\(adapter_config\.json\)",
        ),
    ):
        with pytest.raises(ConfigError, match=complaint):
            check_places(RunConfig.model_validate({section: {"path": path}}))
    for content, complaint in (
        ('{"model_type": "m2m_100"}', r"weights is a m2m_100 checkpoint; set model\.family to it"),
        ("[]", r"model\.path=.*weights: its config\.json is no JSON object"),
        ("{", r"model\.path=.*weights: its config\.json is no JSON object"),
    ):
        (weights / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=complaint):
            check_places(RunConfig.model_validate({"model": {"path": str(weights), "family": "bert"}}))


def test_a_source_without_labels_or_a_task_without_a_source_is_named(tmp_path: Path) -> None:
    (tmp_path / "de.jsonl").write_text('{"text": "a", "y": "b"}\n', encoding="utf-8")

    def files(**values: str) -> list[sources.SourceFile]:
        source = Source.model_validate({"uri": f"{tmp_path}/de.jsonl", **values})
        return sources.list_files((source,), Storage())

    alone, beside = files(), files(pair="y")
    for name in ("classification", "tagging", "translation"):
        objective = Objective.model_validate({"name": name})
        check_sources(objective, beside)
        with pytest.raises(
            ConfigError, match=rf"objective\.name={name} learns what belongs .*de\.jsonl is read for"
        ):
            check_sources(objective, [*beside, *alone])
    check_sources(Objective(name="masked"), alone)
    check_sources(Objective(name="contrastive"), files(pair="y", negatives="n"))
    with pytest.raises(
        ConfigError, match=r"translation knows no hard negatives, and .*de\.jsonl is read with"
    ):
        check_sources(Objective(name="translation"), files(pair="y", negatives="n"))
    tasks = [{"name": name, "objective": "classification"} for name in ("intent", "topic")]
    several = Objective.model_validate({"name": "multitask", "tasks": tasks})
    check_sources(several, [*files(pair="y", task="intent"), *files(pair="y", task="topic")])
    with pytest.raises(ConfigError, match=r"the task 'topic' of objective\.tasks has no source"):
        check_sources(several, files(pair="y", task="intent"))


@pytest.mark.parametrize("algorithm", ["unigram", "bpe", "byte_bpe"])
def test_words_are_the_same_tokens_alone_and_in_their_sentence(algorithm: str) -> None:
    texts = sentences("de")
    config = Tokenizer.model_validate({"algorithm": algorithm, "vocab_size": 400})
    own = tokenizer.encoder(tokenizer.train(iter(texts), config))
    for text in texts[:20]:
        tags = " ".join("O" for _ in text.split())
        (piece,) = labels.Words(own, labels.numbered(["O"]), 512)(Window(0, [text], [tags], [0], [0]))
        assert piece.tokens[1:-1] == own.encode([text])[0]


def test_texts_are_classified_by_their_first_token_as_the_export_says(tmp_path: Path) -> None:
    masked = tiny.encoder("modernbert")
    backbone.export(masked, tiny.tokens(), dict(masked.named_parameters()), tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classifier_pooling": "mean"}))
    network = model("texts", TAGS, "modernbert", tmp_path / "base").eval()
    backbone.export(network, tiny.tokens(), dict(network.named_parameters()), tmp_path / "trained")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained").eval()
    ids = torch.tensor([[2, 9, 11, 30, 3]])
    with torch.no_grad():
        ours = network(ids, torch.ones_like(ids), torch.arange(5)[None], torch.tensor([0]))
        assert torch.allclose(plain(input_ids=ids).logits, ours, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
@pytest.mark.parametrize("kind", ["words", "texts"])
def test_packed_documents_have_the_logits_of_plain_transformers(
    family: str, kind: str, tmp_path: Path
) -> None:
    network = model(kind, TAGS, family).eval()
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    backbone.export(network, tiny.tokens(), weights, tmp_path)
    auto = {
        "words": transformers.AutoModelForTokenClassification,
        "texts": transformers.AutoModelForSequenceClassification,
    }[kind]
    plain = auto.from_pretrained(tmp_path).eval()
    assert plain.config.id2label == {0: "B-LOC", 1: "O"}
    window = Window(0, tiny.texts("de", 12, seed=1), ["O"] * 12, [0] * 12, list(range(12)))
    batch = packing.unpack(
        packing.pack(window, labels.Texts(encoder(), labels.numbered(TAGS), LENGTH), LENGTH, 0)
    )
    inputs, _ = labels.collate(batch)
    assert len(batch) < 8  # several documents a row
    with torch.no_grad():
        everywhere = torch.arange(batch.tokens_BT.size)
        logits = network(**{**inputs, "labelled_N": everywhere}).view(*batch.tokens_BT.shape, -1)
        for row, segments in enumerate(batch.segments_BT):
            for number in range(1, segments.max() + 1):
                columns = np.flatnonzero(segments == number)
                alone = plain(input_ids=inputs["tokens_BT"][row, columns][None]).logits[0]
                ours = logits[row, columns] if kind == "words" else logits[row, columns[0]]
                assert torch.allclose(ours, alone, atol=1e-5)


def test_tags_are_learnt_and_a_checkpoint_goes_on(tmp_path: Path) -> None:
    network = model("words", TAGS)
    config = tiny.train(steps=60, lr=1e-2)
    cut = labels.Words(encoder(), labels.numbered(TAGS), LENGTH)
    tables = []
    for number in range(30):
        texts = tiny.texts("de", 80, seed=number)
        tags = [" ".join("B-LOC" if word == "Alltag" else "O" for word in text.split()) for text in texts]
        tables.append(packing.pack(Window(number, texts, tags, [0] * 80, list(range(80))), cut, LENGTH, 0))
    batches = tiny.deal(pa.concat_tables(tables), 8)
    task = Task(Objective(name="tagging"), tokenizer.vocabulary(tiny.tokens()), ["de"], 0)
    engine = Engine(network, config, 1)
    losses = [step.loss for step in loop.steps(engine, batches, task, config, start=0, seed=0)]
    assert losses[0] > 0.3
    assert max(losses[-5:]) < 0.05
    scores = loop.validate(engine, batches[-3:], task)
    assert scores["de"]["accuracy"] > 0.98
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    backbone.export(network, tiny.tokens(), weights, tmp_path)
    again = model("words", TAGS, folder=tmp_path).eval()
    inputs, _ = labels.collate(batches[0])
    with torch.no_grad():
        assert torch.allclose(again(**inputs), network.eval()(**inputs), atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
@pytest.mark.parametrize("names", [["B-PER", "O"], ["O", "B-LOC"], ["B-LOC", "B-PER", "O"]])
@pytest.mark.parametrize(("before", "kind"), [("words", "words"), ("texts", "texts"), ("words", "texts")])
def test_a_fine_tuned_encoder_gets_a_fresh_head_for_other_labels(
    family: str, names: list[str], before: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = model(before, TAGS, family)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1
    backbone.export(tuned, tiny.tokens(), dict(tuned.named_parameters()), tmp_path)
    again = model(before, TAGS, family, tmp_path).model
    old = dict(tuned.model.named_parameters())
    assert all(torch.equal(tensor, old[name]) for name, tensor in again.named_parameters())
    assert "mlray" not in {record.name for record in caplog.records}
    found = model(kind, names, family, tmp_path)
    (said,) = (record.getMessage() for record in caplog.records if record.name == "mlray")
    assert "2 labels: B-LOC, O) is left out, and a fresh one learns" in said
    assert said.endswith(f"{len(names)} labels: {', '.join(names)}")
    for name, tensor in found.model.base_model.named_parameters():
        assert name.startswith("pooler.") or torch.equal(
            tensor, dict(tuned.model.base_model.named_parameters())[name]
        )
    head = {name: tensor for name, tensor in found.model.named_parameters() if name.startswith("classifier.")}
    weights = [tensor for name, tensor in head.items() if name.endswith("weight")]
    assert len(weights[-1]) == len(names)
    assert all(0 < float(tensor.detach().std()) < 0.5 for tensor in weights)
    assert all(
        name not in old or not torch.equal(tensor, old[name])
        for name, tensor in head.items()
        if "weight" in name
    )
    assert found.model.config.id2label == dict(enumerate(names))
    backbone.export(found, tiny.tokens(), dict(found.named_parameters()), tmp_path / "next")
    read = {"words": labeller.word_labels, "texts": labeller.text_labels}[kind]
    assert read(tmp_path / "next") == names
    inputs, _ = labels.collate(labelled_batch())
    with torch.no_grad():
        expected = found.eval()(**inputs)
        assert torch.equal(model(kind, names, family, tmp_path / "next").eval()(**inputs), expected)


def test_token_dropout_hides_a_share_of_the_ordinary_tokens_while_it_learns() -> None:
    tokens = tiny.tokens()
    ids_BT = torch.arange(len(tokens)).repeat(400, 1)
    special_V = torch.isin(torch.arange(len(tokens)), torch.tensor(tokens.all_special_ids))
    hide = labeller.TokenDropout(0.25, tokens.mask_token_id, tuple(tokens.all_special_ids))
    torch.manual_seed(0)
    read_BT = hide(ids_BT)
    hidden_BT = read_BT != ids_BT
    assert (read_BT[hidden_BT] == tokens.mask_token_id).all()
    assert not hidden_BT[:, special_V].any()
    drawn = 400 * int((~special_V).sum())
    deviation = (0.25 * 0.75 / drawn) ** 0.5
    assert abs(hidden_BT[:, ~special_V].float().mean() - 0.25) < 5 * deviation
    assert (hide(ids_BT) != read_BT).any()


def test_token_dropout_leaves_the_judging_alone() -> None:
    whole = model("words", TAGS)
    hidden = model("words", TAGS, token_dropout=1.0)
    batch = labelled_batch()
    inputs, _ = labels.collate(batch)
    with torch.no_grad():
        assert torch.equal(hidden.eval()(**inputs), whole.eval()(**inputs))
        special = torch.isin(inputs["tokens_BT"], torch.tensor(tiny.tokens().all_special_ids))
        inputs["tokens_BT"] = inputs["tokens_BT"].masked_fill(~special, tiny.tokens().mask_token_id)
        assert torch.equal(hidden.train()(**inputs), whole(**inputs))


def labelled_batch() -> PackedBatch:
    texts = tiny.texts("de", 40, seed=1)
    tags = [" ".join("O" for _ in text.split()) for text in texts]
    cut = labels.Words(encoder(), labels.numbered(TAGS), LENGTH)
    (batch, *_) = tiny.deal(
        packing.pack(Window(0, texts, tags, [0] * 40, list(range(40))), cut, LENGTH, 0), 4
    )
    return batch


def test_a_masked_encoder_becomes_a_labeller(tmp_path: Path) -> None:
    masked = tiny.encoder()
    weights = {name: parameter.detach() for name, parameter in masked.named_parameters()}
    backbone.export(masked, tiny.tokens(), weights, tmp_path)
    network = model("words", TAGS, folder=tmp_path)
    before = dict(masked.model.base_model.named_parameters())
    shared = [name for name, _ in network.model.base_model.named_parameters() if name in before]
    assert len(shared) > 20
    for name in shared:
        assert torch.equal(dict(network.model.base_model.named_parameters())[name], before[name])


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
@pytest.mark.parametrize("kind", ["words", "texts"])
def test_the_encoder_of_a_pretrained_checkpoint_arrives_whole(tmp_path: Path, family: str, kind: str) -> None:
    masked = tiny.encoder(family, seed=7)
    backbone.export(masked, tiny.tokens(), dict(masked.named_parameters()), tmp_path)
    found = dict(model(kind, TAGS, family, tmp_path).model.base_model.named_parameters())
    pretrained = dict(masked.model.base_model.named_parameters())
    assert any("embed" in name and len(tensor) == len(tiny.tokens()) for name, tensor in pretrained.items())
    assert pretrained.keys() == {name for name in found if not name.startswith("pooler.")}
    assert all(torch.equal(found[name], tensor) for name, tensor in pretrained.items())


def test_a_checkpoint_without_a_part_of_its_encoder_is_refused(tmp_path: Path) -> None:
    masked = tiny.encoder("xlm-roberta")
    backbone.export(masked, tiny.tokens(), dict(masked.named_parameters()), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = "roberta.embeddings.word_embeddings.weight"
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"has no tensor {lost}, a part of the xlm-roberta backbone"):
        model("words", TAGS, "xlm-roberta", tmp_path)
    with pytest.raises(ConfigError, match=r"has no tensor embeddings\.word_embeddings\.weight, a part of"):
        embedder.build(Model(family="xlm-roberta"), Contrastive(), tiny.tokens(), tmp_path)
