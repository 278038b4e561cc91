"""Read the records of a data file one by one, each with its place: JSON, JSON lines, CSV, TSV, Parquet, Arrow.

Invariant: a record that cannot be read comes out as a `BadRow` in its place and does not end the reading. A JSON array, a
table's header or a binary file that cannot be read raises DataError. Called in Ray's tasks by `encode`, and by plans.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from tc_ray.data.source.files import DataFile, iter_lines, open_bytes, open_file
from tc_ray.data.source.records import ONE_OBJECT, BadRow, DataError, Record, not_utf8
from tc_ray.text import first_line

TABLES = {".csv": ",", ".tsv": "\t"}
BINARY = (".parquet", ".arrow")
"""Kinds that are compressed inside."""
_BATCH_ROWS = 1024
_SHARED_BYTES = 2**18
"""Smaller files are read by one task."""
_SHARE_ROWS = 500
"""Fewest records that are worth a task of their own."""
_LARGEST_ARRAY = 2**27
"""Bytes of a JSON array above which one task reads it: each that does holds all of it."""
_RECORD_LINES = 100
"""Lines of a table's record above which a quote that is not closed is likelier than a text of so many lines."""
Reader = Callable[[DataFile], Iterator[Record]]


def iter_records(file: DataFile | Path) -> Iterator[Record]:
    """Yield the records of one file in order (of `file.rows` these alone); `value` is the parsed value, or a BadRow."""
    file = DataFile(str(file)) if isinstance(file, Path) else file
    if file.kind in BINARY:
        return _binary(file)
    if file.kind in TABLES:
        return islice(_table(file, TABLES[file.kind]), *(file.rows or (None,)))
    if file.kind == ".json" and _starts_with_bracket(file):
        return islice(_json_array(file), *(file.rows or (None,)))
    return _json_lines(file)


def shares(files: Sequence[DataFile], tasks: int) -> list[DataFile]:
    """The files in order, large ones cut by records, so that `tasks` tasks at once have about as much to do each.

    To cut a file its records are counted, which costs a small part of what tokenising them does. A file of an object store
    stays whole: each task would fetch all of it.
    """
    counts: dict[DataFile, int] = {}
    for file in files if tasks > 1 else ():
        size = file.local_bytes
        if size is not None and size > _SHARED_BYTES and (file.kind != ".json" or size < _LARGEST_ARRAY):
            counts[file] = _count(file)
    each = max(_SHARE_ROWS, -(-sum(counts.values()) // tasks))
    found = []
    for file in files:
        parts = max(1, round(counts.get(file, 0) / each))
        edges = [counts.get(file, 0) * part // parts for part in range(parts + 1)]
        cut = [replace(file, rows=(first, last)) for first, last in pairwise(edges)]
        found += cut if parts > 1 else [file]
    return found


def _count(file: DataFile) -> int:
    import pyarrow as pa

    if file.kind == ".parquet":
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(file.place).num_rows)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, error) from error
    lines = file.kind not in (".json", *TABLES, *BINARY) or (file.kind == ".json" and not _starts_with_bracket(file))
    return sum(1 for _ in (iter_lines(file) if lines else iter_records(file)))


def doubled_key(file: DataFile) -> str | None:
    """A note where a record among the first ones of JSON lines has a key twice: JSON's readers keep the last of its values.

    Looking at all of them would cost five times their reading.
    """
    if (
        file.local_bytes is None
        or file.kind in BINARY
        or file.kind in TABLES
        or (file.kind == ".json" and _starts_with_bracket(file))
    ):
        return None
    found: list[str] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        found.extend(name for name in names if names.count(name) > 1)

    for place, line in iter_lines(replace(file, rows=(0, _BATCH_ROWS))):
        try:
            json.loads(line.decode("utf-8"), object_pairs_hook=keep)
        except (ValueError, RecursionError):
            continue
        if found:
            return f"{file}, line {place}: the key {found[0]} stands twice in one object; the last one counts"
    return None


def _json_lines(file: DataFile) -> Iterator[Record]:
    for place, line in iter_lines(file):
        value: Any
        try:
            value = json.loads(line.decode("utf-8"))  # of bytes json would guess the encoding, line by line
        except UnicodeDecodeError as error:
            value = not_utf8(error)
        except json.JSONDecodeError as error:
            value = BadRow("", f"not JSON: {error.msg} at column {error.colno}", ONE_OBJECT)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, nested too deeply
            value = BadRow("", f"cannot be read: {first_line(error)}", "write one flat JSON object per line")
        yield Record(place, "line", line.decode("utf-8", errors="replace").rstrip("\r\n"), value)


def _starts_with_bracket(file: DataFile) -> bool:
    with open_bytes(file) as content:
        return content.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json_array(file: DataFile) -> Iterator[Record]:
    with open_bytes(file) as opened:
        content = opened.read().removeprefix(b"\xef\xbb\xbf")
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: not JSON ({first_line(error)}); repair the array, or write one JSON object per line so that single bad "
            "lines can be left out"
        ) from error
    for place, value in enumerate(values, start=1):
        yield Record(place, "item", _shown(value), value)


