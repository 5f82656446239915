"""What the arms of `mlm_step.py` start from: documents, initial weights and settings, in one folder.

config.yaml     every setting that the arms share
model/          tokenizer and initial weights
documents.npz   tokenised documents, to train on and held out
"""

from __future__ import annotations

import argparse
import functools
import gzip
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers

from mlray import configuration
from mlray.config import RunConfig
from mlray.corpus import packing, validation
from mlray.corpus.packing import Piece
from mlray.corpus.windows import Window
from mlray.models import backbone, tokenizer
from mlray.objectives.collation import Inputs
from mlray.objectives.table import Task
from mlray.schema import PackedBatch

FLAGS = {
    "ours": {"bf16"},
    "trainer": {"grouped", "concat", "compile", "bf16"},
    "accelerate": {"concat", "compile", "bf16"},
}
BLOCK, BLOCKS = 50, 4
"""The Trainer sorts by length inside blocks of at most 50 batches and a quarter of the data
(`transformers.trainer_pt_utils.get_length_grouped_indices`)."""
WARM_UP = 5
"""Steps before the first timed round."""
HELD_OUT = 256
"""Documents on which the weights are judged after each round."""
HELD_OUT_WINDOW = 1 << 40
HELD_OUT_ROWS = 8
TRAINING_LINES = 2_000
"""Lines of each language that the tokenizer sees."""
WINDOW = 1024
"""Documents that are packed together."""
TOLERANCE = 1e-4
CHECKED_ROWS = 8
"""On the CPU, where padded documents have a number for each token of the vocabulary at each place."""


@dataclass(frozen=True)
class Job:
    """The folder as an arm reads it."""

    folder: Path
    config: RunConfig
    arm: str
    """`ours`, `trainer` or `accelerate`."""
    flags: frozenset[str]
    documents: int
    """Documents of a step."""
    device: str
    tokens: transformers.PreTrainedTokenizerFast
    encoder: backbone.MaskedEncoder
    task: Task

    @property
    def bf16(self) -> bool:
        """Whether the arm computes in bf16."""
        return "bf16" in self.flags

    @property
    def batch_size(self) -> int:
        """Examples of a peer's step: documents, or as many full rows as ours has."""
        return self.config.train.micro_batch_size if "concat" in self.flags else self.documents

    def pieces(self, part: str) -> list[Piece]:
        """Tokenised documents, `train` or `held_out`."""
        with np.load(self.folder / "documents.npz") as arrays:
            tokens, lengths, languages = (
                arrays[f"{part}_{key}"] for key in ("tokens", "lengths", "languages")
            )
        parts = np.split(tokens, np.cumsum(lengths)[:-1])
        return [
            Piece(part.tolist(), int(language), i)
            for i, (part, language) in enumerate(zip(parts, languages, strict=True))
        ]

    def packed(self, pieces: list[Piece], rows: int = 0) -> Iterator[PackedBatch]:
        """Micro-batches of packed rows without end, window after window, as the corpus stream deals them."""
        rows = rows or self.config.train.micro_batch_size
        rest: list[pa.Table] = []
        for number, start in enumerate(itertools.cycle(range(0, len(pieces), WINDOW))):
            table = pa.concat_tables([*rest, self._pack(pieces[start : start + WINDOW], number)])
            whole = len(table) // rows * rows
            for first in range(0, whole, rows):
                yield packing.unpack(table.slice(first, rows))
            rest = [table.slice(whole)]

    def held_out(self) -> list[PackedBatch]:
        """The held-out documents, always in the same rows."""
        return validation.batches(self._pack(self.pieces("held_out"), HELD_OUT_WINDOW), HELD_OUT_ROWS)

    def _pack(self, pieces: list[Piece], window: int) -> pa.Table:
        length, pad = self.config.corpus.sequence_length, self.tokens.pad_token_id
        return packing.pack_pieces(pieces, pad, length, window, self.config.run.seed)

    @torch.no_grad()
    def held_out_loss(self, batches: list[PackedBatch]) -> float:
        """Mean loss (nats) of the weights as they are, always on the same masks."""
        self.encoder.eval()
        total = predictions = 0.0
        for batch in batches:
            inputs = self.task.inputs(batch)
            moved = {name: tensor.to(self.encoder.model.device) for name, tensor in inputs.model.items()}
            total += float(self.task.loss(self.encoder(**moved), inputs))
            predictions += len(inputs.targets_N)
        self.encoder.train()
        return total / predictions


