"""The real run: `mono` as parquet on an S3 server, pre-trained by `ray job submit` with two ZeRO-2 workers.

    python benchmarks/pretrain_mono.py --steps 400

Starts a moto S3 server and a one-node Ray cluster on loopback, writes
`s3://corpus/mono/lang=<tag>/part-0.parquet` for every language of the data set, submits the job as a user
would, and keeps the run's report and plot under `benchmarks/results/pretrain_mono.*`.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    """Parses, starts the servers, runs the job and keeps its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "mono")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        print(
            f"no data at {arguments.data}; name the folder of <lang>.txt.gz files with --data",
            file=sys.stderr,
        )
        return 2
    with contextlib.ExitStack() as stack:
        environment = stack.enter_context(s3_server())
        write_corpus(arguments.data, environment["AWS_ENDPOINT_URL"])
        environment = stack.enter_context(ray_cluster(environment))
        begin = time.monotonic()
        submit(environment, overrides(arguments))
        seconds = time.monotonic() - begin
        keep(environment["AWS_ENDPOINT_URL"], seconds)
    return 0


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The job's settings: an XLM-R type encoder that two CPU cores train in minutes."""
    return [
        "corpus.sources=[{uri: s3://corpus/mono, language: partition}]",
        "run.name=mono",
        "run.storage_uri=s3://corpus/runs",
        f"train.steps={arguments.steps}",
        *arguments.overrides,
    ]


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A moto server on loopback and the environment that points to it."""
    port = free_port()
    with child([str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)], dict(os.environ)):
        wait_for(port)
        keys = {
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        os.environ.update(keys)
        yield {**os.environ, **keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


def write_corpus(folder: Path, endpoint: str) -> None:
    """Every `<lang>.txt.gz` as one hive partition with row groups of 20,000 rows."""
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="corpus")
    filesystem = pyarrow.fs.S3FileSystem(endpoint_override=endpoint.removeprefix("http://"), scheme="http")
    for path in sorted(folder.glob("*.txt.gz")):
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        target = f"corpus/mono/lang={path.name.split('.')[0]}/part-0.parquet"
        pq.write_table(pa.table({"text": lines}), target, filesystem=filesystem, row_group_size=20_000)


@contextlib.contextmanager
def ray_cluster(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """A head node on loopback with a token of its own."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        port, dashboard = free_port(), free_port()
        environment = {
            **environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "PATH": f"{BIN}:{environment['PATH']}",
        }
        command = [
            *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"),
            *(f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"),
            *(f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}"),
        ]
        head = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
        with child(command, head):
            wait_for(dashboard)
            yield environment


def submit(environment: dict[str, str], settings: list[str]) -> None:
    """`ray job submit`, as the README shows it."""
    command = [
        *(str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--"),
        *("python", "jobs/pretrain.py", "--config", "jobs/configs/pretrain_small.yaml", *settings),
    ]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def keep(endpoint: str, seconds: float) -> None:
    """Copies report and plot out of the run folder, with the job's wall time."""
    client = boto3.client("s3", endpoint_url=endpoint)
    body = client.get_object(Bucket="corpus", Key="runs/mono/report.json")["Body"].read()
    report = json.loads(body)
    report["job_seconds"] = seconds
    report["date"] = time.strftime("%Y-%m-%d")
    report["load_average"] = os.getloadavg()
    report["config"]["storage"]["endpoint_url"] = None
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "pretrain_mono.json").write_text(
        json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    plot = client.get_object(Bucket="corpus", Key="runs/mono/loss.png")["Body"].read()
    (RESULTS / "pretrain_mono.png").write_bytes(plot)


@contextlib.contextmanager
def child(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, timeout_s: float = 90.0) -> None:
    """Waits until something listens on the port."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port}")


if __name__ == "__main__":
    sys.exit(main())
