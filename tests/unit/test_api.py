"""The HTTP API without Ray: what is refused and how, keys, and the forms of the replies."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from mlray.access import StorageError
from mlray.config import Serving, Storage
from mlray.release.changes import Product
from serve_app import api, guards, keys, metrics
from serve_app.errors import ApiError
from serve_app.keys import Keys
from serve_app.models import Asked
from serve_app.support import Source

BY = {
    "bundle": "b-1",
    "index": "i-1",
    "language": "de",
    "known_by": "declared",
    "step": "base",
    "adapter": None,
}
VECTORS = np.array([[0.6, 0.8], [1.0, 0.0]], np.float32)


_CHANGED = {"taken_up": True, "bundle": "b-1", "index": "i-1"}


class Known:
    """Answers what a test has put there; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.fault: Exception | None = None

    async def search(self, query: str, market: str, k: int, asked: Asked) -> dict[str, Any]:
        self.asked.append((query, market, k, asked))
        if self.fault:
            raise self.fault
        return {"results": [{"id": "p1", "score": 0.5, "title": None}], "served_by": BY}

    async def embed(
        self, texts: list[str], asked: Asked, model: str | None, dimensions: int | None
    ) -> dict[str, Any]:
        self.asked.append((texts, asked, model, dimensions))
        return {"vectors": VECTORS[: len(texts)], "tokens": 9, "served_by": BY}

    async def support(self, messages: list[str], k: int, asked: Asked, write: bool = False) -> dict[str, Any]:
        self.asked.append((messages, k, asked, write))
        source = {"id": "where", "language": "de", "text": "Morgen. Oder später!", "score": 0.9}
        told = {"answer": "Morgen. Oder später!", "intent": "where", "language": "de", "confidence": 0.9}
        told |= {"written": write, "translated": False}
        return {**told, "hand_over": False, "scope": "language", "sources": [source], "served_by": BY}

    async def write(self, question: str, source: Source, bundle: str) -> dict[str, Any]:
        self.asked.append((question, source.text, bundle))
        if self.fault:
            raise self.fault
        return {"answer": None if question == "Wann?" else "Es kommt morgen."}

    async def recommend(
        self, market: str, products: list[str], k: int, query: str = "", customer: str | None = None
    ) -> dict[str, Any]:
        self.asked.append((market, products, k, query, customer))
        hit = {"id": "p2", "score": 3.5, "title": "Tasse", "by": "sessions"}
        by = {"bundle": "b-1", "index": "i-1", "step": "language", "adapter": "de"}
        return {"results": [hit], "unknown": products[1:], "served_by": by}

    async def translate(
        self, texts: list[str], target: str, glossary: dict[str, str], names: list[str], asked: Asked
    ) -> dict[str, Any]:
        self.asked.append((texts, target, glossary, names, asked))
        told = {"text": "Where?", "kept": [], "whole": True}
        by = {**BY, "step": "pivot"}
        return {"translations": [told] * len(texts), "way": ["de", "en"], "quality": 60.0, "served_by": by}

    async def upsert(self, products: list[Product]) -> dict[str, Any]:
        self.asked.append(products)
        return {"change": 1, "products": len(products), "unknown": [], **_CHANGED}

    async def delete(self, products: list[tuple[str, str]]) -> dict[str, Any]:
        self.asked.append(products)
        return {"change": 2, "products": 1, "unknown": products[1:], **_CHANGED}

    async def ready(self) -> str | None:
        return (await self.about())["champion"]

    async def about(self) -> dict[str, Any]:
        if isinstance(self.fault, TimeoutError):
            await asyncio.sleep(10)
        return {"champion": None, "challenger": {"id": "b-2"}, "fault": "the disk is full"}


def client(backend: Known, known: Keys | None = None, host: str = "127.0.0.1", **settings: Any) -> TestClient:
    app = api.create(backend, Serving.model_validate(settings), lambda: known)
    return TestClient(app, "http://localhost", client=(host, 1), raise_server_exceptions=False)


