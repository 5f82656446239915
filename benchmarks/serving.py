"""One encoder behind HTTP: ours beside what people put in front of it, by the same clients.

    python benchmarks/serving.py --run RUN --infinity INFINITY_EMB [--seconds 4] [--rounds 5]

RUN is a finished, judged run of jobs/align.py; its weights answer in every arm on this machine, which also holds the
clients; a peer has its threads, ours those that Serve gives a replica. Each arm is a server of its own
(`serving_arms.py`; infinity-emb in an environment with `peers/serving.txt`, by its command INFINITY_EMB). First the
vectors are compared. Then clients ask `/v1/embeddings` for a text of some 16 tokens each, one after the other: 1, 8
and 32 at a time; then 32 in six languages; then for 64 texts at once; then at random times (Poisson) at 70 % of the
most that was reached. A request tells its language, as a shop's pages would, English but in the load of six: ours lets
languages wait in lines of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import measure
import numpy as np

HERE = Path(__file__).resolve().parent
ARMS = ("fastapi", "stock-serve", "serve-batch", "infinity", "ours")
CLIENTS = (1, 8, 32)
MODEL = "champion"
PACKAGES = ("ray", "fastapi", "uvicorn", "torch", "transformers", "sentence-transformers")
_WORDS = (
    "water",
    "kettle",
    "green",
    "tea",
    "coffee",
    "warm",
    "cold",
    "blue",
    "steel",
    "glass",
    "cup",
    "lamp",
)
_TOKENS = 16
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
_STARTS_S = 120
_SAME = 0.9999
_LANGUAGES = ("en", "de", "es", "fr", "ja", "ru")
"""What the clients say that they speak: all the first, or one each in turn; only ours has lines for them."""
_MIXED = f"c={CLIENTS[-1]}, six languages"


def main() -> int:
    arguments = parse()
    prepare()
    weights = weights_of(arguments.run)
    words = words_of(weights)
    report: dict[str, Any] = {
        "machine": measure.machine(PACKAGES),
        "encoder": sizes(weights),
        "words": words,
        "seconds": arguments.seconds,
    }
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.arms}
    vectors: dict[str, np.ndarray] = {}
    for number in range(arguments.rounds):
        for name in arguments.arms if number % 2 == 0 else reversed(arguments.arms):
            with server(name, weights, arguments) as url:
                vectors[name] = asyncio.run(compared(url, words))
                rounds[name].append(asyncio.run(measured(url, arguments.seconds, words)))
            print(f"{name}: {rounds[name][-1]['c=32']}", flush=True)
    first = vectors[arguments.arms[0]]
    report["least_cosine"] = {name: float((rows * first).sum(axis=1).min()) for name, rows in vectors.items()}
    if (least := min(report["least_cosine"].values())) < _SAME:
        raise SystemExit(
            f"the arms give other vectors (cosine {least:.6f}): their speeds are not to be compared"
        )
    report["arms"] = {name: told(own) for name, own in rounds.items()}
    if "mlray" in rounds:
        report["ours_over_it"] = {name: ratios(rounds["mlray"], own) for name, own in rounds.items()}
    report["machine"]["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    path = measure.write_json("serving", report, arguments.results)
    print(f"{render(report)}\nfigures: {path.name}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One encoder behind HTTP, beside peers.")
    parser.add_argument("--run", type=Path, required=True, help="folder of a judged run of jobs/align.py")
    parser.add_argument("--infinity", required=True, help="the command infinity_emb")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--results", type=Path, default=measure.RESULTS)
    return parser.parse_args()


def prepare() -> None:
    """What holds for every server."""
    os.environ.update(
        CUDA_VISIBLE_DEVICES="",
        PYTHONPATH=str(HERE.parent),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        HF_HUB_OFFLINE="1",
    )


def weights_of(run: Path) -> str:
    """The folder of a run's weights."""
    found: str = json.loads((run / "report.json").read_text(encoding="utf-8"))["weights"]
    return found


def sizes(weights: str) -> dict[str, Any]:
    """What the encoder says of itself."""
    found = json.loads((Path(weights) / "config.json").read_text(encoding="utf-8"))
    return {key: found[key] for key in sorted(_SIZES)}


def words_of(weights: str) -> int:
    """How many words make a text of some 16 tokens, as the encoder cuts them."""
    from mlray.models import tokenizer

    (tokens,) = tokenizer.encoder(tokenizer.load(weights)).encode([" ".join(_WORDS)])
    return max(1, round(_TOKENS * len(_WORDS) / len(tokens)))


@contextlib.contextmanager
def server(name: str, weights: str, arguments: argparse.Namespace) -> Iterator[str]:
    """The address of an arm that answers; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        command = [sys.executable, str(HERE / "serving_arms.py"), name, weights, str(port)]
        if name == "infinity":
            prefix = [
                "--url-prefix",
                "/v1",
                "--engine",
                "torch",
                "--device",
                "cpu",
                "--served-model-name",
                MODEL,
            ]
            known = for_transformers_4(Path(weights), Path(folder))
            command = [arguments.infinity, "v2", "--model-id", known, "--port", str(port), *prefix]
        if name == "ours":
            registry = registered(arguments.run, Path(folder))
            settings = [f"release.registry_uri={registry}", f"serving.port={port}"]
            command = [sys.executable, "-m", "serve_app", *settings]
        # Ray gives a replica a thread for each of `serving.cpus_per_replica`; a peer has the machine.
        environment = os.environ | ({} if name == "ours" else {"OMP_NUM_THREADS": str(os.cpu_count())})
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                url = f"http://127.0.0.1:{port}/v1/embeddings"
                wait(url, process, Path(folder) / "log")
                yield url
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                process.kill()


def for_transformers_4(weights: Path, folder: Path) -> str:
    """The same weights for infinity-emb, whose transformers 4 knows the class of a tokenizer by another name."""
    copy = shutil.copytree(weights, folder / "weights")
    told = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    told["tokenizer_class"] = "PreTrainedTokenizerFast"
    (copy / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    return str(copy)


def registered(run: Path, folder: Path) -> str:
    """A registry whose champion is the run."""
    from mlray import configuration
    from mlray.release import promotion

    config = configuration.load(None, [f"release.registry_uri={folder}/registry"])
    promotion.challenge(config, str(run), "")
    promotion.promote(config, None, None, "")
    return f"{folder}/registry"


def wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until an arm answers."""
    until = time.monotonic() + _STARTS_S
    body = json.dumps(asked(["a"])).encode()
    while True:
        try:
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=10):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(log.read_text()[-3000:]) from None
            time.sleep(0.5)


