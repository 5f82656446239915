"""Text on S3 to batches of token ids: ours against its peers and against the bare tokenizer.

    python benchmarks/input_pipeline.py [--megabytes 20] [--rounds 5] [--streaming-python VENV/bin/python]

Real sentences in 36 languages (`../shared/data/mono`, or `--data`) become hive-partitioned parquet on a moto
S3 server in a process of its own, and a 16k Unigram tokenizer is trained on them, once. Every arm then turns
the same documents into batches, each in a process of its own, one at a time, in alternating order:

bare          `tokenizers.encode_batch_fast` over texts in memory: the limit
hf_streaming  `datasets` streaming, `map(batched=True)`, `DataLoader` with a padding collator
hf_map        `datasets.map(num_proc=2)`, the same loader
ray_stock     Ray Data: `read_parquet`, `map_batches` (tokenise, pad), `iter_torch_batches`
mosaic        MosaicML streaming (see `peers/streaming_arm.py`); needs `--streaming-python`
ours          `mlray.corpus.stream`: one epoch, alpha 1, no rows held out

First a census of a small corpus: all arms must give the same multiset of documents and the same tokens; of
every timed pass the sums are checked. In a round every arm reads the small corpus and the whole one. "MB/s"
is the whole one's; "sustained" is that of the text by which it exceeds the small one, over the time by which
it takes longer, so that what an arm starts once does not count: a figure for `--megabytes 20` and more, rough
at the default size. Ours is also opened at 90 % of the epoch.

The clock runs from the call that opens the data to the last batch. Before it lie imports, loading the
tokenizer, a running Ray cluster that has run a first data set, MosaicML's conversion to its own format, and
our manifest (timed apart). Ray's actors and tasks, the loaders' workers and the Arrow cache of `datasets.map`
lie inside. The `datasets` arms read a local copy of the files, which favours them: S3 would need s3fs, which this
project leaves out. No peer is asked to shuffle; ours does. Peers cut documents at 128 tokens, ours splits
them. CPU seconds and memory are those of all processes of an arm, without the S3 server.

Figures go to `results/input_pipeline.json` and, as a table, to the terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import input_corpus
import measure
from arm import ArmProcess, Corpus, Setup
from pretrain_mono import s3_server

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data" / "mono"
PACKAGES = ("ray", "tokenizers", "transformers", "datasets", "torch", "pyarrow", "numpy", "moto")
PEERS = ("bare", "hf_streaming", "hf_map", "ray_stock", "mosaic")
SMALL_MB = 1.0
MEGABYTES = 8.0
BATCH_ROWS = 64
SEQUENCE_LENGTH = 128

Passes = dict[str, dict[str, Any]]
"""Of one arm in one round: name of the corpus -> figures."""


def main() -> int:
    """Parses, prepares, runs what was asked for and keeps its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of <lang>.txt.gz files")
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help="over about 100, lines repeat")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=PEERS, default=list(PEERS), help="peers beside ours")
    parser.add_argument("--streaming-python", help="interpreter with peers/streaming.txt installed")
    parser.add_argument("--results", type=Path, default=measure.RESULTS)
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        print(f"no data at {arguments.data}; name the folder with --data", file=sys.stderr)
        return 2
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="input-")))
        endpoint = stack.enter_context(s3_server())["AWS_ENDPOINT_URL"]
        compare_arms(arguments, folder, endpoint)
    return 0


