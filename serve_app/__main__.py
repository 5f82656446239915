"""Serves until it is told to stop: `python -m serve_app release.registry_uri=runs/registry`.

On this machine, with a Ray of its own, or on the cluster that `cluster.address` or RAY_ADDRESS names.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path

from mlray import configuration
from mlray.config import ConfigError, RunConfig, Serving
from serve_app import front
from serve_app.guards import is_local


def main() -> int:
    """Parses, serves, and says in one line why it failed: 0 stopped, 1 failed, 2 bad configuration."""
    arguments = configuration.parser("Serve the champion of release.registry_uri.").parse_intermixed_args()
    return configuration.exit_code(lambda: _serve(arguments.config, arguments.overrides))


def _serve(path: str | None, overrides: list[str]) -> None:
    config = configuration.load(path, overrides)
    _check_host(config.serving)
    if config.cluster.address or "RAY_ADDRESS" in os.environ:
        _until_stopped(config)
        return
    _check_port(config.serving)
    own = config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": "local"})})
    with front.folder() as folder:
        if config.serving.host in front.HOSTS and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1") != "0":
            os.environ |= front.environment(Path(folder)) | os.environ
        _until_stopped(own)


def _until_stopped(config: RunConfig) -> None:
    # Loads torch and ray: not before the configuration is good, nor before Serve's settings are there.
    from ray import serve

    from mlray.release.registry import open_registry
    from mlray.training import placement
    from serve_app.app import bind

    registry = open_registry(config)
    if registry.history().champion is None:
        raise ConfigError(f"{registry.uri} has no champion; jobs/promote.py makes one")
    stopped = threading.Event()
    placement.connect(config)
    for one in (signal.SIGINT, signal.SIGTERM):  # after Ray, which takes the second for itself
        signal.signal(one, lambda *_: stopped.set())
    serve.start(
        http_options={
            "host": config.serving.host,
            "port": config.serving.port,
            "request_timeout_s": 2 * config.serving.timeout_s,
        }
    )
    try:
        serve.run(bind(config), name="mlray")
        print(f"serves      http://{config.serving.host}:{config.serving.port}/", flush=True)
        stopped.wait()
    finally:
        serve.delete("mlray")


def _check_host(settings: Serving) -> None:
    """
    Raises:
        ConfigError: strangers could ask without a key.
    """
    if not is_local(settings.host) and settings.keys_uri is None:
        raise ConfigError(
            f"serving.host={settings.host} is reached from other machines; set serving.keys_uri first "
            "(python -m serve_app.keys NAME >> keys.jsonl)"
        )


def _check_port(settings: Serving) -> None:
    """
    Raises:
        ConfigError: another server has it, or nobody may have it.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        at = f"serving.host={settings.host} serving.port={settings.port}"
        raise ConfigError(f"{at}: {error.strerror}; stop what listens there, or name another port") from None


if __name__ == "__main__":
    sys.exit(main())
