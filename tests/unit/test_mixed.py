"""Texts of several adapters in one forward pass have the vectors that each adapter gives them alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlray.config import Adapter, ConfigError, Contrastive, Model, RunConfig
from mlray.models import adapters, embedder
from mlray.objectives.embedding import TextEmbedder
from tests.unit import tiny
from tests.unit.test_adapters import lose_a_tensor
from tests.unit.test_embedder import exported

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers"
)
TEXTS = [*tiny.texts("de", 16, seed=4), *tiny.texts("en", 16, seed=5)]
LANGUAGES = ("ar", "de", "es", "ja", "ru", "zh")


def adapter(base: Path, folder: Path, seed: int, kind: str = "lora", objective: str = "contrastive") -> Path:
    """An adapter that changes much."""
    network = embedder.build(
        Model(family="xlm-roberta", max_positions=62), Contrastive(), tiny.tokens(), base
    )
    settings = Adapter.model_validate({"kind": kind, "rank": 2 + seed % 3})
    return moved(network, settings, seed, objective, tiny.tokens(), folder)


def moved(
    network: Any,
    settings: Adapter,
    seed: int,
    objective: str,
    tokens: Any,
    folder: Path,
    language: Path | None = None,
) -> Path:
    """A saved adapter of a network, whose tensors are far from where they began."""
    digest, wrapped = adapters.digest(network), adapters.add(network, settings, language)
    torch.manual_seed(seed)
    moving = {name: one.detach() for name, one in network.named_parameters() if one.requires_grad}
    for one in moving.values():
        one += 0.3 * torch.randn_like(one)
    adapters.export(wrapped, digest, objective, tokens, moving, folder)
    return folder


def opened(base: Path, own: Path | None = None, language: Path | None = None) -> TextEmbedder:
    config = RunConfig.model_validate({"model": {"family": "xlm-roberta"}, "corpus": {"sequence_length": 60}})
    return TextEmbedder(config, base, own, language)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone and an adapter for each of six languages."""
    root = tmp_path_factory.mktemp("mixed")
    base = exported(root / "base")
    for seed, language in enumerate(LANGUAGES, start=1):
        adapter(base, root / language, seed)
    return root


@pytest.mark.parametrize("own", [None, "zh"])
def test_32_texts_of_six_languages_are_one_forward_pass(made: Path, own: str | None) -> None:
    mixed = opened(made / "base", made / own if own else None)
    for language in LANGUAGES[:5]:
        mixed.load(language, made / language)
    names = [None if i % 6 == 5 else LANGUAGES[i % 6] for i in range(len(TEXTS))]
    passes = []
    mixed._model.register_forward_hook(lambda *_: passes.append(1))
    cut = mixed.cut(TEXTS)
    found = mixed.read(cut, names)
    assert len(passes) == 1
    plain = opened(made / "base", made / own if own else None)
    alone = {language: opened(made / "base", made / language) for language in LANGUAGES[:5]}
    expected = np.stack(
        [(alone[name] if name else plain).read([one])[0] for name, one in zip(names, cut, strict=True)]
    )
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found - plain.read(cut)).max() > 0.05  # they do change something
    assert np.abs(mixed.read(cut) - plain.read(cut)).max() < 1e-5  # and nothing where none is asked for


def test_adapters_come_and_go(made: Path) -> None:
    mixed = opened(made / "base")
    cut = mixed.cut(TEXTS)
    before = mixed.read(cut)
    mixed.load("de", made / "de")
    german = mixed.read(cut, ["de"] * 32)
    mixed.load("ja", made / "ja")
    assert np.abs(mixed.read(cut, ["de"] * 32) - german).max() < 1e-6
    mixed.unload("de")
    with pytest.raises(ConfigError, match="the adapter de is not loaded"):
        mixed.read(cut, ["de"] * 32)
    with pytest.raises(ConfigError, match="the adapter de is not loaded"):
        mixed.unload("de")
    mixed.load("de", made / "de")
    assert np.abs(mixed.read(cut, ["de"] * 32) - german).max() < 1e-6
    for name in ("de", "ja"):
        mixed.unload(name)
    assert np.abs(mixed.read(cut) - before).max() < 1e-6
    mixed.load("ru", made / "ru")
    assert np.abs(mixed.read(cut, [None] * 32) - before).max() < 1e-6


