"""Counters and times for Prometheus, by route, language, adapter and bundle; the number of labels is bounded.

A language counts by its two letters (ISO 639-1 has 184), any other as `other`; an adapter is one of the champion's; of
bundles only the last four keep their counter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST

_REGISTRY = CollectorRegistry()
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_REQUESTS = Counter("mlray_requests", "Requests answered", ("route", "status"), registry=_REGISTRY)
_SECONDS = Histogram(
    "mlray_request_seconds",
    "From the first byte of a request to the last of its answer",
    ("route",),
    buckets=_BUCKETS,
    registry=_REGISTRY,
)
_ANSWERS = Counter(
    "mlray_answers",
    "Answers of models, by language and by the step of the fallback chain that gave them",
    ("route", "language", "step", "adapter"),
    registry=_REGISTRY,
)
_ANSWER_SECONDS = Histogram(
    "mlray_answer_seconds",
    "What an answer of the models took, waiting included",
    ("language",),
    buckets=_BUCKETS,
    registry=_REGISTRY,
)
_BUNDLES = Counter("mlray_bundle_answers", "Answers of a bundle", ("bundle",), registry=_REGISTRY)
_TURNED_AWAY = Counter(
    "mlray_turned_away",
    "Requests for which the line of their language, or of a market, was too long or too slow",
    ("line",),
    registry=_REGISTRY,
)
_FAULT = Gauge("mlray_fault", "1: something newer in the registry is not taken up", registry=_REGISTRY)
_STOPPED = Gauge(
    "mlray_trial_stopped", "Places in which the trial of a challenger was stopped", registry=_REGISTRY
)
_KEPT = 4
_known: dict[str, None] = {}
"""The last bundles, the newest last."""


def told(scope: Mapping[str, Any], status: int, seconds: float) -> None:
    """Counts a reply; paths that are no routes count as one."""
    route = _route(scope)
    _REQUESTS.labels(route, str(status)).inc()
    _SECONDS.labels(route).observe(seconds)


def answered(scope: Mapping[str, Any], served_by: Mapping[str, Any], seconds: float) -> None:
    """Counts an answer of a model by what has served it."""
    language, step = _language(served_by.get("language")), served_by.get("step", "none")
    _ANSWERS.labels(_route(scope), language, step, served_by.get("adapter") or "none").inc()
    _ANSWER_SECONDS.labels(language).observe(seconds)
    bundle = str(served_by["bundle"])
    if bundle not in _known:
        _known[bundle] = None
        if len(_known) > _KEPT:
            oldest = next(iter(_known))
            del _known[oldest]
            _BUNDLES.remove(oldest)
    _BUNDLES.labels(bundle).inc()


def turned_away(line: str) -> None:
    """Counts a request that was refused in its line; lines are those of the champion, and one for all others."""
    _TURNED_AWAY.labels(_language(line)).inc()


def seen(about: Mapping[str, Any]) -> None:
    """What `/v1/models` says of the registry, each time that it is asked for."""
    _FAULT.set(bool(about.get("fault")))
    challenger = about.get("challenger") or {}
    _STOPPED.set(len(challenger.get("trial", {}).get("stopped", ())))


def _language(tag: str | None) -> str:
    if tag is None:  # of a session
        return "none"
    primary = tag.partition("-")[0].lower()
    return primary if len(primary) == 2 else "other"


def _route(scope: Mapping[str, Any]) -> str:
    return scope["path"] if scope.get("route") else "other"


def latency() -> dict[str, dict[str, float | None]]:
    """Language -> number of answers of this process, and the bounds (s) within which 50 and 95 % of them came.

    None: later than the last bound.
    """
    counts: dict[str, dict[float, float]] = {}
    for family in _ANSWER_SECONDS.collect():
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                counts.setdefault(sample.labels["language"], {})[float(sample.labels["le"])] = sample.value
    return {
        language: {
            "answers": buckets[math.inf],
            "p50_s": _bound(buckets, 0.5),
            "p95_s": _bound(buckets, 0.95),
        }
        for language, buckets in sorted(counts.items())
    }


def _bound(buckets: Mapping[float, float], share: float) -> float | None:
    found = next(bound for bound in sorted(buckets) if buckets[bound] >= share * buckets[math.inf])
    return found if math.isfinite(found) else None


def text() -> bytes:
    """All of them, as Prometheus reads them."""
    return generate_latest(_REGISTRY)
