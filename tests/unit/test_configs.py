"""The ready configurations: each loads, and where the public data sets lie beside the checkout each can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlray import configuration
from mlray.corpus import records, sources
from mlray.evaluation import evaluate
from mlray.training import pretrain
from mlray.tuning import space

ROOT = Path(__file__).parents[2]
_READ_WHOLE = 6 << 20
"""Bytes of test sets that are read to their end."""
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_ready_configuration_loads_and_its_sources_are_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = configuration.load(path)
    wanted = config.corpus.sources + config.evaluation.sources
    if any(source.uri.startswith("../shared") for source in wanted) and not (ROOT / "../shared").exists():
        pytest.skip("the shared data sets are not beside the checkout")
    there = tuple(
        source for source in wanted if not source.uri.startswith("runs/")
    )  # else another job makes it
    for file in sources.list_files(there, config.storage) if there else ():
        chunk = records.chunks(file, 1 << 20, config.storage)[0]
        batch = next(batch for batch in records.read(chunk, 100_000, config.storage) if batch)
        good = [record for record in batch if not record.reason]
        assert len(good) > len(batch) / 20, f"{file.uri}: {batch[0].reason}"
    tested = (
        sources.list_files(config.evaluation.sources, config.storage) if config.evaluation.sources else ()
    )
    if 0 < sum({file.uri: file.size for file in tested}.values()) < _READ_WHOLE:
        backbone = config.model.model_copy(update={"path": None})  # another run leaves it
        groups, _ = evaluate.check(config.model_copy(update={"model": backbone}))
        assert all(groups.values())


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem.startswith("sweep_")], ids=lambda path: path.stem
)
def test_a_ready_sweep_varies_what_a_trial_may_vary(path: Path) -> None:
    config = configuration.load(path)
    assert space.build(config).keys() == config.sweep.space.keys()


def test_tasks_start_where_the_encoder_ends() -> None:
    encoder = configuration.load(ROOT / "jobs/configs/pretrain_shop.yaml")
    last = f"{encoder.run.storage_uri}/{encoder.run.name}/checkpoints/step-{encoder.train.steps:08d}/weights"
    paths = {configuration.load(path).model.path for path in CONFIGS} - {None}
    assert {path for path in paths if "shop-encoder" in str(path)} == {last}


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
