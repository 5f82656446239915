"""What a person sees of a run: a bar on the driver and TensorBoard events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ray.experimental import tqdm_ray
from torch.utils.tensorboard import SummaryWriter

from mlray import storage
from mlray.config import RunConfig
from mlray.training import loop
from mlray.training.checkpoint import Progress
from mlray.training.folders import Folders


class Monitor:
    """Both come from the first worker; on the others it does nothing."""

    def __init__(
        self, config: RunConfig, folders: Folders, rank: int, progress: Progress, refused: list[str]
    ) -> None:
        self._active = rank == 0
        self._folders, self._settings = folders, config.storage
        self._log_every = config.train.log_every
        if not self._active:
            return
        for sentence in refused:
            print(f"{sentence}; it is skipped")
        self._stage = storage.staging()
        self._events = self._stage.__enter__()
        self._writer = SummaryWriter(str(self._events))
        self._bar = tqdm_ray.tqdm(total=config.train.steps, desc=config.run.name, unit="step")
        self._bar.update(progress.step)

    def stepped(self, step: loop.Step) -> None:
        """After each step."""
        if not self._active:
            return
        self._bar.set_description(f"loss {step.loss:.3f}")
        self._bar.update(1)
        if step.number % self._log_every == 0:
            self._writer.add_scalar("train/loss", step.loss, step.number)
            self._writer.add_scalar("train/lr", step.rate, step.number)
            self._writer.add_scalar("train/gradient_norm", step.gradient_norm, step.number)
            self._writer.add_scalar(
                "train/tokens_per_s", float(np.sum(step.tokens)) / step.seconds, step.number
            )
            self._writer.add_scalar("train/waited_share", step.waited_s / step.seconds, step.number)

    def validated(self, progress: Progress, scores: dict[str, dict[str, float]]) -> None:
        """After each validation: kept in the progress on all workers, written by the first."""
        progress.validations.append({"step": progress.step, "languages": scores})
        if not self._active:
            return
        for language, row in scores.items():
            for metric, value in row.items():
                self._writer.add_scalar(f"validation_{metric}/{language}", value, progress.step)
        self._writer.flush()
        storage.upload(Path(self._events), self._folders.events, self._settings)

    def close(self) -> None:
        """Writes the last events."""
        if not self._active:
            return
        self._writer.close()
        storage.upload(Path(self._events), self._folders.events, self._settings)
        self._stage.__exit__(None, None, None)
        self._bar.close()
