"""What `tuning.py` trains: vectors of everyday sentences and their translations, by the job's own loop, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mlray import configuration
from mlray.config import Storage, Sweep
from mlray.corpus import manifest as manifests
from mlray.corpus import packing, scan, sources, validation
from mlray.corpus.mixture import Mixture
from mlray.corpus.windows import WindowReader
from mlray.models import embedder, tokenizer
from mlray.objectives.table import Task
from mlray.training import loop
from mlray.training.engine import Engine
from mlray.tuning import objective

BATCH = 64


class Work:
    """The corpus and its tokenizer, made once."""

    def __init__(self, data: Path, stretches: int, steps: int) -> None:
        self._stretches, self._steps = stretches, steps
        self._base = configuration.build(
            {
                "corpus": {
                    "sources": [
                        {"uri": f"{data}/{name}.tsv.gz", "format": "text", "pair": "translation"}
                        for name in ("de-en", "en-es", "en-fr", "en-ru")
                    ],
                    "window_rows": 2048,
                    "sequence_length": 128,
                    "validation_rows": 128,
                    "alpha": 0.5,
                },
                "tokenizer": {"vocab_size": 8000},
                "model": {"family": "xlm-roberta", "hidden_size": 64, "num_layers": 0, "max_positions": 128},
                "objective": {"name": "contrastive"},
                "train": {
                    "steps": stretches * steps,
                    "global_batch_size": BATCH,
                    "micro_batch_size": BATCH,
                    "warmup_steps": 5,
                    "schedule": "constant",
                    "precision": "fp32",
                    "zero_stage": 0,
                },
            }
        )
        corpus, settings = self._base.corpus, Storage()
        files = sources.list_files(corpus.sources, settings)
        parts = [
            (n, scan.read_file(file, corpus.max_chars, corpus.validation_rows, settings))
            for n, file in enumerate(files)
        ]
        self._manifest = scan.merge(files, parts, corpus, manifests.fingerprint(files, corpus))
        reader = WindowReader(
            self._manifest, Mixture.of(self._manifest, corpus, 0), corpus.max_chars, settings
        )
        windows = [reader.read(n) for n in range(-(-stretches * steps * BATCH // corpus.window_rows))]
        texts = [text for window in windows[:2] for text in (*window.text, *window.pair)]
        self._tokens = tokenizer.train(iter(texts), self._base.tokenizer, [])
        cutter = self._task(self._base).cutter(tokenizer.encoder(self._tokens), corpus.sequence_length)
        tables = [packing.pack(window, cutter, corpus.sequence_length, 0) for window in windows]
        self._batches = [
            packing.unpack(table.slice(first, BATCH))
            for table in tables
            for first in range(0, len(table), BATCH)
        ][: stretches * steps]
        table = validation.rows(self._manifest, cutter, corpus.sequence_length, 0)
        self._held_out = validation.batches(table, BATCH)

    def _task(self, config: Any) -> Task:
        vocabulary = tokenizer.vocabulary(self._tokens)
        return Task(config.objective, vocabulary, self._manifest.languages, 0, contrastive=config.contrastive)

    def train(self, values: dict[str, Any]) -> list[float]:
        """The sweep's objective after every stretch of a run with these settings."""
        config = configuration.change(self._base, values)
        torch.manual_seed(0)
        task = self._task(config)
        engine = Engine(
            embedder.build(config.model, config.contrastive, self._tokens, None),
            config.train,
            1,
            task.over_batch,
        )
        found = []
        for step in loop.steps(engine, self._batches, task, config.train, start=0, seed=0):
            if step.number % self._steps == 0:
                scores = loop.validate(engine, self._held_out, task)
                found.append(objective.score(scores, self._manifest.languages, Sweep()).objective)
        return found
