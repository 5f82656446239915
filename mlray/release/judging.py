"""A bundle as what is judged: again on its own test sets, or on others."""

from __future__ import annotations

from mlray import configuration, storage
from mlray.config import RunConfig
from mlray.release.registry import open_registry


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
    registry.about("bundles", name)
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
