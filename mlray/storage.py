"""One door to S3 and local files: list, read from an offset, atomic write, folders up and down.

boto3 lists and writes (ETags, errors that can be named), `pyarrow.fs` reads. Keys come from the environment or the
instance role. Every failure is a `StorageError` of one line that names the object and the endpoint.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import pyarrow as pa
import pyarrow.fs as pafs
from botocore.exceptions import BotoCoreError, ClientError

from mlray.config import RunError, Storage

_ATTEMPTS = 3
_FAILURES = (BotoCoreError, ClientError, boto3.exceptions.Boto3Error, OSError)


class StorageError(RunError):
    """An object that cannot be listed, read or written."""


@dataclass(frozen=True)
class File:
    """A file as it was listed; `etag` changes when its content does."""

    uri: str
    size: int
    etag: str


def is_s3(uri: str) -> bool:
    """True for `s3://bucket/key`."""
    return uri.startswith("s3://")


def absolute(uri: str) -> str:
    """The same place, independent of the working directory (Ray workers have another one)."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    """Appends path parts to a folder."""
    return "/".join([uri.rstrip("/"), *parts])


def list_files(uri: str, storage: Storage) -> list[File]:
    """Every file below a folder (or the one file), ordered by name; hidden and empty-marker objects are left out.

    Raises:
        StorageError: nothing is there, or it cannot be listed.
    """
    files = _list_s3(uri, storage) if is_s3(uri) else _list_local(Path(uri))
    if not files:
        raise StorageError(f"no files at {_where(uri, storage)}")
    return sorted(files, key=lambda file: file.uri)


def exists(uri: str, storage: Storage) -> bool:
    """True if the object or file is there."""
    if not is_s3(uri):
        return Path(uri).is_file()
    bucket, key = _split(uri)
    with _named(uri, storage):
        try:
            _client(storage).head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response["Error"]["Code"] in {"404", "NoSuchKey", "NotFound"}:
                return False
            raise
    return True


def list_folders(uri: str, storage: Storage) -> list[str]:
    """Names of the direct sub-folders, ordered; an absent folder has none."""
    if not is_s3(uri):
        folder = Path(uri)
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    bucket, key = _split(uri)
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    names: list[str] = []
    with _named(uri, storage):
        pages = (
            _client(storage)
            .get_paginator("list_objects_v2")
            .paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        )
        for page in pages:
            names += [entry["Prefix"][len(prefix) :].rstrip("/") for entry in page.get("CommonPrefixes", [])]
    return sorted(names)


def open_input(uri: str, storage: Storage) -> pa.NativeFile:
    """Opens a file for ranged reads (`seek`, `read`).

    Raises:
        StorageError: it is absent or unreachable.
    """
    with _named(uri, storage):
        if is_s3(uri):
            return filesystem(storage).open_input_file(uri.removeprefix("s3://"))
        return pafs.LocalFileSystem(use_mmap=False).open_input_file(uri)


def read_bytes(uri: str, storage: Storage) -> bytes:
    """The whole content of a small file."""
    with open_input(uri, storage) as file, _named(uri, storage):
        return bytes(file.read())


def write_bytes(uri: str, data: bytes, storage: Storage) -> None:
    """Writes a small file atomically: a reader sees the old content or the new one, never a part."""
    with _named(uri, storage):
        if is_s3(uri):
            bucket, key = _split(uri)
            _client(storage).put_object(Bucket=bucket, Key=key, Body=data)
            return
        path = Path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o644)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def upload(local: Path, uri: str, storage: Storage) -> None:
    """Copies a file, or every file below a folder, to `uri`; local copies are moved into place atomically."""
    if local.is_dir():
        for path in sorted(local.rglob("*")):
            if path.is_file():
                upload(path, join(uri, path.relative_to(local).as_posix()), storage)
        return
    with _named(uri, storage):
        if is_s3(uri):
            bucket, key = _split(uri)
            _client(storage).upload_file(str(local), bucket, key)
            return
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.part")
        try:
            shutil.copyfile(local, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def local_copy(uri: str, storage: Storage) -> Iterator[Path]:
    """A local path with the content of a file or folder; S3 objects are downloaded for the time of the block."""
    if not is_s3(uri):
        yield Path(uri)
        return
    with staging() as folder:
        base = uri.rstrip("/")
        for file in list_files(uri, storage):
            target = folder / "copy" / file.uri.removeprefix(base).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            bucket, key = _split(file.uri)
            with _named(file.uri, storage):
                _client(storage).download_file(bucket, key, str(target))
        yield folder / "copy"


@contextlib.contextmanager
def staging() -> Iterator[Path]:
    """A temporary local folder in which files are written before `upload`."""
    with tempfile.TemporaryDirectory(prefix="mlray-") as folder:
        yield Path(folder)


def delete_folder(uri: str, storage: Storage) -> None:
    """Removes a folder and everything below it; an absent one is no error."""
    if not is_s3(uri):
        shutil.rmtree(uri, ignore_errors=True)
        return
    bucket, key = _split(uri)
    with _named(uri, storage):
        pages = (
            _client(storage)
            .get_paginator("list_objects_v2")
            .paginate(Bucket=bucket, Prefix=f"{key.rstrip('/')}/")
        )
        for page in pages:
            for entry in page.get("Contents", []):
                _client(storage).delete_object(Bucket=bucket, Key=entry["Key"])


def _list_local(path: Path) -> list[File]:
    if path.is_file():
        entries = [path]
    else:
        entries = [
            entry
            for entry in path.rglob("*")
            if entry.is_file()
            and not any(part.startswith((".", "_")) for part in entry.relative_to(path).parts)
        ]
    stats = [(entry, entry.stat()) for entry in entries]
    return [File(str(entry), stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}") for entry, stat in stats]


def _list_s3(uri: str, storage: Storage) -> list[File]:
    bucket, prefix = _split(uri)
    files: list[File] = []
    with _named(uri, storage):
        for page in _client(storage).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                key = entry["Key"]
                inside = key[len(prefix) :]
                below = not prefix or prefix.endswith("/") or inside == "" or inside.startswith("/")
                hidden = any(part.startswith((".", "_")) for part in inside.split("/"))
                if below and not hidden and not key.endswith("/"):
                    files.append(File(f"s3://{bucket}/{key}", entry["Size"], entry["ETag"].strip('"')))
    return files


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _endpoint(storage: Storage) -> str | None:
    return storage.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@functools.lru_cache(maxsize=8)
def _client(storage: Storage) -> Any:
    settings = botocore.config.Config(
        connect_timeout=storage.timeout_s,
        read_timeout=storage.timeout_s,
        retries={"total_max_attempts": _ATTEMPTS, "mode": "standard"},
        s3={"addressing_style": "path"} if _endpoint(storage) else {},
    )
    return boto3.client("s3", endpoint_url=_endpoint(storage), region_name=storage.region, config=settings)


@functools.lru_cache(maxsize=8)
def filesystem(storage: Storage) -> pafs.S3FileSystem:
    """Arrow's view of S3 with this endpoint and these limits."""
    endpoint = _endpoint(storage)
    scheme, _, host = (endpoint or "https://").rpartition("://")
    return pafs.S3FileSystem(
        region=storage.region,
        endpoint_override=host or None,
        scheme=scheme or "https",
        connect_timeout=storage.timeout_s,
        request_timeout=storage.timeout_s,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )


def raise_if_transport(error: Exception, uri: str, storage: Storage) -> None:
    """Tells a failed connection from damaged content: both reach Arrow's readers as `OSError`.

    Raises:
        StorageError: the error came from the network or the operating system, not from the bytes.
    """
    if isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error)):
        raise StorageError(f"{_where(uri, storage)}: {_cause(error)}") from error


def _where(uri: str, storage: Storage) -> str:
    return f"{uri} (endpoint {_endpoint(storage) or 'AWS'})" if is_s3(uri) else uri


@contextlib.contextmanager
def _named(uri: str, storage: Storage) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        raise StorageError(f"{_where(uri, storage)}: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    if isinstance(error, ClientError):
        detail = error.response["Error"]
        return f"{detail.get('Code')} {detail.get('Message', '')}".strip()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
