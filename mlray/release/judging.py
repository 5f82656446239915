"""A bundle as what is judged: again on its own test sets, or on others."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from mlray import configuration, languages, storage
from mlray.config import ConfigError, RunConfig
from mlray.evaluation.report import Report
from mlray.release import evaluations, markets
from mlray.release.registry import Registry, open_registry


def judged(config: RunConfig, name: str | None) -> RunConfig:
    """The configuration that evaluates the main model of a bundle, with its adapter.

    Of `config` the storage, the registry, and what is set in `evaluation` count: test sets that it names take the place
    of the bundle's own. All else is what the bundle was trained with.

    Args:
        config: names `release.registry_uri`.
        name: of a bundle, or `champion` or `challenger`; None leaves the configuration as it is.

    Raises:
        ConfigError: there is no such bundle.
        RunError: it is damaged.
    """
    if name is None:
        return config
    registry = open_registry(config)
    if name in {"champion", "challenger"}:
        history = registry.history()
        event = history.champion if name == "champion" else history.challenger
        name = event.bundle if event else name
    registry.check("bundles", name)
    place = registry.place("bundles", name)
    text = storage.read_bytes(storage.join(place, "config.yaml"), config.storage).decode()
    held = configuration.parse(text, f"{place}/config.yaml")
    told = {key: getattr(config.evaluation, key) for key in config.evaluation.model_fields_set}
    sections = {
        "model": held.model.model_copy(update={"path": storage.join(place, "weights")}),
        "evaluation": held.evaluation.model_copy(update=told),
        "storage": config.storage,
        "release": config.release,
    }
    if held.adapter.kind != "none":
        paths = {"path": storage.join(place, "adapter")}
        if held.adapter.language_path:
            paths["language_path"] = storage.join(place, "language_adapter")
        sections["adapter"] = held.adapter.model_copy(update=paths)
    return held.model_copy(update=sections)


@contextmanager
def rejudged(
    registry: Registry, name: str, uri: str
) -> Iterator[tuple[Report, str, Collection[tuple[str, str]]]]:
    """The report of a bundle, where its predictions lie, and the (task, language) that are those at `uri`, not its own.

    So a champion is compared with a challenger that was judged on newer test sets. A market that has an adapter keeps
    its figures, which are the adapter's, as does a related one that it reads, and every model beside the main one.

    Args:
        registry: where the bundle is.
        name: of the bundle.
        uri: what its evaluation was written to, as `judged` makes it.

    Raises:
        ConfigError: there is no evaluation at `uri`, or it is of other weights.
    """
    place, about = registry.place("bundles", name), registry.about("bundles", name)
    made = f"jobs/evaluate.py --bundle {name} --output {uri} makes it"
    with storage.staging() as stage, storage.staging() as other:
        found = evaluations.read(storage.absolute(uri), registry.settings, made)
        evaluations.copy(place, stage, registry.settings)
        evaluations.copy(storage.absolute(uri), other, registry.settings)
        part = storage.join(place, "weights" if about["adapter"] == "none" else "adapter")
        with storage.local_copy(part, registry.settings) as weights:
            if not evaluations.is_of(found, weights):
                raise ConfigError(f"{uri} is an evaluation of other weights than those of {name}; {made}")
        known = markets.tags(about)
        taken = [
            (task, language)
            for task, table in found.cells.items()
            for language in table
            if languages.nearest(languages.target(language), known) is None
        ]
        evaluations.replace(stage, other, taken)
        yield Report.read(stage), str(stage / evaluations.ROWS), taken
