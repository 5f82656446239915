"""One door to S3 and local files: list, read from an offset, atomic write, folders up and down.

Every failure is an `access.StorageError` of one line that names the object and the endpoint.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
from botocore.exceptions import ClientError

from mlray.access import StorageError, client, filesystem, is_s3, named, split, where
from mlray.config import Storage

_TAKEN = {"PreconditionFailed", "ConditionalRequestConflict"}
"""What S3 answers to a conditional write that lost."""
_PARTIAL = ".part"


@dataclass(frozen=True)
class File:
    """A file as it was listed; `etag` changes when its content does."""

    uri: str
    size: int
    etag: str


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
        raise StorageError(f"no files at {where(uri, storage)}")
    return sorted(files, key=lambda file: file.uri)


def exists(uri: str, storage: Storage) -> bool:
    """True if the object or file is there."""
    if not is_s3(uri):
        return Path(uri).is_file()
    bucket, key = split(uri)
    with named(uri, storage):
        try:
            client(storage).head_object(Bucket=bucket, Key=key)
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
    bucket, key = split(uri)
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    names: list[str] = []
    with named(uri, storage):
        pages = (
            client(storage)
            .get_paginator("list_objects_v2")
            .paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        )
        for page in pages:
            names += [entry["Prefix"][len(prefix) :].rstrip("/") for entry in page.get("CommonPrefixes", [])]
    return sorted(names)


def walk(uri: str, storage: Storage) -> list[str]:
    """Paths of every file below a folder, from there, ordered; hidden ones too. An absent folder has none."""
    if not is_s3(uri):
        root = Path(uri)
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    bucket, key = split(uri)
    prefix = f"{key.rstrip('/')}/"
    with named(uri, storage):
        pages = client(storage).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(entry["Key"][len(prefix) :] for page in pages for entry in page.get("Contents", []))


def open_input(uri: str, storage: Storage) -> pa.NativeFile:
    """Opens a file for ranged reads (`seek`, `read`).

    Raises:
        StorageError: it is absent or unreachable.
    """
    with named(uri, storage):
        if is_s3(uri):
            return filesystem(storage).open_input_file(uri.removeprefix("s3://"))
        return pafs.LocalFileSystem(use_mmap=False).open_input_file(uri)


def read_bytes(uri: str, storage: Storage) -> bytes:
    """The whole content of a small file, as it was at one moment: on S3 by one request, whoever writes it anew."""
    if is_s3(uri):
        bucket, key = split(uri)
        with named(uri, storage):
            return bytes(client(storage).get_object(Bucket=bucket, Key=key)["Body"].read())
    with open_input(uri, storage) as file, named(uri, storage):
        return bytes(file.read())


def write_bytes(uri: str, data: bytes, storage: Storage) -> None:
    """Writes a small file atomically: a reader sees the old content or the new one, never a part."""
    with named(uri, storage):
        if is_s3(uri):
            bucket, key = split(uri)
            client(storage).put_object(Bucket=bucket, Key=key, Body=data)
            return
        with _temporary(Path(uri), data) as temporary:
            temporary.replace(uri)


def create_bytes(uri: str, data: bytes, storage: Storage) -> bool:
    """Writes a small file atomically where there is none; False: somebody else was first, and theirs stays.

    An attempt whose answer was lost may be repeated by the client, and then finds its own file: the same content is
    taken for a success, so two writers must not write the same.
    """
    with named(uri, storage):
        try:
            if is_s3(uri):
                bucket, key = split(uri)
                client(storage).put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            else:
                with _temporary(Path(uri), data) as temporary:
                    os.link(temporary, uri)
        except FileExistsError:
            return False
        except ClientError as error:
            if error.response["Error"]["Code"] not in _TAKEN:
                raise
            return read_bytes(uri, storage) == data
    return True


@contextlib.contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    """A file beside `path` that holds `data` to the disk; gone after the block, unless it got another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PARTIAL)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def is_partial(path: str) -> bool:
    """Whether a path is that of a file which is being written, or whose writer was killed."""
    name = path.rpartition("/")[2]
    return name.startswith(".") and name.endswith(_PARTIAL)


def upload(local: Path, uri: str, storage: Storage) -> None:
    """Copies a file, or every file below a folder, to `uri`; local copies are moved into place atomically."""
    if local.is_dir():
        for path in sorted(local.rglob("*")):
            if path.is_file():
                upload(path, join(uri, path.relative_to(local).as_posix()), storage)
        return
    with named(uri, storage):
        if is_s3(uri):
            bucket, key = split(uri)
            client(storage).upload_file(str(local), bucket, key)
            return
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(
            f".{target.name}.{uuid.uuid4().hex}{_PARTIAL}"
        )  # others may write the same
        try:
            shutil.copyfile(local, temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
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
            bucket, key = split(file.uri)
            with named(file.uri, storage):
                client(storage).download_file(bucket, key, str(target))
        yield folder / "copy"


@contextlib.contextmanager
def staging() -> Iterator[Path]:
    """A temporary local folder in which files are written before `upload`."""
    with tempfile.TemporaryDirectory(prefix="mlray-") as folder:
        yield Path(folder)


def delete_others(uri: str, known: Collection[str], storage: Storage) -> None:
    """Removes every file below a folder that is none of `known` (paths from there) and that nobody is writing.

    One that is gone is no error.
    """
    for path in walk(uri, storage):
        if path not in known and not is_partial(path):
            delete(uri, path, storage)


def delete(uri: str, path: str, storage: Storage) -> None:
    """Removes a file below a folder; one that is gone is no error."""
    with named(uri, storage):
        if is_s3(uri):
            bucket, key = split(uri)
            client(storage).delete_object(Bucket=bucket, Key=f"{key.rstrip('/')}/{path}")
        else:
            (Path(uri) / path).unlink(missing_ok=True)


def delete_folder(uri: str, storage: Storage) -> None:
    """Removes a folder and everything below it; an absent one is no error."""
    if is_s3(uri):
        for path in walk(uri, storage):
            delete(uri, path, storage)
    else:
        shutil.rmtree(uri, ignore_errors=True)


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
    bucket, prefix = split(uri)
    files: list[File] = []
    with named(uri, storage):
        for page in client(storage).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                key = entry["Key"]
                inside = key[len(prefix) :]
                below = not prefix or prefix.endswith("/") or inside == "" or inside.startswith("/")
                hidden = any(part.startswith((".", "_")) for part in inside.split("/"))
                if below and not hidden and not key.endswith("/"):
                    files.append(File(f"s3://{bucket}/{key}", entry["Size"], entry["ETag"].strip('"')))
    return files
