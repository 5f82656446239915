"""Promotions: one wins, a killed one leaves a whole champion, and a rollback restores model and index."""

from __future__ import annotations

import json
import logging
import random
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
import transformers
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from rich.console import Console
from werkzeug.serving import make_server

from mlray import configuration, seal, storage
from mlray.config import Adapter, ConfigError, Model, RunConfig, RunError, Storage
from mlray.evaluation.predictions import Row, report_of
from mlray.models import adapters, backbone, decoder, translator
from mlray.release import bundle, promotion
from mlray.release.registry import ConflictError, History, Registry, open_registry
from tests.unit import test_causal, test_labels, test_translation, tiny

LOCAL = Storage()


def configured(tmp_path: Path, *overrides: str) -> RunConfig:
    places = [f"release.registry_uri={tmp_path}/registry", f"run.storage_uri={tmp_path}/runs"]
    return configuration.load(None, ["objective.name=contrastive", *places, *overrides])


def finished(tmp_path: Path, name: str, hits: dict[str, list[int]]) -> str:
    """The folder of a run as a training and its evaluation leave it; `hits`: ranks of the right answer, 0 for none."""

    def write(weights: Path) -> Path:
        weights.mkdir(parents=True)
        (weights / "config.json").write_text(json.dumps({"model_type": "bert"}))
        (weights / "model.safetensors").write_bytes(name.encode())
        return weights

    return ended(tmp_path / "runs" / name, write, hits, configured(tmp_path, f"run.name={name}"))


def ended(root: Path, write: Callable[[Path], Path], hits: dict[str, list[int]], config: RunConfig) -> str:
    """As `finished`, with weights that `write` puts into the folder that it is given."""
    judge(root, str(trained(root, write, config)), hits)
    return str(root)


def trained(root: Path, write: Callable[[Path], object], config: RunConfig) -> Path:
    """The weights of a run that has ended, and was not judged."""
    weights = root / "checkpoints" / "step-00000002" / "weights"
    write(weights)
    (root / "config.yaml").write_text(config.to_yaml())
    commit = {"step": 2, "files": seal.describe(weights.parent)}
    (weights.parent / "COMMIT.json").write_text(json.dumps(commit))
    (root / "report.json").write_text(
        json.dumps({"weights": str(weights), "documents": {"de-en": 2.0, "sw-en": 1.0}})
    )
    return weights


def judge(root: Path, weights: str, hits: dict[str, list[int]]) -> None:
    rows = []
    for language, ranks in hits.items():
        for rank in ranks:
            others = [str(n) for n in range(9)]
            ranked = [*others[: rank - 1], "99", *others[rank - 1 :]] if rank else others
            rows.append(Row("retrieval", language, " ".join(ranked), "99"))
    report = report_of(
        rows,
        {"sha256": seal.digest(Path(weights))},
        configuration.load(None, ["evaluation.resamples=10"]).evaluation,
    )
    (root / "evaluation").mkdir(exist_ok=True)
    (root / "evaluation" / "report.json").write_text(report.to_json())
    lines = [
        {"task": row.task, "language": row.language, "prediction": row.prediction, "reference": row.truth}
        for row in rows
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "evaluation" / "predictions.jsonl").write_text(text)


WEAK = {"de-en": [2] * 40, "ja-en": [2] * 40}
STRONG = {"de-en": [1] * 40, "ja-en": [1] * 40}
UNFAIR = {"de-en": [1] * 40, "ja-en": [2] * 30 + [0] * 10}


def test_a_run_becomes_challenger_and_then_champion(tmp_path: Path) -> None:
    config = configured(tmp_path)
    event = promotion.challenge(config, finished(tmp_path, "weak", WEAK), "the first")
    registry = open_registry(config)
    assert registry.history().challenger == event
    assert registry.history().champion is None
    verdict, promoted = promotion.promote(config, None, None, "nothing to lose")
    assert verdict is None
    assert promoted is not None
    history = registry.history()
    assert history.champion == promoted
    assert history.champion.bundle == event.bundle
    assert history.challenger is None
    assert (history.champion.number, history.champion.why) == (2, "nothing to lose")
    about = registry.about("bundles", event.bundle)
    assert about["languages"] == {"retrieval": ["de-en", "ja-en"]}
    assert about["means"]["retrieval"]["MRR"] == pytest.approx(50.0)


