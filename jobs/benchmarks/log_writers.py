"""Several writers against one Ledger: do rows per second grow with the writers, up to what the disk or the store takes?

python jobs/benchmarks/log_writers.py [--writers 1 2 4 8] [--megabytes 100] [--repeats 5] [--folder DIR] [--moto] [--json FILE]

Each writer is a process as a Pilot worker is one: it puts records of its own rank, as fast as its queue takes them, into a
RecordWriter with the settings of a run (a file every `--flush-rounds` rounds), and commits through the Ledger actor, with
maintenance. All begin together; a run ends when the last writer's last round is acknowledged. Beside it, in turn, the same
number of processes write the same tables with pyarrow alone, a synced file of 128 MB at a time: what the disk and the
cores take. Records are made before the clock starts. `linear` is the rate over that of one writer times the writers;
`of the limit` is the rate over the lower of one writer's rate times the writers and pyarrow's.

--moto: the log is in an object store, moto's server process on this machine (a program in Python for tests, of one process).
pyarrow's side is left out then. Needs no model and no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from log_throughput import ROWS, Disk, make_records, metadata_of
from workload import machine, print_table, spread, write_json

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger_actor import start_ledger, submit_to
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.write.writer import RecordWriter

SIZES = {"tokens": 80, "targets": 12, "width": 576, "top_k": 16}
BARE_FILE_BYTES = 128 << 20


class Writer:
    """One Pilot worker's side, in a process of its own (a Ray actor)."""

    def __init__(self, rank: int, rounds: int) -> None:
        for folder in (ROOT, Path(__file__).resolve().parent):
            sys.path.insert(0, str(folder))
        self._rank = rank
        made = [make_records(number, **SIZES) for number in range(1, rounds + 1)]
        self._rounds = [
            replace(one, rank=np.full(ROWS, rank, np.int32), sample_id=one.sample_id + rank * ROWS * rounds)
            for one in made
        ]

    def ready(self) -> int:
        """Bytes of all records."""
        return sum(records.nbytes for records in self._rounds)

    def log(
        self, location: Location, ledger: Any, attempt: int, flush_rounds: int, start: float
    ) -> tuple[float, float]:
        """When the last round was acknowledged (Unix seconds), and the seconds that `put` waited."""
        settings = LogSection(flush_rounds=flush_rounds)
        writer = RecordWriter(location, submit_to(ledger), settings, run="benchmark", rank=self._rank, attempt=attempt)
        records: list[Records] = [replace(one, attempt=np.full(ROWS, attempt, np.int32)) for one in self._rounds]
        time.sleep(max(0.0, start - time.time()))
        for number, one in enumerate(records, 1):
            writer.put(one, number)
            writer.end_round(number)
        writer.flush(len(records))
        ended, waited = time.time(), writer.stats()["blocked_seconds"]
        writer.close()
        return ended, waited

    def bare(self, folder: str, start: float) -> tuple[float, float]:
        """As `log`, by pyarrow alone."""
        disk = Disk(Path(folder), self._rounds, BARE_FILE_BYTES)
        time.sleep(max(0.0, start - time.time()))
        disk.write_bare(f"rank{self._rank}")
        return time.time(), 0.0


@contextlib.contextmanager
def moto_store() -> Iterator[tuple[str, dict[str, str]]]:
    """(bucket's URI, storage options) of a server that lives as long as the context."""
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if server.poll() is not None or time.monotonic() > end:
                raise SystemExit("moto's server does not start: pip install 'moto[s3,server]'")
            time.sleep(0.1)
        address = f"http://127.0.0.1:{port}"
        secrets = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        boto3.client("s3", endpoint_url=address, region_name="us-east-1", **secrets).create_bucket(Bucket="logs")
        yield (
            "s3://logs",
            {**secrets, "aws_endpoint_url": address, "aws_region": "us-east-1", "aws_allow_http": "true"},
        )
    finally:
        server.kill()
        server.wait()