def refused(reply: Any, status: int, code: str) -> str:
    """The sentence of a refusal, once its form is what every refusal has."""
    assert reply.status_code == status, reply.text
    fault = reply.json()["error"]
    assert fault.keys() == {"code", "message", "type", "request_id"}
    assert fault["code"] == code
    assert fault["request_id"] == reply.headers["x-request-id"]
    return str(fault["message"])


def test_a_search_passes_on_what_was_asked() -> None:
    backend = Known()
    body = {"query": "  rote Schuhe ", "market": "de", "language": "de", "k": 3}
    reply = client(backend).post(
        "/v1/search", json=body, headers={"accept-language": "fr", "x-request-id": "r.1"}
    )
    assert reply.json() == {"results": [{"id": "p1", "score": 0.5, "title": None}], "served_by": BY}
    assert reply.headers["x-request-id"] == "r.1"
    assert backend.asked == [("rote Schuhe", "de", 3, Asked("de", "fr"))]


def test_a_recommendation_passes_on_the_session() -> None:
    backend = Known()
    reply = client(backend).post("/v1/recommend", json={"market": "DE", "products": ["p1", "gone"], "k": 2})
    assert reply.json() == {
        "results": [{"id": "p2", "score": 3.5, "title": "Tasse", "by": "sessions"}],
        "unknown": ["gone"],
        "served_by": {"bundle": "b-1", "index": "i-1", "step": "language", "adapter": "de"},
    }
    assert (
        client(backend)
        .post(
            "/v1/recommend", json={"market": "de", "query": " rote Schuhe "}, headers={"x-customer-id": "Eva"}
        )
        .status_code
        == 200
    )
    eva = hashlib.sha256(b"Eva").hexdigest()
    assert backend.asked == [("de", ["p1", "gone"], 2, "", None), ("de", [], 10, "rote Schuhe", eva)]


def test_a_translation_passes_on_glossary_and_names_but_not_what_a_browser_prefers() -> None:
    backend = Known()
    body = {"texts": ["Wo?"], "target": "en", "language": "de", "glossary": {"a": "b"}, "names": ["Norvik"]}
    told = client(backend).post("/v1/translate", json=body, headers={"accept-language": "en"}).json()
    assert told["translations"] == [{"text": "Where?", "kept": [], "whole": True}]
    assert (told["way"], told["quality"], told["served_by"]["step"]) == (["de", "en"], 60.0, "pivot")
    assert backend.asked == [(["Wo?"], "en", {"a": "b"}, ["Norvik"], Asked("de", None))]
    for wrong in ({"texts": []}, {"glossary": {" ": "b"}}, {"names": ["x"] * 257}, {"target": None}):
        refused(client(backend).post("/v1/translate", json={**body, **wrong}), 422, "invalid_request")
    many = {**body, "texts": ["x"] * 257}
    refused(client(backend).post("/v1/translate", json=many), 413, "too_many_texts")


@pytest.mark.parametrize(
    "body",
    [
        {"market": "de", "products": ["p"] * 513},
        {"market": "de", "products": [""]},
        {"market": "de", "products": "p1"},
        {"market": "not a tag!", "products": []},
        {"market": "de", "k": 0},
        {"market": "de", "k": 101},
        {"products": ["p1"]},
        {"market": "de", "product": ["p1"]},
    ],
)
def test_a_recommendation_that_cannot_be_is_refused(body: dict[str, Any]) -> None:
    backend = Known()
    refused(client(backend).post("/v1/recommend", json=body), 422, "invalid_request")
    assert not backend.asked


def test_embeddings_have_the_form_of_openai() -> None:
    backend = Known()
    told = (
        client(backend)
        .post("/v1/embeddings", json={"input": ["a", "b"], "model": "champion", "user": "u"})
        .json()
    )
    assert [row["embedding"] for row in told["data"]] == VECTORS.tolist()
    assert (told["object"], told["model"], told["usage"]["prompt_tokens"]) == ("list", "b-1", 9)
    coded = client(backend).post("/v1/embeddings", json={"input": "a", "encoding_format": "base64"}).json()
    assert (
        np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4").tolist() == VECTORS[0].tolist()
    )
    assert backend.asked[1][0] == ["a"]


