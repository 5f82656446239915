"""One door to local files and to S3 (a moto server): whole files or the old ones, and errors of one line."""

import contextlib
import resource
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from mlray import storage
from mlray.access import StorageError
from mlray.config import Storage

LOCAL = Storage()
BUCKET = "shop"


@contextlib.contextmanager
def disk_full_after(num_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond `num_bytes`; the write that tries fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_all(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")


# ---- local files


def test_join_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.join("s3://shop/runs/", "a", "b.json") == "s3://shop/runs/a/b.json"
    assert storage.join("runs", "a") == "runs/a"
    assert storage.absolute("runs/a") == f"{tmp_path}/runs/a"
    assert storage.absolute("~/corpus") == "/home/someone/corpus"
    assert storage.absolute("s3://shop/runs") == "s3://shop/runs"


def test_list_is_ordered_and_leaves_hidden_files_out(tmp_path: Path) -> None:
    write_all(
        tmp_path, "b.txt", "a/z.txt", "a/.hidden", "_SUCCESS", ".git/config", "a/_tmp/part.txt", "a.txt"
    )
    listed = storage.list_files(str(tmp_path), LOCAL)
    assert [file.uri for file in listed] == [f"{tmp_path}/a.txt", f"{tmp_path}/a/z.txt", f"{tmp_path}/b.txt"]
    assert [file.size for file in listed] == [5, 7, 5]


def test_list_of_one_file_names_it_even_if_hidden(tmp_path: Path) -> None:
    write_all(tmp_path, "_part.txt")
    assert [file.uri for file in storage.list_files(f"{tmp_path}/_part.txt", LOCAL)] == [
        f"{tmp_path}/_part.txt"
    ]


def test_etag_follows_the_content(tmp_path: Path) -> None:
    write_all(tmp_path, "a.txt", "b.txt")
    before = storage.list_files(str(tmp_path), LOCAL)
    assert storage.list_files(str(tmp_path), LOCAL) == before
    (tmp_path / "a.txt").write_text("longer than before", encoding="utf-8")
    after = storage.list_files(str(tmp_path), LOCAL)
    assert after[0].etag != before[0].etag
    assert after[1] == before[1]


def test_list_of_nothing_is_an_error(tmp_path: Path) -> None:
    write_all(tmp_path, ".hidden")
    for uri in (str(tmp_path), f"{tmp_path}/absent"):
        with pytest.raises(StorageError, match=f"^no files at {uri}$"):
            storage.list_files(uri, LOCAL)


def test_list_folders(tmp_path: Path) -> None:
    write_all(tmp_path, "step-2/a", "step-10/b/c", "file")
    assert storage.list_folders(str(tmp_path), LOCAL) == ["step-10", "step-2"]
    assert storage.list_folders(f"{tmp_path}/absent", LOCAL) == []


def test_write_and_read(tmp_path: Path) -> None:
    uri = f"{tmp_path}/new/folder/file.bin"
    assert not storage.exists(uri, LOCAL)
    storage.write_bytes(uri, b"first\x00", LOCAL)
    storage.write_bytes(uri, b"second", LOCAL)
    assert storage.exists(uri, LOCAL)
    assert not storage.exists(f"{tmp_path}/new", LOCAL)
    assert storage.read_bytes(uri, LOCAL) == b"second"
    with storage.open_input(uri, LOCAL) as file:
        file.seek(3)
        assert file.read(2) == b"on"


def test_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "progress.json"
    storage.write_bytes(str(target), b"old", LOCAL)
    with disk_full_after(100), pytest.raises(StorageError, match=f"^{target}: File too large$"):
        storage.write_bytes(str(target), b"x" * 5000, LOCAL)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_only_the_first_creates_a_file(tmp_path: Path) -> None:
    uri = f"{tmp_path}/history/1.json"
    assert storage.create_bytes(uri, b"first", LOCAL)
    assert not storage.create_bytes(uri, b"second", LOCAL)
    assert storage.read_bytes(uri, LOCAL) == b"first"
    assert [path.name for path in (tmp_path / "history").iterdir()] == ["1.json"]


def test_of_many_that_create_a_file_one_wins(tmp_path: Path) -> None:
    uri = f"{tmp_path}/1.json"
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: storage.create_bytes(uri, b"%d" % i, LOCAL), range(64)))
    assert sum(won) == 1
    assert storage.read_bytes(uri, LOCAL) == b"%d" % won.index(True)


def test_failed_upload_leaves_the_old_content(tmp_path: Path) -> None:
    source, target = tmp_path / "weights", tmp_path / "run" / "weights"
    source.write_bytes(b"x" * 5000)
    storage.write_bytes(str(target), b"old", LOCAL)
    with disk_full_after(100), pytest.raises(StorageError, match=f"^{target}: File too large$"):
        storage.upload(source, str(target), LOCAL)
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


