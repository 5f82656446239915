"""The cluster of a run: joined or started, and whether it has room for the workers."""

from __future__ import annotations

import time

import ray
from ray.autoscaler import sdk as autoscaler

from mlray.config import ConfigError, RunConfig
from mlray.corpus import stream

_POLL_S = 2.0


def connect(config: RunConfig) -> None:
    """Joins the job's cluster, or starts a local one."""
    if not ray.is_initialized():
        ray.init(address=config.cluster.address, logging_level="warning", log_to_driver=True)


def check(config: RunConfig) -> None:
    """Waits `cluster.wait_s` for nodes that can hold the workers.

    Raises:
        ConfigError: the cluster cannot place them.
    """
    wanted = config.cluster
    data = stream.least_cpus(config.corpus)
    end = time.monotonic() + wanted.wait_s
    bundle = {"CPU": wanted.cpus_per_worker, "GPU": wanted.gpus_per_worker}
    asked = wanted.wait_s > 0
    if asked:  # nodes that start from zero come only when someone asks for them
        bundles = [{key: value for key, value in bundle.items() if value}] * wanted.num_workers
        autoscaler.request_resources(bundles=bundles)
    try:
        while True:
            fitting, offer = _places(config)
            left = offer["CPU"] - wanted.num_workers * wanted.cpus_per_worker
            if fitting >= wanted.num_workers and left >= data - 1e-9:
                return
            if time.monotonic() >= end:
                break
            time.sleep(_POLL_S)
    finally:
        if asked:  # the request would keep the nodes for ever; from here on the run's own demand does
            autoscaler.request_resources(bundles=[])
    raise ConfigError(
        f"cluster.num_workers={wanted.num_workers} cannot be placed: each needs {wanted.cpus_per_worker:g} CPU and "
        f"{wanted.gpus_per_worker:g} GPU, the input pipeline {data:g} CPU, and the cluster offers {offer['CPU']:g} CPU "
        f"and {offer['GPU']:g} GPU, room for {fitting} workers; lower cluster.num_workers or cluster.cpus_per_worker, "
        "or raise cluster.wait_s where nodes are still to come"
    )


def wanted_cpus(config: RunConfig) -> float:
    """CPUs of a run: its workers and the least that its input pipeline needs."""
    return config.cluster.num_workers * config.cluster.cpus_per_worker + stream.least_cpus(config.corpus)


def cpus() -> float:
    """CPUs of the cluster."""
    return float(ray.cluster_resources().get("CPU", 0.0))


def _places(config: RunConfig) -> tuple[int, dict[str, float]]:
    offer = {"CPU": 0.0, "GPU": 0.0}
    fitting = 0
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        resources = {key: float(node["Resources"].get(key, 0.0)) for key in offer}
        room = resources["CPU"] / config.cluster.cpus_per_worker
        if config.cluster.gpus_per_worker:
            room = min(room, resources["GPU"] / config.cluster.gpus_per_worker)
        fitting += int(room + 1e-9)
        offer = {key: offer[key] + resources[key] for key in offer}
    return fitting, offer
