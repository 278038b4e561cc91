"""Writers of small data files below a folder, for `data_cases` and the tests of data."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SUMS = [{"prompt": f"{i // 8}+{i % 8}", "completion": str(i // 8 + i % 8)} for i in range(64)]
HELD = [{"prompt": f"HELD {i}", "completion": "T"} for i in range(20)]


def lines(file: Path, rows: Iterable[Any]) -> Path:
    """JSON lines; a row that is text or bytes is written as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    raw = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
    content = b"".join((row.encode() if isinstance(row, str) else row) + b"\n" for row in raw)
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def one_file(rows: Callable[[], Iterable[Any]], name: str = "t.jsonl") -> Callable[[Path], Path]:
    return lambda folder: lines(folder / name, rows())


def folder_of(files: dict[str, Iterable[Any]]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name, rows in files.items():
            lines(folder / "d" / name, rows)
        return folder / "d"

    return make


def with_links(folder: Path) -> Path:
    """The sums in a folder, with a link to a folder of more and one to nothing."""
    lines(folder / "elsewhere" / "a.jsonl", HELD)
    lines(folder / "d" / "a.jsonl", SUMS)
    (folder / "d" / "more").symlink_to(folder / "elsewhere")
    (folder / "d" / "gone.jsonl").symlink_to(folder / "nowhere.jsonl")
    return folder / "d"


def parquet(**columns: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pq.write_table(pa.table(columns), folder / "t.parquet")
        return folder / "t.parquet"

    return make


def saved_by_datasets(folder: Path) -> Path:
    """What `DatasetDict.save_to_disk` leaves: a folder for each split, with a stream of Arrow and two side files."""
    for split, rows in (("train", SUMS), ("test", HELD)):
        place = folder / "d" / split
        lines(place / "state.json", [{"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split}])
        lines(place / "dataset_info.json", [{}])
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(place / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=9)
    lines(folder / "d" / "dataset_dict.json", [{"splits": ["train", "test"]}])
    return folder / "d"


def bad_utf8(folder: Path) -> Path:
    """Parquet whose fourth prompt is no UTF-8."""
    prompts = [row["prompt"].encode() for row in SUMS]
    prompts.insert(3, b"caf\xe9")
    completions = ["c"] * len(prompts)
    return parquet(prompt=pa.array(prompts).cast(pa.string(), safe=False), completion=completions)(folder)


def text(content: str | bytes, name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return make
