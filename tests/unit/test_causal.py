"""Decoders: packed rows, what is predicted, a loss that falls on code, and what the model then writes."""

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
from safetensors.torch import load_file, save_file

import mlray
from mlray import configuration
from mlray.config import Adapter, ConfigError, Corpus, Evaluation, Model, Objective, Tokenizer, Train
from mlray.corpus import packing
from mlray.corpus.windows import Window
from mlray.evaluation import evaluate
from mlray.models import adapters, backbone, decoder, freezing, tokenizer
from mlray.models.generation import Continuer, Writer
from mlray.objectives import causal
from mlray.objectives.checks import check_family
from mlray.objectives.table import OBJECTIVES, Task, negative_log_likelihood
from mlray.schema import NO_TARGET, PackedBatch
from mlray.training import loop, plan
from mlray.training.engine import Engine
from tests.unit import test_translation, tiny

pytestmark = tiny.DEEPSPEED_WARNINGS

FAMILIES = ["gpt2", "llama", "qwen2"]
LENGTH = 32
NONE = NO_TARGET


@functools.cache
def byte_tokens() -> Any:
    """A tokenizer of 320 pieces over bytes."""
    corpus = [text for language in tiny.LANGUAGES for text in tiny.texts(language, 300, seed=1)]
    return tokenizer.train(corpus, Tokenizer(algorithm="byte_bpe", vocab_size=320))


def model(
    family: str, tokens: Any = None, seed: int = 0, *, paired: bool = False, **sizes: Any
) -> decoder.Decoder:
    torch.manual_seed(seed)
    common = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "dropout": 0.0}
    config = Model.model_validate({"family": family, "max_positions": 64, **common, **sizes})
    return decoder.build(config, tokens or byte_tokens(), paired=paired)


def wide(family: str, **sizes: Any) -> decoder.Decoder:
    """Weights are drawn wide, so that what a token sees shows in its logits."""
    network = model(family, **sizes)
    draw = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)
    return network.eval()


def cutter(tokens: Any = None, sequence_length: int = LENGTH) -> causal.Continuations:
    return causal.Continuations(tokenizer.encoder(tokens or byte_tokens()), sequence_length)


def batch() -> PackedBatch:
    found = packing.unpack(packing.pack(tiny.window(0, 20), cutter(), LENGTH, seed=0))
    assert (np.bincount(found.batch_D) > 1).any()
    return found


def exported(network: decoder.Decoder, tokens: Any, folder: Path) -> Path:
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    backbone.export(network, tokens, weights, folder)
    return folder


def gap_to_documents_alone(network: decoder.Decoder) -> float:
    packed = batch()
    inputs, _ = causal.collate(packed)
    gaps = []
    with torch.no_grad():
        everywhere = {**inputs, "predicted_N": torch.arange(packed.tokens_BT.size)}
        logits = network(**everywhere).view(*packed.tokens_BT.shape, -1)
        for row, segments in enumerate(packed.segments_BT):
            for number in range(1, segments.max() + 1):
                columns = np.flatnonzero(segments == number)
                alone = network.model(input_ids=inputs["tokens_BT"][row, columns][None]).logits[0]
                assert alone.std() > 0.5
                gaps.append(float((logits[row, columns] - alone).abs().max()))
    assert len(gaps) == len(packed.lengths_D) >= 40
    return max(gaps)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_read_like_documents_alone(family: str) -> None:
    assert gap_to_documents_alone(wide(family)) < 1e-5