def test_upload_copies_a_folder_and_keeps_its_shape(tmp_path: Path) -> None:
    write_all(tmp_path / "from", "a.txt", "deep/b.txt", ".hidden")
    storage.upload(tmp_path / "from", f"{tmp_path}/to", LOCAL)
    copied = {str(path.relative_to(tmp_path / "to")): path.read_text() for path in tmp_path.glob("to/**/*.*")}
    assert copied == {"a.txt": "a.txt", "deep/b.txt": "deep/b.txt", ".hidden": ".hidden"}


def test_local_copy_of_a_local_folder_is_the_folder(tmp_path: Path) -> None:
    with storage.local_copy(str(tmp_path), LOCAL) as folder:
        assert folder == tmp_path
    assert tmp_path.is_dir()


def test_staging_is_removed_with_its_block() -> None:
    with storage.staging() as folder:
        write_all(folder, "a/b.txt")
        assert (folder / "a" / "b.txt").is_file()
    assert not folder.exists()


def test_delete_folder(tmp_path: Path) -> None:
    write_all(tmp_path, "run/a/b.txt", "run/.hidden", "run2/c.txt")
    storage.delete_folder(f"{tmp_path}/run", LOCAL)
    storage.delete_folder(f"{tmp_path}/run", LOCAL)
    assert [path.name for path in tmp_path.iterdir()] == ["run2"]


