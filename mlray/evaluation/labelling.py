"""Lets a model label words or texts, or choose sentences: the same cutting, packing and forward as in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlray import languages
from mlray.config import ConfigError, RunConfig
from mlray.corpus import packing, validation
from mlray.corpus.packing import Piece
from mlray.corpus.testsets import Case
from mlray.corpus.windows import Window
from mlray.models import adapters, backbone, tokenizer
from mlray.models.origin import Origin
from mlray.objectives import answers, labels, multitask
from mlray.objectives.checks import check_positions
from mlray.objectives.table import OBJECTIVES, Task
from mlray.schema import PackedBatch


class Cuts:
    """Cuts the rows of test sets as training cuts its own."""

    def __init__(self, config: RunConfig, names: list[str], tokens: Any, labels: list[str]) -> None:
        """What cuts rows in the languages `names` (`de`, or `ner:de` of a multi-task model) for a model's labels."""
        self._config, self._names, self._labels = config, names, labels
        self.task = Task(config.objective, tokenizer.vocabulary(tokens), names, config.run.seed, labels)
        self.encoder = tokenizer.encoder(tokens)
        self._cutter = self.task.cutter(self.encoder, config.corpus.sequence_length)

    def check(self, rows: Mapping[str, Sequence[Case]]) -> None:
        """Cuts the rows of every language, for the errors of `pieces`."""
        for name, group in rows.items():
            self.pieces(group, name)

    def cut_off(self, rows: Sequence[Case], name: str) -> int:
        """How many rows of a language are not read to their end; a long text with tags goes on in another."""
        length, objective = self._config.corpus.sequence_length, kind(self._config, name)
        if objective == "classification":
            return sum(len(ids) > length - 2 for ids in self.encoder.encode([row.text for row in rows]))
        if objective == "answer":
            own = answers.Answers(self.encoder, {}, length)
            return sum(own.is_cut_off(row.text, row.pair) for row in rows)
        return 0

    def pieces(self, rows: Sequence[Case], name: str) -> list[Piece]:
        """The pieces of the rows of a language; each names its row's place as its document.

        Raises:
            ConfigError: it names the file and the row whose labels the training did not know, or are not one a word.
        """
        try:
            return self._cutter(self._window(rows, name))
        except ConfigError:
            for row in rows:
                self._check(row, name)
            raise

    def _check(self, row: Case, name: str) -> None:
        try:
            self._cutter(self._window([row], name))
        except ConfigError as error:  # it calls the row document 0
            raise ConfigError(f"{row.place}{str(error).removeprefix('document 0')}") from None

    def _window(self, rows: Sequence[Case], name: str) -> Window:
        number = self._names.index(name)
        texts, pairs = [row.text for row in rows], [self._told(row.pair, name) for row in rows]
        return Window(0, texts, pairs, [number] * len(rows), list(range(len(rows))))

    def _told(self, pair: str, name: str) -> str:
        """What stands beside a text; with `unknown_labels=wrong` a known label in place of each that is unknown.

        It only marks where the model is asked: scores are computed from the row itself.
        """
        if self._config.evaluation.unknown_labels == "error" or kind(self._config, name) == "answer":
            return pair
        own = multitask.own_labels(self._labels, languages.task(name))
        return " ".join(part if part in own else next(iter(own), part) for part in self._parts(pair, name))

    def _parts(self, pair: str, name: str) -> list[str]:
        return pair.split(" ") if kind(self._config, name) == "tagging" else [pair]

    def unknown(self, rows: Sequence[Case], name: str) -> dict[str, int]:
        """Label that the training did not know -> how often it stands in the rows of a language."""
        if kind(self._config, name) == "answer":
            return {}
        own = multitask.own_labels(self._labels, languages.task(name))
        # As the model has learnt them.
        read = labels.scheme(own) if kind(self._config, name) == "tagging" else list
        told = Counter(part for row in rows for part in read(self._parts(row.pair, name)))
        return {label: number for label, number in sorted(told.items()) if label not in own}