def _table(file: DataFile, separator: str) -> Iterator[Record]:
    """Rows of a CSV or TSV file with a header, all values text; an empty cell is null. A record's place is its first line.

    Raises DataError: a record of several lines is bad, or one has more than _RECORD_LINES. A stray quote takes the records up
    to the next quote into one, so it would cost all of them and count as one bad row, or as none.
    """
    csv.field_size_limit(2**31 - 1)
    with open_bytes(file) as content:
        # bytes that are no UTF-8 cost their record, not the file
        text = io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(text, delimiter=separator, strict=True)
        header = next(rows, None)
        if header is None:
            return
        _check_header(file, header, separator)
        place = rows.line_num + 1
        while True:
            row: list[str] = []
            problem = None
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise DataError(
                        f"{file}, line {place}: a quote that opens in this record is not closed before the end of the file; "
                        'close it, and write a quote within a text twice ("")'
                    ) from error
                problem = BadRow(
                    "", f"cannot be read: {error}", 'write a text with quotes in quotes, each of them twice ("")'
                )
            first, place = place, rows.line_num + 1
            if row or problem:
                value = problem or _cells(header, row)
                _check_lines(file, first, rows.line_num, value)
                yield Record(first, "line", _shown(row), value)


def _check_lines(file: DataFile, first: int, last: int, value: dict[str, str | None] | BadRow) -> None:
    """Refuse the file if a record seems to be several, from its first line to its last one."""
    if isinstance(value, BadRow) and not value.field and last > first:
        raise DataError(
            f"{file}, lines {first} to {last}: a quote is not closed, so they are read as one record ({value.problem}); "
            f'close the quote (a quote within a text is written twice: ""), or, where it is closed, {value.fix}'
        )
    if last - first >= _RECORD_LINES:
        raise DataError(
            f"{file}, lines {first} to {last}: a quote is not closed, or one text has more than {_RECORD_LINES} lines; close "
            "the quote, or save the rows as JSON lines (.jsonl), which have one line per row"
        )


def _check_header(file: DataFile, header: list[str], separator: str) -> None:
    names = [name.strip() for name in header]
    if len(names) == 1 and any(other in names[0] for other in ";\t,|"):
        kind = "tabs" if separator == "\t" else "commas"
        raise DataError(f"{file}: its first line {names[0][:80]!r} is one column; separate columns by {kind}")
    if "" in names or len(set(names)) < len(names):
        raise DataError(
            f"{file}: its first line names the columns; a name is empty or stands twice: {', '.join(names)}"
        )
    header[:] = names


def _cells(header: list[str], row: list[str]) -> dict[str, str | None] | BadRow:
    if len(row) != len(header):
        return BadRow(
            "", f"has {len(row)} cells, the header names {len(header)} columns", "write a cell for each column"
        )
    for name, cell in zip(header, row, strict=True):
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            return BadRow(name, f"not UTF-8 at character {error.start + 1}", "save the file as UTF-8")
    return {name: cell or None for name, cell in zip(header, row, strict=True)}


def _binary(file: DataFile) -> Iterator[Record]:
    """Rows of a Parquet file, or of an Arrow file or stream, as `datasets` saves it."""
    import pyarrow as pa

    first, last = file.rows or (0, None)
    place = 0
    try:
        with closing(open_file(file)) as opened:
            for batch in _batches(file, opened):
                start, place = place, place + batch.num_rows
                if last is not None and start >= last:
                    return
                skipped = max(0, first - start)
                kept = batch.slice(skipped, None if last is None else max(0, last - start - skipped))
                for number, value in enumerate(_rows(kept), start=start + skipped + 1):
                    yield Record(number, "row", _shown(value), value)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _batches(file: DataFile, opened: Any) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.kind == ".parquet":
        yield from pq.ParquetFile(opened).iter_batches(batch_size=_BATCH_ROWS)
        return
    is_file = opened.read(6) == b"ARROW1"
    opened.seek(0)
    batches = pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)
    for batch in map(batches.get_batch, range(batches.num_record_batches)) if is_file else batches:
        yield from (batch.slice(at, _BATCH_ROWS) for at in range(0, batch.num_rows, _BATCH_ROWS))


def _rows(batch: Any) -> Iterator[Any]:
    """The rows as Python's values; one that Python cannot hold (no UTF-8, a date beyond year 9999) as a BadRow."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):
        pass
    for index in range(batch.num_rows):
        row: dict[str, Any] | BadRow = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                value = column[index].as_py()
            except UnicodeDecodeError as error:
                row = BadRow(name, f"not UTF-8 at byte {error.start + 1}", "write the text as UTF-8")
                break
            except (ValueError, OverflowError) as error:
                row = BadRow(name, f"cannot be read: {first_line(error)}", "correct the value, or leave the column out")
                break
            if isinstance(row, dict):
                row[name] = value
        yield row


def _unreadable(file: DataFile, error: Exception) -> DataError:
    kind = "Parquet" if file.kind == ".parquet" else "Arrow"
    return DataError(f"{file}: not a readable {kind} file ({first_line(error)}); write it again")


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
