"""What an objective refuses before it starts: another family, a corpus without what it learns, rows too long."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mlray import access, languages, storage
from mlray.config import ConfigError, RunConfig, Storage
from mlray.config import Model as ModelConfig
from mlray.config import Objective as ObjectiveConfig
from mlray.corpus import records, testsets
from mlray.corpus.sources import SourceFile
from mlray.models import loading
from mlray.objectives.table import HEADS, OBJECTIVES

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_places(config: RunConfig) -> None:
    """Refuses what is not where the configuration says, or is of another family, before anything costs time.

    Raises:
        ConfigError: it names the key and the folder.
        StorageError: a store cannot be reached.
    """
    wanted = {
        "model.path": (config.model.path, "config.json"),
        "tokenizer.path": (config.tokenizer.path, None),
        "distillation.teacher": (config.distillation.teacher, "config.json"),
        "adapter.path": (config.adapter.path, "adapter_config.json"),
        "adapter.language_path": (config.adapter.language_path, "adapter_config.json"),
    }
    for key, (uri, file) in wanted.items():
        if uri and _check_place(key, uri, file, config.storage) and key == "model.path":
            _check_kind(config.model, uri, config.storage)


def _check_place(key: str, uri: str, file: str | None, settings: Storage) -> bool:
    """Whether a folder or prefix holds what is wanted; else it is the name of a model on a hub."""
    path = Path(uri).expanduser()
    if not access.is_s3(uri) and not path.is_dir():
        # On a hub is what could be a name there, and does not lie in a folder that is here.
        if _HUB_NAME.fullmatch(uri) and not (path.parent != Path() and path.parent.is_dir()):
            return False
        raise ConfigError(
            f"{key}={uri}: there is no such folder; name a folder, an s3:// prefix or a model of a hub"
        )
    place = storage.absolute(uri)
    if file is None or storage.exists(storage.join(place, file), settings):
        return True
    below = storage.exists(storage.join(place, "weights", file), settings)
    hint = f"take {storage.join(uri, 'weights')}" if below else "name its weights"
    raise ConfigError(f"{key}={uri} holds no checkpoint of `transformers` ({file}); {hint}")


def _check_kind(model: ModelConfig, uri: str, settings: Storage) -> None:
    """Refuses a checkpoint of another family; one on a hub is refused when it is opened."""
    place = storage.join(storage.absolute(uri), "config.json")
    try:
        found = json.loads(storage.read_bytes(place, settings)).get("model_type", model.family)
    except (ValueError, AttributeError):
        raise ConfigError(f"model.path={uri}: its config.json is no JSON object") from None
    loading.check_family(found, model)


def check_family(objective: ObjectiveConfig, model: ModelConfig) -> None:
    """Refuses a family of models that the objective cannot train, or one without layers.

    Raises:
        ConfigError: it names the two, and the families that fit.
    """
    row = OBJECTIVES[objective.name]
    families = row.families
    if model.family not in families:
        raise ConfigError(
            f"model.family={model.family} does not fit objective.name={objective.name}; take one of "
            f"{', '.join(families)}"
        )
    if model.token_dropout and objective.name not in {*HEADS, "multitask"}:
        raise ConfigError(
            f"model.token_dropout={model.token_dropout:g} is for heads of labels, and objective.name={objective.name} "
            "has none; leave it 0"
        )
    if not model.num_layers and not model.path and (row.texts_in_row == 1 or model.family == "modernbert"):
        raise ConfigError(
            "model.num_layers=0 is for vectors of texts, by bert or xlm-roberta; "
            f"objective.name={objective.name} of {model.family} needs at least 1"
        )


def check_sources(objective: ObjectiveConfig, files: Iterable[SourceFile]) -> None:
    """Refuses texts alone or pairs, whichever the objective cannot learn from, and a task without a source.

    Raises:
        ConfigError: it names the file, or the task.
    """
    unfed = set(objective.heads)
    for file in files:
        unfed.discard(languages.task(file.fallback))
        if OBJECTIVES[objective.name].paired and not (file.pair or file.pair_uri):
            raise ConfigError(
                f"objective.name={objective.name} learns what belongs to a text, and {file.uri} is read for texts "
                "alone; name its column in corpus.sources[].pair, or its file in pair_uri"
            )
        if file.negatives and objective.name not in {"contrastive", "distillation"}:
            raise ConfigError(
                f"objective.name={objective.name} knows no hard negatives, and {file.uri} is read with some; leave "
                "corpus.sources[].negatives out"
            )
        if objective.name == "denoising" and (file.pair or file.pair_uri):
            raise ConfigError(
                f"objective.name=denoising reads texts alone, and {file.uri} is read for pairs; leave "
                "corpus.sources[].pair and pair_uri out, and name each half as a source of its own"
            )
    if objective.name == "multitask" and unfed:
        raise ConfigError(
            f"the task {min(unfed)!r} of objective.tasks has no source; set corpus.sources[].task of one to it"
        )


def guarded(files: list[SourceFile], config: RunConfig, place: str) -> list[SourceFile]:
    """The files of a corpus that refuses what the objective cannot learn from, and what it is judged on.

    With `corpus.without_tests` the hashes of the test sets' texts are written into the folder `place`.

    Raises:
        ConfigError: there is no test set, or a row of one is bad.
        StorageError: a file cannot be reached.
    """
    row, without = OBJECTIVES[config.objective.name], None
    labelled = row.labels_of is not None
    if config.corpus.without_tests:
        groups, _ = testsets.read(config, distinct=row.distinct)
        cases = (case for group in groups.values() for case in group)
        texts = (text for case in cases for text in (case.text, *([] if labelled else [case.pair])))
        without = records.forbid(texts, place, config.storage)
    return [replace(file, distinct=row.distinct, without=without, labelled=labelled) for file in files]


def check_positions(config: RunConfig, positions: int, whose: str = "model") -> None:
    """Refuses rows that the model, or its teacher, cannot read.

    Raises:
        ConfigError: `corpus.sequence_length` is longer than its positions.
    """
    texts = OBJECTIVES[config.objective.name].texts_in_row
    if config.corpus.sequence_length // texts > positions:
        raise ConfigError(
            f"corpus.sequence_length={config.corpus.sequence_length} is longer than the {whose}'s {positions} positions"
            + f" for each of {texts} texts" * (texts > 1)
            + f"; lower it to {positions * texts}"
            + " or raise model.max_positions" * (whose == "model")
        )