def asked(texts: list[str]) -> dict[str, Any]:
    """The body of a request."""
    return {"input": texts, "model": MODEL}


def text(draw: random.Random, words: int) -> str:
    """Some words at random."""
    return " ".join(draw.choices(_WORDS, k=words))


async def ask(
    session: aiohttp.ClientSession, url: str, texts: list[str], language: str = _LANGUAGES[0]
) -> tuple[float, list[Any]]:
    """Seconds, and what was answered."""
    begin = time.perf_counter()
    async with session.post(url, json=asked(texts), headers={"accept-language": language}) as told:
        told.raise_for_status()
        return time.perf_counter() - begin, (await told.json())["data"]


async def compared(url: str, words: int) -> np.ndarray:
    """Vectors of the same texts."""
    draw = random.Random(0)
    async with aiohttp.ClientSession() as session:
        _, data = await ask(session, url, [text(draw, words) for _ in range(32)])
    return np.array([row["embedding"] for row in data])


async def measured(url: str, seconds: float, words: int) -> dict[str, Any]:
    """Each load, one after the other."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        ask_for = functools.partial(closed, session, url, words)
        await ask_for(8, 1, seconds / 4)  # warm
        found = {f"c={clients}": await ask_for(clients, 1, seconds) for clients in CLIENTS}
        found[_MIXED] = await ask_for(CLIENTS[-1], 1, seconds, _LANGUAGES)
        found["bulk of 64"] = await ask_for(1, 64, seconds)
        most = max(found[f"c={clients}"]["per_s"] for clients in CLIENTS)
        found["Poisson"] = await poisson(session, url, words, 0.7 * most, seconds)
    return found


async def closed(
    session: aiohttp.ClientSession,
    url: str,
    words: int,
    clients: int,
    size: int,
    seconds: float,
    languages: tuple[str, ...] = _LANGUAGES[:1],
) -> dict[str, float]:
    """Clients that each ask again as soon as they are answered."""
    until, times = time.perf_counter() + seconds, list[float]()

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.perf_counter() < until:
            texts = [text(draw, words) for _ in range(size)]
            taken, _ = await ask(session, url, texts, languages[number % len(languages)])
            times.append(taken)

    begin = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return summary(times, size * len(times) / (time.perf_counter() - begin))


async def poisson(
    session: aiohttp.ClientSession, url: str, words: int, per_s: float, seconds: float
) -> dict[str, float]:
    """Requests at random times, whether the ones before are answered or not."""
    draw, times = random.Random(0), list[float]()
    begin = time.perf_counter()
    due, waiting = begin, list[asyncio.Task[None]]()

    async def one(asked_for: str) -> None:
        taken, _ = await ask(session, url, [asked_for])
        times.append(taken)

    while due < begin + seconds:
        due += draw.expovariate(per_s)
        await asyncio.sleep(max(due - time.perf_counter(), 0.0))
        waiting.append(asyncio.create_task(one(text(draw, words))))
    await asyncio.gather(*waiting)
    return summary(times, len(times) / (time.perf_counter() - begin))


def summary(times: list[float], per_s: float) -> dict[str, float]:
    """Texts a second, and milliseconds of a request."""
    p50, p95, p99 = (1000.0 * float(one) for one in np.quantile(times, [0.5, 0.95, 0.99]))
    return {"per_s": per_s, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "n": len(times)}


def told(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, minimum and maximum over the rounds of every figure."""
    return {
        load: {key: measure.spread([one[load][key] for one in rounds]) for key in rounds[0][load]}
        for load in rounds[0]
    }


def ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Load -> our requests a second over theirs, round by round."""
    return {
        load: measure.ratio([one[load]["per_s"] for one in ours], [one[load]["per_s"] for one in theirs])
        for load in ours[0]
    }


def render(report: dict[str, Any]) -> str:
    """A row for each arm."""
    loads = [f"c={clients}" for clients in CLIENTS]
    rows = []
    for name, own in report["arms"].items():
        per_s = [f"{own[load]['per_s'].median:,.0f}" for load in [*loads, _MIXED, "bulk of 64"]]
        most, random_times = own[loads[-1]], own["Poisson"]
        rows.append(
            (
                name,
                *per_s,
                f"{most['p50_ms'].median:.0f} / {most['p99_ms'].median:.0f}",
                f"{random_times['p50_ms'].median:.0f} / {random_times['p99_ms'].median:.0f}",
            )
        )
    header = ("arm", *loads, _MIXED, "bulk of 64", "p50 / p99 ms, c=32", "p50 / p99 ms, Poisson 70 %")
    return measure.table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
