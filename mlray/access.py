"""How S3 is reached, and what the failures of storage are called: each is one line that names object and endpoint.

boto3 lists and writes (ETags, errors that can be named), `pyarrow.fs` reads. Keys come from the environment or the
instance role.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import boto3
import botocore.config
import pyarrow.fs as pafs
from botocore.exceptions import BotoCoreError, ClientError

from mlray.config import RunError, Storage

_ATTEMPTS = 3
_FAILURES = (BotoCoreError, ClientError, boto3.exceptions.Boto3Error, OSError)


class StorageError(RunError):
    """An object that cannot be listed, read or written."""


def is_s3(uri: str) -> bool:
    """True for `s3://bucket/key`."""
    return uri.startswith("s3://")


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


@functools.lru_cache(maxsize=8)
def client(storage: Storage) -> Any:
    """boto3's client with this endpoint and these limits."""
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
        raise StorageError(f"{where(uri, storage)}: {_cause(error)}") from error


@contextlib.contextmanager
def named(uri: str, storage: Storage) -> Iterator[None]:
    """Turns what boto3, Arrow and the operating system raise into a `StorageError` that names the place."""
    try:
        yield
    except _FAILURES as error:
        raise StorageError(f"{where(uri, storage)}: {_cause(error)}") from error


def where(uri: str, storage: Storage) -> str:
    """The place as errors call it."""
    return f"{uri} (endpoint {_endpoint(storage) or 'AWS'})" if is_s3(uri) else uri


def _endpoint(storage: Storage) -> str | None:
    return storage.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _cause(error: Exception) -> str:
    if isinstance(error, ClientError):
        detail = error.response["Error"]
        return f"{detail.get('Code')} {detail.get('Message', '')}".strip()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
