"""Memory of a writer and of a reader ten times too slow: is it flat?

python jobs/benchmarks/log_memory.py [--minutes 30] [--rounds-per-second 5] [--json FILE]

One process writes records through a RecordWriter and a real Ledger with retention and compaction on, at a steady rate; another
follows the log as a learner does, with a LogTail and a buffer of the newest 128 rounds: before each step it takes what is new,
and a step takes as long as the writer takes for ten rounds. Both report their resident memory every few seconds. A straight line is fitted to each series after the
first third (when every buffer has filled): its slope, in MB an hour, and the growth over the rest of the run are printed.
Needs no Ray and no model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from log_throughput import make_records, metadata_of
from workload import machine, print_table, write_json

from tc_ray.config.log import LogSection
from tc_ray.copilot.buffer import RoundBuffer
from tc_ray.mistakelog.commit.ledger_actor import LedgerActor
from tc_ray.mistakelog.read.reader import LogTail
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter

SAMPLE_SECONDS = 5.0
SIZES = {"tokens": 80, "targets": 12, "width": 576, "top_k": 64}
BUFFER_ROUNDS = 128
SLOWER = 10


def resident_megabytes() -> float:
    """Of this process, without the page cache behind memory maps."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1000
    raise SystemExit("/proc/self/status has no RssAnon: this benchmark needs Linux")


class Samples:
    """Prints one line every few seconds for the parent to collect."""

    def __init__(self) -> None:
        self._began, self._next = time.monotonic(), 0.0

    def __call__(self, **numbers: float) -> None:
        now = time.monotonic() - self._began
        if now >= self._next:
            self._next = now + SAMPLE_SECONDS
            print(json.dumps({"seconds": now, "megabytes": resident_megabytes(), **numbers}), flush=True)


def write(folder: Path, minutes: float, per_second: float) -> None:
    """The writer's process."""
    samples, metadata = Samples(), metadata_of(make_records(1, **SIZES))
    store = LogStore.create(folder, metadata)
    limits = LogSection(
        file_bytes=32 << 20,
        keep_rounds=300,
        vacuum_grace_seconds=30,
        orphan_seconds=60,
    )
    ledger = LedgerActor(store.location, writers=1, run="benchmark", settings=limits, buffer_rounds=BUFFER_ROUNDS)
    writer = RecordWriter(
        store.location,
        ledger.commit,
        LogSection(flush_rounds=4, file_bytes=64 << 20, queue_rounds=8),
        run="benchmark",
        rank=0,
        attempt=ledger.begin_attempt(0, 1),
    )
    began, number = time.monotonic(), 0
    while time.monotonic() - began < 60 * minutes:
        number += 1
        writer.put(make_records(number, **SIZES), number)
        writer.end_round(number)
        # the reader never keeps up: what it has still to read may go all the same, or the disk would fill
        ledger.report_copilot(number, number)
        if number % 50 == 0:
            writer.flush(number)
            ledger.report_checkpoint(number)
        state = ledger.state()
        samples(round=number, files=state.files, log_megabytes=state.bytes / 1e6)
        time.sleep(max(0.0, began + number / per_second - time.monotonic()))
    writer.close()


def read(folder: Path, minutes: float, per_second: float) -> None:
    """The reader's process."""
    while not (folder / "_delta_log").is_dir():
        time.sleep(0.1)
    time.sleep(1)
    samples, tail, buffer = Samples(), LogTail(folder), RoundBuffer(BUFFER_ROUNDS)
    began, rounds = time.monotonic(), 0
    while time.monotonic() - began < 60 * minutes:
        update = tail.poll()
        for name in update.removed:
            buffer.remove(name)
        for name, records in update.new:
            buffer.add(name, records)
        if len(buffer):
            buffer.draw(16, (rounds,))
        rounds += 1
        samples(round=rounds, version=update.version, buffer_megabytes=buffer.nbytes / 1e6)
        time.sleep(SLOWER / per_second)


def line(samples: list[dict[str, float]]) -> dict[str, float]:
    """Slope and growth after the first third."""
    late = [sample for sample in samples if sample["seconds"] >= samples[-1]["seconds"] / 3]
    seconds, megabytes = (np.array([sample[key] for sample in late]) for key in ("seconds", "megabytes"))
    slope = float(np.polyfit(seconds, megabytes, 1)[0])
    quarter = max(1, len(late) // 4)
    return {
        "samples": len(samples),
        "minutes": samples[-1]["seconds"] / 60,
        "first_quarter_megabytes": float(np.median(megabytes[:quarter])),
        "last_quarter_megabytes": float(np.median(megabytes[-quarter:])),
        "peak_megabytes": float(megabytes.max()),
        "megabytes_per_hour": 3600 * slope,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run both processes and collect their samples."""
    with tempfile.TemporaryDirectory(prefix="tc-ray-benchmark-", dir=arguments.folder) as folder:
        roles = ("write", "read")
        settings = ["--minutes", str(arguments.minutes), "--rounds-per-second", str(arguments.rounds_per_second)]
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--role", role, "--folder", str(Path(folder) / "log"), *settings],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for role in roles
        ]
        reports = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit("a process failed; see above")
    samples = {
        role: [json.loads(text) for text in lines.splitlines()] for role, lines in zip(roles, reports, strict=True)
    }
    return {
        "machine": machine(),
        "settings": {"minutes": arguments.minutes, "rounds_per_second": arguments.rounds_per_second, "slower": SLOWER},
        "memory": {role: line(found) for role, found in samples.items()},
        "last": {role: found[-1] for role, found in samples.items()},
        "samples": samples,
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rounds-per-second", type=float, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to use (default: the system's temporary folder)")
    parser.add_argument("--role", choices=("write", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    if arguments.role:
        work = write if arguments.role == "write" else read
        work(arguments.folder, arguments.minutes, arguments.rounds_per_second)
        return
    result = measure(arguments)
    print(result["machine"])
    rows = [
        [
            role,
            f"{found['first_quarter_megabytes']:.0f}",
            f"{found['last_quarter_megabytes']:.0f}",
            f"{found['peak_megabytes']:.0f}",
            f"{found['megabytes_per_hour']:+.1f}",
        ]
        for role, found in result["memory"].items()
    ]
    title = f"resident MB after the first third of {arguments.minutes:g} minutes, reader {SLOWER} times too slow"
    print_table(title, ["process", "first quarter", "last quarter", "peak", "MB / hour"], rows)
    last = result["last"]
    print(
        f"writer: {last['write']['round']} rounds; log {last['write']['log_megabytes']:.0f} MB in {last['write']['files']} files"
    )
    print(f"reader: {last['read']['round']} polls, buffer {last['read']['buffer_megabytes']:.0f} MB")
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