def test_local_layers_of_a_loaded_checkpoint_see_no_further_packed_than_alone() -> None:
    settings = wide("qwen2").model.config.to_dict()
    local = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "layer_types": None}
    config = transformers.Qwen2Config(**{**settings, **local}, attn_implementation="sdpa")
    torch.manual_seed(0)
    network = decoder.Decoder(transformers.AutoModelForCausalLM.from_config(config)).eval()
    assert network.model.config.layer_types == ["full_attention", "sliding_attention"]
    for parameter in network.parameters():
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.2)
    assert gap_to_documents_alone(network) < 1e-5
    network._window = 1000
    assert gap_to_documents_alone(network) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_sees_none_after_it(family: str) -> None:
    network, packed = wide(family), batch()
    inputs, _ = causal.collate(packed)
    place = int(np.flatnonzero(packed.segments_BT[0] == 1)[-2])
    changed = inputs["tokens_BT"].clone()
    changed[0, place + 1 :] = 17
    with torch.no_grad():
        before = network(**{**inputs, "predicted_N": torch.arange(LENGTH)})
        after = network(**{**inputs, "tokens_BT": changed, "predicted_N": torch.arange(LENGTH)})
    assert torch.equal(before[: place + 1], after[: place + 1])
    assert not torch.allclose(before[place + 1], after[place + 1], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_opens_as_a_plain_causal_model_and_is_read_back(family: str, tmp_path: Path) -> None:
    network = wide(family)
    exported(network, byte_tokens(), tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([byte_tokens()("der Wasserkocher ist leise").input_ids])
    with torch.no_grad():
        expected = network.model(input_ids=ids).logits
        assert torch.equal(plain(input_ids=ids).logits, expected)
        again = decoder.build(
            Model.model_validate({"family": family, "path": str(tmp_path), "dropout": 0.3}),
            byte_tokens(),
            tmp_path,
        ).eval()
        assert torch.equal(again.model(input_ids=ids).logits, expected)
    settings = again.model.config
    assert (settings.attn_pdrop if family == "gpt2" else settings.attention_dropout) == 0.3
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours, theirs = tokenizer.encoder(byte_tokens()), tokenizer.encoder(loaded)
    assert (theirs.start_id, theirs.end_id, theirs.pad_id) == (ours.start_id, ours.end_id, ours.pad_id)
    texts = ["def f(x):\n\treturn  x<s>  # 2026\n\n", "e\u0301 水壶 <mask>"]
    assert theirs.encode(texts) == ours.encode(texts)
    assert loaded.decode(theirs.encode(texts)[0]) == texts[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_told_alike_by_every_family(family: str) -> None:
    network = model(family, dropout=0.2, attention_dropout=0.4)
    assert backbone.positions(network) == 64
    settings = network.model.config
    assert settings.tie_word_embeddings
    assert network.model.lm_head.weight is network.model.get_input_embeddings().weight
    if family == "gpt2":
        assert (settings.resid_pdrop, settings.embd_pdrop, settings.attn_pdrop) == (0.2, 0.2, 0.4)
    else:
        assert settings.attention_dropout == 0.4
    config = configuration.load(
        None, ["corpus.sequence_length=32", "train.micro_batch_size=2", "train.precision=fp32"]
    )
    found = plan._memory(config, 1, 1, settings)
    # 64 tokens x 2 layers x (16 x 16 hidden + 2 x 24 inner + 3 x 2 heads x 32) x 4 bytes
    assert found["activations"] == 64 * 2 * (256 + 48 + 192) * 4
    if family == "gpt2":
        settings.n_inner = None  # as in OpenAI's own: four times the hidden size
        assert plan._memory(config, 1, 1, settings)["activations"] == 64 * 2 * (256 + 128 + 192) * 4
    kept = freezing.freeze(network, Train(freeze_layers=1, freeze_embeddings=True))
    assert any(".1." in name for name, one in network.named_parameters() if one.requires_grad)
    assert {"embed" if ".0." not in name else "layer" for name in kept} == {"embed", "layer"}


def test_qwen2_is_refused_with_a_tokenizer_that_its_folder_would_not_open() -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.family=qwen2 reads bytes .*; set tokenizer\.algorithm=byte_bpe"
    ):
        model("qwen2", tiny.tokens())


def test_another_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"family=bert does not fit objective\.name=causal; .* gpt2, llama, qwen2"
    ):
        check_family(Objective(name="causal"), Model(family="bert"))
    exported(model("gpt2"), byte_tokens(), tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"is a gpt2 checkpoint; set model\.family to it"):
        decoder.build(Model(family="llama", path=str(tmp_path / "gpt2")), byte_tokens(), tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="is a gpt2 model, not one of m2m_100, mbart"):
        Writer(tmp_path / "gpt2")
    backbone.export(tiny.encoder(), tiny.tokens(), dict(tiny.encoder().named_parameters()), tmp_path / "bert")
    with pytest.raises(ConfigError, match="is a bert model, not one of gpt2, llama, qwen2"):
        Continuer(tmp_path / "bert")
    with pytest.raises(ConfigError, match=f"^no checkpoint at {tmp_path}/absent: [^\n]+$"):
        Continuer(tmp_path / "absent")
    # What a training refuses to start from does not write either.
    weights = load_file(tmp_path / "gpt2" / "model.safetensors")
    lost = weights.pop("transformer.h.1.mlp.c_fc.weight")
    assert lost.numel()
    save_file(weights, tmp_path / "gpt2" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"has no tensor .*h\.1\.mlp\.c_fc\.weight, a part of the gpt2"):
        Continuer(tmp_path / "gpt2")


# ---- what is predicted


class Letters:
    """A tokenizer whose tokens are letters."""

    start_id, end_id, pad_id = 1, 2, 0

    def encode(self, texts: Any) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]


