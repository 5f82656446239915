"""What a run will read, see and need, before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from mlray.config import ConfigError, RunConfig
from mlray.corpus.manifest import Manifest
from mlray.corpus.mixture import Mixture
from mlray.models.backbone import Backbone
from mlray.objectives.table import OBJECTIVES
from mlray.training.precision import probe_precision, settle

_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Plan:
    """The figures of a run, per language and per worker."""

    files: dict[str, int]
    documents: dict[str, int]
    tokens: dict[str, float]
    """Estimated tokens of the corpus, from its characters and the tokenizer's fertility."""
    share: dict[str, float]
    """Share of the documents that the run sees."""
    epochs: dict[str, float]
    """How often the run sees the language's documents."""
    steps: int
    tokens_per_step: int
    parameters: int
    trained: int
    """Parameters that are trained."""
    memory_bytes: dict[str, float]
    """Per worker: weights, gradients, optimiser state, activations (estimates)."""


def make(
    config: RunConfig,
    manifest: Manifest,
    fertility: dict[str, dict[str, float]],
    model: Backbone,
) -> Plan:
    """Computes the plan; nothing is read or started."""
    mixture = Mixture.of(manifest, config.corpus, config.run.seed)
    characters = manifest.characters()
    documents = manifest.documents()
    mean = sum(row["tokens_per_char"] for row in fertility.values()) / max(len(fertility), 1) or 0.4
    rate = {name: fertility.get(name, {}).get("tokens_per_char", mean) for name in manifest.languages}
    tokens = {name: characters[name] * rate[name] + 2 * documents[name] for name in manifest.languages}
    share = dict(zip(mixture.languages, map(float, mixture.proportions), strict=True))
    per_document = sum(share[name] * tokens[name] / documents[name] for name in share)
    tokens_per_step = config.train.global_batch_size * config.corpus.sequence_length
    if OBJECTIVES[config.objective.name].loss is None:  # a row is a pair, as long as it is
        tokens_per_step = round(config.train.global_batch_size * per_document)
    seen = config.train.steps * tokens_per_step / per_document
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Plan(
        files=_files(manifest),
        documents=documents,
        tokens=tokens,
        share=share,
        epochs={name: share[name] * seen / documents[name] for name in share},
        steps=config.train.steps,
        tokens_per_step=tokens_per_step,
        parameters=parameters,
        trained=trained,
        memory_bytes=_memory(config, parameters, trained, model.model.config),
    )


def check_batches(config: RunConfig, manifest: Manifest) -> None:
    """Refuses batches of one language or source where a window cannot be made of them.

    Raises:
        ConfigError: the window is no multiple of the batch, or a language or source has, or gives to it, less than one.
    """
    kind, window, batch = config.corpus.batches, config.corpus.window_rows, config.train.global_batch_size
    if kind == "mixed":
        return
    if window % batch:
        raise ConfigError(
            f"corpus.batches={kind} needs windows of whole batches: corpus.window_rows={window} is no multiple of "
            f"train.global_batch_size={batch}"
        )
    mixture = Mixture.of(manifest, config.corpus, config.run.seed)
    rows = dict(zip(mixture.languages, mixture.proportions * window, strict=True))
    held: dict[str, float] = {name: float(count) for name, count in manifest.documents().items()}
    if kind == "source":
        rows, held = _by_source(manifest, rows), _by_source(manifest, held)
    fewest = min(held, key=lambda name: held[name])
    if held[fewest] < batch:
        raise ConfigError(
            f"{fewest} has {held[fewest]:,.0f} pairs, less than the batch of {batch} that corpus.batches={kind} makes "
            f"of one {kind}: copies would fill it; lower train.global_batch_size, leave it out, or set "
            "corpus.batches=mixed"
        )
    least = min(rows, key=lambda name: rows[name])
    if rows[least] < batch:
        raise ConfigError(
            f"{least} gives {rows[least]:,.0f} pairs to a window of {window}, less than the batch of {batch} that "
            f"corpus.batches={kind} makes of one {kind}; raise corpus.window_rows, lower corpus.alpha or "
            "train.global_batch_size, or set corpus.batches=mixed"
        )


