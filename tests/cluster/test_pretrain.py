"""The main job on an S3 server: resume, resize, killed workers, broken records, and what a person is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import boto3
import psutil
import pytest
import torch
import transformers
from ray.job_submission import JobStatus, JobSubmissionClient

from mlray import storage
from mlray.config import ConfigError, RunConfig
from mlray.training import checkpoint as checkpoints
from mlray.training.pretrain import pretrain
from tests.cluster import corpus as sample
from tests.cluster.conftest import ROOT

pytestmark = pytest.mark.cluster


def same_tokenizer(bucket: str) -> dict[str, str]:
    """The undisturbed run's: training a tokenizer twice may order pieces of equal score differently."""
    return {"path": f"s3://{bucket}/runs/undisturbed/tokenizer"}


def kill_a_worker_after(uri: str, config: RunConfig, killed: list[int]) -> None:
    """Waits for an object, then kills one Ray Train worker as a machine would: SIGKILL."""
    end = time.monotonic() + 240
    while time.monotonic() < end and not storage.exists(uri, config.storage):
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):  # another job may run on this machine
        if "RayTrainWorker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
            return


def test_report_counts_every_broken_record_and_uses_the_rest(
    undisturbed: dict[str, Any], refused: dict[str, int], bucket: str
) -> None:
    assert {name: sum(reasons.values()) for name, reasons in undisturbed["refused"].items()} == refused
    uri = f"s3://{bucket}/runs/undisturbed/corpus/quarantine.jsonl"
    lines = storage.read_bytes(uri, sample.config(bucket, "x").storage).decode().splitlines()
    entries = [json.loads(line) for line in lines]
    assert sorted(entry["reason"] for entry in entries) == sorted(
        ["invalid UTF-8 at byte 0", "empty", "NUL character", "not text but int", "not JSON", "null"]
    )
    assert {entry["position"] for entry in entries if entry["language"] == "de"} == {"row 3", "row 4"}
    assert all(value > 0 for value in undisturbed["documents"].values())
    assert set(undisturbed["documents"]) == set(sample.LANGUAGES)