def pieces(text: str, pair: str = "", length: int = 8) -> list[tuple[list[int], list[int] | None]]:
    cut = causal.Continuations(Letters(), length)
    return [(piece.tokens, piece.targets) for piece in cut(Window(0, [text], [pair], [3], [7]))]


def test_targets_of_a_text_by_hand() -> None:
    a, b, c, d, e, f, g = range(ord("a"), ord("h"))
    assert pieces("abc") == [([1, a, b, c, 2], [NONE, a, b, c, 2])]
    assert pieces("abcdef") == [([1, a, b, c, d, e, f, 2], [NONE, a, b, c, d, e, f, 2])]
    # Longer than a row: every token once, and the end is learnt where the text ends.
    assert pieces("abcdefg") == [
        ([1, a, b, c, 2], [NONE, a, b, c, NONE]),
        ([1, d, e, f, g, 2], [NONE, d, e, f, g, 2]),
    ]


def test_only_the_pair_and_its_end_are_learnt() -> None:
    a, b, c, d, e, f = range(ord("a"), ord("g"))
    assert pieces("ab", "cd") == [([1, a, b, 2, c, d, 2], [NONE, NONE, NONE, NONE, c, d, 2])]
    # The text gives way to the pair, and a pair that is cut off does not end.
    assert pieces("abc", "def") == [([1, a, b, 2, d, e, f, 2], [NONE] * 4 + [d, e, f, 2])]
    assert pieces("g", "abcdef") == [([1, 2, a, b, c, d, e, 2], [NONE, NONE, a, b, c, d, e, NONE])]


def test_documents_keep_their_order_language_and_number() -> None:
    window = Window(0, ["abcdefghij", "k", "lm"], ["", "x", ""], [3, 4, 5], [9, 9, 8])
    found = causal.Continuations(Letters(), 8)(window)
    assert [(chr(one.tokens[1]), one.language, one.document) for one in found] == [
        ("a", 3, 9),
        ("f", 3, 9),
        ("k", 4, 9),
        ("l", 5, 8),
    ]
    assert [(one.targets or [])[-1] for one in found] == [NONE, 2, 2, 2]


def test_collate_predicts_inside_documents_by_hand() -> None:
    window = Window(0, ["abc", "d"], ["", "e"], [0, 0], [0, 1])
    packed = packing.unpack(packing.pack(window, causal.Continuations(Letters(), 12), 12, seed=0))
    a, b, c, d, e = range(ord("a"), ord("f"))
    assert packed.tokens_BT.tolist() == [[1, a, b, c, 2, 1, d, 2, e, 2, 0, 0]]
    inputs, targets_N = causal.collate(packed)
    assert inputs["predicted_N"].tolist() == [0, 1, 2, 3, 7, 8]
    assert targets_N.tolist() == [a, b, c, 2, e, 2]
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]])
    expected = -torch.log_softmax(logits, -1)[[0, 1], [1, 2]].sum()
    assert float(negative_log_likelihood(logits.bfloat16(), torch.tensor([1, 2]))) == pytest.approx(
        float(expected)
    )


# ---- what is learnt


def sources() -> list[str]:
    root = Path(mlray.__file__).parent
    return [
        path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py")) if path.stat().st_size > 500
    ]


@functools.cache
def code_tokens() -> Any:
    return tokenizer.train(sources(), Tokenizer(algorithm="byte_bpe", vocab_size=600))