def _by_source(manifest: Manifest, rows: dict[str, float]) -> dict[str, float]:
    """Rows of each language -> those of each source, as they share the language in the whole corpus."""
    documents = manifest.documents()
    found: dict[str, float] = {}
    for entry in manifest.chunks:
        name = f"corpus.sources[{entry.chunk.file.source}]"
        given = sum(
            rows[part.language] * part.documents / documents[part.language]
            for part in entry.parts
            if part.documents
        )
        found[name] = found.get(name, 0.0) + given
    return {name: given for name, given in found.items() if given}


def show(plan: Plan, refused: dict[str, dict[str, int]], console: Console) -> None:
    """Prints the plan as tables."""
    table = Table(title="Plan", title_justify="left")
    for heading in (
        "language",
        "files",
        "rows",
        "tokens (est.)",
        "share",
        "epochs",
        "tokens seen",
        "refused",
    ):
        table.add_column(heading, justify="left" if heading == "language" else "right")
    for name in plan.documents:
        seen = plan.epochs[name] * plan.tokens[name]
        table.add_row(
            name,
            str(plan.files[name]),
            f"{plan.documents[name]:,}",
            f"{plan.tokens[name]:,.0f}",
            f"{plan.share[name]:.2%}",
            f"{plan.epochs[name]:.2f}",
            f"{seen:,.0f}",
            str(sum(refused.get(name, {}).values())),
        )
    for name in sorted(refused.keys() - plan.documents.keys()):
        table.add_row(name, *[""] * 6, str(sum(refused[name].values())))
    console.print(table)
    parts = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in plan.memory_bytes.items())
    total = sum(plan.memory_bytes.values()) / 2**20
    console.print(
        f"{plan.steps:,} steps x {plan.tokens_per_step:,} tokens; {plan.trained:,} of {plan.parameters:,} "
        "parameters are trained"
    )
    console.print(f"memory of a worker: about {total:,.0f} MiB ({parts}) beside 1 GiB for the process itself")


def show_order(plan: Plan, window_rows: int, console: Console) -> None:
    """Says what a window leaves in the order of its file: one label after the other would be learnt and forgotten."""
    documents = sum(plan.documents.values())
    if window_rows < documents:
        console.print(
            f"a window shuffles {window_rows:,} of {documents:,} documents; where a file is sorted by label, set "
            f"corpus.window_rows={documents}"
        )


def _files(manifest: Manifest) -> dict[str, int]:
    files: dict[str, set[str]] = {}
    for entry in manifest.chunks:
        for part in entry.parts:
            files.setdefault(part.language, set()).add(entry.chunk.file.uri)
    return {name: len(files[name]) for name in manifest.languages}


def _memory(config: RunConfig, parameters: int, trained: int, sizes: Any) -> dict[str, float]:
    """ZeRO's division of the model states (Rajbhandari et al. 2020, section 5) and a rough count of activations."""
    # The driver may run on a head without a GPU: what `auto` means there says nothing about the workers.
    on_gpu = config.cluster.gpus_per_worker > 0 and config.train.precision == "auto"
    precision = "bf16" if on_gpu else probe_precision(config.train.precision)
    workers = config.cluster.num_workers
    stage = settle(config.train, workers, precision).zero_stage
    width = _BYTES[precision] if stage else 4
    moments = 8 + (4 if stage else 0)
    tokens = config.train.micro_batch_size * config.corpus.sequence_length
    layers = 1 if config.train.activation_checkpointing else sizes.num_hidden_layers
    hidden = 16 * sizes.hidden_size + 2 * _inner(sizes)
    attention = 3 * sizes.num_attention_heads * config.corpus.sequence_length
    optimiser = "optimiser (on the host)" if config.train.offload else "optimiser"
    return {
        "weights": parameters * width / (workers if stage == 3 else 1),
        "gradients": trained * 4 / (workers if stage >= 2 else 1),
        optimiser: trained * moments / (workers if stage >= 1 else 1),
        "activations": tokens * layers * (hidden + attention) * _BYTES[precision],
    }


def _inner(sizes: Any) -> int:
    """Width of the feed-forward layers, whose name each kind of model has for itself."""
    if sizes.is_encoder_decoder:
        return int(sizes.encoder_ffn_dim)
    if sizes.model_type == "gpt2":
        return int(sizes.n_inner or 4 * sizes.hidden_size)
    return int(sizes.intermediate_size)