def test_weights_open_with_plain_transformers(undisturbed: dict[str, Any], bucket: str) -> None:
    settings = sample.config(bucket, "x").storage
    with storage.local_copy(undisturbed["weights"], settings) as folder:
        model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert not [path for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]
    inputs = tokenizer("Wo ist mein <mask> Paket?", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (1, inputs["input_ids"].shape[1], len(tokenizer))
    assert torch.isfinite(logits).all()


@pytest.mark.long
def test_a_killed_worker_changes_nothing(undisturbed: dict[str, Any], bucket: str) -> None:
    config = sample.config(bucket, "killed", tokenizer=same_tokenizer(bucket))
    commit = f"s3://{bucket}/runs/killed/checkpoints/step-00000005/{checkpoints.COMMIT}"
    killed: list[int] = []
    watcher = threading.Thread(target=kill_a_worker_after, args=(commit, config, killed))
    watcher.start()
    report = pretrain(config)
    watcher.join()
    (pid,) = killed
    assert not psutil.pid_exists(pid)
    steps, losses, digests = zip(*report["losses"], strict=True)
    expected_steps, expected_losses, expected_digests = zip(*undisturbed["losses"], strict=True)
    assert steps == expected_steps == tuple(range(1, 11))
    assert digests == expected_digests  # the same samples in every step
    assert losses == pytest.approx(expected_losses, abs=1e-6)
    assert report["tokens"] == undisturbed["tokens"]  # none lost, none twice


def copy_of_a_run(s3: str, bucket: str, source: str, target: str, step: int) -> None:
    """A run folder as it was after the checkpoint of `step`."""
    client = boto3.client("s3", endpoint_url=s3)
    for part in ("corpus/", "tokenizer/", f"checkpoints/step-{step:08d}/"):
        listing = client.list_objects_v2(Bucket=bucket, Prefix=f"runs/{source}/{part}")
        for entry in listing["Contents"]:
            key = entry["Key"].replace(f"runs/{source}/", f"runs/{target}/")
            client.copy_object(Bucket=bucket, Key=key, CopySource={"Bucket": bucket, "Key": entry["Key"]})


def copy_of_the_corpus(s3: str, bucket: str, target: str) -> dict[str, Any]:
    """The corpus at another place, and the section that names it."""
    client = boto3.client("s3", endpoint_url=s3)
    for entry in client.list_objects_v2(Bucket=bucket, Prefix="corpus/")["Contents"]:
        key = entry["Key"].replace("corpus/", f"{target}/")
        client.copy_object(Bucket=bucket, Key=key, CopySource={"Bucket": bucket, "Key": entry["Key"]})
    section = sample.config(bucket, target).corpus.model_dump(mode="json")
    return {**section, "sources": [{"uri": f"s3://{bucket}/{target}", "language": "partition"}]}


def test_a_checkpoint_of_two_workers_goes_on_with_one_and_a_copy_of_the_corpus(
    undisturbed: dict[str, Any], s3: str, bucket: str
) -> None:
    copy_of_a_run(s3, bucket, "undisturbed", "resized", step=5)
    moved = copy_of_the_corpus(s3, bucket, "moved")
    report = pretrain(sample.config(bucket, "resized", cluster={"num_workers": 1}, corpus=moved))
    assert report["steps"] == 10
    assert report["losses"][:5] == undisturbed["losses"][:5]
    for (step, loss, digest), (other_step, other_loss, other_digest) in zip(
        report["losses"], undisturbed["losses"], strict=True
    ):
        assert (step, digest) == (other_step, other_digest)
        assert loss == pytest.approx(other_loss, abs=1e-4)


def test_a_checkpoint_does_not_go_on_in_other_documents(
    undisturbed: dict[str, Any], s3: str, bucket: str
) -> None:
    copy_of_a_run(s3, bucket, "undisturbed", "edited", step=5)
    edited = copy_of_the_corpus(s3, bucket, "edited-corpus")
    client = boto3.client("s3", endpoint_url=s3)
    place = {"Bucket": bucket, "Key": "edited-corpus/lang=en/part-0.jsonl"}
    text = client.get_object(**place)["Body"].read()
    client.put_object(**place, Body=text.replace(b"the", b"a", 1))
    folder = f"s3://{bucket}/runs/edited/corpus/manifest.json"
    settings = sample.config(bucket, "edited").storage
    before = storage.read_bytes(folder, settings)
    with pytest.raises(
        ConfigError, match=r"^the documents of the corpus, or its limits, are others than .*-0*5 "
    ):
        pretrain(sample.config(bucket, "edited", corpus=edited))
    assert storage.read_bytes(folder, settings) == before


def test_job_submit_runs_the_job_and_a_finished_run_is_only_reported(
    undisturbed: dict[str, Any], cluster: str, s3: str, bucket: str, tmp_path: Any
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(sample.config(bucket, "undisturbed").to_yaml(), encoding="utf-8")
    client = JobSubmissionClient(cluster)
    # A cluster that `ray.init` starts does not hand its token on to jobs; one of `ray start` does.
    token = {"env_vars": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}}
    job = client.submit_job(
        entrypoint=f"{sys.executable} jobs/pretrain.py --config {path}",
        runtime_env={"working_dir": str(ROOT), "excludes": [".venv", ".git", "runs", "benchmarks"], **token},
    )
    end = time.monotonic() + 240
    while not client.get_job_status(job).is_terminal() and time.monotonic() < end:
        time.sleep(0.5)
    logs = client.get_job_logs(job)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, logs[-3000:]
    assert "undisturbed after 10 steps" in logs
    body = boto3.client("s3", endpoint_url=s3).get_object(Bucket=bucket, Key="runs/undisturbed/report.json")
    assert json.loads(body["Body"].read())["losses"] == [list(entry) for entry in undisturbed["losses"]]


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"cluster": {"num_workers": 2, "cpus_per_worker": 3}}, "lower cluster.num_workers"),
        ({"corpus": {"sequence_length": 128}}, "longer than the model's 64 positions; lower it to 64"),
        ({"tokenizer": {"vocab_size": 90_000}}, "larger than the text allows"),
        ({"corpus": {"languages": ["de", "sw"]}}, "'sw', which has no rows"),
    ],
)
def test_what_cannot_run_says_what_to_change(
    cluster: str, bucket: str, refused: dict[str, int], sections: dict[str, Any], sentence: str
) -> None:
    name = "bad-" + "-".join(sections)
    with pytest.raises(ConfigError, match=sentence):
        pretrain(sample.config(bucket, f"{name}-{len(str(sections))}", **sections))


def run_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The job as a process of its own, with no cluster to join."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "jobs/pretrain.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_exit_codes_and_one_line_causes(s3: str, bucket: str) -> None:
    unknown = run_job("train.lrr=1")
    assert unknown.returncode == 2
    assert unknown.stderr.strip() == "configuration: unknown key 'train.lrr'; did you mean 'train.lr'?"
    missing = run_job("corpus.sources=[{uri: s3://no-such-bucket-here/corpus}]")
    assert missing.returncode == 1
    (line,) = missing.stderr.strip().splitlines()
    assert "s3://no-such-bucket-here/corpus" in line
    assert s3 in line
    assert "NoSuchBucket" in line
    endpoint = "http://127.0.0.1:9"
    unreachable = run_job(
        f"corpus.sources=[{{uri: s3://{bucket}/corpus}}]",
        f"storage.endpoint_url={endpoint}",
        "storage.timeout_s=2",
    )
    assert unreachable.returncode == 1
    (line,) = unreachable.stderr.strip().splitlines()
    assert f"s3://{bucket}/corpus" in line
    assert endpoint in line
    empty = run_job(f"corpus.sources=[{{uri: s3://{bucket}/nothing}}]")
    assert empty.returncode == 1
    assert empty.stderr.strip() == f"failed: no files at s3://{bucket}/nothing (endpoint {s3})"
