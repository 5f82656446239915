"""A checkpoint is a folder that ends with `COMMIT.json`, which names the sha256 of every other file in it.

    state/          optimiser state, safetensors, one file a worker: whole tensors, so any world size reads them
    weights/        the model and tokenizer as `from_pretrained` opens them
    config.yaml     the whole configuration of the run
    progress.json   see `Progress`

Without COMMIT, or with a file that does not match it, a folder is no checkpoint and the next older one is
taken. Nothing here is pickled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mlray import seal, storage
from mlray.config import RunError, Storage
from mlray.schema import Position
from mlray.training.engine import STATE_KEYS, Engine

COMMIT = "COMMIT.json"


@dataclass
class Progress:
    """How far a run has come; everything that a resumed run needs beside the weights."""

    step: int = 0
    position: Position = field(default_factory=Position)
    tokens: dict[str, float] = field(default_factory=dict)
    documents: dict[str, float] = field(default_factory=dict)
    together: float = 0.0
    """Pairs that met another of the same item in their batch."""
    best: float | None = None
    """Best value of the early-stopping metric."""
    best_step: int | None = None
    """The step of that validation; its checkpoint is kept."""
    stale: int = 0
    """Validations since then."""
    digest: int = 0
    """Sum of the digests of all steps: equal for runs that saw the same documents equally often."""
    corpus: str = ""
    """Digest of the documents that `position` counts; see `Manifest.digest`."""
    losses: list[tuple[int, float, int]] = field(default_factory=list)
    """(step, training loss, digest so far), every `log_every` steps."""
    validations: list[dict[str, Any]] = field(default_factory=list)
    """`{"step": n, "languages": {language: {metric: value}}}`, the oldest first."""
    seconds: float = 0.0
    """Time spent in steps, over all resumes."""
    peak_bytes: int = 0
    """Most memory that the first worker has held: of the GPU, or of the process."""

    def to_json(self) -> str:
        """As `progress.json` holds it."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Progress:
        """Reads `to_json` back."""
        values = json.loads(text)
        position = Position(**values.pop("position"))
        losses = [(int(step), float(loss), int(digest)) for step, loss, digest in values.pop("losses")]
        return cls(position=position, losses=losses, **values)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files were all verified."""

    uri: str
    progress: Progress


def save(
    engine: Engine,
    progress: Progress,
    config_yaml: str,
    export: Callable[[dict[str, torch.Tensor], Path], None],
    folder: str,
    settings: Storage,
) -> str:
    """Writes a checkpoint below `folder` and returns its place. All workers call it.

    Args:
        engine: gives the state.
        progress: written as `progress.json`.
        config_yaml: the resolved configuration.
        export: writes the fp32 weights (by parameter name) into a local folder; called on the first worker.
        folder: the run's `checkpoints` folder.
        settings: how to reach it.

    Raises:
        RunError: a worker could not write; on all workers alike, and the older checkpoints are as they were.
    """
    target = place(folder, progress.step)

    def clear() -> None:
        if engine.rank == 0:  # without a COMMIT it is what a killed save of the same step left behind
            storage.delete_folder(target, settings)

    def write() -> dict[str, dict[str, Any]]:
        with storage.staging() as stage:
            (stage / "state").mkdir()
            save_file(
                shard, stage / "state" / f"worker-{engine.rank:05d}-of-{engine.world_size:05d}.safetensors"
            )
            if engine.rank == 0:
                (stage / "weights").mkdir()
                export(whole, stage / "weights")
                (stage / "config.yaml").write_text(config_yaml, encoding="utf-8")
                (stage / "progress.json").write_text(progress.to_json(), encoding="utf-8")
            storage.upload(stage, target, settings)
            return seal.describe(stage)

    _together(engine, target, clear)
    shard, whole = _shard(engine)
    files = {name: entry for share in _together(engine, target, write) for name, entry in share.items()}
    _together(engine, target, lambda: _commit(engine, target, progress.step, files, settings))
    return target


def _commit(
    engine: Engine, target: str, step: int, files: dict[str, dict[str, Any]], settings: Storage
) -> None:
    if engine.rank == 0:
        body = json.dumps({"step": step, "files": files}, indent=1, sort_keys=True).encode()
        storage.write_bytes(storage.join(target, COMMIT), body, settings)


def _together(engine: Engine, target: str, act: Callable[[], Any]) -> list[Any]:
    """Every worker acts and learns how the others fared, so that none waits for one that failed.

    Raises:
        RunError: one of them failed; on all alike.
    """
    result, fault = None, ""
    try:
        result = act()
    except (OSError, RunError, SafetensorError) as error:
        fault = f"{target} could not be written: {' '.join(str(error).split())}"
    shares = engine.gather((result, fault))
    faults = [message for _, message in shares if message]
    if faults:
        raise RunError(faults[0])
    return [value for value, _ in shares]


def newest(folder: str, settings: Storage) -> tuple[Checkpoint | None, list[str]]:
    """The newest good checkpoint below `folder`, and a sentence for each newer folder that is none."""
    refused: list[str] = []
    for name in reversed(storage.list_folders(folder, settings)):
        uri = storage.join(folder, name)
        fault = verify(uri, settings)
        if fault is None:
            text = storage.read_bytes(storage.join(uri, "progress.json"), settings).decode()
            return Checkpoint(uri, Progress.from_json(text)), refused
        refused.append(f"{uri} is no checkpoint: {fault}")
    return None, refused


def verify(uri: str, settings: Storage) -> str | None:
    """None if every file is as COMMIT says, else the fault."""
    return seal.verify(uri, COMMIT, settings)


def load(engine: Engine, checkpoint: Checkpoint, settings: Storage) -> None:
    """Puts a checkpoint's state into the engine, whatever world size or ZeRO stage wrote it. All workers call it.

    Raises:
        RunError: the checkpoint belongs to another model.
    """
    with (
        storage.local_copy(storage.join(checkpoint.uri, "state"), settings) as folder,
        _tensors(folder) as read,
    ):
        engine.load_state(read, checkpoint.progress.step)


def place(folder: str, step: int) -> str:
    """Where the checkpoint of a step lies."""
    return storage.join(folder, f"step-{step:08d}")


def retain(folder: str, keep: int, settings: Storage, best_step: int | None = None) -> None:
    """Removes what is older than the `keep` newest good checkpoints; each is read back before one is given up.

    That of the best step stays as well.
    """
    good = 0
    best = None if best_step is None else place(folder, best_step)
    for name in reversed(storage.list_folders(folder, settings)):
        uri = storage.join(folder, name)
        if uri == best:
            continue
        if good >= keep:
            storage.delete_folder(uri, settings)
        elif verify(uri, settings) is None:
            good += 1


def _shard(engine: Engine) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """This worker's tensors of the state, and on the first worker all master weights."""
    shard: dict[str, torch.Tensor] = {}
    whole: dict[str, torch.Tensor] = {}
    for number, (name, tensors) in enumerate(engine.state()):
        if number % engine.world_size == engine.rank:
            shard.update({f"{name}/{key}": tensor for key, tensor in tensors.items()})
        if engine.rank == 0:
            whole[name] = tensors["master"]
    return shard, whole


@contextlib.contextmanager
def _tensors(folder: Path) -> Iterator[Callable[[str, tuple[int, ...]], dict[str, torch.Tensor]]]:
    with contextlib.ExitStack() as stack:
        places: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            places.update(dict.fromkeys(file.keys(), file))

        def read(name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
            if f"{name}/master" not in places:
                raise RunError(f"the checkpoint has no parameter {name}: it was written by another model")
            tensors = {key: places[f"{name}/{key}"].get_tensor(f"{name}/{key}") for key in STATE_KEYS}
            found = tuple(tensors["master"].shape)
            if found != shape:
                raise RunError(
                    f"the checkpoint's {name} has the shape {found} and the model's {shape}: it was written by "
                    "another model"
                )
            return tensors

        yield read
