"""The configuration: one way to set a value, errors that name the key, and a result that cannot change."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from mlray import configuration
from mlray.config import ConfigError, RunConfig, Source
from mlray.objectives.table import OBJECTIVES

JOB_CONFIGS = sorted((Path(__file__).resolve().parents[2] / "jobs" / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("override", "neighbour"),
    [
        ("model.hidden_sise=64", "model.hidden_size"),
        ("train.warmup_step=1", "train.warmup_steps"),
        ("tokeniser.vocab_size=100", "tokenizer"),
        ("corpus.sources=[{uri: data, txt: body}]", "corpus.sources.0.text"),
        ("lr=1e-4", "train.lr"),
    ],
)
def test_unknown_key_names_its_nearest_neighbour(override: str, neighbour: str) -> None:
    with pytest.raises(ConfigError, match=r"^unknown key '[\w.]+'; did you mean '([\w.]+)'\?$") as caught:
        configuration.load(overrides=[override])
    assert f"did you mean '{neighbour}'?" in str(caught.value)


def test_override_reads_yaml_and_scientific_notation() -> None:
    loaded = configuration.load(
        overrides=[
            "train.lr=1e-4",
            "train.adam_betas=[0.9, 95e-2]",
            "train.offload=true",
            "train.steps=7",
            "run.name=de run",
            "tokenizer.path=",
        ]
    )
    assert loaded.train.lr == 0.0001
    assert loaded.train.adam_betas == (0.9, 0.95)
    assert loaded.train.offload is True
    assert loaded.train.steps == 7
    assert loaded.run.name == "de run"
    assert loaded.tokenizer.path is None


@pytest.mark.parametrize("name", ["1e4", "nan", "123", "no", "null"])
def test_quoted_override_stays_text(name: str) -> None:
    assert configuration.load(overrides=[f"run.name='{name}'"]).run.name == name


def test_override_reads_nested_lists() -> None:
    loaded = configuration.load(
        overrides=["corpus.sources=[{uri: s3://shop/a, text: [title, body]}, {uri: b, language: de}]"]
    )
    assert loaded.corpus.sources == (
        Source(uri="s3://shop/a", text=("title", "body")),
        Source(uri="b", language="de"),
    )


def test_override_wins_over_the_file_and_keeps_its_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  steps: 5\n  lr: 2e-3\nrun: {name: file}\n", encoding="utf-8")
    loaded = configuration.load(path, ["train.steps=6", "train.steps=8"])
    assert (loaded.train.steps, loaded.train.lr, loaded.run.name) == (8, 0.002, "file")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "override 'train.lr' is not of the form section.key=value"),
        ("=3", "override '=3' is not of the form section.key=value"),
        ("run.name.first=x", "override 'run.name.first=x': 'name' is a value, not a section"),
    ],
)
def test_malformed_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: {name: x}", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        configuration.load(path, [override])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.lr=fast", "train.lr"),
        ("train.lr=0", "train.lr"),
        ("train.lr=nan", "train.lr"),
        ("train.lr=inf", "train.lr"),
        ("train.steps=1.5", "train.steps"),
        ("train.zero_stage=4", "train.zero_stage"),
        ("train.early_stopping=sw.los", "train.early_stopping"),
        ("train.early_stopping=loss", "train.early_stopping"),
        ("run.name=a/b", "run.name"),
        ("run.name=..", "run.name"),
        ("corpus.alpha=1.01", "corpus.alpha"),
        ("corpus.languages=de", "corpus.languages"),
        ("model.family=word2vec", "model.family"),
        ("objective.mask_rate=1", "objective.mask_rate"),
        ("run.seed=-1", "run.seed"),
        ("train=3", "train"),
    ],
)
def test_value_out_of_range_names_its_key(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.load(overrides=[override])
    assert str(caught.value).startswith(f"{key}: ")
    assert "\n" not in str(caught.value)


def test_all_errors_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.load(overrides=["train.lr=-1", "model.layers=3"])
    assert "train.lr: " in str(caught.value)
    assert "unknown key 'model.layers'" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (
            ["train.global_batch_size=48", "train.micro_batch_size=16", "cluster.num_workers=2"],
            ["train.global_batch_size=48", "train.micro_batch_size", "cluster.num_workers", "16 x 2"],
        ),
        (["train.offload=true", "train.zero_stage=0"], ["train.offload", "train.zero_stage"]),
        (
            ["corpus.curriculum=length", "corpus.batches=language"],
            ["corpus.curriculum=length", "corpus.batches=language"],
        ),
        (
            ["corpus.curriculum=language", "corpus.batches=source"],
            ["corpus.curriculum=language", "corpus.batches=source"],
        ),
        (["model.hidden_size=100", "model.num_heads=8"], ["model.hidden_size=100", "model.num_heads=8"]),
    ],
)
def test_settings_that_do_not_fit_name_every_key(overrides: list[str], keys: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.load(overrides=overrides)
    assert [key for key in keys if key not in str(caught.value)] == []


@pytest.mark.parametrize("section", ["corpus", "evaluation"])
@pytest.mark.parametrize("objective", ["tagging", "classification", "masked", "translation"])
def test_a_task_without_a_multitask_run_names_the_source_and_the_objective(
    section: str, objective: str
) -> None:
    task = f"{section}.sources=[{{uri: a.tsv}}, {{uri: b.tsv, pair: y, task: ner}}]"
    with pytest.raises(ConfigError) as caught:
        configuration.load(overrides=[f"objective.name={objective}", task])
    assert str(caught.value) == (
        f"{section}.sources[].task=ner of b.tsv is for objective.name=multitask, and objective.name={objective} "
        "has no tasks; leave it out"
    )
    several = ["objective.name=multitask", "objective.tasks=[{name: ner, objective: tagging}]"]
    configuration.load(overrides=[*several, task])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bits_per_character_stop_only_what_predicts_text(name: str) -> None:
    more = {
        "multitask": ["objective.tasks=[{name: ner, objective: tagging}]"],
        "next_item": ["tokenizer.algorithm=items"],
    }
    told = [f"objective.name={name}", *more.get(name, [])]
    for metric in ("loss", "accuracy"):
        configuration.load(overrides=[*told, f"train.early_stopping=macro.{metric}"])
    row = OBJECTIVES[name]
    if row.labels_of is None and row.texts_in_row == 1 and not row.of_items:
        configuration.load(overrides=[*told, "train.early_stopping=de.bits_per_char"])
        return
    with pytest.raises(ConfigError) as caught:
        configuration.load(overrides=[*told, "train.early_stopping=de.bits_per_char"])
    assert str(caught.value) == (
        f"train.early_stopping=de.bits_per_char: objective.name={name} predicts no characters; take loss or accuracy"
    )


def test_gradient_accumulation_is_computed_from_the_batch_sizes() -> None:
    loaded = configuration.load(
        overrides=["train.global_batch_size=96", "train.micro_batch_size=4", "cluster.num_workers=3"]
    )
    assert loaded.gradient_accumulation_steps == 8


def test_config_is_frozen_and_its_storage_hashable() -> None:
    loaded = configuration.load(
        overrides=["corpus.sources=[{uri: a, text: [x, y]}]", "corpus.languages=[de, fr]"]
    )
    for section, key in ((loaded, "train"), (loaded.train, "lr"), (loaded.corpus.sources[0], "uri")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, None)
    assert hash(loaded.storage) == hash(loaded.storage.model_copy())  # connections are kept by it


def test_yaml_round_trip(tmp_path: Path) -> None:
    original = configuration.build(
        {
            "run": {"name": "1e4", "storage_uri": "s3://bücket/лавка"},
            "corpus": {
                "sources": [{"uri": "日本", "text": ["a", "b"], "pair": "c"}, {"uri": "no"}],
                "languages": ["no", "zh-Hant"],
            },
            "tokenizer": {"path": "null"},
            "train": {
                "lr": 1e-7,
                "adam_betas": [0.5, 0.75],
                "adam_eps": 1e-20,
                "early_stopping": "macro.loss",
            },
        }
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(original.to_yaml(), encoding="utf-8")
    assert configuration.load(path) == original


def test_defaults_need_no_file_and_survive_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_text(configuration.load().to_yaml(), encoding="utf-8")
    assert configuration.load(path) == RunConfig() == configuration.load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the configuration"),
        (b"\xff\xfe", "cannot read the configuration"),
        (b"train: [1\nrun: }", "is not YAML"),
        (b"- train\n", "must hold sections such as `train:`, not a list"),
    ],
)
def test_unreadable_file_is_named_in_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        configuration.load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# nothing yet\n", encoding="utf-8")
    assert configuration.load(path) == RunConfig()


@pytest.mark.parametrize("path", JOB_CONFIGS, ids=lambda path: path.name)
def test_configurations_of_the_jobs_load(path: Path) -> None:
    assert configuration.load(path) != RunConfig()


def test_import_loads_neither_torch_nor_ray() -> None:
    heavy = {"torch", "ray", "transformers", "deepspeed", "numpy", "pyarrow", "boto3"}
    program = f"import mlray.configuration, sys; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