def test_the_models_own_adapter_is_there_again_when_the_others_have_gone(made: Path) -> None:
    mixed = opened(made / "base", made / "zh")
    cut = mixed.cut(TEXTS)
    before = mixed.read(cut)
    mixed.load("de", made / "de")
    assert np.abs(mixed.read(cut) - before).max() < 1e-6
    mixed.unload("de")
    assert (mixed.read(cut) == before).all()


def test_what_does_not_fit_is_refused_and_what_was_loaded_stays(made: Path, tmp_path: Path) -> None:
    mixed = opened(made / "base")
    mixed.load("de", made / "de")
    before = mixed.read(mixed.cut(TEXTS), ["de"] * 32)
    other = exported(tmp_path / "other", layers=1)
    refusals = {
        "was trained on the backbone": adapter(other, tmp_path / "foreign", 1),
        "is no LoRA": adapter(made / "base", tmp_path / "dora", 2, kind="dora"),
        "was trained for masked, not for contrastive": adapter(
            made / "base", tmp_path / "mlm", 3, objective="masked"
        ),
        "no adapter at": tmp_path / "nowhere",
    }
    for sentence, folder in refusals.items():
        with pytest.raises(ConfigError, match=sentence):
            mixed.load("new", folder)
    for name in ("de", adapters.LANGUAGE):
        with pytest.raises(ConfigError, match=f"there is an adapter {name} already"):
            mixed.load(name, made / "ja")
    assert np.abs(mixed.read(mixed.cut(TEXTS), ["de"] * 32) - before).max() < 1e-6


@pytest.mark.parametrize("kind", ["dora", "above a language"])
def test_an_own_adapter_that_is_no_plain_lora_shares_no_pass(made: Path, tmp_path: Path, kind: str) -> None:
    """Beside others it would be read as one, and every vector would be another."""
    if kind == "dora":
        mixed = opened(made / "base", adapter(made / "base", tmp_path / "own", 1, kind="dora"))
    else:
        german = adapter(made / "base", tmp_path / "german", 2, objective="masked")
        network = embedder.build(
            Model(family="xlm-roberta", max_positions=62), Contrastive(), tiny.tokens(), made / "base"
        )
        own = moved(
            network, Adapter(kind="lora"), 3, "contrastive", tiny.tokens(), tmp_path / "own", language=german
        )
        mixed = opened(made / "base", own, german)
    before = mixed.read(mixed.cut(TEXTS[:4]))
    with pytest.raises(
        ConfigError, match="own adapter is no LoRA, or lies above that of a language, and shares no"
    ):
        mixed.load("de", made / "de")
    assert (mixed.read(mixed.cut(TEXTS[:4])) == before).all()


@pytest.mark.parametrize("own", [None, "zh"])
def test_what_cannot_be_read_leaves_nothing_behind(made: Path, tmp_path: Path, own: str | None) -> None:
    mixed = opened(made / "base", made / own if own else None)
    cut = mixed.cut(TEXTS[:4])
    before = mixed.read(cut)
    torn = tmp_path / "de"
    shutil.copytree(made / "de", torn)
    weights = torn / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"cannot be read: SafetensorError"):
            mixed.load("de", torn)
    shutil.copy(made / "de" / weights.name, weights)
    lose_a_tensor(torn)
    with pytest.raises(ConfigError, match=r"/de and the model differ in base_model"):
        mixed.load("de", torn)
    assert (mixed.read(cut) == before).all()
    weights.write_bytes(whole)
    mixed.load("de", torn)
    alone = opened(made / "base", made / "de").read(cut)
    assert np.abs(mixed.read(cut, ["de"] * 4) - alone).max() < 1e-5
