"""One S3 server and one Ray cluster for all cluster tests: starting Ray is the cost."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import ray
from moto.server import ThreadedMotoServer

from mlray.config import RunConfig
from mlray.training.pretrain import pretrain
from mlray.tuning.finetune import finetune
from serve_app import front
from tests.cluster import corpus as sample

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Endpoint of an S3 server: the one of `MLRAY_TEST_S3_ENDPOINT` (with its keys in the environment), or moto."""
    endpoint = os.environ.get("MLRAY_TEST_S3_ENDPOINT")
    if endpoint:
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        yield endpoint
        return
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def bucket(s3: str) -> str:
    """A bucket of this session."""
    name = f"mlray-test-{secrets.token_hex(4)}"
    boto3.client("s3", endpoint_url=s3).create_bucket(Bucket=name)
    return name


@pytest.fixture(scope="session")
def cluster(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the dashboard of a local cluster with four logical CPUs and a GPU; it knows the S3 server."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "60"
    with front.folder() as folder:
        os.environ.update(front.environment(Path(folder)))
        context = ray.init(
            num_cpus=4, num_gpus=1, include_dashboard=True, logging_level="warning", log_to_driver=False
        )
        yield f"http://{context.dashboard_url}"
        ray.shutdown()


@pytest.fixture(scope="session")
def refused(s3: str, bucket: str) -> dict[str, int]:
    """Uploads the corpus; bad records per language."""
    return sample.upload(s3, bucket)


@pytest.fixture(scope="session")
def undisturbed(cluster: str, bucket: str, refused: dict[str, int]) -> dict[str, Any]:
    """The report of ten steps with two workers at ZeRO-2, in one go."""
    return pretrain(sample.config(bucket, "undisturbed"))


@pytest.fixture(scope="session")
def aligned(cluster: str, bucket: str) -> RunConfig:
    """An encoder after ten steps of 16 pairs, in two chunks on each of two workers."""
    made = sample.aligning(bucket, "aligned")
    report = finetune(made)
    assert report is not None
    assert report.cells["retrieval"].keys() == set(sample.LANGUAGES)
    return made
