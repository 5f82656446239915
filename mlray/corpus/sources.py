"""Which files a source holds, how each is read, and which language its name tells."""

from __future__ import annotations

import fnmatch
import hashlib
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

from mlray import languages, storage
from mlray.config import ConfigError, Source, Storage
from mlray.corpus import label_maps
from mlray.corpus.label_maps import LabelMap

_FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".tsv": "text",
    ".csv": "csv",
    ".conll": "conll",
    ".conllu": "conll",
}
_WHOLE: dict[str, tuple[tuple[str, ...], str | None]] = {
    "squad": (("question",), "sentences"),
    "file": (("text",), None),
}
"""Formats without columns of their own -> text, and what stands beside it."""
_NO_COLUMNS: dict[str, set[str]] = {
    "text": {"pair"},
    "file": set(),
    "squad": {"id", "paragraph", "question", "sentences", "answer", "others"},
}
"""Formats whose rows have no columns -> what else `part_by` may name."""
_SHARD_BYTES = 256 << 20
_CODECS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus and how to read it."""

    uri: str
    size: int
    etag: str
    format: str
    codec: str | None
    columns: tuple[str, ...]
    pair: str | None
    language: str | None
    """The language of every row, or None where `language_column` holds it."""
    language_column: str | None
    pair_uri: str | None = None
    """The file that holds the other half of each line."""
    pair_size: int = 0
    pair_etag: str = ""
    part: tuple[float, float] = (0.0, 1.0)
    """Share of the hashes of its texts that belongs to the source."""
    part_by: str | None = None
    """Column whose hash it is, instead of the text's."""
    rows: tuple[int, int] | None = None
    """First row that belongs to the source, and the first after them."""
    label_map: LabelMap = ()
    task: str | None = None
    """What stands before the language of every row of a multi-task run."""
    negatives: str | None = None
    """Column of the hard negatives."""
    item: str | None = None
    """Column of the item that a row is about."""
    session: str | None = None
    """Column whose neighbouring rows with one value are one record."""
    last_is_pair: bool = False
    """Whether the last item of a session belongs to the others, and not to them."""
    query: str | None = None
    """Column of what the customer of a session has searched for."""
    distinct: bool = False
    """Whether a row whose halves are the same is refused."""
    without: str | None = None
    """File with the hashes of texts that may stand in no row; see `records.forbid`."""
    labelled: bool = False
    """Whether what a row has beside its text is its label, which may stand in a test set too."""
    source: int = 0
    """Its place in `corpus.sources`."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> SourceFile:
        """What `dataclasses.asdict` and JSON have made of one."""
        fields = {name: tuple(values[name]) for name in ("columns", "part")}
        fields["label_map"] = tuple((label, name) for label, name in values["label_map"])
        return cls(**{**values, **fields, "rows": tuple(values["rows"]) if values["rows"] else None})

    @property
    def fallback(self) -> str:
        """The language of a row that does not tell its own."""
        return self.language or self.name(languages.UNKNOWN)

    def name(self, tag: str) -> str:
        """The language of a row under its task, such as `ner:de`."""
        return f"{self.task}:{tag}" if self.task else tag

    def other_half(self) -> SourceFile:
        """The file of the translations."""
        uri = self.pair_uri or ""
        return replace(
            self, uri=uri, size=self.pair_size, etag=self.pair_etag, codec=_codec(uri), pair_uri=None
        )


def list_files(sources: tuple[Source, ...], settings: Storage) -> list[SourceFile]:
    """Every file of all sources, ordered by name.

    Raises:
        ConfigError: no sources, a file of unknown format, or a name that tells no language.
        StorageError: a source that is empty or cannot be listed.
    """
    if not sources:
        raise ConfigError(
            "corpus.sources is empty; name at least one, e.g. corpus.sources=[{uri: s3://bucket/corpus}]"
        )
    found: dict[SourceFile, int] = {}
    for number, source in enumerate(sources):
        _check(source)
        label_map = label_maps.read(source.label_map, settings) if source.label_map else ()
        root = storage.absolute(source.uri)
        for file in _matching(root, source, settings):
            described = _describe(file, root, source)
            if source.pair_uri:
                described = _aligned(
                    described, storage.list_files(storage.absolute(source.pair_uri), settings)
                )
            found.setdefault(replace(described, label_map=label_map), number)  # named twice, it is read once
    files = [replace(file, source=number) for file, number in found.items()]
    return sorted(files, key=lambda file: (file.uri, file.pair_uri or "", repr(file)))


def _matching(root: str, source: Source, settings: Storage) -> list[storage.File]:
    pattern = source.files or "*"
    listed = storage.list_files(root, settings)
    found = [file for file in listed if fnmatch.fnmatch(file.uri.removeprefix(root).lstrip("/"), pattern)]
    if not found:
        raise ConfigError(f"{source.uri}: no file matches sources[].files={source.files!r}")
    return found


def _check(source: Source) -> None:
    for key, (first, last) in (("part", source.part), ("rows", source.rows or (0, 1))):
        if first >= last:
            raise ConfigError(
                f"{source.uri}: sources[].{key}=[{first}, {last}] holds no row; the first must be below the last"
            )
    if source.negatives and not source.pair:
        raise ConfigError(
            f"{source.uri}: sources[].negatives={source.negatives!r} needs sources[].pair, what is to be told from them"
        )
    if source.last_is_pair and (source.pair or source.pair_uri):
        raise ConfigError(
            f"{source.uri}: sources[].last_is_pair makes the pair itself; leave sources[].pair out"
        )
    if source.label_map and not source.pair:
        raise ConfigError(
            f"{source.uri}: sources[].label_map={source.label_map!r} needs sources[].pair, the column of the labels"
        )


def _check_columns(uri: str, kind: str, language: str | None, source: Source) -> None:
    """Refuses settings that name a column of a format without any."""
    part_by, halves = source.part_by, source.pair or source.pair_uri
    if kind == "text" and part_by == "pair" and not halves:
        raise ConfigError(f"{uri}: sources[].part_by=pair needs sources[].pair")
    if language:
        raise ConfigError(f"{uri}: format={kind} has no columns; set sources[].language to a tag or filename")
    known = _NO_COLUMNS[kind]
    for key, column, allowed in (
        ("part_by", part_by, known),
        ("item", source.item, known if kind == "squad" else set[str]()),
        ("query", source.query, set[str]()),
    ):
        if column and column not in allowed:
            raise ConfigError(
                f"{uri}: format={kind} has no column {column!r}; leave sources[].{key} out"
                + (f" or take one of {', '.join(sorted(allowed))}" if allowed else "")
            )


def _aligned(file: SourceFile, halves: list[storage.File]) -> SourceFile:
    if file.format != "text" or len(halves) != 1 or file.language is None or "-" not in file.language:
        raise ConfigError(
            f"{file.uri}: sources[].pair_uri takes one text file beside one text file, and a language such as "
            "en-de"
        )
    other = halves[0]
    return replace(file, pair_uri=other.uri, pair_size=other.size, pair_etag=other.etag)


def _codec(name: str) -> str | None:
    return next((codec for suffix, codec in _CODECS.items() if name.endswith(suffix)), None)


def import_datasets(sources: tuple[Source, ...], folder: str, settings: Storage) -> tuple[Source, ...]:
    """Writes `hf://name[:config[:split]]` sources as parquet below `folder`, once, so that all nodes read the same.

    Raises:
        ConfigError: `datasets` cannot load the name.
    """
    return tuple(
        _import(source, folder, settings) if source.uri.startswith("hf://") else source for source in sources
    )


def _import(source: Source, folder: str, settings: Storage) -> Source:
    name, config, split = [*source.uri.removeprefix("hf://").split(":"), "", ""][:3]
    target = storage.join(
        folder, f"{PurePosixPath(name).name}-{hashlib.sha256(source.uri.encode()).hexdigest()[:8]}"
    )
    done = storage.join(target, "_DONE")
    if not storage.exists(done, settings):
        import datasets  # heavy, and every Ray worker that reads text imports this module

        try:
            loaded = datasets.load_dataset(name, config or None, split=split or "train")
        except Exception as error:
            cause = " ".join(str(error).split())
            raise ConfigError(f"{source.uri}: `datasets` cannot load it: {cause}") from error
        shards = max(-(-loaded.data.nbytes // _SHARD_BYTES), 1)  # files are scanned side by side
        for number in range(shards):
            with storage.staging() as stage:
                loaded.shard(shards, number).to_parquet(str(stage / f"part-{number:05d}.parquet"))
                storage.upload(stage, target, settings)
        storage.write_bytes(done, b"", settings)
    return source.model_copy(update={"uri": target, "format": "parquet"})


def _describe(file: storage.File, root: str, source: Source) -> SourceFile:
    name = PurePosixPath(file.uri).name
    codec = _codec(name)
    stem = PurePosixPath(name).stem if codec else name
    kind = source.format if source.format != "auto" else _FORMATS.get(PurePosixPath(stem).suffix.lower(), "")
    if not kind:
        raise ConfigError(
            f"{file.uri}: unknown file type; set sources[].format to parquet, jsonl, text, csv, tsv, conll, "
            "squad or file"
        )
    if kind == "parquet" and codec:
        raise ConfigError(f"{file.uri}: parquet compresses inside; a compressed parquet file cannot be read")
    language, column = _language(file.uri, root, stem, source)
    if source.negatives and kind in {"text", "file"}:
        raise ConfigError(f"{file.uri}: format={kind} has no column for sources[].negatives")
    if source.rows and kind not in {"csv", "tsv", "conll"}:
        raise ConfigError(f"{file.uri}: sources[].rows is for csv, tsv and conll, not for format={kind}")
    if source.session and (kind not in {"csv", "tsv"} or not isinstance(source.text, str)):
        raise ConfigError(
            f"{file.uri}: sources[].session is for one column of csv and tsv, not for format={kind} and "
            f"text={source.text}"
        )
    if kind in _NO_COLUMNS:
        _check_columns(file.uri, kind, column, source)
    columns = (source.text,) if isinstance(source.text, str) else source.text
    if kind in _WHOLE:
        columns, whole = _WHOLE[kind]
        pair = source.pair if kind == "squad" and source.pair else whole
    else:
        pair = source.pair
    described = SourceFile(file.uri, file.size, file.etag, kind, codec, columns, pair, language, column)
    carried = ("part", "part_by", "rows", "task", "negatives", "item", "session", "last_is_pair", "query")
    described = replace(described, **{name: getattr(source, name) for name in carried})
    return replace(described, language=described.name(language)) if language else described


def _language(uri: str, root: str, stem: str, source: Source) -> tuple[str | None, str | None]:
    rule, _, argument = source.language.partition(":")
    if rule == "column":
        return None, argument or "language"
    if rule == "partition":
        parts = dict(part.split("=", 1) for part in uri.removeprefix(root).split("/") if "=" in part)
        key = argument or next(iter(parts), "")
        tag = unquote(parts.get(key, ""))
    elif rule == "folder":
        tag = PurePosixPath(uri).parent.name
    elif rule == "filename":
        tag = stem.split(".")[0]
    else:
        tag = source.language
    normal = languages.normalize(tag)
    if normal is None:
        raise ConfigError(
            f"{uri}: no language in {tag!r} (sources[].language={source.language!r}); use column:<name>, "
            "partition:<key>, folder, filename, or a fixed tag such as de"
        )
    return normal, None