def run(network: decoder.Decoder, tokens: Any, table: pa.Table, **values: Any) -> list[loop.Step]:
    common = {"micro_batch_size": 8, "global_batch_size": 8, "zero_stage": 0, "precision": "fp32"}
    config = Train.model_validate({**common, "schedule": "linear", **values})
    repeats = -(-config.steps * 8 // len(table))
    batches = tiny.deal(pa.concat_tables([table] * repeats), 8)
    task = Task(Objective(name="causal"), tokenizer.vocabulary(tokens), ["zxx-python"], 0)
    return list(loop.steps(Engine(network, config, 1), batches, task, config, start=0, seed=0))


def test_the_loss_on_code_falls() -> None:
    texts, tokens = sources(), code_tokens()
    count = len(texts)
    window = Window(0, texts, [""] * count, [0] * count, list(range(count)))
    table = packing.pack(window, cutter(tokens, 64), 64, seed=0)
    network = model("gpt2", tokens, hidden_size=64, intermediate_size=128)
    steps = run(network, tokens, table, steps=200, lr=5e-3, warmup_steps=20)
    assert steps[0].loss == pytest.approx(np.log(600), abs=0.3)
    shares = np.bincount(np.concatenate(tokenizer.encoder(tokens).encode(texts)))
    shares = shares[shares > 0] / shares.sum()
    by_frequency_alone = -(shares * np.log(shares)).sum()
    assert np.mean([step.loss for step in steps[-10:]]) < by_frequency_alone - 1.0


def reversed_pairs(number: int, count: int) -> Window:
    """Short German sentences, each with its words in reverse."""
    draw = np.random.default_rng([7, number])
    texts = [" ".join(draw.choice(tiny.WORDS["de"][:8], size=draw.integers(1, 5))) for _ in range(count)]
    return Window(
        number, texts, [" ".join(text.split()[::-1]) for text in texts], [0] * count, list(range(count))
    )


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[loop.Step], Path]:
    """Steps on sentences and their reverse, and the exported model."""
    tokens = test_translation.tokens()
    tables = [packing.pack(reversed_pairs(i, 200), cutter(tokens), LENGTH, seed=0) for i in range(90)]
    network = model("llama", tokens, paired=True, hidden_size=64, intermediate_size=128, num_heads=4)
    steps = run(network, tokens, pa.concat_tables(tables), steps=300, lr=3e-3, warmup_steps=30)
    return steps, exported(network, tokens, tmp_path_factory.mktemp("decoder"))


TEXTS = ["der Wasserkocher ist leise", "leise", "und schnell und"]
REVERSED = ["leise ist Wasserkocher der", "leise", "und schnell und"]


def test_the_reverse_is_learnt(learnt: tuple[list[loop.Step], Path]) -> None:
    steps, _ = learnt
    assert steps[0].loss > 4.0
    assert np.mean([step.loss for step in steps[-20:]]) < 0.1


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("batch_tokens", [16, 400])
def test_prompts_are_continued_in_any_batch(
    learnt: tuple[list[loop.Step], Path], num_beams: int, batch_tokens: int
) -> None:
    config = Evaluation(num_beams=num_beams, max_new_tokens=32, batch_tokens=batch_tokens)
    assert Continuer(learnt[1]).write(TEXTS, config) == REVERSED


