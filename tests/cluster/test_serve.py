"""The champion of a registry on S3 over HTTP: it answers in every language, and is exchanged under load."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import requests
from ray import serve

from mlray import storage
from mlray.config import RunConfig, Source
from mlray.release import bundle, indexing, promotion
from mlray.release.registry import open_registry
from serve_app.app import bind
from tests.cluster import corpus as sample
from tests.cluster.conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.long]
TIMEOUT_S = 30
ANSWERS = {
    "uri": str(ROOT / "mlray/corpus/sample/support.jsonl"),
    "text": "phrasings",
    "pair": "answer",
    "part_by": "intent",
    "language": "column:language",
}


@pytest.fixture
def served(aligned: RunConfig, bucket: str) -> Iterator[tuple[RunConfig, str]]:
    """A champion with an index of every product, and the address that it answers at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    release = aligned.release.model_copy(update={"registry_uri": f"s3://{bucket}/served"})
    serving = aligned.serving.model_copy(update={"port": port, "watch_s": 0.2, "cpus_per_replica": 0.5})
    config = aligned.model_copy(update={"release": release, "serving": serving})
    promotion.challenge(config, f"s3://{bucket}/runs/aligned", "the first")
    index = indexing.build(config, None, products((0.0, 1.0)))
    knowledge = indexing.build(config, None, Source.model_validate(ANSWERS), "knowledge")
    promotion.promote(config, None, index, "", knowledge=knowledge)
    serve.start(http_options={"host": "0.0.0.0", "port": port})
    serve.run(bind(config), name="mlray")
    yield config, f"http://127.0.0.1:{port}"
    serve.shutdown()


def products(part: tuple[float, float]) -> Source:
    return Source.model_validate({**sample.PRODUCTS, "pair": None, "item": None, "part": part})


def search(url: str, query: str, market: str) -> dict[str, Any]:
    reply = requests.post(
        f"{url}/v1/search", json={"query": query, "market": market, "k": 1}, timeout=TIMEOUT_S
    )
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def others(url: str) -> None:
    """The routes that the swap does not ask, each through Ray and what stands before it."""
    session = {"market": "de", "products": ["p001"], "k": 3}
    next_ones = requests.post(f"{url}/v1/recommend", json=session, timeout=TIMEOUT_S).json()["results"]
    assert [one["by"] for one in next_ones] == ["texts"] * 3
    assert "p001" not in {one["id"] for one in next_ones}
    with (ROOT / "mlray/corpus/sample/support.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    known = next(row for row in rows if row["language"] == "de")
    turns = {"messages": [{"text": "\n".join(known["phrasings"])}], "language": "de"}
    told = requests.post(f"{url}/v1/support", json=turns, timeout=TIMEOUT_S).json()
    assert (told["answer"], told["intent"], told["scope"]) == (known["answer"], known["intent"], "language")
    parts = requests.post(f"{url}/v1/support", json={**turns, "stream": True}, timeout=TIMEOUT_S)
    assert parts.headers["content-type"].startswith("text/event-stream")
    events = [block.split("\n")[0] for block in parts.text.strip().split("\n\n")]
    assert (events[0], events[-1], {*events[1:-1]}) == ("event: sources", "event: done", {"event: answer"})
    words = {"texts": ["Hallo"], "target": "en", "language": "de"}
    refused = requests.post(f"{url}/v1/translate", json=words, timeout=TIMEOUT_S)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "no_translator")
    gone = {"products": [{"market": "de", "id": "never"}]}
    refused = requests.post(f"{url}/v1/products/delete", json=gone, timeout=TIMEOUT_S)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unknown_product")
    assert "mlray_requests_total" in requests.get(f"{url}/metrics", timeout=TIMEOUT_S).text


def only_here(port: int) -> None:
    """HAProxy serves the port, nothing else of it listens beyond this machine, and who asks from elsewhere is known."""
    if sys.platform != "linux":
        return  # there is none for this machine
    folder = str(Path(os.environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent)
    listening = {
        found.laddr
        for one in psutil.process_iter(["name", "cmdline"])
        if one.info["name"] == "haproxy" and any(folder in part for part in one.info["cmdline"])
        for found in one.net_connections()
        if found.status == psutil.CONN_LISTEN
    }
    assert {ip for ip, at in listening if at == port} == {"0.0.0.0"}
    assert {ip for ip, at in listening if at != port} == {"127.0.0.1"}
    outside = ray.util.get_node_ip_address()
    for headers in ({}, {"host": "localhost"}):
        reply = requests.get(f"http://{outside}:{port}/v1/models", headers=headers, timeout=TIMEOUT_S)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "no_keys")
    assert requests.get(f"http://127.0.0.1:{port}/v1/models", timeout=TIMEOUT_S).status_code == 200


def test_a_champion_answers_over_http_and_is_exchanged_under_load(served: tuple[RunConfig, str]) -> None:
    config, url = served
    registry = open_registry(config)
    first = registry.history().champion
    assert first is not None
    ready = requests.get(f"{url}/readyz", headers={"x-request-id": "r.1"}, timeout=TIMEOUT_S)
    assert (ready.json()["bundle"], ready.headers["x-request-id"]) == (first.bundle, "r.1")
    only_here(int(url.rpartition(":")[2]))
    titles = {language: sample.sentences(language)[0] for language in sample.LANGUAGES}
    for language, title in titles.items():
        found = search(url, title, language)
        assert (found["results"][0]["id"], found["results"][0]["title"]) == ("p001", title)
        assert found["served_by"]["language"] == language
    asked = {"input": list(titles.values())}
    told = requests.post(f"{url}/v1/embeddings", json=asked, timeout=TIMEOUT_S).json()
    vectors = np.array([row["embedding"] for row in told["data"]])
    expected = bundle.open_embedder(registry, first.bundle).embed(list(titles.values()))
    assert np.abs(vectors - expected).max() < 1e-5
    others(url)
    new = {"products": [{"market": "de", "id": "new", "text": "Ein ganz neues Produkt\nmit Text"}]}
    assert requests.put(f"{url}/v1/products", json=new, timeout=TIMEOUT_S).json()["change"] == 1
    assert search(url, new["products"][0]["text"], "de")["results"][0]["id"] == "new"
    assert requests.get(f"{url}/v1/search", timeout=TIMEOUT_S).json()["error"]["code"] == "method_not_allowed"

    replies: list[dict[str, Any]] = []
    faults: list[BaseException] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                replies.append(search(url, titles["de"], "de"))
            except BaseException as fault:
                faults.append(fault)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    again = f"{config.run.storage_uri}/again"
    with storage.local_copy(f"{config.run.storage_uri}/aligned", config.storage) as run:
        storage.upload(run, again, config.storage)
    second = promotion.challenge(config, again, "another model").bundle
    half = indexing.build(config, second, products((0.0, 0.5)))
    known = indexing.build(config, second, Source.model_validate(ANSWERS), "knowledge")
    promotion.promote(config, None, half, "fewer products", knowledge=known)
    end = time.monotonic() + 60
    while not replies or replies[-1]["served_by"]["index"] != half:
        assert time.monotonic() < end, replies[-1:]
        time.sleep(0.1)
    over.set()
    for thread in threads:
        thread.join()
    assert not faults
    served_by = {(reply["served_by"]["bundle"], reply["served_by"]["index"]) for reply in replies}
    assert served_by == {(first.bundle, first.index), (second, half)}
    markets = requests.get(f"{url}/v1/models", timeout=TIMEOUT_S).json()["data"][0]["markets"]
    assert 0 < markets["de"] < 64