def read(folder: Path, arm: str, documents: int, device: str) -> Job:
    """The folder for the arm `name[-flag...]`; all arms start from the same weights."""
    config = configuration.load(folder / "config.yaml")
    torch.set_num_threads(config.cluster.threads_per_worker)
    torch.manual_seed(config.run.seed)
    backbone.quiet()
    tokens = tokenizer.load(folder / "model")
    languages = list(config.corpus.languages)
    name, *flags = arm.split("-")
    return Job(
        folder=folder,
        config=config,
        arm=name,
        flags=frozenset(flags),
        documents=documents,
        device=device,
        tokens=tokens,
        encoder=backbone.build(config.model, tokens, folder / "model"),
        task=Task(config.objective, tokenizer.vocabulary(tokens), languages, config.run.seed),
    )


def write(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Fills the folder and returns a description of the work."""
    backbone.quiet()
    settings = [
        "tokenizer.algorithm=bpe",  # Unigram takes half a minute to train, and a step does not care
        "train.schedule=constant",
        "train.warmup_steps=0",
        f"train.steps={WARM_UP + arguments.steps * arguments.rounds}",
        f"train.micro_batch_size={arguments.rows}",
        f"train.global_batch_size={arguments.rows}",
        f"corpus.languages=[{', '.join(repr(name) for name in arguments.languages)}]",
        f"cluster.threads_per_worker={arguments.threads}",
        *arguments.overrides,
    ]
    config = configuration.load(None, settings)
    texts = read_texts(arguments.data, arguments.languages, HELD_OUT + most_documents(arguments, config))
    tokens = tokenizer.train([text for _, text in texts], config.tokenizer)
    pieces = tokenise(texts, tokenizer.encoder(tokens), config.corpus.sequence_length)
    mean = np.mean([len(piece.tokens) for piece in pieces])
    documents = round(arguments.rows * config.corpus.sequence_length / mean)
    wanted = BLOCKS * min(arguments.steps, BLOCK) * documents
    if len(pieces) < wanted + HELD_OUT:
        raise SystemExit(f"{len(pieces)} documents are too few, {wanted + HELD_OUT} are needed; lower --rows")
    pieces, held_out = pieces[:wanted], pieces[wanted : wanted + HELD_OUT]
    lengths = np.array([len(piece.tokens) for piece in pieces])
    torch.manual_seed(config.run.seed)
    encoder = backbone.build(config.model, tokens)
    encoder.model.save_pretrained(folder / "model")
    tokens.save_pretrained(folder / "model")
    np.savez(folder / "documents.npz", **arrays("train", pieces), **arrays("held_out", held_out))
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return {"documents_per_step": documents, **describe(arguments, config, lengths, encoder)}


def most_documents(arguments: argparse.Namespace, config: RunConfig) -> int:
    """Documents that are needed if they are as short as ten tokens."""
    return BLOCKS * min(arguments.steps, BLOCK) * arguments.rows * config.corpus.sequence_length // 10


def read_texts(folder: Path, languages: list[str], wanted: int) -> list[tuple[int, str]]:
    """Distinct lines, as many of each language, in a seeded order: (language number, line)."""
    each = max(TRAINING_LINES, -(-wanted // len(languages)))
    random = np.random.default_rng(0)
    texts: list[tuple[int, str]] = []
    for number, language in enumerate(languages):
        text = gzip.decompress((folder / f"{language}.txt.gz").read_bytes()).decode("utf-8")
        lines = list(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))
        texts += [(number, lines[i]) for i in random.permutation(len(lines))[:each]]
    return [texts[i] for i in random.permutation(len(texts))]


def tokenise(texts: list[tuple[int, str]], encoder: tokenizer.Encoder, length: int) -> list[Piece]:
    """Documents as tokens; those that are longer than a row are cut, for all arms alike."""
    languages, lines = [language for language, _ in texts], [line for _, line in texts]
    window = Window(0, lines, [""] * len(lines), languages, list(range(len(lines))))
    return packing.pieces(window, encoder, length)


def arrays(part: str, pieces: list[Piece]) -> dict[str, np.ndarray]:
    """What `Job.pieces` reads."""
    return {
        f"{part}_tokens": np.concatenate([np.array(piece.tokens, np.int32) for piece in pieces]),
        f"{part}_lengths": np.array([len(piece.tokens) for piece in pieces]),
        f"{part}_languages": np.array([piece.language for piece in pieces]),
    }


def describe(
    arguments: argparse.Namespace, config: RunConfig, lengths: np.ndarray, encoder: backbone.MaskedEncoder
) -> dict[str, Any]:
    """What every arm does."""
    return {
        "languages": arguments.languages,
        "device": arguments.device,
        "threads": arguments.threads,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "tokens_per_document": float(lengths.mean()),
        "rows_per_step": config.train.micro_batch_size,
        "sequence_length": config.corpus.sequence_length,
        "vocabulary": config.tokenizer.vocab_size,
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "flops_per_token": flops_per_token(config, lengths),
        "warm_up_steps": WARM_UP,
        "steps_per_round": arguments.steps,
        "rounds": arguments.rounds,
        "model": config.model.model_dump(mode="json"),
        "objective": config.objective.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json", exclude={"precision"}),
    }


def flops_per_token(config: RunConfig, lengths: np.ndarray) -> float:
    """What a real token needs: attention inside its document, the head if masked; backward twice forward.

    A product of (m, k) and (k, n) counts 2 m k n; embeddings, norms and softmax count nothing.
    """
    H, F, L = config.model.hidden_size, config.model.intermediate_size, config.model.num_layers
    layers = L * 2 * (4 * H * H + 2 * H * F)
    attention = L * 4 * H * float((lengths**2).sum() / lengths.sum())
    masked = config.objective.mask_rate * float((lengths - 2).sum() / lengths.sum())
    head = masked * 2 * (H * H + H * config.tokenizer.vocab_size)
    return 3 * (layers + attention + head)


def check_equal(folder: Path) -> dict[str, float]:
    """Loss and gradient of packed rows with the masked-only head, and of padded documents with the full head.

    Raises:
        SystemExit: they differ by more than `TOLERANCE`.
    """
    job = read(folder, "ours", documents=1, device="cpu")
    rows = min(CHECKED_ROWS, job.config.train.micro_batch_size)
    batch = next(job.packed(job.pieces("train"), rows))
    inputs = job.task.inputs(batch)
    weight = job.encoder.model.get_input_embeddings().weight
    job.encoder.eval()
    ours = job.task.loss(job.encoder(**inputs.model), inputs) / len(inputs.targets_N)
    theirs = job.encoder.model(**unpacked(inputs, batch.segments_BT, job.tokens.pad_token_id)).loss
    (our_gradient,), (their_gradient,) = (torch.autograd.grad(loss, weight) for loss in (ours, theirs))
    difference = (our_gradient - their_gradient).abs().max() / their_gradient.abs().max()
    result = {
        "predictions": len(inputs.targets_N),
        "loss_masked_only_packed": ours.item(),
        "loss_full_head_padded": theirs.item(),
        "relative_gradient_difference": difference.item(),
    }
    if abs(ours.item() - theirs.item()) > TOLERANCE or difference.item() > TOLERANCE:
        raise SystemExit(f"the two heads disagree: {result}")
    return result


def unpacked(inputs: Inputs, segments_BT: np.ndarray, pad_id: int) -> dict[str, torch.Tensor]:
    """The same masked documents, one a row and padded, as a `transformers` model takes them."""
    tokens_BT = inputs.model["tokens_BT"]
    labels_BT = torch.full_like(tokens_BT, -100)
    labels_BT.view(-1)[inputs.model["masked_N"]] = inputs.targets_N
    places = [
        (row, np.flatnonzero(segments == number))
        for row, segments in enumerate(segments_BT)
        for number in range(1, segments.max() + 1)
    ]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "input_ids": pad([tokens_BT[row, columns] for row, columns in places], padding_value=pad_id),
        "attention_mask": pad([torch.ones(len(columns), dtype=torch.long) for _, columns in places]),
        "labels": pad([labels_BT[row, columns] for row, columns in places], padding_value=-100),
    }
