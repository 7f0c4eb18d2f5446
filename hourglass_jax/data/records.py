"""Documents of a corpus as a stream: text, JSON Lines, CSV, Parquet and Arrow files, plain or compressed."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from hourglass_jax.data.corpora import matching_files
from hourglass_jax.errors import UsageError
from hourglass_jax.tokenizers import to_utf8

Values = Sequence[Any]  # of the requested fields of a record; None for a missing value
Names = Sequence[str]  # of the requested fields
Reader = Callable[[Any, Names], Iterable["Values | bytes"]]

CHUNK = 2**20  # characters or bytes read at once
ROWS = 128  # rows of a Parquet file decoded at once
DAMAGED = (EOFError, OSError, ValueError, NotImplementedError, zlib.error, lzma.LZMAError, csv.Error)
METADATA = ("dataset_info.json", "dataset_dict.json", "state.json")  # of a directory that `datasets` saved


class Record(NamedTuple):
    """A record as its file has it: the requested fields, or a JSON object that `read_fields` parses."""

    content: Values | bytes
    file: str
    number: int  # from 1

    @property
    def place(self) -> str:
        return f"{self.file}, record {self.number}"


class Document(NamedTuple):
    """UTF-8 text, the key whose hash decides the split, and where the document was read."""

    text: bytes
    key: bytes
    place: str


def corpus_files(path: str) -> list[str]:
    """Return the sorted files of a path: a file, a directory, a pattern, a URL, or several separated by commas.

    Raises UsageError if a part of the path matches no file.
    """
    if "://" not in path:
        return [str(file) for file in matching_files(path, tuple(READERS | OPENERS)) if file.name not in METADATA]
    files: list[str] = []
    for part in path.split(","):
        files += remote_files(part.strip()) if "://" in part else corpus_files(part.strip())
    return files


def remote_files(url: str) -> list[str]:
    if "*" not in url:
        return [url]
    system, pattern = imported("fsspec").core.url_to_fs(url)
    if files := sorted(map(system.unstrip_protocol, system.glob(pattern))):
        return files
    raise UsageError(f"{url}: no such file; give a URL, or a pattern that a server with listings can expand")


def read_records(files: Iterable[str], names: Names) -> Iterator[Record]:
    """Yield the records in order of file and record.

    names: of the fields. Text files have no fields: each is a record.

    Raises UsageError with file and record for a damaged file and a missing column.
    """
    for file in files:
        number = 0
        try:
            with open_file(file) as stream:
                for number, content in enumerate(reader_of(file)(stream, names), 1):
                    yield Record(content, file, number)
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from error
        except DAMAGED as error:
            raise UsageError(f"{file}, record {number + 1}: cannot be read ({error}); give an intact file") from error


def read_document(record: Record, names: Names) -> Document:
    """Return the document of a record. names: the field of the text, and that of the key unless the text is the key.

    Raises UsageError with file and record for a missing field, and for text that is not UTF-8.
    """
    text, *key = read_fields(record, names)
    try:
        found = utf8(text, names[0])
        if key and isinstance(key[0], int | float):
            key = [str(key[0])]
        return Document(found, utf8(key[0], names[1]) if key else found, record.place)
    except UsageError as error:
        raise UsageError(f"{record.place}: {error}") from error


def read_fields(record: Record, names: Names) -> Values:
    """Return the fields of a record. Raises UsageError with file and record unless JSON is an object."""
    if not isinstance(record.content, bytes):
        return record.content
    try:
        return fields_of(json.loads(record.content), names)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{record.place}: cannot be read ({error}); give an intact file") from error


def fields_of(item: Any, names: Names) -> Values:
    """Return the fields of a JSON object."""
    if not isinstance(item, dict):
        raise ValueError(f"a JSON {type(item).__name__}, not an object")
    return [item.get(name) for name in names]


def utf8(value: Any, field: str) -> bytes:
    """Return text as UTF-8. Raises UsageError for other values and encodings."""
    if isinstance(value, str):
        return to_utf8(value)
    if isinstance(value, bytes):
        try:
            value.decode()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"not UTF-8 at byte {error.start} (0x{value[error.start]:02x}); convert it first"
            ) from error
        return value
    found = "missing" if value is None else f"{type(value).__name__}, not text"
    raise UsageError(f"field {field!r} is {found}; give another field as --field or --id_field")


def kind_of(file: str) -> str:
    """Return the suffix without that of the compression."""
    name = file.lower()
    for suffix in OPENERS:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def reader_of(file: str) -> Reader:
    """Return the reader of the file's format; a file of another kind is text."""
    return READERS.get(kind_of(file), read_text)


