"""The ready configurations: each loads, and where the public data sets lie beside the checkout each can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlray import configuration
from mlray.config import RunConfig
from mlray.corpus import records, sources, testsets
from mlray.evaluation import evaluate
from mlray.objectives.table import OBJECTIVES
from mlray.training import pretrain
from mlray.tuning import space

ROOT = Path(__file__).parents[2]
_READ_WHOLE = 6 << 20
"""Bytes of test sets that are read to their end."""
_LACKING = {
    "align_off_taxonomy": "no key 'names.",
    "translate_off_taxonomy": "no key 'names.",
    "write_amazon_pqa": "empty",
}
"""Configuration -> the reason for which most rows of some of its files are refused: nodes without a name in a language,
questions without an answer in words."""
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))


def _need_data(config: RunConfig) -> None:
    wanted = config.corpus.sources + config.evaluation.sources
    if any(source.uri.startswith("../shared") for source in wanted) and not (ROOT / "../shared").exists():
        pytest.skip("the shared data sets are not beside the checkout")


def _knows_all_labels(path: Path) -> bool:
    """Whether a configuration is of labels, and does not say that the tests may have others."""
    if path.stem == "finetune_names":  # the configurations of its two data sets tell the same
        return False
    config = configuration.load(path)
    has_labels = OBJECTIVES[config.objective.name].labels_of is not None
    return has_labels and config.evaluation.unknown_labels == "error"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_ready_configuration_loads_and_its_sources_are_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = configuration.load(path)
    _need_data(config)
    wanted = config.corpus.sources + config.evaluation.sources
    there = tuple(
        source for source in wanted if not source.uri.startswith("runs/")
    )  # else another job makes it
    for file in sources.list_files(there, config.storage) if there else ():
        chunk = records.chunks(file, 1 << 20, config.storage)[0]
        batch = next(batch for batch in records.read(chunk, 100_000, config.storage) if batch)
        good = sum(not record.reason for record in batch)
        reason = _LACKING.get(path.stem, "-")
        lacking = sum(record.reason.startswith(reason) for record in batch)
        bad = [record.reason for record in batch if record.reason and not record.reason.startswith(reason)]
        assert good + lacking >= 0.9 * len(batch), f"{file.uri}: {bad[0]}"
        assert good > len(batch) / 20, f"{file.uri}: {batch[0].reason}"
    tested = (
        sources.list_files(config.evaluation.sources, config.storage) if config.evaluation.sources else ()
    )
    if 0 < sum({file.uri: file.size for file in tested}.values()) < _READ_WHOLE:
        backbone = config.model.model_copy(update={"path": None})  # another run leaves it
        groups, _ = evaluate.check(config.model_copy(update={"model": backbone}))
        assert all(groups.values())


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if _knows_all_labels(path)], ids=lambda path: path.stem
)
def test_training_has_the_labels_of_the_tests(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = configuration.load(path)
    _need_data(config)
    labels_of = OBJECTIVES[config.objective.name].labels_of
    assert labels_of
    groups, _ = testsets.read(config)
    missing = {
        label
        for language, group in groups.items()
        for case in group
        for label in labels_of(case.text, case.pair, language, config.objective)
    }
    assert missing
    for file in testsets.files_of(config.corpus.sources, config):
        for _, record in testsets.rows_of(file, config):
            if not missing:
                return
            if not record.reason:
                missing -= set(labels_of(record.text, record.pair, record.language, config.objective))
    assert not missing


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem.startswith("sweep_")], ids=lambda path: path.stem
)
def test_a_ready_sweep_varies_what_a_trial_may_vary(path: Path) -> None:
    config = configuration.load(path)
    assert space.build(config).keys() == config.sweep.space.keys()


@pytest.mark.parametrize("before", ["pretrain_shop", "align_shop"])
def test_tasks_start_where_the_encoder_ends(before: str) -> None:
    run = configuration.load(ROOT / f"jobs/configs/{before}.yaml")
    last = f"{run.run.storage_uri}/{run.run.name}/checkpoints/step-{run.train.steps:08d}/weights"
    paths = {configuration.load(path).model.path for path in CONFIGS} - {None}
    assert {path for path in paths if run.run.name in str(path)} == {last}


def test_a_folder_beside_the_job_means_the_same_to_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/encoder").mkdir(parents=True)
    config = configuration.load(
        None, ["model.path=runs/encoder", "tokenizer.path=org/name", "adapter.language_path=s3://b/a"]
    )
    placed = pretrain.placed(config)
    assert placed.model.path == str(tmp_path / "runs/encoder")
    assert placed.run.storage_uri == str(tmp_path / "runs")
    assert (placed.tokenizer.path, placed.adapter.language_path) == ("org/name", "s3://b/a")


def test_the_readme_names_the_run_that_a_configuration_starts_from() -> None:
    makers = {configuration.load(path).run.name: path.stem for path in CONFIGS}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    for path in CONFIGS:
        place = configuration.load(path).model.path or ""
        if not place.startswith("runs/") or path.stem.endswith("_sample"):
            continue
        maker = makers[place.split("/")[1]]
        needed = [needs for named, needs in rows if f"`{path.stem}`" in named]
        assert len(needed) == 1, path.stem
        assert f"`{maker}`" in needed[0], path.stem
