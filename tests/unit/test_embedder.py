"""Vectors of texts: alone or packed, here or in sentence-transformers, they are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from mlray.config import Adapter, ConfigError, Contrastive, Model, RunConfig
from mlray.models import adapters, backbone, embedder
from mlray.objectives import contrastive
from mlray.objectives.embedding import TextEmbedder
from mlray.objectives.pairing import Texts
from tests.unit import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers"
)
FAMILIES = ("bert", "xlm-roberta", "modernbert")
TEXTS = [*tiny.texts("de", 9, seed=4), *tiny.texts("en", 9, seed=4), "Wasserkocher " * 60, "warm"]


def model(
    family: str = "xlm-roberta", pooling: Any = "mean", folder: Path | None = None, layers: int = 2
) -> embedder.Embedder:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": layers, "num_heads": 2, "intermediate_size": 24}
    config = Model.model_validate({"family": family, "max_positions": 62, "dropout": 0.1, **sizes})
    return embedder.build(config, Contrastive(pooling=pooling, temperature=0.04), tiny.tokens(), folder)


def exported(folder: Path, family: str = "xlm-roberta", pooling: Any = "mean", layers: int = 2) -> Path:
    network = model(family, pooling, layers=layers)
    embedder.export(network, tiny.tokens(), dict(network.named_parameters()), folder)
    return folder


def opened(folder: Path, family: str = "xlm-roberta") -> TextEmbedder:
    config = RunConfig.model_validate({"model": {"family": family}, "corpus": {"sequence_length": 60}})
    return TextEmbedder(config, folder)


@pytest.mark.parametrize(
    ("family", "pooling", "layers"),
    [
        *[(family, pooling, 2) for family in FAMILIES for pooling in ("mean", "cls", "last")],
        *[(family, "mean", 0) for family in FAMILIES[:2]],
    ],
)
def test_packed_texts_have_the_vectors_that_sentence_transformers_gives_them(
    tmp_path: Path, family: str, pooling: str, layers: int
) -> None:
    folder = exported(tmp_path, family, pooling, layers)
    found = opened(folder, family).embed(TEXTS)
    peer = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    peer.max_seq_length = 60
    expected = np.stack([peer.encode([text], show_progress_bar=False)[0] for text in TEXTS])
    assert np.abs(found - expected).max() < 2e-6
    assert np.allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)


def test_a_model_without_layers_takes_no_adapter() -> None:
    bag = Model(family="xlm-roberta", hidden_size=16, num_layers=0, num_heads=2, max_positions=62)
    network = embedder.build(bag, Contrastive(), tiny.tokens(), None)
    for kind in ("lora", "ia3"):
        with pytest.raises(
            ConfigError, match=f"adapter.kind={kind} wraps linear layers and the model has none"
        ):
            adapters.add(network, Adapter.model_validate({"kind": kind}))


@pytest.mark.parametrize(
    ("objective", "learns"), [("contrastive", False), ("contrastive", True), ("distillation", False)]
)
def test_an_adapter_makes_the_vectors_that_peft_makes(tmp_path: Path, objective: str, learns: bool) -> None:
    base = exported(tmp_path / "base")
    settings = Contrastive(temperature=0.04, learn_temperature=learns)
    network = embedder.build(Model(family="xlm-roberta", max_positions=62), settings, tiny.tokens(), base)
    digest = adapters.digest(network)
    wrapped = adapters.add(network, Adapter(kind="lora"))
    moving = {
        name: parameter.detach() for name, parameter in network.named_parameters() if parameter.requires_grad
    }
    assert ("log_scale_1" in moving) == learns
    for parameter in moving.values():
        parameter += 0.1 * torch.randn_like(parameter)
    adapters.export(wrapped, digest, objective, tiny.tokens(), moving, tmp_path / "adapter")
    config = RunConfig.model_validate({"model": {"family": "xlm-roberta"}, "corpus": {"sequence_length": 60}})
    found = TextEmbedder(config, base, tmp_path / "adapter").embed(TEXTS)
    fresh = embedder.build(Model(family="xlm-roberta", max_positions=62), settings, tiny.tokens(), base)
    adapters.load(fresh, tmp_path / "adapter", objective=objective)  # by its own name too, to be merged
    plain = transformers.AutoModel.from_pretrained(base, add_pooling_layer=False)
    peer = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        for text, vector in zip(TEXTS, found, strict=True):
            asked = tiny.tokens()(text, truncation=True, max_length=60, return_tensors="pt")
            mean = peer(input_ids=asked.input_ids).last_hidden_state[0].mean(0)
            assert torch.allclose(
                torch.nn.functional.normalize(mean, dim=0), torch.from_numpy(vector), atol=2e-6
            )
    assert np.abs(found - opened(base).embed(TEXTS)).max() > 1e-3


def test_a_pass_has_no_more_places_than_its_texts_need(tmp_path: Path) -> None:
    ours = opened(exported(tmp_path))
    shapes = list[tuple[int, int]]()
    ours._model.register_forward_pre_hook(
        lambda _, __, told: shapes.append(tuple(told["tokens_BT"].shape)), with_kwargs=True
    )
    cut = [ours.cut(["kettle"])[0][:1] * length for length in (5, 3, 9, 4)]
    together = ours.read(cut)
    alone = [ours.read([tokens])[0] for tokens in cut]
    assert shapes == [(1, 21), (1, 5), (1, 3), (1, 9), (1, 4)]  # of 60 tokens that a row could have
    assert np.abs(together - alone).max() < 1e-6


def test_the_loss_is_that_of_sentence_transformers(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    queries, targets = TEXTS[:9], TEXTS[9:18]
    peer = SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()
    features = [peer.tokenize(side) for side in (queries, targets)]
    with torch.no_grad():
        expected = float(MultipleNegativesRankingLoss(peer, scale=25.0)(features, None))
    vectors = opened(folder).embed([text for pair in zip(queries, targets, strict=True) for text in pair])
    told = np.arange(18)
    texts = Texts(told, told // 2, told % 2, *np.zeros((2, 18), np.int64))
    total, _, _ = contrastive.loss(
        torch.from_numpy(vectors) * 5.0, texts, np.arange(9), Contrastive(temperature=0.04, symmetric=False)
    )
    assert total / 9 == pytest.approx(expected, abs=1e-5)


def test_vectors_are_as_long_as_the_temperature_says() -> None:
    network = model().eval()
    inputs = {
        "tokens_BT": torch.tensor([[5, 6, 7, 8]]),
        "segments_BT": torch.tensor([[1, 1, 2, 2]]),
        "offsets_BT": torch.tensor([[0, 1, 0, 1]]),
        "texts_BT": torch.tensor([[0, 0, 1, 1]]),
        "first_N": torch.tensor([0, 2]),
        "last_N": torch.tensor([1, 3]),
    }
    with torch.no_grad():
        assert torch.allclose(network(**inputs).norm(dim=-1), torch.full((2,), 5.0), atol=1e-5)
        network.learns_scale = True
        network.log_scale_1.fill_(50.0)  # a temperature below 0.01 is not learnt
        assert torch.allclose(network(**inputs).norm(dim=-1), torch.full((2,), 10.0), atol=1e-4)


def test_a_temperature_is_what_it_says_and_only_a_learnt_one_has_a_bound() -> None:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 24, "max_positions": 62}
    config = Model.model_validate(sizes)
    network = embedder.build(config, Contrastive(temperature=0.002), tiny.tokens(), None).eval()
    batch = torch.ones(1, 4, dtype=torch.long)
    one = torch.zeros(1, dtype=torch.long)
    vector_1H = network(batch, batch, torch.arange(4)[None], batch * 0, one, one + 3)
    assert float(vector_1H.detach().square().sum()) == pytest.approx(1 / 0.002, rel=1e-4)
    with pytest.raises(ValueError, match=r"learnt starts at 0\.01"):
        Contrastive(temperature=0.002, learn_temperature=True)


@pytest.mark.parametrize("dimensions", [(16,), (4, 99)])
def test_a_prefix_is_shorter_than_the_vector(dimensions: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"contrastive\.dimensions=.* the vector has 16"):
        embedder.build(
            Model(hidden_size=16, num_heads=2), Contrastive(dimensions=dimensions), tiny.tokens(), None
        )
    with pytest.raises(ValueError, match="greater than 0"):
        Contrastive(dimensions=(0,))


def test_a_masked_encoder_becomes_an_embedder_without_its_head(tmp_path: Path) -> None:
    masked = tiny.encoder("xlm-roberta", seed=7)
    backbone.export(masked, tiny.tokens(), dict(masked.named_parameters()), tmp_path)
    network = model(folder=tmp_path)
    before = dict(masked.model.base_model.named_parameters())
    found = dict(network.model.named_parameters())
    assert found.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())
    assert adapters.digest(network) == adapters.digest(masked)
    assert embedder.pooling_of(tmp_path) is None


def test_what_is_no_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        opened(tmp_path)


@pytest.mark.parametrize(("told", "pooling"), [("mean", "mean"), ("cls", "cls"), ("lasttoken", "last")])
def test_pooling_is_read_as_the_peer_writes_it_today(tmp_path: Path, told: str, pooling: str) -> None:
    exported(tmp_path / "ours")
    read = Transformer(str(tmp_path / "ours"))
    SentenceTransformer(modules=[read, Pooling(read.get_embedding_dimension(), pooling_mode=told)]).save(
        str(tmp_path / "theirs")
    )
    assert embedder.pooling_of(tmp_path / "theirs") == pooling


def test_an_encoder_that_does_more_than_pool_is_refused(tmp_path: Path) -> None:
    exported(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    with pytest.raises(ConfigError, match="pools by max; take one of mean, cls, last"):
        embedder.pooling_of(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    modules = json.loads((tmp_path / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(
        json.dumps([*modules, {"type": "sentence_transformers.models.Dense"}])
    )
    with pytest.raises(ConfigError, match="has a module Dense"):
        embedder.pooling_of(tmp_path)
