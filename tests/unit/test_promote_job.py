"""`jobs/promote.py` and `jobs/index.py` from their command lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import index, promote
from mlray import seal
from mlray.config import RunConfig, Storage
from mlray.corpus import records, sources
from mlray.objectives.recommending import NextItem
from mlray.release import companions, indexing
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


def test_the_way_of_a_bundle_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # as in a job's log
    config = test_registry.configured(tmp_path)
    place = f"release.registry_uri={config.release.registry_uri}"

    def asked(*told: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["promote.py", *told, place])
        code = promote.main()
        return code, *capsys.readouterr()

    def champion() -> str:
        event = open_registry(config).history().champion
        return event.bundle.rpartition("-")[0] if event else ""

    def challenge(name: str, hits: dict[str, list[int]]) -> None:
        run = test_registry.finished(tmp_path, name, hits)
        assert asked("--to", "challenger", "--run", run, "--why", name)[0] == 0

    challenge("weak", test_registry.WEAK)
    code, told, _ = asked("--to", "champion", "--why", "the first")
    assert (code, champion()) == (0, "weak")
    assert "no other champion" in told
    challenge("unfair", test_registry.UNFAIR)
    code, told, fault = asked("--to", "champion", "--why", "on the mean")
    assert (code, champion()) == (1, "weak")
    assert "the gate refused: retrieval, ja-en: MRR falls by 12.50 from 50.00 to 37.50" in fault
    assert "Traceback" not in fault
    assert "refused" in told
    challenge("strong", test_registry.STRONG)
    code, told, _ = asked("--to", "champion", "--dry-run")
    assert (code, champion()) == (0, "weak")
    assert "passed: no language pays for the mean" in told
    assert asked("--to", "champion", "--why", "better")[0] == 0
    assert champion() == "strong"
    code, told, _ = asked("--rollback", "--why", "complaints")
    assert (code, champion()) == (0, "weak")
    bundles = {event.bundle for event in open_registry(config).history().events}
    assert all(name in told for name in bundles)  # whole, so that one can be named for `--bundle`
    code, _, fault = asked("--rollback", "--bundle", "nobody", "--why", "x")
    assert code == 2
    assert "nobody is no earlier champion" in fault
    with pytest.raises(SystemExit) as refused:
        asked("--rollback", "--to", "champion")
    assert refused.value.code == 2


def test_an_index_of_ids_is_made_of_the_files_of_markets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "de.tsv").write_text("userId\titemId\trate\nu1\tB01\t5\nu2\tB02\t4\n")
    (tmp_path / "notes.md").write_text("no market")
    built = []
    monkeypatch.setattr(indexing, "build", lambda *told: built.append(told))
    ids = ["--text", "itemId", "--id", "itemId", "--market-of-file", "--files", "*.tsv", "--format", "tsv"]
    monkeypatch.setattr(sys, "argv", ["index.py", "--input", str(tmp_path), *ids])
    assert index.main() == 0
    ((_, name, source, kind),) = built
    assert (name, kind) == (None, "index")
    (file,) = sources.list_files((source,), Storage())
    (chunk,) = records.chunks(file, 1 << 20, Storage())
    found = [row for group in records.read(chunk, 100, Storage()) for row in group]
    assert [(row.key, row.text, row.language) for row in found] == [
        ("B01", "B01", "de"),
        ("B02", "B02", "de"),
    ]