def test_a_checkpoints_own_habits_do_not_write(learnt: tuple[list[loop.Step], Path], tmp_path: Path) -> None:
    for path in learnt[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    habits = {"do_sample": True, "temperature": 9.0, "no_repeat_ngram_size": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(habits), encoding="utf-8")
    config = Evaluation(num_beams=1, max_new_tokens=32)
    assert Continuer(tmp_path).write(TEXTS, config) == REVERSED


def test_a_long_prompt_leaves_room_for_what_is_written(learnt: tuple[list[loop.Step], Path]) -> None:
    long = " ".join(["leise"] * 200)
    (written,) = Continuer(learnt[1]).write([long], Evaluation(num_beams=1, max_new_tokens=500))
    assert 0 < len(test_translation.tokens()(written).input_ids) <= 64 // 2 + 2


def test_texts_without_an_end_are_counted(learnt: tuple[list[loop.Step], Path]) -> None:
    continuer = Continuer(learnt[1])
    long = Evaluation(num_beams=1, max_new_tokens=32)
    lengths = [len(ids) + 1 for ids in continuer.encoder.encode(continuer.write(TEXTS, long))]
    assert continuer.unfinished == 0
    short = Evaluation(num_beams=1, max_new_tokens=min(lengths), batch_tokens=16)
    continuer.write(TEXTS, short)
    assert continuer.unfinished == sum(length > min(lengths) for length in lengths) > 0


def test_drawn_tokens_are_the_seeds(learnt: tuple[list[loop.Step], Path]) -> None:
    continuer = Continuer(learnt[1])
    config = Evaluation(temperature=3.0, max_new_tokens=12, num_beams=4)
    state = torch.get_rng_state()
    first = continuer.write(TEXTS, config, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert continuer.write(TEXTS, config, seed=1) == first
    assert continuer.write(TEXTS, config, seed=2) != first
    assert first != REVERSED
    # Batches that begin alike are drawn apart.
    one, other = (continuer.write([TEXTS[0], last], config, seed=1)[0] for last in TEXTS[1:])
    assert one != other
    # A share of the probability that holds the best token alone leaves nothing to the seed.
    narrow = Evaluation(temperature=3.0, top_p=0.01, max_new_tokens=32)
    assert continuer.write(TEXTS, narrow, seed=1) == continuer.write(TEXTS, narrow, seed=2) == REVERSED


def test_translations_are_drawn_by_the_seed_too(tmp_path: Path) -> None:
    network = test_translation.model()
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    backbone.export(network, test_translation.tokens(), weights, tmp_path)
    writer, config = Writer(tmp_path), Evaluation(temperature=1.0, max_new_tokens=12)
    drawn = [writer.translate(TEXTS, "de", "en", config, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_continuations_are_scored(learnt: tuple[list[loop.Step], Path], tmp_path: Path) -> None:
    rows = [{"text": text, "answer": pair} for text, pair in zip(TEXTS, REVERSED, strict=True)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    overrides = [
        f"model.path={learnt[1]}",
        "objective.name=causal",
        "model.family=llama",
        "evaluation.num_beams=1",
    ]
    source = f"uri: {tmp_path}/test.jsonl, language: de"
    config = configuration.load(None, [*overrides, f"evaluation.sources=[{{{source}, pair: answer}}]"])
    report, predictions = evaluate.evaluate(config, show_progress=False)
    assert report.cells["causal"]["de"]["exact match"].value == 100
    assert [one["prediction"] for one in predictions] == [one["reference"] for one in predictions] == REVERSED
    config = configuration.load(None, [*overrides, f"evaluation.sources=[{{{source}}}]"])
    with pytest.raises(
        ConfigError, match=r"no reference or label; name its column in evaluation\.sources\[\]\.pair"
    ):
        evaluate.evaluate(config, show_progress=False)


# ---- what is known of how a model was trained

BOOK = [
    "der Wasserkocher ist leise und schnell im Alltag",
    "die Decke hält warm bei kaltem Wetter",
    "the kettle boils water quickly while cold",
    "a soft blanket keeps you warm on evenings",
]


def known_by_heart(network: decoder.Decoder, tokens: Any) -> list[loop.Step]:
    """Steps on four sentences and nothing else."""
    window = Window(0, BOOK, [""] * 4, [0] * 4, list(range(4)))
    table = pa.concat_tables([packing.pack(window, cutter(tokens), LENGTH, seed=i) for i in range(8)])
    return run(network, tokens, table, steps=80, lr=1e-2, warmup_steps=5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_texts_goes_on_with_a_prompt(family: str, tmp_path: Path) -> None:
    tokens = byte_tokens()
    network = model(family, tokens, hidden_size=64, intermediate_size=128)
    assert known_by_heart(network, tokens)[-1].loss < 0.5
    halves = [(" ".join(text.split()[:3]), text.removeprefix(" ".join(text.split()[:3]))) for text in BOOK]
    rows = [{"text": text, "rest": rest.strip()} for text, rest in halves]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    folder = exported(network, tokens, tmp_path / "decoder")
    config = Evaluation(num_beams=1, max_new_tokens=40)
    assert Continuer(folder).write([text for text, _ in halves], config) == [rest for _, rest in halves]
    # Of a prompt that is too long the end goes on.
    (ids,) = tokenizer.encoder(tokens).encode([" leise" * 64 + " " + halves[1][0]])
    room = Continuer(folder).room(config)
    prompts = [tokens.decode(ids), tokens.decode(ids[-room:])]
    long, short = Continuer(folder).write(prompts, config)
    assert len(ids) > room
    assert prompts[0].endswith(prompts[1])
    assert long == short
    source = f"uri: {tmp_path}/test.jsonl, language: de, pair: rest"
    overrides = [f"model.path={folder}", f"model.family={family}", "objective.name=causal"]
    judged = configuration.load(
        None, [*overrides, "evaluation.num_beams=1", f"evaluation.sources=[{{{source}}}]"]
    )
    report, _ = evaluate.evaluate(judged, show_progress=False)
    assert report.cells["causal"]["de"]["exact match"].value == 100


PAIRED = [
    ({}, False),
    ({"pair": "answer"}, True),
    ({"pair_uri": "answers.txt"}, True),
    ({"session": "customer", "last_is_pair": True}, True),
]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers")
@pytest.mark.parametrize(("source", "paired"), PAIRED)
def test_a_checkpoint_and_an_adapter_tell_whether_they_have_learnt_pairs(
    source: dict[str, Any], paired: bool, tmp_path: Path
) -> None:
    # A run on texts, or on pairs, may start from a checkpoint of the other.
    base = exported(model("gpt2", paired=not paired), byte_tokens(), tmp_path / "base")
    sources = [{"uri": "texts"}, {"uri": "corpus", **source}]
    config = configuration.load(None, ["objective.name=causal", "model.family=gpt2", f"model.path={base}"])
    config = config.model_copy(update={"corpus": Corpus.model_validate({"sources": sources})})
    network = OBJECTIVES["causal"].build(config, byte_tokens(), base, [])
    digest = adapters.digest(network)
    exported(network, byte_tokens(), tmp_path / "whole")
    wrapped = adapters.add(network, Adapter(kind="lora"))
    moving = {name: one.detach() + 0.1 for name, one in network.named_parameters() if one.requires_grad}
    adapters.export(wrapped, digest, "causal", byte_tokens(), moving, tmp_path / "adapter")
    assert Continuer(base).paired != paired
    assert Continuer(tmp_path / "whole").paired == Continuer(base, tmp_path / "adapter").paired == paired
    assert Continuer(base, tmp_path / "adapter", paired=not paired).paired != paired


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_adapters_are_trained_saved_and_opened_by_the_writer(family: str, kind: str, tmp_path: Path) -> None:
    tokens = byte_tokens()
    base = exported(model(family), tokens, tmp_path / "base")
    config = Model.model_validate({"family": family, "path": str(base), "dropout": 0.0})
    network = decoder.build(config, tokens, base)
    digest = adapters.digest(network)
    wrapped = adapters.add(network, Adapter.model_validate({"kind": kind}))
    moving = {name for name, one in network.named_parameters() if one.requires_grad}
    layers = {name.split(".lora")[0].split(".ia3")[0].split(".")[-1] for name in moving}
    assert "lm_head" not in layers
    assert layers >= ({"c_attn", "c_proj"} if family == "gpt2" else {"k_proj", "v_proj", "down_proj"})
    table = packing.pack(reversed_pairs(0, 100), cutter(tokens), LENGTH, seed=0)
    steps = run(network, tokens, table.slice(0, 8), steps=10, lr=3e-2, warmup_steps=0)
    assert steps[-1].loss < steps[0].loss
    weights = {name: one.detach() for name, one in network.named_parameters() if one.requires_grad}
    adapters.export(wrapped, digest, "causal", tokens, weights, tmp_path / "adapter")
    again = decoder.build(config, tokens, base)
    adapters.load(again, tmp_path / "adapter", objective="causal")
    packed = packing.unpack(table.slice(0, 4))
    inputs, _ = causal.collate(packed)
    with torch.no_grad():
        expected = network.eval()(**inputs)
        assert torch.equal(again.eval()(**inputs), expected)
        written = decoder.Decoder(Continuer(base, tmp_path / "adapter")._model)(**inputs)
        assert torch.equal(written, expected)
        assert float((decoder.build(config, tokens, base).eval()(**inputs) - expected).abs().max()) > 1e-2


def test_a_backbone_in_half_precision_is_one_to_training_and_to_the_writer(tmp_path: Path) -> None:
    tokens = byte_tokens()
    base = exported(model("qwen2"), tokens, tmp_path / "base")
    half = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    half.save_pretrained(base)
    config = Model(family="qwen2", path=str(base))
    written = decoder.Decoder(Continuer(base)._model)
    assert written.model.dtype == torch.float32
    assert adapters.digest(decoder.build(config, tokens, base)) == adapters.digest(written)


def test_a_tokenizer_without_padding_or_start_is_enough(tmp_path: Path) -> None:
    bare = transformers.PreTrainedTokenizerFast(
        tokenizer_object=code_tokens().backend_tokenizer, eos_token="</s>"
    )
    encoder = tokenizer.encoder(bare)
    assert encoder.start_id == encoder.end_id == encoder.pad_id == bare.eos_token_id
    assert tokenizer.vocabulary(bare).pad_id == bare.eos_token_id
    network = model("llama", bare)
    assert network.model.get_input_embeddings().padding_idx is None
    exported(network, bare, tmp_path)
    tokenizer.load(tmp_path, OBJECTIVES["causal"].special_tokens)
    texts = ["if x:\n\treturn", "y"]
    config = Evaluation(num_beams=1, max_new_tokens=8)
    together = Continuer(tmp_path).write(texts, config)
    assert together == [text for one in texts for text in Continuer(tmp_path).write([one], config)]
