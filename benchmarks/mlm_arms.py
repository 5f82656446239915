"""One arm of `mlm_step.py` in a process of its own, which trains a round whenever the parent says so.

    python benchmarks/mlm_arms.py FOLDER ARM --documents 19 --steps 50 --rounds 5    (started by mlm_step.py)

FOLDER is what `mlm_work.write` fills. An arm is `ours`, `trainer` (transformers.Trainer) or `accelerate`,
followed by any of

    -grouped   batches of documents of like length (Trainer: `train_sampling_strategy="group_by_length"`)
    -concat    documents one after another, cut into full rows (run_mlm.py's `group_texts`): no padding, but
               documents are cut in two and see each other
    -compile   torch.compile
    -bf16      autocast in the peers; in ours bf16 weights with fp32 masters (autocast at ZeRO stage 0)

A line on stdin starts a round; a line on stdout is its report. What lies before the first line is not
measured; making batches (padding or packing) and masking are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import mlm_work
import torch
import transformers
from mlm_work import Job

from mlray.corpus.packing import Piece
from mlray.training import loop
from mlray.training.engine import Engine
from mlray.training.precision import settle


class Rounds:
    """Clock and books of an arm; `sizes` are the optimiser steps of each round."""

    def __init__(self, sizes: list[int], channel: TextIO, evaluate: Callable[[], float]) -> None:
        self._sizes, self._channel, self._evaluate = sizes, channel, evaluate
        self._losses: list[Any] = []
        self._tokens: list[Any] = []
        self._places = 0

    def begin(self) -> None:
        """Says that the arm is ready, waits for its turn, and starts the clock."""
        self._answer({})
        self._wait()

    def _answer(self, report: dict[str, Any]) -> None:
        print(json.dumps(report), file=self._channel, flush=True)

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit("the parent is gone")
        self._losses, self._tokens, self._places = [], [], 0
        synchronize()
        self._begin = clocks()

    def add(self, loss: Any, tokens: Any, places: int) -> None:
        """Books a step: numbers, or tensors that are read after the round; `places` counts padding too."""
        self._losses.append(loss)
        self._tokens.append(tokens)
        self._places += places

    def add_batch(self, loss: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
        """Books a step of a peer."""
        self.add(loss.detach(), batch["attention_mask"].sum(), batch["attention_mask"].numel())

    def stepped(self) -> None:
        """After each optimiser step: ends the round after its last and waits for the next."""
        if len(self._losses) < self._sizes[0]:
            return
        synchronize()
        wall_s, cpu_s = (now - then for now, then in zip(clocks(), self._begin, strict=True))
        report = {
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "losses": [float(loss) for loss in self._losses],
            "tokens": [int(tokens) for tokens in self._tokens],
            "places": self._places,
            "peak_bytes": peak_bytes(),
            "device_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            "held_out": self._evaluate(),
        }
        self._answer(report)
        self._sizes = self._sizes[1:]
        if self._sizes:
            self._wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("arm")
    parser.add_argument("--documents", type=int, required=True, help="documents of a peer's step")
    parser.add_argument("--steps", type=int, required=True, help="optimiser steps of a round")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like; the parent reads reports only
    job = mlm_work.read(arguments.folder, arguments.arm, arguments.documents, arguments.device)
    held_out = job.held_out()
    sizes = [mlm_work.WARM_UP, *[arguments.steps] * arguments.rounds]
    rounds = Rounds(sizes, channel, lambda: job.held_out_loss(held_out))
    TRAIN[job.arm](job, job.pieces("train"), rounds)


def train_ours(job: Job, pieces: list[Piece], rounds: Rounds) -> None:
    """Packed rows, a head on masked positions only, the DeepSpeed engine and the one loop."""
    config = settle(job.config.train, num_workers=1, precision="bf16" if job.bf16 else "fp32")
    engine = Engine(job.encoder, config, accumulation=1)
    rounds.begin()
    places = config.micro_batch_size * job.config.corpus.sequence_length
    for step in loop.steps(engine, job.packed(pieces), job.task, config, start=0, seed=job.config.run.seed):
        rounds.add(step.loss, step.tokens.sum(), places)
        rounds.stepped()


def examples(job: Job, pieces: list[Piece]) -> list[dict[str, list[int]]]:
    """What a tokenizer returns with `return_special_tokens_mask`, which the collator wants for speed."""
    rows = [piece.tokens for piece in pieces]
    if "concat" in job.flags:
        length = job.config.corpus.sequence_length
        flat = list(itertools.chain.from_iterable(rows))
        rows = [flat[i : i + length] for i in range(0, len(flat) - length + 1, length)]
    special = job.task.vocabulary.special_V.astype(int)
    return [
        {
            "input_ids": row,
            "attention_mask": [1] * len(row),
            "special_tokens_mask": special[row].tolist(),
        }
        for row in rows
    ]


def collator(job: Job) -> transformers.DataCollatorForLanguageModeling:
    return transformers.DataCollatorForLanguageModeling(
        job.tokens,
        mlm_probability=job.config.objective.mask_rate,
        pad_to_multiple_of=8 if job.device == "cuda" else None,
    )


class CountingTrainer(transformers.Trainer):
    """The Trainer, with a line in the books for each step."""

    rounds: Rounds

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **names: Any) -> torch.Tensor:
        """One forward and backward pass; there is no accumulation."""
        loss = super().training_step(model, inputs, *arguments, **names)
        self.rounds.add_batch(loss, inputs)
        return loss


class RoundsCallback(transformers.TrainerCallback):
    """Lets the parent start each round."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Waits for the first round."""
        self._rounds.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Ends a round after its last step."""
        self._rounds.stepped()


def train_trainer(job: Job, pieces: list[Piece], rounds: Rounds) -> None:
    """`transformers.Trainer` as it is documented: fused AdamW is its default; nothing is logged or saved."""
    trainer = CountingTrainer(
        model=job.encoder.model,
        args=trainer_arguments(job),
        train_dataset=examples(job, pieces),
        data_collator=collator(job),
        processing_class=job.tokens,
        callbacks=[RoundsCallback(rounds)],
    )
    trainer.rounds = rounds
    trainer.train()


def trainer_arguments(job: Job) -> transformers.TrainingArguments:
    """The shared settings in the Trainer's words."""
    config = job.config.train
    grouped = "grouped" in job.flags
    return transformers.TrainingArguments(
        output_dir=str(job.folder / job.arm),
        max_steps=config.steps,
        per_device_train_batch_size=job.batch_size,
        train_sampling_strategy="group_by_length" if grouped else "random",
        learning_rate=config.lr,
        lr_scheduler_type="constant",
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_betas[0],
        adam_beta2=config.adam_betas[1],
        adam_epsilon=config.adam_eps,
        max_grad_norm=config.gradient_clipping,
        bf16=job.bf16,
        torch_compile="compile" in job.flags,
        use_cpu=job.device == "cpu",
        seed=job.config.run.seed,
        dataloader_drop_last=True,
        dataloader_pin_memory=job.device == "cuda",
        dataloader_num_workers=4 if job.device == "cuda" else 0,
        dataloader_persistent_workers=job.device == "cuda",
        remove_unused_columns=False,  # else the collator would have to find special tokens by itself
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def train_accelerate(job: Job, pieces: list[Piece], rounds: Rounds) -> None:
    """The loop of accelerate's documentation, with the collator and the optimiser of the Trainer arm."""
    import accelerate

    precision = "bf16" if job.bf16 else "no"
    accelerator = accelerate.Accelerator(cpu=job.device == "cpu", mixed_precision=precision)
    model = torch.compile(job.encoder.model) if "compile" in job.flags else job.encoder.model
    loader = torch.utils.data.DataLoader(
        examples(job, pieces),
        batch_size=job.batch_size,
        shuffle=True,
        collate_fn=collator(job),
        drop_last=True,
    )
    model, optimizer, loader = accelerator.prepare(model, adamw(job), loader)
    model.train()
    rounds.begin()
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for batch in itertools.islice(epochs, job.config.train.steps):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), job.config.train.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        rounds.add_batch(loss, batch)
        rounds.stepped()


def adamw(job: Job) -> torch.optim.AdamW:
    """Fused AdamW (the Trainer's default), no decay on biases and norms."""
    config = job.config.train
    parameters = list(job.encoder.model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, config.lr, config.adam_betas, config.adam_eps, fused=True)


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Largest resident memory of this process so far; getrusage would count the parent's before exec too."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


TRAIN = {"ours": train_ours, "trainer": train_trainer, "accelerate": train_accelerate}

if __name__ == "__main__":
    main()
