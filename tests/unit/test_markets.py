"""A bundle with adapters of single markets: they fit its weights, and its report says what is served where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mlray import configuration, storage
from mlray.config import ConfigError, RunConfig
from mlray.release import bundle, promotion
from mlray.release.bundle import Beside
from mlray.release.registry import open_registry
from tests.unit import test_registry
from tests.unit.test_embedder import exported
from tests.unit.test_mixed import adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers"
)
PLAIN = {"de-en": [2] * 8, "en-de": [2] * 8, "ja-de": [2] * 8}
BETTER = {"de-en": [1] * 8, "en-de": [1] * 8, "ja-de": [4] * 8}


def ended(
    root: Path, name: str, write: Callable[[Path], Path], hits: dict[str, list[int]], *overrides: str
) -> str:
    """The folder of a run that has ended and was judged."""
    config = configured(root, f"run.name={name}", *overrides)
    return test_registry.ended(root / "runs" / name, write, hits, config)


def configured(root: Path, *overrides: str) -> RunConfig:
    places = [f"release.registry_uri={root}/registry", f"run.storage_uri={root}/runs"]
    common = ["objective.name=contrastive", "model.family=xlm-roberta", "corpus.sequence_length=60"]
    return configuration.load(None, [*common, *places, *overrides])


def test_a_market_is_served_and_judged_by_its_adapter(tmp_path: Path) -> None:
    main = ended(tmp_path, "main", exported, PLAIN)
    base = f"{main}/checkpoints/step-00000002/weights"
    lora = ["adapter.kind=lora", f"model.path={base}"]
    german = ended(tmp_path, "de", lambda folder: adapter(Path(base), folder, 1), BETTER, *lora)
    config = configured(tmp_path)
    event = promotion.challenge(config, main, "", Beside(promotion._markets("--adapter", [f"de={german}"])))
    assert event.bundle.startswith("main-")
    registry = open_registry(config)
    registry.check("bundles", event.bundle)
    assert registry.about("bundles", event.bundle)["adapters"] == ["de"]
    report, predictions = bundle.report_of(registry, event.bundle)
    found = {name: row["R@1"].value for name, row in report.cells["retrieval"].items()}
    assert found == {
        "de-en": 0.0,
        "en-de": 100.0,
        "ja-de": 0.0,
    }  # what is found in German, from whatever language
    assert report.cells["retrieval"]["ja-de"]["MRR"].value == 25.0  # for the worse, too
    rows = [
        json.loads(line) for line in storage.read_bytes(predictions, registry.settings).decode().splitlines()
    ]
    firsts = {row["language"]: row["prediction"].split().index("99") for row in rows}
    assert firsts == {"de-en": 1, "en-de": 0, "ja-de": 3}
    assert len(rows) == 24
    read = bundle.open_reader(registry, event.bundle)
    texts = ["warm und leise", "warm und leise", "warm und leise"]
    found_N2H, plain_NH = (
        read(texts, ["de", "de-AT", "en"]),
        bundle.open_embedder(registry, event.bundle).embed(texts),
    )
    assert abs(found_N2H[:, 16:] - plain_NH).max() < 1e-6  # beside each what no adapter has read
    german_1, austrian_1, other_1 = found_N2H[:, :16]
    assert abs(other_1 - plain_NH[2]).max() < 1e-6
    assert abs(german_1 - austrian_1).max() < 1e-6
    assert abs(german_1 - other_1).max() > 0.01


def test_an_adapter_that_does_not_belong_is_refused(tmp_path: Path) -> None:
    main = ended(tmp_path, "main", exported, PLAIN)
    base = Path(main) / "checkpoints" / "step-00000002" / "weights"
    foreign = exported(tmp_path / "foreign", layers=1)
    lora = ["adapter.kind=lora", f"model.path={base}"]
    runs = {
        "was trained on the backbone": ("other", lambda folder: adapter(foreign, folder, 1), BETTER),
        "was not judged where the bundle was": (
            "ja",
            lambda folder: adapter(base, folder, 2),
            {"en-ja": [1] * 8},
        ),
    }
    config = configured(tmp_path)
    for sentence, (name, write, hits) in runs.items():
        run = ended(tmp_path, name, write, hits, *lora)
        with pytest.raises(ConfigError, match=sentence):
            promotion.challenge(config, main, "", Beside({"de": run}))
    assert open_registry(config).history().events == ()
    assert open_registry(config).names("bundles") == []


def test_an_adapter_is_judged_wherever_it_reads(tmp_path: Path) -> None:
    """In a related market that has none of its own, and whatever the language of the query."""
    hits = {"en-da": [2] * 8, "en-nb": [2] * 8, "nb-da": [2] * 8}
    main = ended(tmp_path, "main", exported, hits)
    base = Path(main) / "checkpoints" / "step-00000002" / "weights"
    lora = ["adapter.kind=lora", f"model.path={base}"]
    config = configured(tmp_path)
    for lacks in ("en-nb", "nb-da"):
        run = ended(
            tmp_path, f"without-{lacks}", lambda folder: adapter(base, folder, 1),
            {name: [1] * 8 for name in hits if name != lacks}, *lora,
        )  # fmt: skip
        with pytest.raises(ConfigError, match=rf"was not judged where the bundle was \(retrieval, {lacks}\)"):
            promotion.challenge(config, main, "", Beside({"da": run}))
    whole = ended(
        tmp_path, "whole", lambda folder: adapter(base, folder, 1), {name: [1] * 8 for name in hits}, *lora
    )
    event = promotion.challenge(config, main, "", Beside({"da": whole}))
    report, _ = bundle.report_of(open_registry(config), event.bundle)
    assert {name: row["R@1"].value for name, row in report.cells["retrieval"].items()} == dict.fromkeys(
        hits, 100.0
    )


def test_an_adapter_whose_backbone_has_changed_is_no_bundle(tmp_path: Path) -> None:
    base = exported(tmp_path / "base")
    lora = ["adapter.kind=lora", f"model.path={base}"]
    run = ended(tmp_path, "adapted", lambda folder: adapter(base, folder, 1), PLAIN, *lora)
    config = configured(tmp_path)
    assert promotion.challenge(config, run, "").bundle.startswith("adapted-")
    exported(base, pooling="cls", layers=1)
    with pytest.raises(ConfigError, match="was trained on the backbone"):
        promotion.challenge(config, run, "")


@pytest.mark.parametrize("told", [["de"], ["=x"], ["DE=x"], ["../x=y"], ["de=x", "de=y"], ["de="]])
def test_what_names_no_market_is_refused(told: list[str]) -> None:
    with pytest.raises(ConfigError, match="say MARKET=RUN"):
        promotion._markets("--adapter", told)
