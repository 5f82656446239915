"""The table of objectives: how documents are cut, which model learns from them, its inputs and its loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlray import languages
from mlray.config import ConfigError
from mlray.config import Model as ModelConfig
from mlray.config import Objective as ObjectiveConfig
from mlray.corpus.packing import Cutter, Texts
from mlray.corpus.sources import SourceFile
from mlray.models import backbone, decoder, labeller, translator
from mlray.models.tokenizer import Encoder, Vocabulary
from mlray.objectives import answers, causal, denoising, labels, masked, multitask, translation
from mlray.schema import PackedBatch


@dataclass(frozen=True)
class Inputs:
    """One micro-batch as the loop sees it. N predictions over B rows."""

    model: dict[str, torch.Tensor]
    """Keyword arguments of the model's forward, which returns logits (N, V)."""
    targets_N: torch.Tensor
    rows_N: np.ndarray
    """Row of the batch that a prediction belongs to."""
    characters_N: np.ndarray
    """Characters of text that a target stands for."""


@dataclass(frozen=True)
class Task:
    """What is learnt on which languages: all that a row of the table may know."""

    objective: ObjectiveConfig
    vocabulary: Vocabulary
    languages: list[str]
    """Names of the language numbers."""
    seed: int
    labels: list[str] = field(default_factory=list)
    """Names of the label numbers."""

    def cutter(self, encoder: Encoder, sequence_length: int) -> Cutter:
        """What cuts documents into pieces.

        Raises:
            ConfigError: the languages or the tokenizer are none for the objective.
        """
        return OBJECTIVES[self.objective.name].cutter(encoder, self, sequence_length)

    def inputs(self, batch: PackedBatch) -> Inputs:
        """A micro-batch as the model takes it."""
        return OBJECTIVES[self.objective.name].collate(batch, self)

    def loss(self, logits: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Sum of the losses of a micro-batch, in nats."""
        return OBJECTIVES[self.objective.name].loss(logits, inputs.targets_N.to(logits.device), self)


@dataclass(frozen=True)
class Objective:
    """A row of the table."""

    cutter: Callable[[Encoder, Task, int], Cutter]
    """(tokenizer, task, sequence length) -> what cuts documents into pieces."""
    build: Callable[[ModelConfig, Any, Path | str | None, list[str]], Any]
    """(model configuration, tokenizer, folder or None, labels) -> model."""
    collate: Callable[[PackedBatch, Task], Inputs]
    loss: Callable[[torch.Tensor, torch.Tensor, Task], torch.Tensor]
    """(logits_NV, targets_N, task) -> sum over N, in nats."""
    families: Collection[str]
    """Of models that it trains."""
    special_tokens: tuple[str, ...] = ("pad_token",)
    """What the tokenizer must have."""
    language_tokens: Callable[[list[str]], list[str]] = lambda _: []
    """Names of the language numbers -> languages that need a token of their own."""
    labels_of: Callable[[str, str, str, ObjectiveConfig], Iterable[str]] | None = None
    """(text, what belongs to it, its language, configuration) -> labels in it; None if the objective has none."""
    labels_in: Callable[[Path | str], list[str]] = lambda _: []
    """Folder of a checkpoint -> the labels of its head, which must be one of the objective."""
    paired: bool = False
    """Whether something must stand beside each text."""


def check_family(objective: ObjectiveConfig, model: ModelConfig) -> None:
    """Refuses a family of models that the objective cannot train.

    Raises:
        ConfigError: it names the two, and the families that fit.
    """
    families = OBJECTIVES[objective.name].families
    if model.family not in families:
        raise ConfigError(
            f"model.family={model.family} does not fit objective.name={objective.name}; take one of "
            f"{', '.join(families)}"
        )


def check_sources(objective: ObjectiveConfig, files: Iterable[SourceFile]) -> None:
    """Refuses a training set with nothing beside its texts where the objective learns that, and a task without one.

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
    if objective.name == "multitask" and unfed:
        raise ConfigError(
            f"the task {min(unfed)!r} of objective.tasks has no source; set corpus.sources[].task of one to it"
        )


def _collate_masked(batch: PackedBatch, task: Task) -> Inputs:
    tokens_BT, masked_N, targets_N = masked.mask(batch, task.vocabulary, task.objective, task.seed)
    model = {
        "tokens_BT": torch.from_numpy(tokens_BT),
        "segments_BT": torch.from_numpy(batch.segments_BT),
        "offsets_BT": torch.from_numpy(batch.offsets_BT).long(),
        "masked_N": torch.from_numpy(masked_N),
    }
    return _of_text(batch, model, masked_N, targets_N, task)


def _collate_pairs(batch: PackedBatch, task: Task) -> Inputs:
    model, targets_N = translation.collate(batch, task.vocabulary)
    return _of_text(batch, model, model["predicted_N"].numpy(), targets_N, task)


def _collate_continuations(batch: PackedBatch, task: Task) -> Inputs:
    model, targets_N = causal.collate(batch)
    return _of_text(batch, model, model["predicted_N"].numpy(), targets_N, task)


def _of_text(
    batch: PackedBatch, model: dict[str, torch.Tensor], flat_N: np.ndarray, targets_N: np.ndarray, task: Task
) -> Inputs:
    """Inputs whose targets are tokens, at the flat positions of the batch."""
    rows_N = flat_N // batch.tokens_BT.shape[1]
    return Inputs(model, torch.from_numpy(targets_N), rows_N, task.vocabulary.characters_V[targets_N])


def _collate_labels(batch: PackedBatch, _: Task) -> Inputs:
    model, targets_N = labels.collate(batch)
    rows_N = model["labelled_N"].numpy() // batch.tokens_BT.shape[1]
    # A label stands for no character: bits per character mean nothing here.
    return Inputs(model, torch.from_numpy(targets_N), rows_N, np.zeros(len(targets_N), np.int64))


def _collate_tasks(batch: PackedBatch, task: Task) -> Inputs:
    inputs = _collate_labels(batch, task)
    inputs.model["allowed_NK"] = multitask.allowed(inputs.targets_N.numpy(), task.labels)
    return inputs


@dataclass(frozen=True)
class Head:
    """What differs between objectives of labels."""

    cutter: multitask.MakeCutter
    build: Callable[[ModelConfig, Any, Path | str | None, list[str]], Any]
    labels_of: Callable[[str, str], Iterable[str]]
    """(text, what belongs to it) -> labels in it; refuses what does not fit together, as the cutter does."""
    labels_in: Callable[[Path | str], list[str]] = labeller.word_labels

    def alone(self) -> Objective:
        """The row of an objective with this head only."""
        return Objective(
            cutter=lambda encoder, task, length: self.cutter(encoder, labels.numbered(task.labels), length),
            build=self.build,
            collate=_collate_labels,
            loss=lambda logits_NK, targets_N, _: labels.loss(logits_NK, targets_N),
            families=labeller.FAMILIES,
            labels_of=lambda text, pair, _, __: self.labels_of(text, pair),
            labels_in=self.labels_in,
            paired=True,
        )


HEADS = {
    "tagging": Head(labels.Words, labeller.build_words, lambda text, tags: labels.paired(text, tags, 0)[1]),
    "classification": Head(
        labels.Texts, labeller.build_texts, lambda _, label: [label], labeller.text_labels
    ),
    "answer": Head(answers.Answers, labeller.build_words, lambda _, pair: answers.labels_of(pair)),
}


def _cut_tasks(encoder: Encoder, task: Task, sequence_length: int) -> Cutter:
    makers = {name: HEADS[one.objective].cutter for name, one in task.objective.heads.items()}
    return multitask.cutter(encoder, task.languages, task.labels, makers, sequence_length)


def _labels_of_task(text: str, pair: str, language: str, config: ObjectiveConfig) -> list[str]:
    multitask.check([language], config.heads)
    name = languages.task(language)
    return [f"{name}:{label}" for label in HEADS[config.heads[name].objective].labels_of(text, pair)]


OBJECTIVES = {
    "masked": Objective(
        cutter=lambda encoder, _, sequence_length: Texts(encoder, sequence_length),
        build=lambda config, tokens, folder, _: backbone.build(config, tokens, folder),
        collate=_collate_masked,
        loss=lambda logits_NV, targets_N, _: masked.loss(logits_NV, targets_N),
        families=tuple(backbone.FAMILIES),
        special_tokens=("mask_token", "pad_token"),
    ),
    "causal": Objective(
        cutter=lambda encoder, _, sequence_length: causal.Continuations(encoder, sequence_length),
        build=lambda config, tokens, folder, _: decoder.build(config, tokens, folder),
        collate=_collate_continuations,
        loss=lambda logits_NV, targets_N, _: causal.loss(logits_NV, targets_N),
        families=tuple(decoder.FAMILIES),
        special_tokens=("eos_token",),  # nobody reads padding, and GPT-2 has none
    ),
    "translation": Objective(
        cutter=lambda encoder, task, length: translation.pairs(encoder, task.languages, length),
        build=lambda config, tokens, folder, _: translator.build(config, tokens, folder),
        collate=_collate_pairs,
        loss=lambda logits_NV, targets_N, task: translation.loss(logits_NV, targets_N, task.objective),
        families=tuple(translator.FAMILIES),
        paired=True,
        special_tokens=("pad_token", "eos_token"),
        language_tokens=lambda names: sorted({one for both in translation.directions(names) for one in both}),
    ),
    "denoising": Objective(
        cutter=lambda encoder, task, length: denoising.noised(
            encoder, task.vocabulary, task.languages, length, task.objective, task.seed
        ),
        build=lambda config, tokens, folder, _: translator.build(config, tokens, folder),
        collate=_collate_pairs,
        loss=lambda logits_NV, targets_N, task: translation.loss(logits_NV, targets_N, task.objective),
        families=tuple(translator.FAMILIES),
        special_tokens=("mask_token", "pad_token", "eos_token"),
        language_tokens=sorted,
    ),
    **{name: head.alone() for name, head in HEADS.items()},
    "multitask": Objective(
        cutter=_cut_tasks,
        build=labeller.build_words,
        collate=_collate_tasks,
        loss=lambda logits_NK, targets_N, task: multitask.loss(
            logits_NK, targets_N, multitask.weights(task.labels, task.objective)
        ),
        families=labeller.FAMILIES,
        labels_of=_labels_of_task,
        labels_in=labeller.word_labels,
        paired=True,
    ),
}
