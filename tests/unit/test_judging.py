"""A bundle is judged as its run was: weights and adapter from the registry, on its own test sets or on others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from jobs import evaluate as job
from mlray.evaluation import evaluate
from mlray.release import promotion
from mlray.release.registry import open_registry
from tests.unit import test_registry
from tests.unit.test_embedder import exported
from tests.unit.test_markets import PLAIN, configured, ended
from tests.unit.test_mixed import adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers"
)
PAIRS = [("der warme Tee", "the warm tea"), ("leise Uhr", "silent clock"), ("rotes Buch", "red book")]


def pairs(path: Path, rows: list[tuple[str, str]]) -> str:
    """A test set, as it stands in a configuration."""
    path.write_text("".join(f"{left}\t{right}\n" for left, right in rows))
    return f"evaluation.sources=[{{uri: {path}, format: text, pair: translation, language: de-en}}]"


def judge(monkeypatch: pytest.MonkeyPatch, *told: str) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *told])
    return job.main()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_bundle_is_judged_as_its_model_is(
    adapted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = pairs(tmp_path / "own.tsv", PAIRS)
    base = exported(tmp_path / "base")
    told = [own, "evaluation.resamples=10"]
    if adapted:
        told += ["adapter.kind=lora", f"model.path={base}"]
        run = ended(tmp_path, "main", lambda folder: adapter(base, folder, 1), PLAIN, *told)
    else:
        run = ended(tmp_path, "main", exported, PLAIN, *told)
    event = promotion.challenge(configured(tmp_path), run, "")
    weights = f"{run}/checkpoints/step-00000002/weights"
    by_hand = [f"adapter.path={weights}"] if adapted else [f"model.path={weights}"]
    registry = f"release.registry_uri={tmp_path}/registry"
    capsys.readouterr()  # what DeepSpeed says once
    for name, sets in ((event.bundle, []), ("challenger", [pairs(tmp_path / "other.tsv", PAIRS[::-1])])):
        assert judge(monkeypatch, "--bundle", name, registry, *sets, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        expected, _ = evaluate.evaluate(configured(tmp_path, *told, *by_hand, *sets), show_progress=False)
        assert found["about"]["sha256"] == expected.about["sha256"]
        assert found["about"]["evaluation"]["resamples"] == 10
        assert found["cells"] == json.loads(expected.to_json())["cells"]
        assert found["cells"]["retrieval"]["de-en"]["MRR"]["n"] == 3
        assert found["empty"]["retrieval"]["sw-en"].startswith("no test rows: the corpus has it")


def test_what_is_no_bundle_or_not_whole_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = test_registry.configured(tmp_path)
    registry = f"release.registry_uri={config.release.registry_uri}"
    assert judge(monkeypatch, "--bundle", "champion", registry) == 2
    assert "bundles/champion/BUNDLE.json is not there" in capsys.readouterr().err
    event = promotion.challenge(config, test_registry.finished(tmp_path, "weak", PLAIN), "")
    place = Path(open_registry(config).place("bundles", event.bundle))
    (place / "weights" / "model.safetensors").write_bytes(b"other")
    assert judge(monkeypatch, "--bundle", event.bundle, registry) == 1
    said = capsys.readouterr().err
    assert "is damaged: " in said
    assert said.count("\n") == 1
