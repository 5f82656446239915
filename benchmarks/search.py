"""Products near a query in one market: ours beside the indexes that shops use, at equal recall.

    python benchmarks/search.py --model WEIGHTS --peer-python PYTHON [--products 100000] [--queries 1000] [--rounds 5]

Sentences of eight languages, and of others where these have too few (`../shared/data/opus_tatoeba`, or `--data`),
become vectors by the encoder at WEIGHTS, such as `jobs/configs/align_tatoeba.yaml` leaves; a product's market is
drawn by 1/rank, so the largest of eight has 37 % and the smallest 5 % of them. Queries are other sentences, each in a
market that is drawn likewise. Each arm (see `search_arms.py`) is a process of its own, in an environment with
`peers/search.txt`. It takes the cheapest of its settings that finds 95 % of the ten exact nearest; `ours-served`
takes the wider one that is served. Then come the timed rounds, in alternating order: every query alone, then in
batches of 64. Before, each arm changes and deletes a thousand products, or says that it cannot.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import numpy as np

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data" / "opus_tatoeba"
LANGUAGES = ("de", "es", "fr", "it", "ja", "pt", "ru", "zh")
ARMS = (
    "ours",
    "ours-served",
    "faiss-flat",
    "faiss-hnsw",
    "faiss-hnsw-market",
    "hnswlib-market",
    "usearch",
    "lancedb",
)
NEAREST = 10


def main() -> int:
    arguments = parse()
    os.environ.update(OMP_NUM_THREADS="2", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(HERE.parent))
    report: dict[str, Any] = {"machine": measure.machine(["numpy", "torch"]), "products": arguments.products}
    with tempfile.TemporaryDirectory(prefix="search-") as name:
        folder = Path(name)
        prepare(arguments, folder)
        report["arms"] = run(arguments, folder)
    report["machine"]["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    path = measure.write_json(f"search_{arguments.products}", report, arguments.results)
    print(f"{render(report)}\nfigures: {path.name}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Nearest products of a market, beside peers.")
    parser.add_argument("--model", required=True, help="weights of an encoder of texts")
    parser.add_argument("--peer-python", required=True, help="interpreter with peers/search.txt installed")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--products", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--results", type=Path, default=measure.RESULTS)
    return parser.parse_args()


def sentences(data: Path, wanted: int) -> list[str]:
    """Distinct sentences, as many of each language as there are to be had of the rarest that fills its share."""
    found: dict[str, None] = {}
    others = {part for path in data.glob("*.tsv.gz") for part in path.name.removesuffix(".tsv.gz").split("-")}
    for language in (*LANGUAGES, *sorted(others.difference(LANGUAGES))):
        if language not in LANGUAGES and len(found) >= wanted:
            break
        own: dict[str, None] = {}
        for path in sorted(data.glob(f"*{language}*.tsv.gz")):
            column = path.name.removesuffix(".tsv.gz").split("-").index(language)
            with gzip.open(path, "rt", encoding="utf-8") as file:
                own.update(dict.fromkeys(line.rstrip("\n").split("\t")[column] for line in file))
            if len(own) > 2 * wanted // len(LANGUAGES):
                break
        found.update(own)
    if len(found) < wanted:
        raise SystemExit(f"{data} has {len(found)} sentences, fewer than {wanted}")
    draw = np.random.default_rng(0)
    texts = list(found)
    return [texts[i] for i in draw.permutation(len(texts))[:wanted]]


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Vectors and markets of products and queries, and the exact nearest."""
    from mlray.config import RunConfig
    from mlray.tuning.embed import opener

    texts = sentences(arguments.data, arguments.products + arguments.queries)
    vectors = opener(RunConfig(), arguments.model)().embed(texts)
    pool, queries = vectors[: arguments.products], vectors[arguments.products :]
    shares = 1 / np.arange(1, 9)
    draw = np.random.default_rng(1)
    markets, asked = (draw.choice(8, size=len(one), p=shares / shares.sum()) for one in (pool, queries))
    truth = np.zeros((len(queries), NEAREST), np.int64)
    for market in range(8):
        own, mine = np.flatnonzero(markets == market), np.flatnonzero(asked == market)
        products = queries[mine].astype(np.float64) @ pool[own].T.astype(np.float64)
        truth[mine] = own[np.argsort(-products, axis=1, kind="stable")[:, :NEAREST]]
    for name, array in {
        "pool": pool,
        "queries": queries,
        "markets": markets,
        "asked": asked,
        "truth": truth,
    }.items():
        np.save(folder / f"{name}.npy", array)


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of every arm."""
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        arms = {}
        for name in arguments.arms:
            command = [arguments.peer_python, str(HERE / "search_arms.py"), str(folder), name]
            arms[name] = stack.enter_context(measure.Arm(command, folder / f"{name}.log"))
            found[name] = arms[name].answer()  # one builds at a time
        samples = measure.alternate({name: arm.go for name, arm in arms.items()}, arguments.rounds)
    for name, rounds in samples.items():
        for key in ("p50_ms", "p99_ms", "batch_per_s"):
            found[name][key] = measure.spread([one[key] for one in rounds])
        found[name]["ours_over_it"] = {
            "p50": measure.ratio(
                [1 / one["p50_ms"] for one in samples["ours"]], [1 / one["p50_ms"] for one in rounds]
            ),
            "batch": measure.ratio(
                [one["batch_per_s"] for one in samples["ours"]], [one["batch_per_s"] for one in rounds]
            ),
        }
    return found


def render(report: dict[str, Any]) -> str:
    """One table."""
    header = (
        *(
            "arm",
            "setting",
            "recall@10",
            "p50 ms",
            "p99 ms",
            "queries/s of 64",
            "ours / it, one",
            "ours / it, 64",
        ),
        *("build s", "MB on disk", "MB held", "1,000 changed s", "1,000 deleted s"),
    )
    rows = [
        (
            *(name, one["setting"], f"{one['recall']:.3f}", str(one["p50_ms"]), str(one["p99_ms"])),
            *(str(one["batch_per_s"]), str(one["ours_over_it"]["p50"]), str(one["ours_over_it"]["batch"])),
            *(f"{one['build_s']:.1f}", f"{one['disk_mb']:.0f}", f"{one['held_mb']:.0f}"),
            *("no" if one[key] is None else f"{one[key]:.2f}" for key in ("change_s", "delete_s")),
        )
        for name, one in report["arms"].items()
    ]
    return measure.table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
