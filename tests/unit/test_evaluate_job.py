"""`jobs/evaluate.py` from its command line: what it reads, what it prints, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from jobs import evaluate as job

RIGHT, WRONG = ["a", "b", "a", "b"], ["a", "b", "b", "a"]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def body(predicted: list[str]) -> str:
    """Predictions in German whose labels are `RIGHT`."""
    rows = [{"language": "de", "prediction": p, "label": t} for p, t in zip(predicted, RIGHT, strict=True)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
    return job.main()


def test_predictions_are_scored_and_only_the_report_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text(body(WRONG), encoding="utf-8")
    arguments = ("--predictions", "p.jsonl", "--json", "--output", "judged", "evaluation.resamples=20")
    assert run(monkeypatch, *arguments) == 0
    printed, errors = capfd.readouterr()
    report = json.loads(printed)
    assert report["about"] == {"predictions": "p.jsonl", "resamples": 20}
    figures = report["cells"]["classification"]["de"]
    assert {name: figure["value"] for name, figure in figures.items()} == {
        "accuracy": 50.0,
        "macro F1": 50.0,
        "MCC": 0.0,
    }
    assert errors == ""
    assert Path("judged/report.json").read_text(encoding="utf-8") == printed
    assert {path.name for path in Path("judged").iterdir()} == {"report.json", "report.html"}


def test_predictions_are_compared_and_only_the_comparison_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(body(WRONG), encoding="utf-8")
    Path("b.jsonl").write_text(body(RIGHT), encoding="utf-8")
    assert run(monkeypatch, "--compare", "a.jsonl", "b.jsonl", "--json") == 0
    printed, errors = capfd.readouterr()
    found = json.loads(printed)
    assert (found["about"]["first"], found["about"]["second"]) == ("a.jsonl", "b.jsonl")
    assert {name: (cell["first"], cell["second"]) for name, cell in found["cells"].items()} == {
        "classification de accuracy": (50.0, 100.0),
        "classification de macro F1": (50.0, 100.0),
        "classification de MCC": (0.0, 100.0),
    }
    assert errors == ""
    assert run(monkeypatch, "--compare", "a.jsonl", "b.jsonl") == 0  # as a table
    assert "classification de" in capfd.readouterr().out


def test_predictions_of_a_run_in_s3_are_read_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], endpoint: str
) -> None:
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="judged")
    for name, labels in (("a", WRONG), ("b", RIGHT)):
        client.put_object(Bucket="judged", Key=f"{name}/predictions.jsonl", Body=body(labels).encode())
    first, second = (f"s3://judged/{name}/predictions.jsonl" for name in "ab")
    settings = (f"storage.endpoint_url={endpoint}", "evaluation.resamples=20", "--json")
    capfd.readouterr()  # what the server says as it starts
    assert run(monkeypatch, "--predictions", first, *settings) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["about"]["predictions"] == first
    assert report["cells"]["classification"]["de"]["accuracy"]["value"] == 50.0
    assert run(monkeypatch, "--compare", first, second, *settings) == 0
    cell = json.loads(capfd.readouterr().out)["cells"]["classification de accuracy"]
    assert (cell["first"], cell["second"]) == (50.0, 100.0)
    assert run(monkeypatch, "--predictions", "s3://judged/none.jsonl", *settings) == 1
    printed, errors = capfd.readouterr()
    assert printed == ""
    assert errors.startswith("failed: cannot read the predictions: s3://judged/none.jsonl")
    assert errors.count("\n") == 1


def test_a_file_that_is_not_there_fails_and_a_bad_one_is_bad_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text(body(RIGHT), encoding="utf-8")
    Path("bad.jsonl").write_text(body(RIGHT) + "{\n", encoding="utf-8")
    Path("latin.jsonl").write_bytes(b"\xe4\n")
    Path("short.jsonl").write_text("".join(body(RIGHT).splitlines(keepends=True)[:3]), encoding="utf-8")
    Path("other.jsonl").write_text(body(RIGHT).replace('"label": "a"', '"label": "c"'), encoding="utf-8")
    missing = "failed: cannot read the predictions: "
    for arguments, code, complaint in (
        (("--predictions", "none.jsonl"), 1, missing),
        (("--compare", "good.jsonl", "none.jsonl"), 1, missing),
        (("--predictions", "bad.jsonl"), 2, "configuration: bad.jsonl: line 5 is not JSON: "),
        (("--compare", "good.jsonl", "bad.jsonl"), 2, "configuration: bad.jsonl: line 5 is not JSON: "),
        (
            ("--compare", "good.jsonl", "short.jsonl"),
            2,
            "configuration: classification, de: good.jsonl has 4 rows and short.jsonl 3",
        ),
        (
            ("--compare", "good.jsonl", "other.jsonl"),
            2,
            "configuration: classification, de: good.jsonl: line 1 and other.jsonl: line 1 are different rows",
        ),
        (("--predictions", "latin.jsonl"), 2, "configuration: cannot read the predictions latin.jsonl: "),
        (("--predictions", "good.jsonl", "evaluation.resample=1"), 2, "configuration: unknown key "),
    ):
        assert run(monkeypatch, *arguments, "--json") == code
        printed, errors = capfd.readouterr()
        assert printed == ""
        assert errors.startswith(complaint)
        assert errors.count("\n") == 1


def test_the_help_says_what_is_compared(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--help")
    assert stopped.value.code == 0
    assert "paired test of two predictions.jsonl, no model folders" in " ".join(
        capfd.readouterr().out.split()
    )
    assert job.__doc__ is not None
    assert {"--predictions", "--trec", "--compare", "--leakage"} <= set(job.__doc__.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--predictions", "p", "--leakage"),
        ("--leakage", "--compare", "a", "b"),
        ("--compare", "a", "b", "--predictions", "p"),
        ("--trec", "run", "qrels", "--predictions", "p"),
    ],
)
def test_one_thing_at_a_time(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert "not allowed with argument" in capfd.readouterr().err
