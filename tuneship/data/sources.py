"""Raw rows from a Hub data set, a JSONL, CSV or Parquet file, a gs:// URI of one, or the built-in set.

Rows are streamed: memory does not grow with the file. A source yields every row with its number
(line of the file, or index of the row), and a row that cannot even be read as a `Broken`.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tuneship import hub, storage
from tuneship.errors import InputError, OutsideError, TuneshipError
from tuneship.recipe import Data

BUILTIN = {"builtin:text-to-sql": Path(__file__).parent / "text_to_sql" / "rows.jsonl"}
SUFFIXES = (".jsonl", ".csv", ".parquet")

# A row of text-to-SQL is a few hundred bytes; one of megabytes is a mistake, and is not read into memory.
MAX_ROW_BYTES = 2**20


@dataclass(frozen=True)
class Broken:
    """A row that could not be read, and why."""

    reason: str


RawRow = dict[str, Any] | Broken


def check(data: Data) -> str:
    """What kind of source a recipe names: `builtin`, `file` or `hub`.

    Raises:
        InputError: it is none, or a setting has no effect on it.
    """
    name = data.dataset_name
    if name in BUILTIN:
        kind = "builtin"
    elif name.startswith("builtin:"):
        raise InputError(
            "no such built-in data", where=f"data.dataset_name: {name}", fix=f"there is {', '.join(BUILTIN)}"
        )
    elif name.endswith(SUFFIXES):
        kind = "file"
        if not storage.is_remote(name) and not Path(name).is_file():
            raise InputError("no such file", where=f"data.dataset_name: {name}", fix="check the path")
    elif storage.is_remote(name) or Path(name).exists():
        raise InputError(
            f"data is read from files that end in {', '.join(SUFFIXES)}", where=f"data.dataset_name: {name}"
        )
    elif hub.is_id(name):
        return "hub"
    else:
        raise InputError(
            "no such data",
            where=f"data.dataset_name: {name}",
            fix=f"name a file ({', '.join(SUFFIXES)}), a gs:// URI of one, a Hub id, or {', '.join(BUILTIN)}",
        )
    for key in ("dataset_config", "dataset_revision"):
        if getattr(data, key) is not None:
            raise InputError(f"{key} has an effect on a Hub data set only", where=f"data.{key}", fix="remove it")
    return kind


def revision(data: Data) -> str:
    """What identifies the state of a source elsewhere: the commit of a Hub data set, the checksum of an object.

    Raises:
        InputError, OutsideError: the Hub or the storage does not know it or refuses.
    """
    if check(data) != "hub":
        return storage.checksum(data.dataset_name)
    info = hub.call(
        f"dataset {data.dataset_name}",
        lambda: hub.api().dataset_info(data.dataset_name, revision=data.dataset_revision),
    )
    return str(info.sha)


def read(data: Data) -> Iterator[tuple[int, RawRow]]:
    """The rows of a source, numbered from 1, in its order.

    Raises:
        InputError: the source does not exist or is not of its kind.
        OutsideError: it cannot be reached.
    """
    kind = check(data)
    if kind == "hub":
        yield from _hub(data)
        return
    name = str(BUILTIN.get(data.dataset_name, data.dataset_name))
    with storage.open_read(name) as stream:
        if name.endswith(".jsonl"):
            yield from _jsonl(stream)
        elif name.endswith(".csv"):
            yield from _csv(stream, name)
        else:
            yield from _parquet(stream, name)


def _jsonl(stream: IO[bytes]) -> Iterator[tuple[int, RawRow]]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_ROW_BYTES)
            yield number, Broken(f"longer than {MAX_ROW_BYTES} bytes")
            continue
        if not line.strip():
            continue
        yield number, _json(line)


def _json(line: bytes) -> RawRow:
    try:
        row = json.loads(line.rstrip())
    except UnicodeDecodeError as error:
        return Broken(f"not UTF-8: byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return Broken(f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Broken("not JSON: nested too deeply")
    except ValueError as error:
        return Broken(f"not JSON: {error}")
    return row if isinstance(row, dict) else Broken(f"not a JSON object but {type(row).__name__}")


def _csv(stream: IO[bytes], name: str) -> Iterator[tuple[int, RawRow]]:
    # Bytes that are not UTF-8 become lone surrogates, so that the row, not the file, is refused.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _records(text, name)
    finally:
        # The stream is closed by whoever opened it.
        text.detach()


def _records(text: io.TextIOWrapper, name: str) -> Iterator[tuple[int, RawRow]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(_bounded(text), strict=True)
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise InputError(f"not CSV: {error}", where=f"{name}:1") from None
    if not header:
        raise InputError("the file is empty", where=name)
    if repeated := [column for column, count in Counter(header).items() if count > 1]:
        raise InputError(f"the header names {repeated[0]!r} twice", where=f"{name}:1", fix="rename one of them")
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, Broken(f"not CSV: {error}")
            continue
        if fields is None:
            return
        if not fields:
            continue
        if len(fields) != len(header):
            yield reader.line_num, Broken(f"{len(fields)} fields, the header has {len(header)}")
        else:
            yield reader.line_num, dict(zip(header, fields, strict=True))


def _bounded(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(MAX_ROW_BYTES + 2):
        if len(line) > MAX_ROW_BYTES:
            while line and not line.endswith("\n"):
                line = text.readline(MAX_ROW_BYTES)
            # The reader refuses a field of this length, and names its line.
            line = "x" * (MAX_ROW_BYTES + 1) + "\n"
        yield line


def _parquet(stream: IO[bytes], name: str) -> Iterator[tuple[int, RawRow]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise OutsideError("Parquet needs pyarrow", where=name, fix="pip install 'tuneship[train]'") from None
    try:
        file = parquet.ParquetFile(stream)
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for row in _plain(batch):
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        # What is wrong with the file's bytes is an OSError, too.
        raise InputError(f"not Parquet: {str(error).splitlines()[0]}", where=name) from None


def _plain(batch: Any) -> list[RawRow]:
    """The rows of a batch; one that holds what Python cannot is broken, not all."""
    try:
        return list(batch.to_pylist())
    except ValueError as error:
        if batch.num_rows == 1:
            return [Broken(f"cannot be read: {error}")]
        return [row for index in range(batch.num_rows) for row in _plain(batch.slice(index, 1))]


def _hub(data: Data) -> Iterator[tuple[int, RawRow]]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise OutsideError(
            "Hub data needs the datasets package", where=data.dataset_name, fix="pip install 'tuneship[train]'"
        ) from None
    from tuneship.credentials import hub_token

    def load() -> Iterable[Any]:
        stream: Iterable[Any] = datasets.load_dataset(
            data.dataset_name,
            data.dataset_config,
            split=data.dataset_train_split,
            revision=data.dataset_revision,
            streaming=True,
            token=hub_token(),
        )
        return stream

    what = f"dataset {data.dataset_name}"
    broken_off: tuple[type[Exception], ...] = (OSError, *hub.transport_errors())
    try:
        for index, row in enumerate(hub.call(what, load)):
            yield index + 1, dict(row)
    except datasets.exceptions.DatasetsError as error:
        raise InputError(f"no such data set, or none that can be read: {error}", where=what) from error
    except broken_off as error:
        if isinstance(error, TuneshipError):
            raise
        # Rows are streamed: the Hub may break off in the middle.
        raise hub.unreachable(what, error) from error
    except ValueError as error:
        # datasets' word for an unknown configuration or split.
        raise InputError(
            str(error), where=data.dataset_name, fix="check dataset_config and dataset_train_split"
        ) from error
