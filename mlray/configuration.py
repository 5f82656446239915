"""From a YAML file and `section.key=value` overrides to a `RunConfig`: the one way to set a value.

An unknown key names its nearest neighbour.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mlray.config import ConfigError, Corpus, RunConfig, RunError, Source

_OF_TEXT = {"masked", "causal", "denoising", "translation"}
"""Objectives whose targets stand for characters; of the others bits per character are 0."""
_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def load(path: str | Path | None = None, overrides: tuple[str, ...] | list[str] = ()) -> RunConfig:
    """Reads a YAML file, applies `section.key=value` overrides and checks the result.

    Raises:
        ConfigError: an unreadable file, an unknown key, a value of the wrong kind, or sizes that do not fit.
    """
    values = _read_yaml(Path(path)) if path else {}
    for override in overrides:
        _apply(values, override)
    return build(values)


def parse(text: str, place: str) -> RunConfig:
    """The configuration in a text that was read at `place`.

    Raises:
        ConfigError: as `load`.
    """
    return build(_sections(text, place))


def change(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The configuration with other values at some dotted keys.

    Raises:
        ConfigError: as `load`.
    """
    changed = config.model_dump(mode="json")
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = changed
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {parent!r} is a value, not a section")
        node[leaf] = value
    return build(changed)


def parser(description: str) -> argparse.ArgumentParser:
    """What every job understands, `--config` and overrides; parse with `parse_intermixed_args`."""
    found = argparse.ArgumentParser(description=f"{description} mlray/config.py has every key.")
    found.add_argument("--config", help="YAML with what differs from the defaults")
    found.add_argument("overrides", nargs="*", metavar="section.key=value")
    return found


def add_input(parser: argparse.ArgumentParser) -> None:
    """What jobs that read rows understand beside it."""
    parser.add_argument("--input", required=True, help="file or folder: JSON lines, parquet, CSV or TSV")
    formats = ("auto", "jsonl", "parquet", "csv", "tsv")
    parser.add_argument("--format", default="auto", choices=formats, help="if the files' names do not tell")
    parser.add_argument("--text", nargs="+", default=["text"], help="columns that are embedded, joined")


def build(values: dict[str, Any]) -> RunConfig:
    """Checks a nested dictionary and freezes it.

    Raises:
        ConfigError: as `load`.
    """
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    _check_training(config)
    _check_model(config)
    _check_tasks(config)
    _check_order(config.corpus)
    return config


def _check_training(config: RunConfig) -> None:
    train, adapted = config.train, config.adapter.kind != "none"
    per_step = train.micro_batch_size * config.cluster.num_workers
    if train.global_batch_size % per_step:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is no multiple of train.micro_batch_size "
            f"x cluster.num_workers = {train.micro_batch_size} x {config.cluster.num_workers}; change one"
        )
    if train.offload and train.zero_stage == 0:
        raise ConfigError("train.offload=true needs train.zero_stage 1, 2 or 3")
    if adapted and (train.freeze_layers or train.freeze_embeddings):
        raise ConfigError(
            "train.freeze_layers and train.freeze_embeddings do not go with adapter.kind, which freezes the whole model"
        )
    of_text = config.objective.name in _OF_TEXT
    if not of_text and train.early_stopping and train.early_stopping.endswith(".bits_per_char"):
        raise ConfigError(
            f"train.early_stopping={train.early_stopping}: objective.name={config.objective.name} predicts no "
            "characters; take loss or accuracy"
        )


def _check_model(config: RunConfig) -> None:
    model, objective = config.model, config.objective
    if config.adapter.kind != "none" and model.path is None:
        raise ConfigError(
            f"adapter.kind={config.adapter.kind} needs model.path: a backbone that is trained already"
        )
    if config.adapter.kind != "none" and config.tokenizer.path:
        raise ConfigError(
            f"adapter.kind={config.adapter.kind} is read with the tokenizer of model.path; leave tokenizer.path empty"
        )
    if model.hidden_size % model.num_heads:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} is no multiple of model.num_heads={model.num_heads}"
        )
    if (objective.name == "next_item") != (config.tokenizer.algorithm == "items"):
        raise ConfigError(
            "objective.name=next_item and tokenizer.algorithm=items go together: each item is a token"
        )
    held_back = any(source.last_is_pair for source in config.corpus.sources)
    if objective.name != "next_item" and (held_back or config.recommendation.vectors):
        raise ConfigError(
            "corpus.sources[].last_is_pair and recommendation.vectors are for objective.name=next_item; leave them out"
        )


def _check_tasks(config: RunConfig) -> None:
    objective = config.objective
    if (objective.name == "multitask") != bool(objective.tasks):
        raise ConfigError(
            "objective.name=multitask and objective.tasks go together; the heads are a list such as "
            "[{name: ner, objective: tagging}]"
        )
    if len(objective.heads) < len(objective.tasks):
        raise ConfigError("two of objective.tasks have the same name")
    for section, sources in (("corpus", config.corpus.sources), ("evaluation", config.evaluation.sources)):
        for source in sources:
            if source.task and objective.name != "multitask":
                raise ConfigError(
                    f"{section}.sources[].task={source.task} of {source.uri} is for objective.name=multitask, and "
                    f"objective.name={objective.name} has no tasks; leave it out"
                )


def _check_order(corpus: Corpus) -> None:
    if corpus.curriculum != "none" and corpus.batches != "mixed":
        raise ConfigError(
            f"corpus.curriculum={corpus.curriculum} and corpus.batches={corpus.batches} both order the rows of a "
            "window; set one of them back"
        )


def exit_code(work: Callable[[], object]) -> int:
    """Runs a job; a failure is one line on standard error: 0 done, 1 failed, 2 bad configuration."""
    try:
        work()
    except ConfigError as error:
        print(f"configuration: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return _sections(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None


def _sections(text: str, place: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{place} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{place} must hold sections such as `train:`, not a {type(values).__name__}")
    return {name: section for name, section in values.items() if section is not None}


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(value, str) and _SCIENTIFIC.fullmatch(text.strip()):  # YAML 1.1 reads 1e-4 as a string.
        value = float(value)
    *parents, leaf = key.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
        node = child
    node[leaf] = value


def _likeness(key: str, known: str) -> float:
    """How alike two dotted keys are: as a whole, or by their last parts where the section is missing or wrong."""
    whole = difflib.SequenceMatcher(None, key, known).ratio()
    last = difflib.SequenceMatcher(None, key.rsplit(".", 1)[-1], known.rsplit(".", 1)[-1]).ratio()
    return max(whole, last) + 0.1 * whole


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(_unknown(key))
        else:
            lines.append(f"{key}: {item['msg']} (got {item['input']!r})")
    return "; ".join(lines)


def check_key(key: str) -> None:
    """Refuses a dotted key that the configuration does not have.

    Raises:
        ConfigError: it names the nearest neighbour.
    """
    if key not in _known_keys():
        raise ConfigError(_unknown(key))


def _unknown(key: str) -> str:
    nearest = max(_known_keys(), key=lambda known: _likeness(key, known))
    return f"unknown key {key!r}; did you mean {nearest!r}?"


def _known_keys() -> list[str]:
    keys = list(RunConfig.model_fields)
    for name, field in RunConfig.model_fields.items():
        keys += [f"{name}.{key}" for key in field.default.__class__.model_fields]
    return keys + [f"corpus.sources.0.{key}" for key in Source.model_fields]
