"""`jobs/promote.py` from its command line: a run with a recommender beside it and the adapter of a market."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import promote
from mlray import seal
from mlray.config import RunConfig
from mlray.objectives.recommending import NextItem
from mlray.release import companions
from mlray.release.registry import open_registry
from tests.unit import test_recommending, test_registry
from tests.unit.test_embedder import exported
from tests.unit.test_markets import configured

pytestmark = test_recommending.ONE_PASS


def ended(folder: Path, config: RunConfig, task: str, write: Callable[[Path], object], value: float) -> str:
    """The folder of a run that has ended and was judged in German."""
    weights = test_registry.trained(folder, write, config)
    judged = folder / "evaluation"
    test_recommending.judged(judged, task, value)
    report = json.loads((judged / "report.json").read_text())
    report["about"] = {"sha256": seal.digest(weights)}
    (judged / "report.json").write_text(json.dumps(report))
    return str(folder)


def run(monkeypatch: pytest.MonkeyPatch, *told: str) -> int:
    monkeypatch.setattr(sys, "argv", ["promote.py", "--to", "challenger", *told])
    return promote.main()


def test_the_sessions_of_a_market_are_read_by_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, runs = configured(tmp_path), tmp_path / "runs"
    main = ended(runs / "main", config, "retrieval", exported, 50.0)
    sessions = test_recommending.trained(tmp_path / "base")
    whole = ended(runs / "sessions", sessions, "recommendation", test_recommending.trained, 50.0)
    base = runs / "sessions" / "checkpoints" / "step-00000002" / "weights"
    lora = sessions.model_copy(
        update={
            "adapter": sessions.adapter.model_copy(update={"kind": "lora"}),
            "model": sessions.model.model_copy(update={"path": str(base)}),
        }
    )
    own = ended(
        runs / "german", lora, "recommendation",
        lambda folder: test_recommending.adapter(base, sessions, folder, 1), 70.0,
    )  # fmt: skip
    place = f"release.registry_uri={config.release.registry_uri}"
    assert run(monkeypatch, "--run", main, "--recommender-adapter", f"de={own}", place) == 2
    assert "--recommender-adapter needs --recommender, the model below it" in capsys.readouterr().err
    beside = ("--recommender", whole, "--recommender-adapter", f"de={own}")
    assert run(monkeypatch, "--run", main, *beside, place) == 0
    registry = open_registry(config)
    made = registry.history().challenger
    assert made is not None
    opened = companions.open_companion(registry, made.bundle, "recommender")
    assert isinstance(opened, NextItem)
    adapter = runs / "german" / "checkpoints" / "step-00000002" / "weights"
    expected = NextItem(sessions, base, adapter).scores(["a1"], ["de"])
    assert opened.scores(["a1"], ["de"]) == pytest.approx(expected, abs=1e-5)
    report = json.loads((Path(registry.place("bundles", made.bundle)) / "report.json").read_text())
    assert report["cells"]["recommendation"]["de"]["MRR"]["value"] == 70.0
    assert report["cells"]["retrieval"]["de"]["MRR"]["value"] == 50.0
