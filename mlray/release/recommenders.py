"""The recommender of a bundle: what a customer may want next, by sessions, beside what is found by texts.

    recommender/    weights, catalogue (as a tokenizer) and configuration of a run of `next_item`

Its evaluation stands in the bundle's report and predictions, so that the gate judges it market by market.
"""

from __future__ import annotations

from pathlib import Path

from mlray import configuration, storage
from mlray.config import ConfigError, RunConfig
from mlray.evaluation.report import Report
from mlray.objectives.recommending import NextItem
from mlray.release.registry import Registry

FOLDER = "recommender"


def add(stage: Path, config: RunConfig, weights: str, judged: Path) -> None:
    """Puts a recommender into the bundle that is being made.

    Args:
        stage: the bundle; its `report.json` and `predictions.jsonl` are rewritten.
        config: of the run.
        weights: the folder of the run's weights.
        judged: folder with the run's own report and predictions.

    Raises:
        ConfigError: the run is of another objective, or an adapter without its backbone.
        StorageError: the weights cannot be read.
    """
    if config.objective.name != "next_item" or config.adapter.kind != "none":
        raise ConfigError(
            f"--recommender takes a whole model of objective.name=next_item, and {config.run.name} is "
            f"{config.objective.name} with adapter.kind={config.adapter.kind}"
        )
    target = stage / FOLDER
    with storage.local_copy(weights, config.storage) as folder:
        storage.upload(folder, str(target), config.storage)
    (target / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    _opened(target)  # what could not be served is told here
    ours, theirs = (
        Report.from_json((one / "report.json").read_text(encoding="utf-8")) for one in (stage, judged)
    )
    ours.cells.update(theirs.cells)
    (stage / "report.json").write_text(ours.to_json(), encoding="utf-8")
    with (stage / "predictions.jsonl").open("a", encoding="utf-8") as rows:
        rows.write((judged / "predictions.jsonl").read_text(encoding="utf-8"))


def open_recommender(registry: Registry, name: str, device: str = "cpu") -> NextItem | None:
    """The recommender of a bundle; None if it has none.

    Raises:
        ConfigError: there is no such bundle, or it cannot be opened.
    """
    if not registry.about("bundles", name).get(FOLDER):
        return None
    with storage.local_copy(
        storage.join(registry.place("bundles", name), FOLDER), registry.settings
    ) as folder:
        return _opened(folder, device)


def _opened(folder: Path, device: str = "cpu") -> NextItem:
    place = folder / "config.yaml"
    config = configuration.parse(place.read_text(encoding="utf-8"), str(place))
    return NextItem(config, folder, device=device)
