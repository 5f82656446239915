"""The smallest real things that training is tested on: a tokenizer, packed rows, an encoder and its settings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mlray.config import Model, Objective, Storage, Tokenizer, Train
from mlray.corpus import packing, validation
from mlray.corpus.lines import Chunk
from mlray.corpus.manifest import ChunkEntry, HeldOut, Manifest, Part
from mlray.corpus.sources import SourceFile
from mlray.corpus.windows import Window
from mlray.models import backbone, tokenizer
from mlray.objectives.table import Task
from mlray.schema import PackedBatch
from mlray.training import loop
from mlray.training.engine import Engine
from mlray.training.loop import Step

torch.set_num_threads(1)  # sums are then always taken in the same order, and workers do not fight

DEEPSPEED_WARNINGS = [
    pytest.mark.filterwarnings(text)
    for text in (
        r"ignore:`torch\.distributed\.\w+` is deprecated:FutureWarning:torch.distributed.c10d_logger",
        r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning:torch.jit",
    )
]
"""DeepSpeed calls what torch 2.13 deprecates."""

STORAGE = Storage()
LANGUAGES = ["de", "en"]
WORDS = {
    "de": [
        "der",
        "Wasserkocher",
        "ist",
        "leise",
        "und",
        "schnell",
        "im",
        "Alltag",
        "die",
        "Decke",
        "hält",
        "warm",
        "bei",
        "kaltem",
        "Wetter",
    ],
    "en": [
        "the",
        "kettle",
        "boils",
        "water",
        "quickly",
        "while",
        "a",
        "soft",
        "blanket",
        "keeps",
        "you",
        "warm",
        "on",
        "cold",
        "evenings",
    ],
}


def texts(language: str, count: int, seed: int) -> list[str]:
    """Sentences of 2 to 14 known words."""
    draw = np.random.default_rng([seed, len(language), ord(language[0])])
    return [" ".join(draw.choice(WORDS[language], size=draw.integers(2, 15))) for _ in range(count)]


@functools.cache
def tokens() -> Any:
    """A tokenizer of 120 pieces, trained here."""
    corpus = [text for language in LANGUAGES for text in texts(language, 300, seed=1)]
    return tokenizer.train(corpus, Tokenizer(algorithm="bpe", vocab_size=120))


def cutter(sequence_length: int) -> packing.Texts:
    """Cuts texts with that tokenizer."""
    return packing.Texts(tokenizer.encoder(tokens()), sequence_length)


def window(number: int, documents: int, seed: int = 2) -> Window:
    """Documents of both languages in turn."""
    columns = [texts(language, documents, seed=seed + number) for language in LANGUAGES]
    both = [text for pair in zip(*columns, strict=True) for text in pair]
    return Window(number, both, [""] * len(both), [0, 1] * documents, list(range(len(both))))


def rows(count: int, sequence_length: int = 32) -> pa.Table:
    """The first `count` packed rows of an endless stream of windows."""
    tables: list[pa.Table] = []
    while sum(map(len, tables)) < count:
        tables.append(packing.pack(window(len(tables), 40), cutter(sequence_length), sequence_length, seed=0))
    return pa.concat_tables(tables).slice(0, count)


def held_out(counts: dict[str, int], sequence_length: int = 32) -> pa.Table:
    """Packed validation rows, each of one language."""
    held = [HeldOut(name, text, "") for name in LANGUAGES for text in texts(name, counts[name], seed=9)]
    file = SourceFile("corpus.jsonl", 1, "1", "jsonl", None, ("text",), None, None, "language")
    parts = tuple(Part(name, 1, 1, ()) for name in LANGUAGES)
    manifest = Manifest((ChunkEntry(Chunk(file), parts),), tuple(held), (), "")
    return validation.rows(manifest, cutter(sequence_length), sequence_length, seed=0)


def deal(table: pa.Table, micro_batch_size: int, rank: int = 0, world_size: int = 1) -> list[PackedBatch]:
    """The micro-batches of a worker: number k goes to worker k modulo `world_size`."""
    starts = range(rank * micro_batch_size, len(table), world_size * micro_batch_size)
    return [packing.unpack(table.slice(start, micro_batch_size)) for start in starts]


def encoder(family: str = "bert", seed: int = 0, **sizes: Any) -> backbone.MaskedEncoder:
    """An encoder of a few thousand parameters; without dropout unless it is asked for."""
    torch.manual_seed(seed)
    common = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "dropout": 0.0}
    config = Model.model_validate({"family": family, "max_positions": 64, **common, **sizes})
    return backbone.build(config, tokens())


def task(seed: int = 0) -> Task:
    """Masked language modelling on the two languages."""
    return Task(Objective(), tokenizer.vocabulary(tokens()), LANGUAGES, seed)


def advance(engine: Engine, batches: list[PackedBatch], config: Train, start: int = 0) -> list[Step]:
    """Steps from `start` to the end of the run; `batches` are the worker's own from the first step on."""
    rest = batches[start * engine.accumulation :]
    return list(loop.steps(engine, rest, task(), config, start=start, seed=0))


def train(**values: Any) -> Train:
    """Settings of a run of 20 steps of 8 rows in fp32."""
    common = {"steps": 20, "global_batch_size": 8, "micro_batch_size": 8, "lr": 5e-3, "warmup_steps": 5}
    return Train.model_validate({**common, "zero_stage": 0, "precision": "fp32", **values})


def export(model: backbone.MaskedEncoder) -> Callable[[dict[str, torch.Tensor], Path], None]:
    """Writes the weights of the encoder and the tokenizer, as the run does."""
    return functools.partial(backbone.export, model, tokens())


def gathered(model: Any, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Parameters of a model as they are now, whole, though ZeRO-3 may have cut them up."""
    import deepspeed

    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters([parameters[name] for name in names]):
        return {name: parameters[name].detach().clone() for name in names}
