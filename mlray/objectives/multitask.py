"""Several heads in one run: rows of several tasks, each labelled by a head of its own on the same encoder.

The heads lie side by side as one linear layer; a position sees the logits of its own task's labels alone, which is the
same as a head for each (Liu et al. 2019, MT-DNN). A label is called `<task>:<label>`, a language `<task>:<language>`.
Shape letters: N labelled positions, K labels of all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mlray import languages
from mlray.config import ConfigError, Objective
from mlray.corpus.packing import Cutter, Piece
from mlray.corpus.windows import Window
from mlray.models.tokenizer import Encoder

MakeCutter = Callable[[Encoder, dict[str, int], int], Cutter]


@dataclass(frozen=True)
class Tasks:
    """Cuts each document as its task does."""

    encoder: Encoder
    tasks: tuple[str, ...]
    """Language number -> task."""
    cutters: Mapping[str, Cutter]

    def __call__(self, window: Window) -> list[Piece]:
        """The pieces of all documents, task after task."""
        pieces: list[Piece] = []
        for task, cutter in self.cutters.items():
            own = [i for i, language in enumerate(window.language) if self.tasks[language] == task]
            part = Window(
                window.number,
                [window.text[i] for i in own],
                [window.pair[i] for i in own],
                [window.language[i] for i in own],
                [window.document[i] for i in own],
            )
            pieces += cutter(part)
        return pieces


def cutter(
    encoder: Encoder,
    names: Sequence[str],
    labels: Sequence[str],
    makers: Mapping[str, MakeCutter],
    sequence_length: int,
) -> Tasks:
    """The cutter of a corpus.

    Args:
        encoder: the tokenizer.
        names: of the language numbers, such as `ner:de`.
        labels: of all tasks, such as `ner:B-LOC`.
        makers: task -> what makes its cutter.
        sequence_length: tokens of a row.

    Raises:
        ConfigError: a source belongs to no task of the run.
    """
    check(names, makers)
    cutters = {}
    for task, make in makers.items():
        cutters[task] = make(encoder, own_labels(labels, task), sequence_length)
    return Tasks(encoder, tuple(languages.task(name) for name in names), cutters)


def own_labels(labels: Sequence[str], task: str) -> dict[str, int]:
    """Label of a task, without the task's name -> its number; without a task all labels are its own."""
    prefix = f"{task}:" if task else ""
    return {label.removeprefix(prefix): k for k, label in enumerate(labels) if label.startswith(prefix)}


def check(names: Sequence[str], tasks: Mapping[str, object]) -> None:
    """Refuses languages of no task.

    Raises:
        ConfigError: it names the language and the tasks.
    """
    for name in names:
        if languages.task(name) not in tasks:
            raise ConfigError(
                f"the rows of {name!r} belong to no task of the run; set sources[].task to one of "
                f"{', '.join(tasks) or 'objective.tasks, which is empty'}"
            )


def allowed(targets_N: np.ndarray, labels: Sequence[str]) -> torch.Tensor:
    """Which labels a position chooses from (N, K) bool: those of its target's task."""
    tasks = [languages.task(label) for label in labels]
    numbers = {task: number for number, task in enumerate(dict.fromkeys(tasks))}
    of_K = np.array([numbers[task] for task in tasks])
    return torch.from_numpy(of_K[targets_N][:, None] == of_K[None])


def weights(labels: Sequence[str], config: Objective) -> torch.Tensor:
    """The weight of each label's task (K,)."""
    return torch.tensor([config.heads[languages.task(label)].weight for label in labels])


def loss(logits_NK: torch.Tensor, targets_N: torch.Tensor, weights_K: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the negative log-likelihoods (nats), in fp32.

    `weights_K` is the weight of each label's task; it applies to every prediction, and a tagged sentence has as many as
    words.
    """
    losses_N = torch.nn.functional.cross_entropy(logits_NK.float(), targets_N, reduction="none")
    return (losses_N * weights_K.to(losses_N.device)[targets_N]).sum()
