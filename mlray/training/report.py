"""What a finished run says: `report.json`, a plot of the loss per language, and a table."""

from __future__ import annotations

import io
import json
import platform
from importlib import metadata
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from mlray import storage
from mlray.config import RunConfig
from mlray.objectives.table import OBJECTIVES
from mlray.training import checkpoint as checkpoints
from mlray.training.checkpoint import Checkpoint
from mlray.training.plan import Plan

_VERSIONS = ("mlray", "torch", "ray", "deepspeed", "transformers", "tokenizers", "pyarrow")
_MACRO = "macro"
_NAMED = 50
"""Languages that the legend of a plot has room for."""


def build(
    config: RunConfig,
    checkpoint: Checkpoint,
    outline: Plan,
    fertility: dict[str, dict[str, float]],
    refused: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """The report of a run from its last checkpoint; with early stopping `weights` are those of the best validation."""
    progress = checkpoint.progress
    folder = checkpoint.uri.rpartition("/")[0]
    return {
        "run": config.run.name,
        "checkpoint": checkpoint.uri,
        "weights": storage.join(checkpoints.place(folder, progress.best_step or progress.step), "weights"),
        "best_step": progress.best_step,
        "steps": progress.step,
        "stopped_early": progress.step < config.train.steps,
        "parameters": outline.parameters,
        "trained_parameters": outline.trained,
        "seconds_in_steps": progress.seconds,
        "peak_worker_bytes": progress.peak_bytes,
        "tokens_per_s": sum(progress.tokens.values()) / max(progress.seconds, 1e-9),
        # Texts of pairs are packed anew for the encoder: their rows of the stream are no measure.
        "useful_token_share": None
        if OBJECTIVES[config.objective.name].texts_in_row > 1
        else sum(progress.tokens.values())
        / (progress.step * config.train.global_batch_size * config.corpus.sequence_length),
        "tokens": progress.tokens,
        "documents": progress.documents,
        "pairs_of_one_item": progress.together,
        "losses": progress.losses,
        "validations": progress.validations,
        "fertility": fertility,
        "refused": refused,
        "config": config.model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in _VERSIONS},
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def save(report: dict[str, Any], root: str, config: RunConfig) -> None:
    """Writes `report.json` and `loss.png` into the run folder."""
    storage.write_bytes(storage.join(root, "loss.png"), plot(report), config.storage)
    body = json.dumps(report, ensure_ascii=False, indent=1).encode()
    storage.write_bytes(storage.join(root, "report.json"), body, config.storage)


def plot(report: dict[str, Any]) -> bytes:
    """Validation loss per language over the steps, and their mean; of training where nothing is held out (PNG)."""
    last = report["validations"][-1]["languages"]
    names = sorted((name for name in last if name != _MACRO), key=lambda name: -last[name]["loss"])
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    if names:
        _draw_languages(axes, report["validations"], names)
    else:
        _draw_training(axes, report["losses"])
    axes.set(xlabel="step", title=f"Loss: {report['run']}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    columns = 1 if len(names) <= 20 else 2
    title = "last value" if len(names) <= _NAMED else f"last value, the {_NAMED} highest of {len(names)}"
    figure.legend(loc="outside right upper", ncols=columns, fontsize=8, frameon=False, title=title)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()


def _draw_languages(axes: Any, validations: list[dict[str, Any]], names: list[str]) -> None:
    steps, last = [entry["step"] for entry in validations], validations[-1]["languages"]
    colors = _colors(len(names))
    for number, (color, name) in enumerate(zip(colors, names, strict=True)):
        values = [entry["languages"].get(name, {}).get("loss") for entry in validations]
        label = f"{name}  {last[name]['loss']:.2f}" if number < _NAMED else None
        axes.plot(steps, values, color=color, linewidth=1.4, label=label)
    if _MACRO in last:
        values = [entry["languages"].get(_MACRO, {}).get("loss") for entry in validations]
        axes.plot(steps, values, "k--", linewidth=2.4, label=f"mean  {last[_MACRO]['loss']:.2f}")
    axes.set_ylabel("validation loss (nats a prediction)")


def _draw_training(axes: Any, losses: list[Any]) -> None:
    label = f"training  {losses[-1][1]:.2f}" if losses else "training"
    axes.plot([one[0] for one in losses], [one[1] for one in losses], "k", label=label)
    axes.set_ylabel("training loss (nats a prediction)")


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](i) for i in range(count)]
    return [colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def show(report: dict[str, Any], console: Console) -> None:
    """Prints what each language got and gave."""
    first, last = report["validations"][0]["languages"], report["validations"][-1]["languages"]
    table = Table(title=f"{report['run']} after {report['steps']:,} steps", title_justify="left")
    headings = (
        "language",
        "documents seen",
        "tokens seen",
        "loss first",
        "loss last",
        "accuracy",
        "bits/char",
        "refused",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "language" else "right")
    for name in sorted(report["tokens"]):
        table.add_row(
            name,
            f"{report['documents'][name]:,.0f}",
            f"{report['tokens'][name]:,.0f}",
            *_cells(first.get(name), last.get(name)),
            str(sum(report["refused"].get(name, {}).values())),
        )
    for name in sorted(report["refused"].keys() - report["tokens"].keys()):
        table.add_row(name, *[""] * 6, str(sum(report["refused"][name].values())))
    if _MACRO in last:
        table.add_section()
        table.add_row("mean", "", "", *_cells(first.get(_MACRO), last[_MACRO]), "")
    console.print(table)
    share = report["useful_token_share"]
    full = "" if share is None else f"rows are {share:.1%} full; "
    console.print(
        f"{report['tokens_per_s']:,.0f} tokens/s in steps; {full}"
        f"{report['seconds_in_steps']:,.0f} s; a worker held at most {report['peak_worker_bytes'] / 2**20:,.0f} MiB"
    )
    if report["pairs_of_one_item"]:
        share = report["pairs_of_one_item"] / (
            report["steps"] * report["config"]["train"]["global_batch_size"]
        )
        console.print(
            f"{report['pairs_of_one_item']:,.0f} pairs ({share:.1%}) met another of the same item in their batch: no "
            "negatives of each other"
        )


def _cells(first: dict[str, float] | None, last: dict[str, float] | None) -> list[str]:
    if first is None or last is None:
        return ["no held-out rows", "", "", ""]
    return [
        f"{first['loss']:.3f}",
        f"{last['loss']:.3f}",
        f"{last['accuracy']:.1%}",
        f"{last['bits_per_char']:.2f}" if last["bits_per_char"] else "",  # labels stand for no characters
    ]


def show_fertility(fertility: dict[str, dict[str, float]], console: Console) -> None:
    """Prints what each language costs in tokens."""
    table = Table(title="Tokenizer", title_justify="left")
    for heading in ("language", "tokens/char", "tokens/word", "unknown", "longer than a row"):
        table.add_column(heading, justify="left" if heading == "language" else "right")
    for name, row in fertility.items():
        table.add_row(
            name,
            f"{row['tokens_per_char']:.3f}",
            f"{row['tokens_per_word']:.2f}",
            f"{row['unknown_share']:.2%}",
            f"{row['longer_share']:.1%}",
        )
    console.print(table)
