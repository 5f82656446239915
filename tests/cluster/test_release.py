"""From a run on S3 to a champion that finds its products: bundle, index, promotion, and what it refuses."""

from __future__ import annotations

import pytest

from mlray import storage
from mlray.config import ConfigError, RunConfig, RunError, Source
from mlray.release import bundle, indexing, promotion
from mlray.release.index import ProductIndex
from mlray.release.registry import open_registry
from tests.cluster import corpus as sample

pytestmark = [pytest.mark.cluster, pytest.mark.long]


def test_a_champion_finds_products_by_their_titles(aligned: RunConfig, bucket: str) -> None:
    release = aligned.release.model_copy(update={"registry_uri": f"s3://{bucket}/registry"})
    config = aligned.model_copy(update={"release": release})
    registry = open_registry(config)
    source = Source.model_validate({**sample.PRODUCTS, "pair": None, "item": None})
    with pytest.raises(ConfigError, match="has neither challenger nor champion"):
        indexing.build(config, None, source)
    name = promotion.challenge(config, f"s3://{bucket}/runs/aligned", "the first").bundle
    with pytest.raises(ConfigError, match=f"{name} has 0 indexes; jobs/index.py --bundle {name} makes one"):
        promotion.promote(config, None, "auto", "")
    index = indexing.build(config, None, source)
    assert registry.about("indexes", index)["markets"] == dict.fromkeys(sample.LANGUAGES, 64)
    promotion.promote(config, None, "auto", "")
    champion = registry.history().champion
    assert champion is not None
    assert (champion.bundle, champion.index) == (name, index)
    with storage.local_copy(registry.place("indexes", index), aligned.storage) as folder:
        found = ProductIndex.load(folder)
    titles = {language: sample.sentences(language)[0] for language in sample.LANGUAGES}
    embedder = bundle.open_embedder(registry, name)
    for language, title in titles.items():
        assert found.search(language, embedder.embed([title]), 1)[0][0][0] == "p001"
    storage.write_bytes(f"{registry.place('indexes', index)}/products.parquet", b"altered", aligned.storage)
    with pytest.raises(RunError, match=r"is damaged: products\.parquet does not match its sha256"):
        registry.check("indexes", index)
