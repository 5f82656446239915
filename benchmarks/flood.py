"""Whether a flood in one language slows the others down.

    python benchmarks/flood.py --run RUN [--clients 64] [--rate 4] [--seconds 10] [--rounds 5]

RUN is a finished, judged run of jobs/align.py, served by `python -m serve_app` on this machine, which also holds the
clients. Customers of seven languages ask `/v1/embeddings` for a text of 16 words at random times, `--rate` a second in
each; then an eighth language joins them, from a process of its own, with `--clients` that ask again as soon as they
are answered. The two states take turns; what counts are the answers to the seven. Beside them: the share of a core
that each process took.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import aiohttp
import measure
import numpy as np
import serving

QUIET, WORDS = 7, 16
"""Languages that ask as ever, and words of a text."""
KINDS = {
    "haproxy": "HAProxy",
    ":Ingress": "ingress",
    ":Models": "models",
    "spawn_main": "flood's clients",
}
"""What a process does, by a mark in its command line."""


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
        await customers(session, url, others, arguments.rate, arguments.seconds / 4)  # warm
        for number in range(arguments.rounds):
            own: dict[str, Any] = {}
            for name in ("quiet", "flood") if number % 2 == 0 else ("flood", "quiet"):
                clients = arguments.clients if name == "flood" else 0
                with flooded(url, flood, clients) as answers:
                    before, begin = busy(), time.perf_counter()
                    own[name] = await customers(session, url, others, arguments.rate, arguments.seconds)
                    own[name]["cores"] = shares(before, busy(), time.perf_counter() - begin)
                own[name]["flood_a_second"] = answers
            found.append(own)
            print(f"round {number + 1}: {own}", flush=True)
    return found


async def ask(session: aiohttp.ClientSession, url: str, language: str, words: str) -> tuple[float, int]:
    """Seconds, and the status."""
    begin = time.perf_counter()
    async with session.post(url, json={**serving.asked([words]), "language": language}) as answer:
        await answer.read()
        return time.perf_counter() - begin, answer.status


async def customers(
    session: aiohttp.ClientSession, url: str, languages: list[str], rate: float, seconds: float
) -> dict[str, Any]:
    """Milliseconds of answers to requests at random times, whether the ones before are answered or not."""
    times: list[float] = []

    async def one(language: str, words: str) -> None:
        taken, status = await ask(session, url, language, words)
        if status != 200:
            raise RuntimeError(f"{language}: status {status}")
        times.append(taken)

    async def some(language: str) -> None:
        draw, until = random.Random(language), time.perf_counter() + seconds
        waiting: set[asyncio.Task[None]] = set()
        while time.perf_counter() < until:
            await asyncio.sleep(draw.expovariate(rate))
            waiting.add(asyncio.create_task(one(language, serving.text(draw, WORDS))))
        await asyncio.gather(*waiting)

    await asyncio.gather(*map(some, languages))
    p50, p95 = (1000.0 * float(one) for one in np.quantile(times, [0.5, 0.95]))
    return {"p50_ms": p50, "p95_ms": p95, "n": len(times)}


@contextlib.contextmanager
def flooded(url: str, language: str, clients: int) -> Iterator[dict[int, float]]:
    """The flood lasts as long as the block, from another process; then its answers a second are told, by status."""
    answers: dict[int, float] = {}
    if not clients:
        yield answers
        return
    spawn = multiprocessing.get_context("spawn")
    under_way, over = spawn.Event(), spawn.Event()
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=flooding, args=(url, language, clients, under_way, over, sender))
    process.start()
    try:
        if not under_way.wait(60):
            raise RuntimeError("the flood has not begun")
        yield answers
        over.set()
        if not receiver.poll(60):
            raise RuntimeError("the flood has ended too early")
        answers.update(receiver.recv())
    finally:
        over.set()
        process.join(60)


def flooding(url: str, language: str, clients: int, under_way: Event, over: Event, sender: Any) -> None:
    """A process: clients that ask again as soon as they are answered."""
    answers: collections.Counter[int] = collections.Counter()

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        draw = random.Random(number)
        while not over.is_set():
            _, status = await ask(session, url, language, serving.text(draw, WORDS))
            under_way.set()
            answers[status] += 1
            if status == 429:
                await asyncio.sleep(0.1)

    async def all_of_them() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(client(session, number) for number in range(clients)))

    begin = time.perf_counter()
    asyncio.run(all_of_them())
    seconds = time.perf_counter() - begin
    sender.send({status: count / seconds for status, count in answers.items()})


def busy() -> dict[tuple[int, str], float]:
    """CPU seconds until now of each process below this one, and of this one, by what it does."""
    return {(pid, kind_of(pid)): seconds for pid, seconds in measure.cpu_s(os.getpid()).items()}


def kind_of(pid: int) -> str:
    """What a process does, by its command line."""
    if pid == os.getpid():
        return "customers"
    command = ""
    with contextlib.suppress(OSError):  # it has just ended
        command = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    return next((kind for mark, kind in KINDS.items() if mark in command), "rest of Ray")


def shares(
    before: dict[tuple[int, str], float], after: dict[tuple[int, str], float], seconds: float
) -> dict[str, float]:
    """Of a core, by what a process does; processes that began in between count whole."""
    found: dict[str, float] = collections.defaultdict(float)
    for (pid, kind), until in after.items():
        found[kind] += (until - before.get((pid, kind), 0.0)) / seconds
    return {kind: round(found[kind], 3) for kind in sorted(found, key=found.__getitem__, reverse=True)}


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
    found["flood"]["answers_a_second"] = measure.spread(
        [one["flood"]["flood_a_second"].get(200, 0.0) for one in states]
    )
    for name in ("quiet", "flood"):
        kinds = states[0][name]["cores"]
        found[name]["cores"] = {
            kind: measure.spread([one[name]["cores"].get(kind, 0.0) for one in states]) for kind in kinds
        }
    return found


def render(report: dict[str, Any]) -> str:
    """A row for each state, and who had the cores."""
    rows = [
        (name, *(str(report[name][key]) for key in ("p50_ms", "p95_ms")))
        for name in ("quiet", "flood", "ratio")
    ]
    flood = report["flood"]
    cores = [
        (kind, str(report["quiet"]["cores"].get(kind, "-")), str(of)) for kind, of in flood["cores"].items()
    ]
    return "\n\n".join(
        (
            measure.table(("seven languages", "p50 ms", "p95 ms"), rows),
            measure.table(("cores", "quiet", "flood"), cores),
            f"answers of the flood a second: {flood['answers_a_second']}",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