@contextmanager
def open_file(file: str) -> Iterator[Any]:
    """Open a local file or a URL, decompressed by its suffix."""
    with ExitStack() as stack:
        if "://" in file:
            raw = io.BufferedReader(stack.enter_context(imported("fsspec").open(file)), CHUNK)
        else:
            raw = stack.enter_context(Path(file).open("rb"))
        opener = OPENERS.get(Path(file).suffix.lower())
        yield stack.enter_context(opener(raw)) if opener else raw


def open_zst(raw: IO[bytes]) -> IO[bytes]:
    # Not fsspec's reader, which takes the end of a truncated file for the end of the text.
    return io.BufferedReader(imported("pyarrow").CompressedInputStream(raw, "zstd"), CHUNK)


def imported(module: str) -> Any:
    """Return a module of the extra [data]. Raises UsageError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"this format requires {module.partition('.')[0]}; install it with pip install 'hourglass_jax[data]'"
        ) from error


def read_text(stream: Any, names: Names) -> Iterator[Values]:
    if len(names) > 1:
        raise UsageError(f"a text file has no field {names[1]!r}; leave out --id_field")
    yield [stream.read()]


def read_json(stream: Any, names: Names) -> Iterator[Values | bytes]:
    """Yield the lines of JSON Lines, or the fields of the objects in an array."""
    if stream.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return (fields_of(item, names) for item in json_array(stream))
    return (line for line in stream if line.strip())


def json_array(stream: Any) -> Iterator[Any]:
    """Yield the items of a JSON array without reading it whole."""
    text, decode, between = io.TextIOWrapper(stream, "utf-8-sig"), json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    buffer, start = text.read(CHUNK).lstrip()[1:], 0
    while True:
        start += len(between.match(buffer, start)[0])  # type: ignore[index]
        if buffer.startswith("]", start):
            return
        try:
            item, start = decode(buffer, start)
        except ValueError:
            buffer, start = buffer[start:], 0
            if not (more := text.read(max(CHUNK, len(buffer)))):
                raise
            buffer += more
            continue
        yield item


def read_csv(stream: Any, names: Names, delimiter: str = ",") -> Iterator[Values]:
    csv.field_size_limit(sys.maxsize)
    # Escaped, bytes that are not UTF-8 raise in their record.
    lines = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header = next(rows, [])
    check_columns(names, header)
    columns = [header.index(name) for name in names]
    for row in filter(None, rows):
        yield [row[i].encode("utf-8", "surrogateescape") if i < len(row) else None for i in columns]


def read_tsv(stream: Any, names: Names) -> Iterator[Values]:
    return read_csv(stream, names, "\t")


def read_parquet(stream: Any, names: Names) -> Iterator[Values]:
    table = imported("pyarrow.parquet").ParquetFile(stream)
    check_columns(names, table.schema_arrow.names)
    for batch in table.iter_batches(ROWS, columns=list(names)):
        yield from arrow_rows(batch, names)


def read_arrow(stream: Any, names: Names) -> Iterator[Values]:
    """Yield the fields of an Arrow file or stream; `datasets` saves the latter."""
    ipc = imported("pyarrow.ipc")
    is_file = stream.peek(6).startswith(b"ARROW1")
    table = ipc.open_file(stream) if is_file else ipc.open_stream(stream)
    check_columns(names, table.schema.names)
    for batch in map(table.get_batch, range(table.num_record_batches)) if is_file else table:
        yield from arrow_rows(batch, names)


def arrow_rows(batch: Any, names: Names) -> Iterator[Values]:
    pyarrow = imported("pyarrow")
    columns = [batch.column(name) for name in names]
    # As bytes, text that is not UTF-8 raises in its record.
    bytes_of = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    return zip(*(column.cast(bytes_of.get(column.type, column.type)).to_pylist() for column in columns), strict=True)


def check_columns(names: Names, found: Names) -> None:
    for name in names:
        if name not in found:
            shown = ", ".join(found[:5]) + ", ..." * (len(found) > 5)
            raise UsageError(f"no column {name!r}, only {shown or 'an empty header'}; give the column as --field")


OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": open_zst,
}
READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".json": read_json,
    ".jsonl": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