@pytest.mark.parametrize("operate", [storage.open_input, storage.read_bytes])
def test_absent_file_is_named_in_one_line(operate: Callable[..., object], tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        operate(f"{tmp_path}/absent.json", LOCAL)
    assert str(caught.value).startswith(f"{tmp_path}/absent.json: ")
    assert "\n" not in str(caught.value)


# ---- S3


@pytest.fixture(scope="module", autouse=True)
def aws_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def s3(aws_environment: None) -> Iterator[Storage]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield Storage(endpoint_url=f"http://{host}:{port}")
    server.stop()


@pytest.fixture
def bucket(s3: Storage) -> Iterator[Any]:
    """An empty bucket, seen through a client of the test's own."""
    resource_s3 = boto3.resource("s3", endpoint_url=s3.endpoint_url, region_name=s3.region)
    found = resource_s3.create_bucket(Bucket=BUCKET)
    yield found
    found.objects.all().delete()
    found.delete()


def put_all(bucket: Any, *keys: str) -> None:
    for key in keys:
        bucket.put_object(Key=key, Body=key.encode())


def keys_of(bucket: Any) -> list[str]:
    return [entry.key for entry in bucket.objects.all()]


def test_s3_list_stays_inside_the_folder(s3: Storage, bucket: Any) -> None:
    put_all(
        bucket,
        "corpus/b.txt",
        "corpus/a/z.txt",
        "corpus/_SUCCESS",
        "corpus/.tmp/x",
        "corpus2/c",
        "corpus.old",
    )
    put_all(bucket, "corpus/empty/")
    expected = ["s3://shop/corpus/a/z.txt", "s3://shop/corpus/b.txt"]
    listed = storage.list_files("s3://shop/corpus", s3)
    assert [file.uri for file in listed] == expected
    assert [file.size for file in listed] == [len("corpus/a/z.txt"), len("corpus/b.txt")]
    assert storage.list_files("s3://shop/corpus/", s3) == listed
    assert [file.uri for file in storage.list_files("s3://shop/corpus/b.txt", s3)] == expected[1:]
    assert len(storage.list_files("s3://shop", s3)) == 4


def test_s3_etag_follows_the_content(s3: Storage, bucket: Any) -> None:
    put_all(bucket, "a")
    (before,) = storage.list_files("s3://shop/a", s3)
    bucket.put_object(Key="a", Body=b"b")
    (after,) = storage.list_files("s3://shop/a", s3)
    assert (before.size, before.etag) == (1, "0cc175b9c0f1b6a831c399e269772661")  # md5 of "a"
    assert (after.size, after.etag) == (1, "92eb5ffee6ae2fec3ad71c777531578f")  # md5 of "b"


def test_s3_list_folders(s3: Storage, bucket: Any) -> None:
    put_all(bucket, "runs/step-2/a", "runs/step-10/b/c", "runs/file", "runs2/x/y")
    assert storage.list_folders("s3://shop/runs", s3) == ["step-10", "step-2"]
    assert storage.list_folders("s3://shop/runs/absent", s3) == []


@pytest.mark.parametrize("uri", ["s3://shop", "s3://shop/"])
def test_s3_list_folders_of_a_bucket(uri: str, s3: Storage, bucket: Any) -> None:
    put_all(bucket, "runs/a", "corpus/b", "file")
    assert storage.list_folders(uri, s3) == ["corpus", "runs"]


def test_s3_write_exists_and_ranged_read(s3: Storage, bucket: Any) -> None:
    uri = "s3://shop/новый/a b+c%20.bin"
    assert not storage.exists(uri, s3)
    storage.write_bytes(uri, b"first", s3)
    storage.write_bytes(uri, b"second", s3)
    assert storage.exists(uri, s3)
    assert not storage.exists("s3://shop/новый", s3)
    assert storage.read_bytes(uri, s3) == b"second"
    assert [file.uri for file in storage.list_files("s3://shop/новый", s3)] == [uri]
    with storage.open_input(uri, s3) as file:
        file.seek(3)
        assert file.read(2) == b"on"
    assert bucket.Object("новый/a b+c%20.bin").get()["Body"].read() == b"second"


def test_s3_only_the_first_creates_a_file(s3: Storage, bucket: Any) -> None:
    uri = "s3://shop/history/1.json"
    assert storage.create_bytes(uri, b"first", s3)
    assert not storage.create_bytes(uri, b"second", s3)
    assert storage.create_bytes(uri, b"first", s3)  # an attempt whose answer was lost
    assert bucket.Object("history/1.json").get()["Body"].read() == b"first"


def test_s3_upload_and_local_copy_of_a_folder(s3: Storage, bucket: Any, tmp_path: Path) -> None:
    write_all(tmp_path / "from", "a.txt", "deep/b.txt")
    storage.upload(tmp_path / "from", "s3://shop/run/weights", s3)
    put_all(bucket, "run/weights2/c.txt")
    assert keys_of(bucket) == ["run/weights/a.txt", "run/weights/deep/b.txt", "run/weights2/c.txt"]
    with storage.local_copy("s3://shop/run/weights/", s3) as folder:
        copied = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.txt")}
    assert copied == {"a.txt": "a.txt", "deep/b.txt": "deep/b.txt"}
    assert not folder.exists()


def test_s3_local_copy_of_a_file(s3: Storage, bucket: Any) -> None:
    put_all(bucket, "run/report.json")
    with storage.local_copy("s3://shop/run/report.json", s3) as path:
        assert path.read_text() == "run/report.json"


def test_s3_delete_folder_leaves_nothing_and_touches_no_neighbour(s3: Storage, bucket: Any) -> None:
    put_all(bucket, "run/a", "run/deep/b", "run/_hidden", "run/.part", "run/empty/", "run2/c", "run.txt")
    storage.delete_folder("s3://shop/run", s3)
    assert keys_of(bucket) == ["run.txt", "run2/c"]
    storage.delete_folder("s3://shop/run", s3)


def test_s3_endpoint_from_the_environment(s3: Storage, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put_all(bucket, "a.txt")
    assert s3.endpoint_url is not None
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint_url)
    settings = Storage(region="eu-central-1")  # not used elsewhere: clients are kept by their settings
    assert storage.read_bytes("s3://shop/a.txt", settings) == b"a.txt"
    assert [file.uri for file in storage.list_files("s3://shop", settings)] == ["s3://shop/a.txt"]


def local_copy(uri: str, settings: Storage) -> None:
    with storage.local_copy(uri, settings):
        pass


def write(uri: str, settings: Storage) -> None:
    storage.write_bytes(uri, b"x", settings)


def upload(uri: str, settings: Storage) -> None:
    storage.upload(Path(__file__), uri, settings)


READERS = [storage.list_files, storage.open_input, storage.read_bytes, local_copy]
WRITERS = [write, upload, storage.delete_folder]


def check_message(message: str, uri: str, settings: Storage) -> None:
    assert uri in message
    assert f"(endpoint {settings.endpoint_url})" in message
    assert "\n" not in message


@pytest.mark.parametrize("operate", READERS)
def test_s3_absent_object_is_named(operate: Callable[..., object], s3: Storage, bucket: Any) -> None:
    put_all(bucket, "corpus/de.txt")
    with pytest.raises(StorageError) as caught:
        operate("s3://shop/corpus/fr.txt", s3)
    check_message(str(caught.value), "s3://shop/corpus/fr.txt", s3)


@pytest.mark.parametrize("operate", [*READERS, *WRITERS, storage.list_folders])
def test_s3_missing_bucket_is_named(operate: Callable[..., object], s3: Storage) -> None:
    with pytest.raises(StorageError) as caught:
        operate("s3://no-such-shop/corpus/de.txt", s3)
    check_message(str(caught.value), "s3://no-such-shop/corpus/de.txt", s3)


@pytest.fixture(scope="module")
def closed_endpoint() -> Iterator[Storage]:
    """A port that is taken by a socket that does not listen: every connection is refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield Storage(endpoint_url=f"http://127.0.0.1:{taken.getsockname()[1]}", timeout_s=1)


@pytest.mark.parametrize("operate", [*READERS, *WRITERS, storage.list_folders, storage.exists])
def test_s3_unreachable_endpoint_is_named(operate: Callable[..., object], closed_endpoint: Storage) -> None:
    with pytest.raises(StorageError) as caught:
        operate("s3://shop/corpus/de.txt", closed_endpoint)
    check_message(str(caught.value), "s3://shop/corpus/de.txt", closed_endpoint)


@pytest.mark.parametrize("operate", [storage.list_files, storage.read_bytes])
def test_s3_silent_endpoint_is_given_up(operate: Callable[..., object]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel connects, nobody answers
        settings = Storage(endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
        with pytest.raises(StorageError) as caught:
            operate("s3://shop/corpus/de.txt", settings)
    check_message(str(caught.value), "s3://shop/corpus/de.txt", settings)