def one_run(ray: Any, writers: list[Any], place: Location | Path, flush_rounds: int) -> tuple[float, float]:
    """Seconds of all writers together, and the share of it that they waited at a full queue. A Path: pyarrow alone."""
    os.sync()
    if isinstance(place, Path):
        start = time.time() + 2.0  # the tables are made before
        found = ray.get([writer.bare.remote(str(place), start) for writer in writers])
    else:
        settings = LogSection(flush_rounds=flush_rounds)
        metadata = metadata_of(make_records(1, **SIZES))
        ledger = start_ledger(place, metadata, writers=len(writers), run="benchmark", settings=settings)
        attempt = ray.get(ledger.begin_attempt.remote(0, len(writers)))
        start = time.time() + 1.0
        found = ray.get([writer.log.remote(place, ledger, attempt, flush_rounds, start) for writer in writers])
        ray.kill(ledger)
    seconds = max(ended for ended, _ in found) - start
    return seconds, statistics.mean(waited for _, waited in found) / seconds


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The repeats, every number of writers and both sides in turn."""
    import ray

    rounds = max(1, int(arguments.megabytes * 1e6) // make_records(1, **SIZES).nbytes)
    ray.init(address="local", num_cpus=max(arguments.writers), include_dashboard=False, log_to_driver=False)
    actor = ray.remote(num_cpus=0)(Writer)
    writers = [actor.remote(rank, rounds) for rank in range(max(arguments.writers))]
    ray.get([writer.ready.remote() for writer in writers])
    seconds: dict[str, list[float]] = {}
    waits: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(moto_store()) if arguments.moto else None
        for repeat in range(arguments.repeats + 1):
            for number in arguments.writers if repeat % 2 == 0 else reversed(arguments.writers):
                with tempfile.TemporaryDirectory(prefix="tc-ray-benchmark-", dir=arguments.folder) as name:
                    log = Location(f"{store[0]}/{uuid.uuid4().hex}", store[1]) if store else Location(f"{name}/log")
                    sides: dict[str, Location | Path] = {"log": log} | ({} if store else {"bare": Path(name)})
                    for side, place in sides.items():
                        taken, waited = one_run(ray, writers[:number], place, arguments.flush_rounds)
                        if repeat:  # the first is a warm-up
                            seconds.setdefault(f"{side} {number}", []).append(taken)
                            waits.setdefault(f"{side} {number}", []).append(waited)
    ray.shutdown()
    rows = ROWS * rounds
    found: dict[str, Any] = {"machine": machine(), "rows_per_writer": rows, "runs": {}}
    for name, times in seconds.items():
        side, count = name.split()
        found["runs"].setdefault(count, {})[side] = {
            "seconds": spread(times),
            "rows_per_second": int(count) * rows / statistics.median(times),
            "waited": statistics.median(waits[name]),
        }
    one = found["runs"][str(arguments.writers[0])]["log"]["rows_per_second"] / arguments.writers[0]
    for count, run in found["runs"].items():
        rate = run["log"]["rows_per_second"]
        run["linear"] = rate / (one * int(count))
        limit = min([one * int(count), *([run["bare"]["rows_per_second"]] if "bare" in run else [])])
        run["of_the_limit"] = rate / limit
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--megabytes", type=float, default=100, help="of records, for each writer")
    parser.add_argument("--flush-rounds", type=int, default=LogSection().flush_rounds)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--moto", action="store_true", help="the log in an object store, moto's server here")
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    if arguments.folder is not None and not arguments.folder.is_dir():
        parser.error(f"--folder: {arguments.folder} is no folder; make it, or name another on that disk")
    result = measure(arguments)
    print(result["machine"])
    head = ["writers", "rows/s", "seconds", "waited", "linear", "pyarrow rows/s", "of the limit"]
    rows = [
        [
            count,
            f"{run['log']['rows_per_second']:.0f}",
            "{q25:.2f} to {q75:.2f}".format(**run["log"]["seconds"]),
            f"{run['log']['waited']:.0%}",
            f"{run['linear']:.2f}",
            f"{run['bare']['rows_per_second']:.0f}" if "bare" in run else "",
            f"{run['of_the_limit']:.2f}",
        ]
        for count, run in sorted(result["runs"].items(), key=lambda item: int(item[0]))
    ]
    print_table(f"{result['rows_per_writer']} rows per writer, {arguments.repeats} repeats, medians", head, rows)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