def compare_arms(arguments: argparse.Namespace, folder: Path, endpoint: str) -> None:
    """Census, rounds, report."""
    machine = measure.machine(PACKAGES)
    sizes = {"small": SMALL_MB, "whole": arguments.megabytes}
    setup = prepare(arguments.data, sizes, folder, endpoint)
    whole = setup.corpora["whole"]
    rest = dataclasses.replace(whole, name="rest", first_window=whole.windows * 9 // 10)
    setup = dataclasses.replace(setup, corpora={**setup.corpora, "rest": rest})
    with start("scan", setup, folder) as process:
        manifest = run(process, {"small": None, "whole": None})
    names = [name for name in arguments.arms if name != "mosaic" or arguments.streaming_python]
    with contextlib.ExitStack() as stack:
        arms = {
            name: stack.enter_context(start(name, setup, folder, arguments.streaming_python))
            for name in [*names, "ours"]
        }
        census = take_census(arms)
        samples = measure.alternate({name: timed(name, arm) for name, arm in arms.items()}, arguments.rounds)
    check_sums(samples)
    report = {
        "machine": machine,
        "load_average_at_end": [round(value, 2) for value in os.getloadavg()],
        "mosaic_environment": peer_versions(arguments.streaming_python),
        "settings": {"batch_rows": BATCH_ROWS, "sequence_length": SEQUENCE_LENGTH},
        "corpora": {name: describe(corpus) for name, corpus in setup.corpora.items()},
        "census": census,
        "summary": {name: summarise(runs, samples["ours"], setup) for name, runs in samples.items()},
        "not_run": {name: reason(name, arguments) for name in PEERS if name not in samples},
        "manifest": manifest,
        "resume": resume(samples["ours"]),
        "samples": samples,
    }
    path = measure.write_json("input_pipeline", report, arguments.results)
    print(f"{render(report)}\n\nfigures: {path.name}")


def prepare(data: Path, sizes: dict[str, float], folder: Path, endpoint: str) -> Setup:
    """Corpora of the given megabytes, and the tokenizer."""
    progress("reading and sampling text, training the tokenizer")
    distinct = input_corpus.read(data)
    return Setup(
        endpoint=endpoint,
        tokenizer=input_corpus.train_tokenizer(distinct, folder),
        scratch=str(folder),
        corpora={
            name: input_corpus.write(name, input_corpus.sample(distinct, megabytes), folder, endpoint)
            for name, megabytes in sizes.items()
        },
        batch_rows=BATCH_ROWS,
        sequence_length=SEQUENCE_LENGTH,
        cores=len(os.sched_getaffinity(0)),
    )


def start(name: str, setup: Setup, folder: Path, streaming_python: str | None = None) -> ArmProcess:
    """An arm's process; `scan` and `ours` share a folder."""
    scratch = folder / "arms" / ("ours" if name == "scan" else name)
    command = [sys.executable, str(HERE / "input_arms.py"), name]
    if name == "mosaic":
        command = [str(streaming_python), str(HERE / "peers" / "streaming_arm.py")]
    return ArmProcess(command, dataclasses.replace(setup, scratch=str(scratch)), folder / f"{name}.log")


def timed(name: str, process: ArmProcess) -> Callable[[], Passes]:
    """What an arm does in a round: both corpora, every second time in reverse; ours also resumes."""
    orders = itertools.cycle([("small", "whole"), ("whole", "small")])

    def once() -> Passes:
        progress(name)
        return run(process, {**dict.fromkeys(next(orders)), **({"rest": 1} if name == "ours" else {})})

    return once


def run(process: ArmProcess, limits: dict[str, int | None]) -> Passes:
    """Passes over corpora under the clock, each up to a number of batches."""
    begin = time.perf_counter()
    process.ask("prepare")
    passes: Passes = {"prepare": {"wall_s": time.perf_counter() - begin}}
    for corpus, limit in limits.items():
        with measure.Watch(process.pid) as watch:
            counts = process.ask("run", corpus, limit)
        passes[corpus] = {**dataclasses.asdict(watch.usage), **counts}
    process.ask("finish")
    return passes


def take_census(arms: dict[str, ArmProcess]) -> dict[str, dict[str, int]]:
    """Checks that all arms give the same documents and tokens of the small corpus; this also warms them up.

    Raises:
        ValueError: an arm lost, doubled or changed a document.
    """
    census = {}
    for name, process in arms.items():
        progress(f"census of {name}")
        process.ask("prepare")
        census[name] = process.ask("census", "small")
        process.ask("finish")
    expected = census["ours"]
    for name, found in census.items():
        kept = expected["tokens" if name in ("bare", "ours") else "tokens_after_truncation"]
        if found != {**expected, "tokens": kept}:
            raise ValueError(f"{name} gives other documents than ours: {found} instead of {expected}")
    return census


def check_sums(samples: dict[str, list[Passes]]) -> None:
    """Checks that the timed passes gave equal tokens in all rounds, special ones and padding apart.

    Raises:
        ValueError: they did not.
    """
    for corpus in ("small", "whole"):
        found: dict[bool, set[int]] = {}
        for name, runs in samples.items():
            sums = {entry[corpus]["tokens"] - 2 * entry[corpus]["pieces"] for entry in runs}
            found.setdefault(name in ("bare", "ours"), set()).update(sums)
        if any(len(sums) > 1 for sums in found.values()):
            raise ValueError(f"the arms gave different numbers of tokens of the {corpus} corpus: {found}")


def summarise(runs: list[Passes], ours: list[Passes], setup: Setup) -> dict[str, Any]:
    """An arm's figures over the rounds; ratios are ours over the arm's."""
    small, whole = (setup.corpora[name].megabytes for name in ("small", "whole"))
    summary: dict[str, Any] = {}
    for label, key in (("s", "wall_s"), ("cpu_s", "cpu_s")):
        rates = [whole / entry["whole"][key] for entry in runs]
        our_rates = [whole / entry["whole"][key] for entry in ours]
        summary[f"mb_per_{label}"] = measure.spread(rates)
        summary[f"ours_over_it_per_{label}"] = measure.ratio(our_rates, rates)
        rates, our_rates = (
            [(whole - small) / max(entry["whole"][key] - entry["small"][key], 1e-3) for entry in entries]
            for entries in (runs, ours)
        )
        summary[f"sustained_mb_per_{label}"] = measure.spread(rates)
        summary[f"ours_over_it_sustained_per_{label}"] = measure.ratio(our_rates, rates)
    passes = [entry["whole"] for entry in runs]
    return {
        **summary,
        "useful_tokens": measure.spread([found["tokens"] / found["slots"] for found in passes]),
        "rows": measure.spread([found["rows"] for found in passes]),
        "first_batch_s": measure.spread([found["first_batch_s"] for found in passes]),
        "peak_process_mb": measure.spread([found["peak_process_bytes"] / 1e6 for found in passes]),
        "peak_total_mb": measure.spread([found["peak_total_bytes"] / 1e6 for found in passes]),
    }


def resume(ours: list[Passes]) -> dict[str, measure.Ratio]:
    """Time to the first batch of ours, from the start and at 90 % of the epoch."""
    return {
        "first_batch_at_0_s": measure.spread([entry["whole"]["first_batch_s"] for entry in ours]),
        "first_batch_at_90_percent_s": measure.spread([entry["rest"]["first_batch_s"] for entry in ours]),
    }


def describe(corpus: Corpus) -> dict[str, Any]:
    """What a reader of the figures needs to know of a corpus."""
    return {
        "megabytes": corpus.megabytes,
        "documents": corpus.documents,
        "languages": corpus.languages,
        "windows": corpus.windows,
        "first_window": corpus.first_window,
    }


def reason(name: str, arguments: argparse.Namespace) -> str:
    """Why an arm was not run."""
    return "not asked for (--arms)" if name not in arguments.arms else "no --streaming-python given"


def peer_versions(interpreter: str | None) -> list[str]:
    """What the peer's environment holds of the packages that it pins."""
    if not interpreter:
        return []
    pins = (HERE / "peers" / "streaming.txt").read_text(encoding="utf-8").split()
    code = "import importlib.metadata as m, sys; print(*(f'{n}=={m.version(n)}' for n in sys.argv[1:]))"
    command = [interpreter, "-c", code, *(pin.partition("==")[0] for pin in pins)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


SPEEDS = {
    "MB/s": "mb_per_s",
    "sustained": "sustained_mb_per_s",
    "MB/CPU-s": "mb_per_cpu_s",
    "sustained/CPU": "sustained_mb_per_cpu_s",
    "ours / it": "ours_over_it_per_s",
    "sustained ratio": "ours_over_it_sustained_per_s",
    "CPU ratio": "ours_over_it_per_cpu_s",
    "sustained CPU ratio": "ours_over_it_sustained_per_cpu_s",
}


def render(report: dict[str, Any]) -> str:
    """The tables and the figures beside them."""
    summaries, whole = report["summary"], report["corpora"]["whole"]
    speeds = [[name, *(summary[key] for key in SPEEDS.values())] for name, summary in summaries.items()]
    speeds += [[name, f"not run: {why}", *[""] * 7] for name, why in report["not_run"].items()]
    manifest = report["manifest"]["whole"]
    lines = [
        f"{whole['megabytes']:.1f} MB, {whole['documents']:,} documents, {whole['languages']} languages; "
        "median (minimum-maximum) of the rounds",
        "",
        measure.table(["arm", *SPEEDS], speeds),
        "",
        render_rest(summaries),
        "",
        f"manifest, once a corpus: {manifest['wall_s']:.1f} s, {manifest['cpu_s']:.1f} CPU s",
        f"first batch of ours: {report['resume']['first_batch_at_0_s']} s from the start, "
        f"{report['resume']['first_batch_at_90_percent_s']} s at 90 % of the epoch",
    ]
    return "\n".join(lines)


def render_rest(summaries: dict[str, dict[str, measure.Ratio]]) -> str:
    """Useful tokens, rows, start and memory."""
    header: Sequence[str] = ["arm", "useful", "rows", "first batch s", "peak process MB", "peak sum MB"]
    rows = []
    for name, summary in summaries.items():
        peaks = [f"{summary[key].median:,.0f}" for key in ("peak_process_mb", "peak_total_mb")]
        useful, count = summary["useful_tokens"].median, summary["rows"].median
        rows.append([name, f"{useful:.1%}", f"{count:,.0f}", summary["first_batch_s"], *peaks])
    return measure.table(header, rows)


def progress(what: str) -> None:
    """Tells what is being done."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