class Judge:
    """A model that labels, with its tokenizer and labels."""

    def __init__(
        self,
        config: RunConfig,
        names: list[str],
        folder: Path,
        adapter: Path | None = None,
        language: Path | None = None,
        device: str = "cpu",
    ) -> None:
        """Opens the checkpoint at `folder`, and an adapter on it, if one is named, with its language adapter.

        Args:
            config: objective, model, row length.
            names: languages of the rows to come, such as `de`, or `ner:de` of a multi-task model.
            folder: of the checkpoint.
            adapter: of the adapter.
            language: of the language adapter.
            device: where the model computes.

        Raises:
            ConfigError: it is none for the objective, has fewer positions than a row, or the adapter is none for it.
        """
        objective = OBJECTIVES[config.objective.name]
        self._config = config
        tokens = tokenizer.load(folder, objective.special_tokens)
        self._labels = Origin.of(adapter).labels if adapter else objective.labels_in(folder)
        self._model = objective.build(config, tokens, folder, self._labels)
        check_positions(config, backbone.positions(self._model))
        if adapter:
            adapters.load(self._model, adapter, language, objective=config.objective.name)
        self._device = device
        self._model.to(device).eval()
        self.cuts = Cuts(config, names, tokens, self._labels)

    def label(self, rows: Sequence[Case], name: str) -> list[str]:
        """What the model says of each row of a language.

        The tags of the words with a space between, the label of the text, or the numbers of the sentences, the
        likeliest answer first.

        Raises:
            ConfigError: as `Cuts.pieces`.
        """
        pieces = self.cuts.pieces(rows, name)
        numbered = [piece._replace(document=number) for number, piece in enumerate(pieces)]
        length = self._config.corpus.sequence_length
        table = packing.pack_pieces(numbered, self.cuts.encoder.pad_id, length, 0, seed=0)
        found: dict[int, list[np.ndarray]] = {}
        for batch in validation.batches(table, self._config.train.micro_batch_size):
            for place, logits_K in self._forward(batch):
                found.setdefault(place, []).append(logits_K)
        result: list[list[np.ndarray]] = [[] for _ in rows]
        for number, piece in enumerate(pieces):
            result[piece.document] += found.get(number, [])
        own = multitask.own_labels(self._labels, languages.task(name))
        if kind(self._config, name) == "answer":
            return [_ranked(np.array(logits_NK), own) for logits_NK in result]
        names, places = list(own), list(own.values())
        if kind(self._config, name) == "tagging":
            return [
                " ".join(names[k] for k in labels.tags(np.array(row)[:, places], names)) for row in result
            ]
        return [names[int(logits_K[places].argmax())] for (logits_K,) in result]

    @torch.inference_mode()
    def _forward(self, batch: PackedBatch) -> list[tuple[int, np.ndarray]]:
        """(piece, logits over the labels) of every labelled position, in order."""
        inputs = self.cuts.task.inputs(batch).model
        moved = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        logits_NK: np.ndarray = self._model(**moved).float().cpu().numpy()
        flat_N = inputs["labelled_N"].numpy()
        first_B = np.searchsorted(batch.batch_D, np.arange(len(batch)))
        rows_N = flat_N // batch.tokens_BT.shape[1]
        places_N = first_B[rows_N] + batch.segments_BT.ravel()[flat_N] - 1
        return list(zip(batch.documents_D[places_N].tolist(), logits_NK, strict=True))


def mark_spans(config: RunConfig, rows: Mapping[str, Sequence[Case]]) -> dict[str, bool]:
    """Language -> whether its tags mark spans, in all languages of a task alike; true where there are no tags.

    Raises:
        ConfigError: as `labels.mark_spans`.
    """
    names = [name for name in rows if kind(config, name) == "tagging"]
    places: dict[str, dict[str, str]] = {languages.task(name): {} for name in names}
    for name in names:
        for row in rows[name]:
            for tag in row.pair.split():
                places[languages.task(name)].setdefault(tag, row.place)
    spans = {task: labels.mark_spans(own) for task, own in places.items()}
    return {name: spans.get(languages.task(name), True) for name in rows}


def kind(config: RunConfig, name: str) -> str:
    """The objective that the rows of a language belong to: of a multi-task run that of their task.

    Raises:
        ConfigError: they belong to no task of the run.
    """
    if config.objective.name != "multitask":
        return config.objective.name
    multitask.check([name], config.objective.heads)
    return config.objective.heads[languages.task(name)].objective


def _ranked(logits_NK: np.ndarray, own: Mapping[str, int]) -> str:
    """The numbers of the N sentences, the likeliest answer first."""
    margins_N = logits_NK[:, own[answers.OTHER]] - logits_NK[:, own[answers.ANSWER]]
    return " ".join(map(str, np.argsort(margins_N, kind="stable")))
