"""The table of objectives: how documents are cut, which model learns from them, its inputs and its loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlray import languages
from mlray.config import Contrastive, Distillation, Recommendation, RunConfig
from mlray.config import Model as ModelConfig
from mlray.config import Objective as ObjectiveConfig
from mlray.corpus.packing import Cutter, Texts
from mlray.models import backbone, decoder, embedder, labeller, recommender, translator
from mlray.models.tokenizer import Encoder, Vocabulary
from mlray.objectives import (
    answers,
    causal,
    collation,
    denoising,
    distillation,
    item_vectors,
    labels,
    multitask,
    next_item,
    pairing,
    translation,
)
from mlray.objectives.collation import Inputs
from mlray.schema import PackedBatch


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
    contrastive: Contrastive = field(default_factory=Contrastive)
    distillation: Distillation = field(default_factory=Distillation)
    teacher: Encoder | None = None
    """Tokenizer of the teacher, where there is one."""
    recommendation: Recommendation = field(default_factory=Recommendation)
    frequencies_V: np.ndarray | None = None
    """How often each token is the right item, of 1, where candidates are drawn."""

    @functools.cached_property
    def label_weights(self) -> torch.Tensor:
        """The weight of each label's task (K,), of a multi-task run."""
        return multitask.weights(self.labels, self.objective)

    @property
    def over_batch(self) -> bool:
        """Whether the loss looks at the whole global batch."""
        return OBJECTIVES[self.objective.name].loss is None

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
        loss = OBJECTIVES[self.objective.name].loss
        assert loss is not None, "the loss over a batch is no sum over micro-batches"
        return loss(logits, inputs.targets_N.to(logits.device), self)

    def scores(self, logits: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss (nats) of each prediction, and whether it is right, for validation."""
        scores = OBJECTIVES[self.objective.name].scores
        return scores(logits.float(), inputs.targets_N.to(logits.device), self)


def negative_log_likelihood(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Sum over N in nats, in fp32; 0 for none, with a gradient."""
    return torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def _scores(logits_NV: torch.Tensor, targets_N: torch.Tensor, _: Task) -> tuple[torch.Tensor, torch.Tensor]:
    losses_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    return losses_N, logits_NV.argmax(-1) == targets_N


@dataclass(frozen=True)
class Objective:
    """A row of the table."""

    cutter: Callable[[Encoder, Task, int], Cutter]
    """(tokenizer, task, sequence length) -> what cuts documents into pieces."""
    build: Callable[[RunConfig, Any, Path | str | None, list[str]], Any]
    """(configuration, tokenizer, folder or None, labels) -> model."""
    collate: Callable[[PackedBatch, Task], Inputs]
    families: Collection[str]
    """Of models that it trains."""
    loss: Callable[[torch.Tensor, torch.Tensor, Task], torch.Tensor] | None = lambda logits_NV, targets_N, _: (
        negative_log_likelihood(logits_NV, targets_N)
    )
    """(logits_NV, targets_N, task) -> sum over N, in nats; None for the contrastive one, over the global batch."""
    teacher: Callable[[RunConfig], Encoder | None] = lambda _: None
    """Opens the tokenizer of a teacher, for objectives that have one."""
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
    texts_in_row: int = 1
    """At least: each has its own positions, and its share of `corpus.sequence_length`."""
    scores: Callable[[torch.Tensor, torch.Tensor, Task], tuple[torch.Tensor, torch.Tensor]] = _scores
    """(outputs, targets_N, task) -> loss and rightness of each prediction, without smoothing."""
    of_items: bool = False
    """Whether its tokens are items, of which must be known how often each is there."""
    writes: bool = False
    """Whether its model writes text, and so must have a token for whatever it is held against."""
    distinct: bool = False
    """Whether a pair of twice the same text teaches nothing."""
    export: Callable[[Any, Any, dict[str, torch.Tensor], Path], None] = backbone.export
    """(model, tokenizer, weights by name, folder) writes what is opened as any model of its kind."""


@dataclass(frozen=True)
class Head:
    """What differs between objectives of labels."""

    cutter: multitask.MakeCutter
    build: Callable[[ModelConfig, Any, Path | str | None, list[str]], Any]
    """(model configuration, tokenizer, folder or None, labels) -> model."""
    labels_of: Callable[[str, str], Iterable[str]]
    """(text, what belongs to it) -> labels in it; refuses what does not fit together, as the cutter does."""
    labels_in: Callable[[Path | str], list[str]] = labeller.word_labels

    def alone(self) -> Objective:
        """The row of an objective with this head only."""
        return Objective(
            cutter=lambda encoder, task, length: self.cutter(encoder, labels.numbered(task.labels), length),
            build=lambda config, tokens, folder, names: self.build(config.model, tokens, folder, names),
            collate=lambda batch, _: collation.labels_of(batch),
            families=labeller.FAMILIES,
            labels_of=lambda text, pair, _, __: self.labels_of(text, pair),
            labels_in=self.labels_in,
            paired=True,
        )


HEADS = {
    "tagging": Head(
        labels.Words, labeller.build_words, lambda text, tags: labels.begun(labels.paired(text, tags, 0)[1])
    ),
    "classification": Head(
        labels.Texts, labeller.build_texts, lambda _, label: [label], labeller.text_labels
    ),
    "answer": Head(answers.Answers, labeller.build_words, lambda _, pair: answers.labels_of(pair)),
}


def _recommender(config: RunConfig, tokens: Any, folder: Path | str | None, _: list[str]) -> Any:
    place = (
        config.recommendation.vectors if folder is None else None
    )  # a trained one holds what it made of them
    vectors_VW = item_vectors.table(item_vectors.read(place, config.storage), tokens) if place else None
    return recommender.build(config.model, tokens, folder, vectors_VW)


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
        build=lambda config, tokens, folder, _: backbone.build(config.model, tokens, folder),
        collate=lambda batch, task: collation.masks(batch, task.vocabulary, task.objective, task.seed),
        families=tuple(backbone.FAMILIES),
        special_tokens=("mask_token", "pad_token"),
    ),
    "causal": Objective(
        cutter=lambda encoder, _, sequence_length: causal.Continuations(encoder, sequence_length),
        build=lambda config, tokens, folder, _: decoder.build(
            config.model, tokens, folder, paired=causal.paired(config.corpus.sources)
        ),
        collate=lambda batch, task: collation.continuations(batch, task.vocabulary),
        families=tuple(decoder.FAMILIES),
        special_tokens=("eos_token",),  # nobody reads padding, and GPT-2 has none
        writes=True,
    ),
    "translation": Objective(
        cutter=lambda encoder, task, length: translation.pairs(encoder, task.languages, length),
        build=lambda config, tokens, folder, _: translator.build(config.model, tokens, folder),
        collate=lambda batch, task: collation.translations(batch, task.vocabulary),
        loss=lambda logits_NV, targets_N, task: translation.loss(logits_NV, targets_N, task.objective),
        families=tuple(translator.FAMILIES),
        paired=True,
        writes=True,
        special_tokens=("pad_token", "eos_token"),
        language_tokens=lambda names: sorted({one for both in translation.directions(names) for one in both}),
    ),
    "denoising": Objective(
        cutter=lambda encoder, task, length: denoising.noised(
            encoder, task.vocabulary, task.languages, length, task.objective, task.seed
        ),
        build=lambda config, tokens, folder, _: translator.build(config.model, tokens, folder),
        collate=lambda batch, task: collation.translations(batch, task.vocabulary),
        loss=lambda logits_NV, targets_N, task: translation.loss(logits_NV, targets_N, task.objective),
        families=tuple(translator.FAMILIES),
        special_tokens=("mask_token", "pad_token", "eos_token"),
        language_tokens=sorted,
        writes=True,
    ),
    **{name: head.alone() for name, head in HEADS.items()},
    "multitask": Objective(
        cutter=_cut_tasks,
        build=lambda config, tokens, folder, names: labeller.build_words(config.model, tokens, folder, names),
        collate=lambda batch, task: collation.tasks(batch, task.labels),
        loss=lambda logits_NK, targets_N, task: multitask.loss(logits_NK, targets_N, task.label_weights),
        families=labeller.FAMILIES,
        labels_of=_labels_of_task,
        labels_in=labeller.word_labels,
        paired=True,
    ),
    "contrastive": Objective(
        cutter=lambda encoder, _, sequence_length: pairing.Pairs(encoder, sequence_length),
        build=lambda config, tokens, folder, _: embedder.build(
            config.model, config.contrastive, tokens, folder
        ),
        collate=lambda batch, task: collation.texts(batch, task.vocabulary.pad_id, task.languages),
        loss=None,
        texts_in_row=2,
        families=tuple(backbone.FAMILIES),
        paired=True,
        distinct=True,
        export=embedder.export,
    ),
    "distillation": Objective(
        cutter=lambda encoder, task, length: distillation.halves(
            encoder, task.teacher, task.languages, task.distillation, length
        ),
        build=lambda config, tokens, folder, _: distillation.build(config, tokens, folder),
        teacher=distillation.open_teacher,
        collate=lambda batch, task: collation.halves(batch, task.vocabulary.pad_id, task.teacher),
        loss=lambda vectors, _, task: distillation.loss(vectors, task.distillation),
        texts_in_row=3,
        scores=lambda vectors, _, task: distillation.scores(vectors, task.distillation),
        families=tuple(backbone.FAMILIES),
        paired=True,
        distinct=True,
        export=embedder.export,
    ),
    "next_item": Objective(
        cutter=lambda encoder, task, length: next_item.sessions(
            encoder, task.vocabulary, task.languages, length
        ),
        build=_recommender,
        collate=lambda batch, task: collation.sessions(
            batch, task.vocabulary, task.frequencies_V, task.recommendation
        ),
        families=tuple(decoder.FAMILIES),
        special_tokens=("pad_token",),
        language_tokens=sorted,
        of_items=True,
        export=recommender.export,
    ),
}
