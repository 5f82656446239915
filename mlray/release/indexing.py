"""Builds the product index of a bundle by the bundle's own encoder, and keeps it in the registry."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from mlray import storage
from mlray.config import ConfigError, RunConfig, Source
from mlray.console import left_out, wide
from mlray.corpus import vectors
from mlray.models import backbone
from mlray.release import bundle, markets
from mlray.release.changes import Changes
from mlray.release.index import ProductIndex
from mlray.release.registry import Registry, open_registry
from mlray.training import placement


def build(config: RunConfig, name: str | None, source: Source, kind: str = "index") -> str:
    """Makes an index of every product, or every answer, of a source, and returns its name.

    Bad rows (no text, id or market) are left out, counted, and the first of them named.

    Args:
        config: where the registry is, and the actors that embed.
        name: the bundle; None is the challenger, else the champion.
        source: products; `part_by` is the column of their ids, `language` that of their markets, and `pair` that of
            what people see of them, if it is not the first line of their text.
        kind: `index` of products, or `knowledge`: of answers to customers, whose markets are languages.

    Raises:
        ConfigError: there is no bundle, it makes no vectors, or no product can be read.
        RunError: a file of the bundle is missing or altered, or storage failed; then nothing is kept.
    """
    backbone.quiet()
    registry = open_registry(config)
    name = name or _newest(registry)
    registry.check("bundles", name)
    device = "cuda" if config.cluster.gpus_per_worker else "cpu"
    adapted = kind == "index"
    # What makes no vectors is told before anything starts.
    bundle.open_reader(registry, name, adapted=adapted)
    position = Changes(registry).position
    placement.connect(config)
    opened = functools.partial(bundle.open_reader, registry, name, device, adapted=adapted)
    known = markets.tags(registry.about("bundles", name)) if adapted else []
    index, refused = _read(config, source, opened, known)
    if index is None:
        raise ConfigError(
            f"{source.uri} holds nothing for an index"
            + (f"; the first bad row: {refused[0]}" if refused else "")
        )
    with storage.staging() as stage:
        index.save(stage)
        about = {
            "bundle": name,
            "kind": kind,
            "position": position,
            "width": index.width,
            "markets": index.markets,
            "left_out": len(refused),
        }
        made = registry.put("indexes", stage, name.rsplit("-", 1)[0], about)
    _show(index, refused, "Products" if kind == "index" else "Answers")
    print(f"bundle      {name}\nindex       {made}")
    return made


def _newest(registry: Registry) -> str:
    history = registry.history()
    event = history.challenger or history.champion
    if event is None:
        raise ConfigError(f"{registry.uri} has neither challenger nor champion; name a bundle")
    return event.bundle


def _read(
    config: RunConfig, source: Source, opened: Callable[[], vectors.Read], known: Sequence[str]
) -> tuple[ProductIndex | None, list[str]]:
    index: ProductIndex | None = None
    refused: list[str] = []
    columns, off = (SpinnerColumn(), TextColumn("{task.completed:,} products")), not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=off) as bar:
        work = bar.add_task("", total=None)
        tables = vectors.embed(source, opened, config.cluster, config.corpus.max_chars, config.storage)
        for table, left_out in tables:
            refused += left_out
            if not len(table):
                continue
            width = table.schema.field("vector").type.list_size
            index = index or ProductIndex(width // 2 if known else width)
            rows_NH = table.column("vector").combine_chunks().flatten().to_numpy().reshape(-1, width)
            sold, ids, titles = (table.column(name).to_pylist() for name in ("language", "id", "title"))
            for market in sorted(set(sold)):
                # The last of a product counts.
                places = {ids[i]: i for i, told in enumerate(sold) if told == market}
                own = list(places.values())
                own_NH, plain_NH = markets.apart(rows_NH[own], market, known)
                index.upsert(market, list(places), own_NH, [titles[i] for i in own], plain_NH)
            bar.advance(work, len(table))
    return index, refused


def _show(index: ProductIndex, refused: list[str], title: str) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("market" if title == "Products" else "language")
    table.add_column(title.lower(), justify="right")
    for market, count in index.markets.items():
        table.add_row(market, f"{count:,}")
    console = wide()
    console.print(table)
    if refused:
        console.print(left_out(refused), markup=False)
