"""Whether a flood in one language slows the others down.

    python benchmarks/flood.py --run RUN [--clients 64] [--rate 4] [--seconds 10] [--rounds 5]

RUN is a finished, judged run of jobs/align.py, served by `python -m serve_app` on this machine, which also holds the
clients. Customers of seven languages ask `/v1/embeddings` for a text of 16 words at random times, `--rate` a second in
each; then an eighth language joins them with `--clients` that ask again as soon as they are answered. The two states
take turns; what counts are the answers to the seven.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import random
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import measure
import numpy as np
import serving

QUIET, WORDS = 7, 16
"""Languages that ask as ever, and words of a text."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Latency of seven languages while an eighth floods.")
    parser.add_argument("--run", type=Path, required=True, help="folder of a judged run of jobs/align.py")
    parser.add_argument("--clients", type=int, default=64, help="of the flood")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second of each other language")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each state in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=measure.RESULTS)
    arguments = parser.parse_args()
    serving.prepare()
    report: dict[str, Any] = {"machine": measure.machine(serving.PACKAGES)}
    report |= {name: getattr(arguments, name) for name in ("clients", "rate", "seconds")}
    weights = serving.weights_of(arguments.run)
    with serving.server("ours", weights, arguments) as url:
        states = asyncio.run(rounds(url, arguments))
    report |= {"rounds": states, **told(states)}
    path = measure.write_json("flood", report, arguments.results)
    print(f"{render(report)}\nfigures: {path.name}")
    return 0


async def rounds(url: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Both states, in turn the one or the other first."""
    connector, found = aiohttp.TCPConnector(limit=0), list[dict[str, Any]]()
    async with aiohttp.ClientSession(connector=connector) as session:
        async with session.get(url.replace("/embeddings", "/models")) as answer:
            (champion, *_) = (await answer.json())["data"]
        flood, *others = [name for name in champion["languages"] if name.isalpha()][: QUIET + 1]
        if len(others) < QUIET:
            raise RuntimeError(f"the run was judged in {len(others) + 1} languages alone")
        await State(session, url, arguments.rate).measured(others, arguments.seconds / 4)  # warm
        for number in range(arguments.rounds):
            own: dict[str, Any] = {}
            for name in ("quiet", "flood") if number % 2 == 0 else ("flood", "quiet"):
                clients = arguments.clients if name == "flood" else 0
                asked = State(session, url, arguments.rate)
                own[name] = await asked.measured(others, arguments.seconds, flood, clients)
            found.append(own)
            print(f"round {number + 1}: {own}", flush=True)
    return found


class State:
    """Clients of one state, and what they were answered."""

    def __init__(self, session: aiohttp.ClientSession, url: str, rate: float) -> None:
        self._session, self._url, self._rate = session, url, rate
        self._times: list[float] = []
        self._answers: collections.Counter[int] = collections.Counter()

    async def measured(
        self, others: list[str], seconds: float, flood: str = "", clients: int = 0
    ) -> dict[str, Any]:
        """Milliseconds of the answers to the others, and how many the flood got by status."""
        floods = [asyncio.create_task(self._flooding(number, flood)) for number in range(clients)]
        await asyncio.gather(*(self._customers(language, seconds) for language in others))
        for one in floods:
            one.cancel()
        ends = await asyncio.gather(*floods, return_exceptions=True)
        if faults := [end for end in ends if not isinstance(end, asyncio.CancelledError)]:
            raise RuntimeError(f"the flood has ended: {faults[0]!r}")
        p50, p95 = (1000.0 * float(one) for one in np.quantile(self._times, [0.5, 0.95]))
        return {"p50_ms": p50, "p95_ms": p95, "n": len(self._times), "flood": dict(self._answers)}

    async def _ask(self, language: str, words: str) -> tuple[float, int]:
        begin = time.perf_counter()
        body = {**serving.asked([words]), "language": language}
        async with self._session.post(self._url, json=body) as answer:
            await answer.read()
            return time.perf_counter() - begin, answer.status

    async def _customers(self, language: str, seconds: float) -> None:
        """Requests at random times, whether the ones before are answered or not."""
        draw, until = random.Random(language), time.perf_counter() + seconds
        waiting: set[asyncio.Task[None]] = set()
        while time.perf_counter() < until:
            await asyncio.sleep(draw.expovariate(self._rate))
            waiting.add(asyncio.create_task(self._customer(language, serving.text(draw, WORDS))))
        await asyncio.gather(*waiting)

    async def _customer(self, language: str, words: str) -> None:
        taken, status = await self._ask(language, words)
        if status != 200:
            raise RuntimeError(f"{language}: status {status}")
        self._times.append(taken)

    async def _flooding(self, number: int, language: str) -> None:
        draw = random.Random(number)
        while True:
            _, status = await self._ask(language, serving.text(draw, WORDS))
            self._answers[status] += 1
            if status == 429:
                await asyncio.sleep(0.1)


def told(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, minimum and maximum over the rounds."""
    found: dict[str, Any] = {
        name: {key: measure.spread([one[name][key] for one in states]) for key in ("p50_ms", "p95_ms")}
        for name in ("quiet", "flood")
    }
    found["ratio"] = {
        key: measure.spread([one["flood"][key] / one["quiet"][key] for one in states])
        for key in ("p50_ms", "p95_ms")
    }
    return found


def render(report: dict[str, Any]) -> str:
    """A row for each state."""
    rows = [
        (name, *(str(report[name][key]) for key in ("p50_ms", "p95_ms")))
        for name in ("quiet", "flood", "ratio")
    ]
    return measure.table(("seven languages", "p50 ms", "p95 ms"), rows)


if __name__ == "__main__":
    sys.exit(main())