def test_the_same_run_is_the_same_bundle(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run = finished(tmp_path, "weak", WEAK)
    assert promotion.challenge(config, run, "").bundle == promotion.challenge(config, run, "").bundle


def test_the_gate_decides_and_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    config = configured(tmp_path)
    for name, hits in (("weak", WEAK), ("unfair", UNFAIR), ("strong", STRONG)):
        promotion.challenge(config, finished(tmp_path, name, hits), name)
    weak, unfair, strong = (event.bundle for event in open_registry(config).history().events)
    promotion.promote(config, weak, None, "")
    verdict, event = promotion.promote(config, unfair, None, "")
    assert event is None
    assert verdict is not None
    assert verdict.macro["retrieval"] == pytest.approx((50.0, (100 + 100 * 30 * 0.5 / 40) / 2))
    assert [line.language for line in verdict.lines if line.refused] == ["ja-en"]
    verdict, event = promotion.promote(config, strong, None, "", dry_run=True)
    assert verdict is not None
    assert verdict.passed
    assert all(line.p is not None and line.p < 0.001 for line in verdict.lines)
    assert event is None
    assert len(open_registry(config).history().events) == 4
    _, event = promotion.promote(config, strong, None, "")
    assert event is not None
    assert event.verdict is not None
    assert event.verdict["passed"] is True


def test_a_champion_is_judged_again_where_the_test_sets_are_others_now(tmp_path: Path) -> None:
    config = configured(tmp_path)
    weak = promotion.challenge(config, finished(tmp_path, "weak", WEAK), "").bundle
    promotion.promote(config, weak, None, "")
    newer = {"de-en": [1] * 50, "ja-en": [1] * 40, "ko-en": [2] * 40}  # ten more rows, and a language more
    strong = promotion.challenge(config, finished(tmp_path, "strong", newer), "").bundle
    again = tmp_path / "again"
    again.mkdir()
    told = f"jobs/evaluate.py --bundle {weak} --output FOLDER"
    with pytest.raises(ConfigError, match=f"de-en: .* has 40 rows and .* 50; .*{told}.*--judged FOLDER"):
        promotion.promote(config, None, None, "")
    with pytest.raises(ConfigError, match=r"again/report\.json is not there"):
        promotion.promote(config, None, None, "", judged=str(again))
    weights = str(tmp_path / "runs" / "{}" / "checkpoints" / "step-00000002" / "weights")
    judge(again.parent, weights.format("strong"), {"de-en": [2] * 50, "ko-en": [1] * 40})
    with pytest.raises(ConfigError, match=f"an evaluation of other weights than those of {weak}"):
        promotion.promote(config, None, None, "", judged=str(tmp_path / "evaluation"))
    judge(again.parent, weights.format("weak"), {"de-en": [2] * 50, "ko-en": [1] * 40})
    verdict, event = promotion.promote(config, None, None, "", judged=str(tmp_path / "evaluation"))
    assert verdict is not None
    assert event is None
    figures = {line.language: (line.champion, line.challenger) for line in verdict.lines}
    assert figures == {"de-en": (50.0, 100.0), "ja-en": (50.0, 100.0), "ko-en": (100.0, 50.0)}
    assert [line.language for line in verdict.lines if line.refused] == ["ko-en"]
    judge(again.parent, weights.format("weak"), {"de-en": [2] * 50})
    _, event = promotion.promote(config, None, None, "", judged=str(tmp_path / "evaluation"))
    assert event is not None
    assert event.bundle == strong


def indexed(registry: Registry, name: str, folder: Path) -> str:
    folder.mkdir()
    (folder / "vectors.bin").write_bytes(name.encode())
    return registry.put("indexes", folder, "products", {"bundle": name})


def test_a_rollback_restores_model_and_index(tmp_path: Path) -> None:
    config = configured(tmp_path)
    registry = open_registry(config)
    served = []
    for name, hits in (("weak", WEAK), ("strong", STRONG)):
        bundle_name = promotion.challenge(config, finished(tmp_path, name, hits), "").bundle
        index = indexed(registry, bundle_name, tmp_path / name)
        promotion.promote(config, None, index, "")
        served.append((bundle_name, index))
    with pytest.raises(ConfigError, match="is champion already"):
        promotion.promote(config, *served[1], "")
    event = promotion.rollback(config, "customers complain")
    assert (event.bundle, event.index) == served[0]
    champion = registry.history().champion
    assert champion is not None
    assert (champion.bundle, champion.index) == served[0]
    with pytest.raises(ConfigError, match="nothing to go back to"):
        promotion.rollback(config, "")
    promotion.promote(config, *served[1], "it was the network")
    assert promotion.rollback(config, "").bundle == served[0][0]


def champions(tmp_path: Path, *named: tuple[str, dict[str, list[int]]]) -> tuple[RunConfig, list[str]]:
    """Bundles that became champion one after the other."""
    config, names = configured(tmp_path), []
    for name, hits in named:
        names.append(promotion.challenge(config, finished(tmp_path, name, hits), "").bundle)
        _, event = promotion.promote(config, None, None, "")
        assert event is not None
    return config, names


def test_what_one_promotion_may_cost_three_may_not(tmp_path: Path) -> None:
    """2.5 points of Japanese each time, with a tolerance of 3."""
    hits = [
        {"de-en": [1] * n + [2] * (40 - n), "ja-en": [1] * (30 - n) + [2] * (10 + n)} for n in (10, 12, 14)
    ]
    config, _ = champions(tmp_path, ("a", hits[0]))
    config = configuration.change(config, {"release.tolerance": 3.0})
    promotion.challenge(config, finished(tmp_path, "b", hits[1]), "")
    verdict, event = promotion.promote(config, None, None, "")
    assert verdict is not None
    assert event is not None
    assert [line.best for line in verdict.lines] == pytest.approx([62.5, 75.0])
    promotion.challenge(config, finished(tmp_path, "c", hits[2]), "")
    verdict, event = promotion.promote(config, None, None, "")
    assert verdict is not None
    assert verdict.refusals == (
        "retrieval, ja-en: MRR falls by 5.00 from 75.00, an earlier champion's, to 70.00 (no paired test), and its "
        "tolerance is 3",
    )
    assert event is None
    # New test sets of German change nothing in what Japanese has lost.
    weights = str(tmp_path / "runs" / "b" / "checkpoints" / "step-00000002" / "weights")
    judge(tmp_path, weights, {"de-en": hits[1]["de-en"]})
    again, event = promotion.promote(config, None, None, "", judged=str(tmp_path / "evaluation"))
    assert again is not None
    assert again.refusals == verdict.refusals
    assert event is None


def test_a_champion_whose_figures_were_altered_lets_nothing_pass(tmp_path: Path) -> None:
    config, (weak,) = champions(tmp_path, ("weak", WEAK))
    promotion.challenge(config, finished(tmp_path, "strong", STRONG), "")
    place = Path(open_registry(config).place("bundles", weak)) / "report.json"
    place.write_text(place.read_text().replace("50.0", "10.0"))
    with pytest.raises(RunError, match=rf"{weak} is damaged: report\.json"):
        promotion.promote(config, None, None, "")


def test_a_rollback_goes_to_whoever_is_named_or_whole(tmp_path: Path) -> None:
    middle = {"de-en": [1] * 20 + [2] * 20, "ja-en": [1] * 20 + [2] * 20}
    config, (weak, better, strong) = champions(tmp_path, ("a", WEAK), ("b", middle), ("c", STRONG))
    registry = open_registry(config)
    with pytest.raises(ConfigError, match=f"{strong} is no earlier champion"):
        promotion.rollback(config, "", strong)
    assert promotion.rollback(config, "", weak).bundle == weak
    assert [one.bundle for one in registry.history().reigns] == [weak]
    for name in (better, strong):
        promotion.promote(config, name, None, "")
    (Path(registry.place("bundles", better)) / "weights" / "config.json").unlink()
    with pytest.raises(RunError, match=f"{better} is damaged: weights/config.json"):
        promotion.rollback(config, "", better)
    console = Console(record=True, width=300)
    assert promotion.rollback(config, "", console=console).bundle == weak
    assert f"passed over: {registry.place('bundles', better)} is damaged" in console.export_text()


def test_a_damaged_index_of_another_bundle_is_no_hindrance(tmp_path: Path) -> None:
    config, (weak,) = champions(tmp_path, ("weak", WEAK))
    registry = open_registry(config)
    index = indexed(registry, weak, tmp_path / "index")
    other = indexed(registry, "other", tmp_path / "other-index")
    (Path(registry.place("indexes", other)) / "INDEX.json").write_text("{")
    assert promotion.only_index(registry, weak, "index") == index


def test_what_another_is_writing_is_left_alone(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run = finished(tmp_path, "weak", WEAK)
    registry = open_registry(config)
    name = promotion.challenge(config, run, "").bundle
    place = Path(registry.place("bundles", name))
    half = place / "weights" / ".model.safetensors.0123.part"
    half.write_bytes(b"half")
    registry.check("bundles", name)
    (place / "weights" / "config.json").write_text("altered")
    assert promotion.challenge(config, run, "").bundle == name  # makes it again
    registry.check("bundles", name)
    assert half.read_bytes() == b"half"


def test_an_index_of_another_encoder_is_refused(tmp_path: Path) -> None:
    config = configured(tmp_path)
    registry = open_registry(config)
    weak = promotion.challenge(config, finished(tmp_path, "weak", WEAK), "").bundle
    strong = promotion.challenge(config, finished(tmp_path, "strong", STRONG), "").bundle
    index = indexed(registry, weak, tmp_path / "index")
    with pytest.raises(
        ConfigError, match=f"the index {index} was built by the encoder of {weak}, and {strong}"
    ):
        promotion.promote(config, strong, index, "")
    assert registry.history().champion is None


@pytest.mark.parametrize("fault", ["missing", "altered", "added"])
def test_a_bundle_that_is_not_whole_is_not_promoted(tmp_path: Path, fault: str) -> None:
    config = configured(tmp_path)
    name = promotion.challenge(config, finished(tmp_path, "weak", WEAK), "").bundle
    place = Path(open_registry(config).place("bundles", name))
    weights = place / "weights" / "model.safetensors"
    if fault == "missing":
        weights.unlink()
    elif fault == "altered":
        weights.write_bytes(b"wea!")
    else:
        (place / "weights" / "more.py").write_text("import os")
    with pytest.raises(RunError, match="is damaged: weights/"):
        promotion.promote(config, None, None, "")
    assert open_registry(config).history().champion is None


def test_what_was_never_evaluated_is_no_bundle(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run = finished(tmp_path, "weak", WEAK)
    finished(tmp_path, "other", STRONG)
    judge(Path(run), f"{tmp_path}/runs/other/checkpoints/step-00000002/weights", WEAK)
    with pytest.raises(ConfigError, match="is of other weights than those of step-00000002"):
        promotion.challenge(config, run, "")
    (Path(run) / "evaluation" / "report.json").unlink()
    with pytest.raises(ConfigError, match="was never evaluated"):
        promotion.challenge(config, run, "")
    assert open_registry(config).names("bundles") == []


@pytest.mark.parametrize("name", ["../runs/weak", "..", "", ".hidden", "a/b"])
def test_a_name_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a bundle"):
        promotion.promote(configured(tmp_path), name, None, "")


def test_of_two_promoters_one_wins_each_time(tmp_path: Path) -> None:
    config = configured(tmp_path)
    names = [
        promotion.challenge(config, finished(tmp_path, name, STRONG), "").bundle for name in ("one", "other")
    ]
    registry = open_registry(config)
    for _ in range(100):
        before = registry.history()

        def act(name: str) -> tuple[str, str]:
            try:
                registry.append(before, action="promote", bundle=name, index=None, why="")  # noqa: B023
            except ConflictError as error:
                return name, str(error)
            return name, ""

        with ThreadPoolExecutor(2) as pool:
            told = dict(pool.map(act, random.sample(names, 2)))
        won = [name for name, fault in told.items() if not fault]
        assert len(won) == 1
        assert "was first: promote of" in "".join(told.values())
        champion = registry.history().champion
        assert champion is not None
        assert champion.bundle == won[0]


def test_of_two_promotions_that_begin_together_one_passes_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gate, checks and indexes: both have read the same history before either writes."""
    config, _ = champions(tmp_path, ("first", WEAK))
    registry, served = open_registry(config), {}
    for name in ("one", "other"):
        made = promotion.challenge(config, finished(tmp_path, name, STRONG), "").bundle
        served[made] = indexed(registry, made, tmp_path / f"index-{name}")
    together, seen, read = threading.Barrier(2, timeout=30), threading.local(), Registry.history

    def history(self: Registry, *known: History) -> History:
        found = read(self, *known)
        if not hasattr(seen, "it"):
            seen.it = together.wait()
        return found

    def act(name: str) -> str:
        try:
            promotion.promote(config, name, served[name], "")
        except ConflictError as error:
            return str(error)
        return ""

    with monkeypatch.context() as patched, ThreadPoolExecutor(2) as pool:
        patched.setattr(Registry, "history", history)
        told = dict(zip(served, pool.map(act, served), strict=True))
    (won,) = (name for name, fault in told.items() if not fault)
    assert f"was first: promote of {won}" in "".join(told.values())
    champion = registry.history().champion
    assert champion is not None
    assert (champion.bundle, champion.index) == (won, served[won])


class Serial:
    """moto, a request at a time: its conditional write looks and then writes, where S3's is one step."""

    def __init__(self) -> None:
        self._app, self._lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def __call__(self, environ: Any, start_response: Any) -> list[bytes]:
        with self._lock:
            return list(self._app(environ, start_response))


def test_a_second_maker_of_the_same_bundle_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw the bundle unfinished, and is killed after the first one has made it champion."""
    config = configured(tmp_path)
    run = finished(tmp_path, "weak", WEAK)
    event = promotion.challenge(config, run, "")
    promotion.promote(config, None, None, "")
    registry = open_registry(config)
    monkeypatch.setattr(Registry, "fault", lambda *_: "unfinished, when it was looked at")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "upload", killed)
    folder = Path(registry.place("bundles", event.bundle))
    with pytest.raises(KeyboardInterrupt):
        registry.put("bundles", folder, "weak", registry.about("bundles", event.bundle))
    monkeypatch.undo()
    registry.check("bundles", event.bundle)


def test_on_s3_one_of_two_promoters_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = make_server("127.0.0.1", 0, Serial(), threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = Storage(endpoint_url=f"http://127.0.0.1:{server.server_port}")
    boto3.client("s3", endpoint_url=settings.endpoint_url, region_name="us-east-1").create_bucket(
        Bucket="promotions"
    )
    registry = Registry("s3://promotions/registry", settings)
    for number in range(1, 11):
        before = registry.history()
        assert len(before.events) == number - 1

        def act(name: str) -> bool:
            try:
                registry.append(before, action="promote", bundle=name, index=None, why="")  # noqa: B023
            except ConflictError:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            assert sum(pool.map(act, ("one", "other"))) == 1
    server.shutdown()


def test_a_hole_in_the_history_is_no_end(tmp_path: Path) -> None:
    config = configured(tmp_path)
    registry = open_registry(config)
    for name in ("one", "other"):
        promotion.challenge(config, finished(tmp_path, name, STRONG), "")
    promotion.promote(config, None, None, "")
    known = registry.history()
    (tmp_path / "registry/history/00000002.json").unlink()
    for before in (History(), known):
        with pytest.raises(RunError, match=r"00000002\.json is missing, and later events are there"):
            registry.history(before)


def test_what_is_known_of_the_history_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path)
    registry = open_registry(config)
    promotion.challenge(config, finished(tmp_path, "one", STRONG), "")
    known = registry.history()
    promotion.promote(config, None, None, "")
    read, places = storage.read_bytes, list[str]()
    monkeypatch.setattr(
        storage, "read_bytes", lambda uri, settings: places.append(uri) or read(uri, settings)
    )
    found = registry.history(known)
    assert [place[-13:] for place in places] == ["00000002.json"]
    assert found == registry.history()


def test_an_altered_bundle_with_an_altered_seal_does_not_fit_its_name(tmp_path: Path) -> None:
    config = configured(tmp_path)
    registry = open_registry(config)
    name = promotion.challenge(config, finished(tmp_path, "weak", WEAK), "").bundle
    place = Path(registry.place("bundles", name))
    (place / "weights" / "model.safetensors").write_bytes(b"mine")
    mark = json.loads((place / "BUNDLE.json").read_text())
    (place / "BUNDLE.json").unlink()
    (place / "BUNDLE.json").write_text(json.dumps({**mark, "files": seal.describe(place)}))
    assert registry.fault("bundles", name) == "BUNDLE.json does not match its name"
    (place / "BUNDLE.json").write_text("{")
    with pytest.raises(RunError, match="is damaged"):
        registry.about("bundles", name)


def test_a_new_index_of_the_champion_needs_no_gate_and_none_is_dropped_in_silence(tmp_path: Path) -> None:
    config = configured(tmp_path, "release.min_gain=1")
    registry = open_registry(config)
    name = promotion.challenge(config, finished(tmp_path, "weak", WEAK), "").bundle
    first = indexed(registry, name, tmp_path / "first")
    promotion.promote(config, None, "auto", "")
    with pytest.raises(ConfigError, match=f"{name} is served with an index"):
        promotion.promote(config, name, None, "")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "vectors.bin").write_bytes(b"more products")
    second = registry.put("indexes", tmp_path / "second", "products", {"bundle": name, "position": 7})
    (tmp_path / "registry/indexes/half-written").mkdir()
    assert promotion.only_index(registry, name, "index", newest=True) == second
    (tmp_path / "second" / "vectors.bin").write_bytes(b"as many changes")
    registry.put("indexes", tmp_path / "second", "products", {"bundle": name, "position": 7})
    with pytest.raises(ConfigError, match="take one away, as none is newer"):
        promotion.only_index(registry, name, "index", newest=True)
    with pytest.raises(ConfigError, match=f"{name} has 3 indexes; there are"):
        promotion.promote(config, name, "auto", "")
    verdict, event = promotion.promote(config, name, second, "")
    assert verdict is None
    assert event is not None
    assert (event.bundle, event.index) == (name, second)
    assert promotion.rollback(config, "").index == first


def test_a_bundle_killed_between_any_two_writes_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write in its turn is the last; the champion stays, and the next attempt is whole."""
    config = configured(tmp_path)
    registry = open_registry(config)
    first = promotion.challenge(config, finished(tmp_path, "weak", WEAK), "").bundle
    promotion.promote(config, first, None, "")
    run = finished(tmp_path, "strong", STRONG)
    number = 0
    while True:
        number += 1
        with monkeypatch.context() as patch:
            left = _die_at(patch, number)
            try:
                name = promotion.challenge(config, run, "").bundle
                promotion.promote(config, name, None, "")
            except KeyboardInterrupt:
                pass
        champion = registry.history().champion
        assert champion is not None
        assert registry.fault("bundles", champion.bundle) is None
        if left[0] > 0:
            assert champion.bundle.startswith("strong-")
            break
        assert champion.bundle == first
    assert number > 6  # files of the bundle, its seal, two events


def _die_at(patch: pytest.MonkeyPatch, number: int) -> list[int]:
    """From now on the write of this number, and all after it, are not made."""
    left = [number]

    def counted(write: Any) -> Any:
        def act(*arguments: Any) -> Any:
            if write is not real["upload"] or not Path(arguments[0]).is_dir():
                if str(arguments[1 if write is real["upload"] else 0]).startswith(
                    f"{tempfile.gettempdir()}/mlray-"
                ):
                    return write(*arguments)  # in the staging folder, which dies with the process
                left[0] -= 1
                if left[0] <= 0:
                    raise KeyboardInterrupt
            return write(*arguments)

        return act

    real = {name: getattr(storage, name) for name in ("upload", "write_bytes", "create_bytes")}
    for name, write in real.items():
        patch.setattr(storage, name, counted(write))
    return left


def test_report_of_a_bundle_is_that_of_the_run(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run = finished(tmp_path, "weak", WEAK)
    name = promotion.challenge(config, run, "").bundle
    report, _ = bundle.report_of(open_registry(config), name)
    assert report.to_json() == (Path(run) / "evaluation" / "report.json").read_text()


def _tagger(folder: Path) -> tuple[Any, Any]:
    network = (
        test_labels.model("words", test_labels.TAGS, folder=folder) if folder.is_dir() else tiny.encoder()
    )
    return network, tiny.tokens()


def _llama(folder: Path) -> tuple[Any, Any]:
    """A decoder whose tokenizer has neither a padding nor a mask token, as Llama's own."""
    tokens = transformers.PreTrainedTokenizerFast(
        tokenizer_object=test_causal.code_tokens().backend_tokenizer, eos_token="</s>"
    )
    config = Model(family="llama", hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32)
    return decoder.build(config, tokens, folder if folder.is_dir() else None), tokens


def _translator(folder: Path) -> tuple[Any, Any]:
    config = Model(family="m2m_100", hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32)
    tokens = test_translation.tokens()
    return translator.build(config, tokens, folder if folder.is_dir() else None), tokens


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers")
@pytest.mark.parametrize(
    ("objective", "family", "opened"),
    [("tagging", "bert", _tagger), ("causal", "llama", _llama), ("translation", "m2m_100", _translator)],
)
def test_an_adapter_of_every_kind_of_model_becomes_a_bundle_with_its_backbone(
    tmp_path: Path, objective: str, family: str, opened: Callable[[Path], tuple[Any, Any]]
) -> None:
    backbones = [tmp_path / "one", tmp_path / "other"]
    for scale, folder in enumerate(backbones, 1):
        torch.manual_seed(0)
        network, tokens = opened(folder)
        for parameter in network.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1 * scale)
        backbone.export(network, tokens, dict(network.named_parameters()), folder)

    def write(weights: Path) -> None:
        network, tokens = opened(backbones[0])
        digest = adapters.digest(network)
        wrapped = adapters.add(network, Adapter(kind="lora"))
        moved = {name: one.detach() + 0.1 for name, one in network.named_parameters() if one.requires_grad}
        adapters.export(wrapped, digest, objective, tokens, moved, weights)

    def run(name: str, folder: Path) -> str:
        overrides = [f"objective.name={objective}", f"model.family={family}", f"model.path={folder}"]
        root = tmp_path / "runs" / name
        trained_on = configured(tmp_path, *overrides, "adapter.kind=lora", f"run.name={name}")
        ended(root, write, WEAK, trained_on)
        if objective == "tagging":
            (root / "labels.json").write_text(json.dumps(test_labels.TAGS))
        return str(root)

    registry = open_registry(configured(tmp_path))
    name = bundle.make(run("fits", backbones[0]), registry)
    place = Path(registry.place("bundles", name))
    assert seal.digest(place / "weights") == seal.digest(backbones[0])
    assert (place / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(ConfigError, match=r"was trained on the backbone [0-9a-f]{12} and this one is"):
        bundle.make(run("moved", backbones[1]), registry)
