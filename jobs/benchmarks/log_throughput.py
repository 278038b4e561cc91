"""The Mistake Log against bare pyarrow on the same disk: how fast records are written, and read into Copilot batches.

python jobs/benchmarks/log_throughput.py [--megabytes 512] [--repeats 5] [--folder DIR] [--json FILE]

Writing: the same Arrow tables go (a) through pyarrow's ParquetWriter alone, cut at the same size, each file synced to the disk, and
(b) through a RecordWriter and a real Ledger: queue, thread, checksums, sync, Delta commits; from the first `put` until the last
round is acknowledged. Reading: (a) pyarrow's `read_table` of every file, with its threads, to Arrow tables and no further, as it is called
by default and ("mapped") with `memory_map=True`; (b) from the table's version to padded Copilot batches: file list, checksums,
parsing, Records, batches of 16. With the files in the page cache ("warm") and dropped from it ("cold", read from the disk).
Each way of reading has a process of its own, which has read once before it is measured. Interleaved, in turn; the data is random,
as hidden states nearly are. Needs no Ray and no model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from workload import machine, print_table, spread, write_json

from tc_ray.config.log import LogSection
from tc_ray.copilot.batch import batch_from_records
from tc_ray.files import sync
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import ROW_SCHEMA, LogMetadata
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter

SIDES, WAYS = ("bare", "log"), ("bare", "mapped", "log")
PAIRS = {
    "write": ("write bare", "write log"),
    "read warm": ("read warm bare", "read warm log"),
    "read cold": ("read cold bare", "read cold log"),
    "read warm, mapped": ("read warm mapped", "read warm log"),
    "read cold, mapped": ("read cold mapped", "read cold log"),
}
ROWS = 16
ROW_GROUP_BYTES = 16 << 20


def make_records(number: int, *, tokens: int, targets: int, width: int, top_k: int) -> Records:
    """Records of one round: `ROWS` sequences of `tokens` tokens, the last `targets` of them targets."""
    dice = np.random.default_rng(number)

    def offsets(each: int) -> np.ndarray:
        return np.arange(ROWS + 1, dtype=np.int64) * each

    count = ROWS * targets
    return Records(
        round=np.full(ROWS, number, np.int64),
        rank=np.zeros(ROWS, np.int32),
        attempt=np.ones(ROWS, np.int32),
        sample_id=np.arange(ROWS, dtype=np.int64) + ROWS * number,
        seen=np.zeros(ROWS, np.int16),
        input_ids=dice.integers(0, 49152, ROWS * tokens).astype(np.int32),
        seq_offsets=offsets(tokens),
        target_start=np.full(ROWS, tokens - targets, np.int32),
        rationale=dice.integers(0, 0x7F80, (ROWS * (tokens - 1), 1, width)).astype(np.uint16),
        rationale_offsets=offsets(tokens - 1),
        rationale_layers=1,
        rationale_dim=width,
        error_ids=dice.integers(0, 49152, (count, top_k + 1)).astype(np.int32),
        error_values=dice.random((count, top_k + 1)).astype(np.float32),
        error_rest=dice.random(count).astype(np.float32),
        token_loss=dice.random(count).astype(np.float32),
        token_correct=dice.random(count) < 0.5,
        target_offsets=offsets(targets),
    )


def metadata_of(records: Records) -> LogMetadata:
    """Of a log that holds records like these."""
    return LogMetadata(
        run="benchmark",
        pilot="none",
        tokenizer_hash="",
        vocab_size=49152,
        rationale_dim=records.rationale_dim,
        rationale_layers=1,
        pooling="mean",
        tap="random",
        positions="all",
        top_k=records.top_k,
    )


class Disk:
    """The two ways to write and to read, in one folder."""

    def __init__(self, folder: Path, rounds: list[Records], file_bytes: int) -> None:
        self._folder, self._rounds, self._file_bytes = folder, rounds, file_bytes
        self._tables = [records.to_arrow("benchmark") for records in rounds]
        self.bytes = sum(table.get_total_buffer_size() for table in self._tables)

    def write_bare(self, name: str) -> float:
        """Seconds of pyarrow alone."""
        began = time.perf_counter()
        target = self._folder / name
        target.mkdir()
        number, waiting, size, file_size = 0, [], 0, 0
        writer: Any = None
        for table in self._tables:
            if writer is None:
                path = target / f"{number}.parquet"
                writer = pq.ParquetWriter(
                    path,
                    ROW_SCHEMA,
                    compression="none",
                    use_dictionary=["run"],
                    write_statistics=["run", "attempt", "round", "rank", "sample_id"],
                    store_schema=False,
                )
            waiting.append(table)
            size += table.get_total_buffer_size()
            last = table is self._tables[-1]
            if size >= ROW_GROUP_BYTES or last:
                writer.write_table(pa.concat_tables(waiting))
                file_size, waiting, size = file_size + size, [], 0
            if file_size >= self._file_bytes or last:
                writer.close()
                sync(path)
                writer, number, file_size = None, number + 1, 0
        return time.perf_counter() - began

    def write_log(self, name: str) -> float:
        """Seconds of the record writer with its Ledger."""
        metadata = metadata_of(self._rounds[0])
        store = LogStore.create(self._folder / name, metadata)
        ledger = Ledger(store.location, writers=1, run="benchmark")
        attempt = ledger.begin_attempt(0, 1)
        began = time.perf_counter()
        writer = RecordWriter(
            store.location,
            ledger.commit,
            LogSection(flush_rounds=2**31, file_bytes=self._file_bytes, queue_rounds=8),
            run="benchmark",
            rank=0,
            attempt=attempt,
        )
        for number, records in enumerate(self._rounds, 1):
            writer.put(records, number)
            writer.end_round(number)
        writer.flush(len(self._rounds))
        seconds = time.perf_counter() - began
        writer.close()
        return seconds

    def forget(self, name: str) -> None:
        """Drop a folder's files from the page cache."""
        for path in (self._folder / name).rglob("*.parquet"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bare(folder: Path, *, mapped: bool = False) -> int:
    """Rows that pyarrow alone reads."""
    return sum(pq.read_table(path, memory_map=mapped).num_rows for path in sorted(folder.glob("*.parquet")))


def read_log(folder: Path) -> int:
    """Rows read from the version to Copilot batches."""
    rows = 0
    with MistakeLog(folder) as log:
        for _, records in log.pieces(batch=ROWS):
            for first in range(0, len(records), ROWS):
                chosen = range(first, min(first + ROWS, len(records)))
                rows += len(batch_from_records(records, chosen).error_ids)
    return rows


def timed_read(way: str, folder: Path, rows: int) -> float:
    """Seconds of one read, in the process it is called in."""
    torch.set_num_threads(1)
    reads: dict[str, Callable[[Path], int]] = {
        "bare": read_bare,
        "mapped": partial(read_bare, mapped=True),
        "log": read_log,
    }
    began = time.perf_counter()
    found = reads[way](folder)
    taken = time.perf_counter() - began
    if found != rows:
        raise RuntimeError(f"{found} rows read, {rows} written")
    return taken


class Readers:
    """A process for each way to read: memory that one has freed, and the allocator kept, would make another look faster."""

    def __init__(self, folder: Path, rows: int) -> None:
        self._folder, self._rows = folder, rows
        context = multiprocessing.get_context("spawn")
        self._pools = {way: context.Pool(1) for way in WAYS}

    def read(self, way: str) -> float:
        """Seconds of one read."""
        folder = self._folder / ("log" if way == "log" else "bare")
        return self._pools[way].apply(timed_read, (way, folder, self._rows))

    def close(self) -> None:
        """End the processes."""
        for pool in self._pools.values():
            pool.close()
            pool.join()


def remove(folder: Path) -> None:
    """Delete a folder's files, so that repeats do not fill the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the repeats in turn; medians in MB/s and the ratio of each pair."""
    torch.set_num_threads(1)
    sizes = {name: getattr(arguments, name) for name in ("tokens", "targets", "width", "top_k")}
    one = make_records(1, **sizes).nbytes
    rounds = [make_records(number, **sizes) for number in range(1, 2 + int(arguments.megabytes * 1e6) // one)]
    seconds: dict[str, list[float]] = {name: [] for pair in PAIRS.values() for name in pair}
    with (
        tempfile.TemporaryDirectory(prefix="tc-ray-benchmark-", dir=arguments.folder) as folder,
        closing(Readers(Path(folder), ROWS * len(rounds))) as readers,
    ):
        disk = Disk(Path(folder), rounds, arguments.file_megabytes << 20)
        for repeat in range(arguments.repeats + 1):
            writes: list[tuple[str, Callable[[str], float]]] = [("bare", disk.write_bare), ("log", disk.write_log)]
            for way, write in writes if repeat % 2 == 0 else reversed(writes):
                os.sync()
                taken = write(way)
                if repeat:  # the first is a warm-up
                    seconds[f"write {way}"].append(taken)
            os.sync()
            for turn in range(4):
                kind = ("read warm", "read cold")[turn % 2]
                ways = [*WAYS] if turn < 2 else [*reversed(WAYS)]
                for way in ways:
                    if kind == "read cold":
                        disk.forget("log" if way == "log" else "bare")
                    taken = readers.read(way)
                    if repeat:
                        seconds[f"{kind} {way}"].append(taken)
            for way in SIDES:
                remove(Path(folder) / way)
        megabytes = disk.bytes / 1e6
    ratios = {
        what: [a / b for a, b in zip(seconds[bare], seconds[log], strict=True)] for what, (bare, log) in PAIRS.items()
    }
    return {
        "machine": machine(),
        "settings": {k: str(v) for k, v in vars(arguments).items() if k not in ("json", "folder")},
        "megabytes": megabytes,
        "megabytes_per_second": {name: megabytes / statistics.median(taken) for name, taken in seconds.items()},
        "seconds": {name: spread(taken) for name, taken in seconds.items()},
        "ratio": {what: statistics.median(found) for what, found in ratios.items()},
        "ratio_quartiles": {
            what: [float(np.quantile(found, q)) for q in (0.25, 0.75)] for what, found in ratios.items()
        },
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=512)
    parser.add_argument("--file-megabytes", type=int, default=128, help="files are cut at this size (default 128)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--targets", type=int, default=12)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    if arguments.folder is not None and not arguments.folder.is_dir():
        parser.error(f"--folder: {arguments.folder} is no folder; make it, or name another on that disk")
    result = measure(arguments)
    print(result["machine"])
    rates = result["megabytes_per_second"]
    rows = [
        [
            what,
            f"{rates[bare]:.0f}",
            f"{rates[log]:.0f}",
            f"{result['ratio'][what]:.3f}",
            "{:.3f} to {:.3f}".format(*result["ratio_quartiles"][what]),
        ]
        for what, (bare, log) in PAIRS.items()
    ]
    title = f"{result['megabytes']:.0f} MB of records, {arguments.repeats} repeats, medians"
    print_table(title, ["", "pyarrow MB/s", "log MB/s", "log / pyarrow", "quartiles"], rows)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