def events_of(reply: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """Names and contents of server-sent events."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [block.split("\n") for block in reply.text.strip().split("\n\n")]
    names, data = zip(*events, strict=True)
    return [name.removeprefix("event: ") for name in names], [
        json.loads(one.removeprefix("data: ")) for one in data
    ]


def test_customer_service_answers_at_once_or_as_events() -> None:
    backend = Known()
    turns = [{"text": "Hallo"}, {"role": "assistant", "text": "Ja?"}, {"role": "user", "text": "Wo ist es?"}]
    asked = client(backend)
    told = asked.post("/v1/support", json={"messages": turns, "k": 2}).json()
    assert told["answer"] == told["sources"][0]["text"] == "Morgen. Oder später!"
    assert backend.asked == [(["Hallo", "Wo ist es?"], 2, Asked(), False)]
    eva = {"x-customer-id": "Eva"}
    assert asked.post("/v1/support", json={"messages": turns, "write": True}, headers=eva).json()["written"]
    assert backend.asked[-1][2] == Asked(customer=hashlib.sha256(b"Eva").hexdigest())
    names, data = events_of(asked.post("/v1/support", json={"messages": turns, "stream": True}))
    assert names == ["sources", "answer", "answer", "done"]
    assert data[1]["text"] + data[2]["text"] == told["answer"]
    assert data[0]["sources"] == told["sources"]
    assert data[3] == {key: value for key, value in told.items() if key != "sources"}
    names, data = events_of(
        asked.post("/v1/support", json={"messages": turns, "stream": True, "write": True})
    )
    assert names == ["sources", "answer", "done"]
    assert (data[1]["text"], data[2]["answer"], data[2]["written"]) == (*["Es kommt morgen."] * 2, True)
    # Sources come before what is written, and are looked for once.
    assert backend.asked[-2:] == [
        (["Hallo", "Wo ist es?"], 3, Asked(), False),
        ("Wo ist es?", "Morgen. Oder später!", "b-1"),
    ]
    odd = {"messages": [{"text": "Wann?"}], "stream": True, "write": True}
    assert events_of(asked.post("/v1/support", json=odd))[1][-1]["written"] is False
    backend.fault = ApiError(429, "overloaded", "too much waits", 1.0)
    names, told = events_of(
        asked.post("/v1/support", json={"messages": turns, "stream": True, "write": True})
    )
    assert names == ["sources", "answer", "answer", "done"]
    assert told[-1]["written"] is False  # nothing can be written now: the source answers
    backend.fault = None
    message = refused(asked.post("/v1/support", json={"messages": turns[:2]}), 422, "invalid_request")
    assert "the last message is the customer's" in message


BAD = [
    ({"query": "q"}, 422, "invalid_request", "market: Field required"),
    ({"query": "", "market": "de"}, 422, "invalid_request", "query: String should have at least 1 character"),
    (
        {"query": "q", "market": "de", "k": 0},
        422,
        "invalid_request",
        "k: Input should be greater than or equal",
    ),
    (
        {"query": "q", "market": "de", "k": 101},
        422,
        "invalid_request",
        "k: Input should be less than or equal",
    ),
    ({"query": "q", "market": "de", "kk": 1}, 422, "invalid_request", "kk: Extra inputs are not permitted"),
    ({"query": ["q"], "market": "de"}, 422, "invalid_request", "query: Input should be a valid string"),
    ({"query": "secret" * 2000, "market": "de"}, 413, "text_too_long", "12,000 characters; a text has 8,192"),
]


@pytest.mark.parametrize(("body", "status", "code", "message"), BAD)
def test_a_bad_search_is_refused(body: Any, status: int, code: str, message: str) -> None:
    backend = Known()
    assert message in refused(client(backend).post("/v1/search", json=body), status, code)
    assert not backend.asked


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b'{"query": "\xff\xfe", "market": "de"}', 400, "bad_request"),
        (b"[" * 200_000, 400, "bad_request"),
        (b"\x00", 400, "invalid_json"),
        (b"[]", 422, "invalid_request"),
        (b"", 422, "invalid_request"),
    ],
)
def test_a_body_that_is_no_json_is_refused(content: bytes, status: int, code: str) -> None:
    reply = client(Known()).post("/v1/search", content=content, headers={"content-type": "application/json"})
    message = refused(reply, status, code)
    assert "Traceback" not in message
    assert "/" not in message


def test_too_much_is_refused_before_it_is_read() -> None:
    backend = Known()
    small = client(backend, max_body_bytes=100, max_texts=2)
    refused(small.post("/v1/embeddings", content=b"x" * 101), 413, "body_too_large")
    parts = (b"x" * 60 for _ in range(2))  # chunked, without a length
    refused(small.post("/v1/embeddings", content=parts), 413, "body_too_large")
    assert "3 texts" in refused(
        small.post("/v1/embeddings", json={"input": ["a"] * 3}), 413, "too_many_texts"
    )
    refused(small.get("/nowhere"), 404, "not_found")
    refused(small.get("/v1/search"), 405, "method_not_allowed")
    assert not backend.asked


def test_refusals_of_a_replica_come_through_and_failures_tell_nothing() -> None:
    backend = Known()
    ask = {"query": "q", "market": "de"}
    backend.fault = ApiError(429, "overloaded", "too much waits", 2.4)
    reply = client(backend).post("/v1/search", json=ask)
    refused(reply, 429, "overloaded")
    assert reply.headers["retry-after"] == "2"
    backend.fault = ValueError("the customer's words")
    assert "words" not in refused(client(backend).post("/v1/search", json=ask), 500, "internal")
    refused(client(backend).get("/readyz"), 503, "no_champion")


def test_every_route_but_health_needs_a_key(tmp_path: Path) -> None:
    key, line = keys.make("shop", 1)
    old, expired = keys.make("old", 1)
    told = json.loads(expired) | {"expires": (datetime.now(UTC) - timedelta(days=1)).isoformat()}
    (tmp_path / "keys.jsonl").write_text(f"{line}\n\n{json.dumps(told)}\n")
    known = Keys.read(str(tmp_path / "keys.jsonl"), Storage())
    assert key not in (tmp_path / "keys.jsonl").read_text()
    asked = client(Known(), known)
    paths = {*asked.app.openapi()["paths"], "/openapi.json", "/docs", "/nowhere"}  # type: ignore[attr-defined]
    assert BODIES.keys() < paths
    assert "/metrics" in paths
    for path in paths - set(guards.OPEN):
        refused(asked.get(path), 401, "no_key")
        refused(asked.post(path, headers={"authorization": "Bearer wrong"}), 401, "unknown_key")
        refused(asked.get(path, headers={"authorization": f"Bearer {old}"}), 401, "expired_key")
    assert asked.get("/healthz").status_code == 200
    assert "<title>mlray console</title>" in asked.get("/").text
    assert asked.get("/").headers["content-security-policy"].startswith("default-src 'self'")
    told = asked.get("/v1/models", headers={"authorization": f"bearer {key}"}).json()
    assert (told["data"][0]["id"], told["fault"]) == ("b-2", "the disk is full")


def test_products_change_by_a_key_that_may_write(tmp_path: Path) -> None:
    (reader, first), (writer, second) = keys.make("page", 1), keys.make("catalogue", 1, writes=True)
    (tmp_path / "keys.jsonl").write_text(f"{first}\n{second}\n")
    backend = Known()
    asked = client(backend, Keys.read(str(tmp_path / "keys.jsonl"), Storage()))
    put = {"products": [{"market": "de", "id": "p1", "text": "Kessel\nAus Stahl"}]}
    gone = {"products": [{"market": "de", "id": "p1"}, {"market": "fr", "id": "p2"}]}
    for ask in (
        lambda **k: asked.put("/v1/products", json=put, **k),
        lambda **k: asked.post("/v1/products/delete", json=gone, **k),
    ):
        refused(ask(headers={"authorization": f"Bearer {reader}"}), 403, "read_only_key")
        assert not backend.asked[2:]
        assert ask(headers={"authorization": f"Bearer {writer}"}).status_code == 200
    assert backend.asked == [[Product("de", "p1", "Kessel\nAus Stahl")], [("de", "p1"), ("fr", "p2")]]
    for bad in (
        {"products": []},
        {"products": [{"market": "../de", "id": "p", "text": "x"}]},
        {"products": [{"market": "de", "id": "", "text": "x"}]},
    ):
        refused(
            asked.put("/v1/products", json=bad, headers={"authorization": f"Bearer {writer}"}),
            422,
            "invalid_request",
        )


def test_without_keys_only_this_machine_is_answered() -> None:
    refused(client(Known(), host="10.1.2.3").get("/v1/models"), 401, "no_keys")
    asked = client(Known(), host="::1")
    for name in ("localhost", "localhost:8000", "127.0.0.1", "[::1]:80"):
        assert asked.get("/v1/models", headers={"host": name}).status_code == 200
    assert asked.get("/v1/models", headers={"origin": "http://localhost:8000"}).status_code == 200
    for name, value in {  # another page in the browser, by a name of its own or not, and a proxy's clients
        "host": "evil.example",
        "origin": "https://evil.example",
        "x-forwarded-host": "localhost",
        "via": "1.1 evil.example",
        "x-forwarded-for": "10.1.2.3",
        "forwarded": "for=10.1.2.3",
    }.items():
        refused(asked.get("/v1/models", headers={name: value}), 401, "no_keys")
    for origin in ("null", "http://[", "http://"):  # a page in a frame without a name; no address
        refused(asked.get("/v1/models", headers={"origin": origin}), 401, "no_keys")
    refused(asked.get("/v1/models", headers={"host": "["}), 401, "no_keys")


def test_nobody_waits_for_what_does_not_come() -> None:
    backend = Known()
    backend.fault = TimeoutError()
    asked = client(backend, timeout_s=0.2)
    refused(asked.get("/readyz"), 503, "deadline")
    refused(asked.get("/v1/models"), 503, "deadline")
    sent: list[Message] = []

    async def never() -> Message:
        await asyncio.sleep(10)
        raise AssertionError

    async def ask(path: str) -> int:
        sent.clear()

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": headers,
            "client": ("127.0.0.1", 1),
        }
        scope |= {"query_string": b"", "root_path": "", "scheme": "http", "server": ("localhost", 80)}
        await asyncio.wait_for(asked.app({**scope, "http_version": "1.1"}, never, send), 5)
        return int(sent[0]["status"])

    assert asyncio.run(ask("/v1/search")) == 408  # a body that never ends
    assert asyncio.run(ask("/healthz")) == 405  # and nobody reads one where no key is asked for


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/products", "/v1/products/delete", "/v1/support"])
def test_long_lists_are_refused_as_a_whole(path: str) -> None:
    name = {"/v1/embeddings": "input", "/v1/support": "messages"}.get(path, "products")
    status, code = (422, "invalid_request") if name == "messages" else (413, "too_many_texts")
    ask = client(Known()).put if path == "/v1/products" else client(Known()).post
    one = {"text": "a", "market": "de", "id": "p"}
    item = {"input": "a", "messages": {"text": "a"}}.get(name, one)
    for items in ([item] * 10_000, [1] * 100_000):
        message = refused(ask(path, json={name: items}), status, code)
        assert len(message) < 200
        assert ("at most 64" in message) == (name == "messages")


def test_a_bad_request_id_is_refused_and_unknown_names_are_cut() -> None:
    asked = client(Known())
    refused(asked.get("/v1/models", headers={"x-request-id": "a b"}), 400, "bad_request_id")
    assert len(refused(asked.post("/v1/search", json={"q" * 10_000: 1}), 422, "invalid_request")) < 400


def test_a_line_that_is_no_key_locks_nobody_else_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, line = keys.make("shop", 1)
    place = tmp_path / "keys.jsonl"
    bad = ["{", '{"name": "x"}', '{"name": "x", "sha256": "y", "expires": "soon"}', "[]", "null"]
    place.write_text("\n".join([*bad, line]))
    known = Keys.read(str(place), Storage())
    assert known.check(f"Bearer {key}").name == "shop"
    assert len(caplog.messages) == len(bad)
    place.write_text("")  # the last key is revoked
    with pytest.raises(ApiError, match="unknown_key"):
        Keys.read(str(place), Storage()).check(f"Bearer {key}")
    with pytest.raises(StorageError, match="nowhere: "):
        Keys.read(str(tmp_path / "nowhere"), Storage())


def test_a_day_written_by_hand_is_a_date_of_utc(tmp_path: Path) -> None:
    key, line = keys.make("shop", 1)
    for expires, code in (("2999-12-31", None), ("2001-01-01", "expired_key")):
        (tmp_path / "keys.jsonl").write_text(json.dumps(json.loads(line) | {"expires": expires}))
        known = Keys.read(str(tmp_path / "keys.jsonl"), Storage())
        if code is None:
            assert known.check(f"Bearer {key}").name == "shop"
        else:
            with pytest.raises(ApiError, match=code):
                known.check(f"Bearer {key}")


def test_requests_are_counted_by_route_and_status() -> None:
    asked = client(Known())
    asked.post("/v1/search", json={"query": "q", "market": "de"})
    asked.get("/a/path/that/a/stranger/made/up")
    lines = asked.get("/metrics").text.splitlines()
    assert any(line.startswith('mlray_requests_total{route="/v1/search",status="200"}') for line in lines)
    assert not any("stranger" in line for line in lines)


def test_answers_are_counted_by_what_has_served_them() -> None:
    asked = client(Known())
    before = counts(asked, "mlray_answers_total")
    for route, body in (("search", {"query": "q", "market": "de"}), ("recommend", {"market": "de"})):
        asked.post(f"/v1/{route}", json=body)
    gained = counts(asked, "mlray_answers_total") - before
    assert gained == {
        '{adapter="none",language="de",route="/v1/search",step="base"}': 1.0,
        '{adapter="de",language="none",route="/v1/recommend",step="language"}': 1.0,
    }
    assert counts(asked, "mlray_answer_seconds_count")['{language="de"}'] >= 1


def test_labels_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_known", {})
    asked = client(Known())
    scope = {"path": "/v1/search", "route": object()}
    for number in range(9):
        by = {**BY, "language": f"q{number}a-x-secret{number}", "bundle": f"promoted-{number}"}
        metrics.answered(scope, by, 0.1)
    told = asked.get("/metrics").text
    assert "secret" not in told
    assert 'language="other"' in told
    bundles = [line for line in told.splitlines() if 'bundle="promoted-' in line and "_total" in line]
    assert [line.split('"')[1] for line in bundles] == [f"promoted-{number}" for number in (5, 6, 7, 8)]


def test_grafana_draws_metrics_that_there_are() -> None:
    board = json.loads((Path(api.__file__).parent / "grafana.json").read_text())
    drawn = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    named = set(re.findall(r"mlray_\w+", drawn))
    told = client(Known()).get("/metrics").text
    assert len(named) == 8
    for name in named:
        assert name.removesuffix("_total").removesuffix("_bucket") in told


def counts(asked: TestClient, name: str) -> Counter[str]:
    """Labels -> value of a metric."""
    lines = (line.rpartition(" ") for line in asked.get("/metrics").text.splitlines())
    return Counter(
        {key.removeprefix(name): float(value) for key, _, value in lines if key.startswith(name + "{")}
    )


def test_the_document_says_how_a_key_is_sent() -> None:
    told = client(Known()).get("/openapi.json").json()
    assert told["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    open_routes = {"/healthz", "/readyz"}
    for path, item in told["paths"].items():
        for operation in item.values():
            assert ("security" in operation) == (path not in open_routes), path


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
BODIES = {
    "/v1/search": {"query": "q", "market": "de", "language": "de", "k": 3},
    "/v1/recommend": {"market": "de", "products": ["p1"], "query": "q", "k": 3},
    "/v1/translate": {
        "texts": ["a"],
        "target": "en",
        "language": "de",
        "glossary": {"a": "b"},
        "names": ["x"],
    },
    "/v1/support": {
        "messages": [{"role": "user", "text": "a"}],
        "language": "de",
        "k": 3,
        "stream": False,
        "write": True,
    },
    "/v1/embeddings": {"input": ["a"], "model": "m", "dimensions": 2, "encoding_format": "float"},
    "/v1/products/delete": {"products": [{"market": "de", "id": "p1"}]},
}
ASKED = client(Known())


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(BODIES)), st.data())
def test_no_body_makes_the_server_fail(route: str, data: st.DataObject) -> None:
    body: Any = dict(BODIES[route])
    for name in data.draw(st.lists(st.sampled_from([*body, "other"]), min_size=1, max_size=2)):
        body[name] = data.draw(JSON)
    whole = data.draw(st.sampled_from([body, None]))
    told = ASKED.post(route, json=body if whole else data.draw(JSON))
    assert told.status_code in {200, 400, 413, 422}, told.text
    if told.status_code != 200:
        refused(told, told.status_code, told.json()["error"]["code"])


@pytest.mark.parametrize("fault", [ValueError, ApiError])
def test_no_word_of_a_customer_is_in_the_log(
    fault: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    word = "Geheimnis"

    class Failing:
        """Fails with what it was asked, as a library might."""

        def __getattr__(self, name: str) -> Any:
            async def ask(*told: Any, **more: Any) -> None:
                message = f"{name} {told} {more}"
                raise ApiError(503, "storage", "later", None) if fault is ApiError else fault(message)

            return ask

    json_type = {"content-type": "application/json"}
    bodies = json.loads(json.dumps(BODIES).replace('"a"', f'"{word}"').replace('"q"', f'"{word}"'))
    asked = client(Failing())  # type: ignore[arg-type]
    with caplog.at_level("INFO"):
        for route, body in bodies.items():
            reply = asked.post(route, json=body, headers={"x-customer-id": word})
            assert reply.status_code == (503 if fault is ApiError else 500), route
            assert word not in reply.text
        assert asked.post("/v1/search", json={"query": word, "market": word}).status_code == 422
        assert asked.post("/v1/search", content=word, headers=json_type).status_code == 400
    assert word not in caplog.text
    if fault is not ApiError:
        assert re.search(r"fault [0-9a-f]{8}: request [0-9a-f]+ failed with ValueError", caplog.text)


def test_an_answer_that_fails_half_way_ends_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    backend = Known()
    backend.fault = ValueError("Geheimnis")
    turns = {"messages": [{"text": "Geheimnis"}], "stream": True, "write": True}
    with caplog.at_level("INFO"):
        reply = client(backend).post("/v1/support", json=turns)
    assert reply.status_code == 200
    assert "event: sources" in reply.text
    assert "event: done" not in reply.text
    assert "failed with ValueError" in caplog.text
    assert "Geheimnis" not in caplog.text


def test_latency_is_told_per_language() -> None:
    asked = client(Known())
    asked.post("/v1/search", json={"query": "q", "market": "de"})
    row = asked.get("/v1/models").json()["latency"]["de"]
    assert row["answers"] >= 1
    assert 0 < row["p50_s"] <= row["p95_s"]
