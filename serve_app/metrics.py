"""Counters and times for Prometheus; labels are routes and statuses, so their number is bounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST

_REGISTRY = CollectorRegistry()
_REQUESTS = Counter("mlray_requests", "Requests answered", ("route", "status"), registry=_REGISTRY)
_SECONDS = Histogram(
    "mlray_request_seconds",
    "From the first byte of a request to the last of its answer",
    ("route",),
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=_REGISTRY,
)


def told(scope: Mapping[str, Any], status: int, seconds: float) -> None:
    """Counts an answer; paths that are no routes count as one."""
    route = scope["path"] if scope.get("route") else "other"
    _REQUESTS.labels(route, str(status)).inc()
    _SECONDS.labels(route).observe(seconds)


def text() -> bytes:
    """All of them, as Prometheus reads them."""
    return generate_latest(_REGISTRY)
