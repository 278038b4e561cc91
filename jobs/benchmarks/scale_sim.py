"""Where is the first bottleneck at 64, 512 and 4096 GPUs? The real Ledger and table under simulated Pilot workers.

python jobs/benchmarks/scale_sim.py [--from RUN] [--gpus 64 512 4096] [--commits 1000] [--folder DISK] [--json FILE]

Real: the Ledger and its Delta table on a disk of this machine, every commit of every writer (one per Pilot GPU) in turn, timed; a
learner's look at the table, its reading of files and its buffer. Simulated: the Pilot is a clock, each of whose ticks is a round; all
writers hand their file to the Ledger at the same tick, as ranks that step together do, and wait for it in a queue of this script; a
file is a hole of the size that it would have. Assumed, unless `--from RUN` measured it: seconds a round, seconds a Copilot step and
the shape of a row. Left out: Ray's calls, the network, compaction and retention. A load above 1 means that a part cannot keep up:
the largest is the bottleneck. Then settings are changed, each time the one that helps the largest load, until none is above 0.8.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from log_throughput import make_records, metadata_of
from workload import machine, print_table, write_json

from tc_ray.config.log import LogSection
from tc_ray.config.training import CopilotSection
from tc_ray.copilot.buffer import RoundBuffer
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.read.reader import LogTail
from tc_ray.mistakelog.table.data_file import DataFile, file_name
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter

Floats = NDArray[np.float64]
SAFE = 0.8
"""A load that leaves room for what was left out."""
GPUS_A_LEARNER = 64
TICKS = 10
READ_BYTES = 64 * 10**6
STORE_MEGABYTES = 256


@dataclass(frozen=True)
class Row:
    """A logged example: tokens, of which targets; width of a hidden state; errors kept per target token."""

    tokens: int
    targets: int
    width: int
    top_k: int
    positions: str = "all"

    @property
    def bytes(self) -> float:
        """In a data file without compression; what else a row holds is below 200 bytes."""
        states = self.tokens - 1 if self.positions == "all" else self.targets
        return 2.0 * self.width * states + self.targets * (8.0 * (self.top_k + 1) + 9) + 4.0 * self.tokens


@dataclass(frozen=True)
class Setup:
    """Settings and costs of a cluster: what may be changed, and what one unit of each work takes."""

    row: Row
    rows: int
    """Per Pilot GPU and round."""
    round_seconds: float
    step_seconds: float
    """Of a Copilot step with one learner."""
    steps_per_round: int
    flush_rounds: int
    file_bytes: int
    buffer_rounds: int
    sampling: float = 1.0
    scale: float = 1.0
    """Measured bytes of a row over those of `Row.bytes`."""
    learner_gpus: int = GPUS_A_LEARNER
    """GPUs of the cluster for each learner."""

    @property
    def writer_bytes(self) -> float:
        """That one Pilot GPU logs in a round."""
        return self.rows * self.row.bytes * self.scale * self.sampling

    @property
    def file_rounds(self) -> int:
        """Rounds in a file: it is cut by rounds or by size."""
        return max(1, min(self.flush_rounds, int(self.file_bytes // self.writer_bytes)))

    def learners(self, gpus: int) -> int:
        """Learners of a cluster."""
        return max(1, gpus // self.learner_gpus)


@dataclass(frozen=True)
class Machine:
    """What was measured here, or given: megabytes a second and, of a learner, bytes in memory per byte of the log."""

    store: float
    read: float
    memory: float
    learner_gigabytes: float


@dataclass(frozen=True)
class Commits:
    """Real commits of so many writers. seconds: of each, of which processor; waits: from tick to commit, in the clock's time."""

    writers: int
    seconds: float
    processor: float
    waits: tuple[float, float]
    """Median and 99%."""
    more_per_thousand: float
    """Seconds that a commit takes more per thousand versions."""
    begin_attempt: float
    look: float
    """Seconds of a learner's list of the table's files at the last version."""
    files: int


def run_commits(folder: Path, setup: Setup, writers: int, most: int) -> Commits:
    """Make `most` commits by the real Ledger, then let the clock tick TICKS times with commits that take as long as these did."""
    store = LogStore.create(folder, metadata_of(make_records(1, tokens=8, targets=2, width=4, top_k=2)))
    ledger = Ledger(store.location, writers=writers, run="benchmark")
    began = time.perf_counter()
    attempt = ledger.begin_attempt(0, writers)
    begin_attempt = time.perf_counter() - began
    size, rounds = max(1, int(setup.writer_bytes * setup.file_rounds)), setup.file_rounds
    seconds: list[float] = []
    processor = 0.0
    for number in range(most):
        burst, rank = divmod(number, writers)
        first = burst * rounds + 1
        name = file_name(first, rank, attempt, burst)
        with (folder / name).open("wb") as file:
            file.truncate(size)
        done = DataFile(name, setup.rows * rounds, size, first, first + rounds - 1, rank, attempt, burst, crc32=1)
        began, busy = time.perf_counter(), time.process_time()
        ledger.commit(done)
        seconds.append(time.perf_counter() - began)
        processor += time.process_time() - busy
    began = time.perf_counter()
    files = len(LogStore(folder).files())
    look = time.perf_counter() - began
    slope = float(np.polyfit(np.arange(most), seconds, 1)[0]) if most > 1 else 0.0
    waits = waits_of(np.resize(seconds, TICKS * writers).reshape(TICKS, writers), rounds * setup.round_seconds)
    late = (float(np.median(waits)), float(np.quantile(waits, 0.99)))
    return Commits(writers, float(np.mean(seconds)), processor / most, late, 1000 * slope, begin_attempt, look, files)


def waits_of(seconds: Floats, tick: float) -> Floats:
    """[ticks, writers] of the same: from each tick, when all writers hand in a file, to the commit of each, one after the other."""
    waits, free = np.empty_like(seconds), 0.0
    for number, burst in enumerate(seconds):
        ends = max(free, number * tick) + np.cumsum(burst)
        waits[number], free = ends - number * tick, ends[-1]
    return waits


def measure_machine(folder: Path, row: Row, arguments: argparse.Namespace) -> Machine:
    """The disk's speed, and how fast a learner takes files of such rows and what they weigh in its memory."""
    given = arguments.store_megabytes
    store = given or STORE_MEGABYTES / _timed_write(folder / "block", STORE_MEGABYTES << 20)
    shape = {name: getattr(row, name) for name in ("tokens", "targets", "width", "top_k")}
    one = make_records(1, **shape)
    log = LogStore.create(folder / "read", metadata_of(one))
    ledger, rounds = Ledger(log.location, writers=1, run="benchmark"), min(100, 1 + READ_BYTES // one.nbytes)
    attempt = ledger.begin_attempt(0, 1)
    writer = RecordWriter(log.location, ledger.commit, LogSection(), run="benchmark", rank=0, attempt=attempt)
    for number in range(1, rounds + 1):
        writer.put(make_records(number, **shape), number)
        writer.end_round(number)
    writer.close()
    size = ledger.state().bytes
    buffer, tail = RoundBuffer(10**6), LogTail(log.location)
    began = time.perf_counter()
    for name, records in tail.poll().new:
        buffer.add(name, records)
    seconds = time.perf_counter() - began
    tail.close()
    return Machine(store, size / 1e6 / seconds, buffer.nbytes / size, arguments.learner_gigabytes)


def _timed_write(path: Path, size: int) -> float:
    block = os.urandom(1 << 20)
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def loads(setup: Setup, at: Machine, commits: Commits, gpus: int) -> dict[str, float]:
    """Share of what each part can do that the Pilot's pace asks for, by part."""
    learners = setup.learners(gpus)
    megabytes = commits.writers * setup.writer_bytes / 1e6 / setup.round_seconds
    tick = setup.file_rounds * setup.round_seconds
    held = setup.buffer_rounds * commits.writers * setup.writer_bytes * at.memory
    return {
        "Ledger": commits.writers * commits.seconds / tick,
        "store": megabytes / at.store,
        "reading": megabytes / at.read,
        "Copilot steps": setup.steps_per_round * setup.step_seconds / learners / setup.round_seconds,
        "learner memory": held / (at.learner_gigabytes * 1e9),
    }


def change(setup: Setup, part: str) -> tuple[str, str, Setup] | None:
    """The mildest setting that lowers the load of a part: its name, its value, and the setup with it; None: there is none left."""
    row = setup.row
    if part == "Ledger":
        rounds = 2 * setup.file_rounds
        if rounds > setup.buffer_rounds // 2:  # records would be old before the Copilot sees them
            return None
        size = max(setup.file_bytes, int(2**20 * -(-rounds * setup.writer_bytes // 2**20)))
        return "log.flush_rounds", str(rounds), replace(setup, flush_rounds=rounds, file_bytes=size)
    if part == "Copilot steps":
        gpus = setup.learner_gpus // 2
        return ("GPUs of the cluster per learner", str(gpus), replace(setup, learner_gpus=gpus)) if gpus else None
    if row.positions == "all":
        return "log.positions", "target", replace(setup, row=replace(row, positions="target"))
    if row.top_k > 4:
        return "log.top_k", "4", replace(setup, row=replace(row, top_k=4))
    if part == "learner memory" and setup.buffer_rounds > 32:
        rounds = setup.buffer_rounds // 2
        return "copilot.buffer_rounds", str(rounds), replace(setup, buffer_rounds=rounds)
    share = setup.sampling / 2
    return ("log.sampling_fraction", f"{share:.3g}", replace(setup, sampling=share)) if share > 1e-3 else None


@dataclass(frozen=True)
class Advice:
    """Settings by name, and the loads with them. stuck: parts above SAFE for which no setting is left, the worst first."""

    settings: dict[str, str]
    loads: dict[str, float]
    stuck: str


def advise(setup: Setup, at: Machine, commits: Commits, gpus: int) -> Advice:
    """Change one setting after the other, each time for the largest load that a setting can lower."""
    settings: dict[str, str] = {}
    while True:
        found = loads(setup, at, commits, gpus)
        high = sorted((part for part in found if found[part] > SAFE), key=lambda part: -found[part])
        step = next((made for part in high if (made := change(setup, part)) is not None), None)
        if step is None:
            return Advice(settings, found, ", ".join(high))
        name, value, setup = step
        settings[name] = value
        if setup.file_bytes > LogSection().file_bytes:
            settings["log.file_bytes"] = f"{setup.file_bytes >> 20} MiB"


def setup_of(arguments: argparse.Namespace) -> Setup:
    """What the options say, or what `--from` measured."""
    if arguments.run is None:
        log, names = LogSection(), ("rows", "round_seconds", "step_seconds", "steps_per_round")
        return Setup(
            Row(arguments.tokens, arguments.targets, arguments.width, arguments.top_k),
            **{name: getattr(arguments, name) for name in names},
            flush_rounds=log.flush_rounds,
            file_bytes=log.file_bytes,
            buffer_rounds=CopilotSection().buffer_rounds,
        )
    from tc_ray.inspection.source import find_log
    from tc_ray.run.costs.measured import read_costs

    costs = read_costs(arguments.run)
    if costs.log is None or not costs.copilot.count or not costs.pilot.count or not costs.log.rounds:
        raise SystemExit(f"--from {arguments.run}: a run with a log, rounds and Copilot steps is needed")
    config, meta = costs.config, find_log(str(arguments.run)).open().metadata
    rows = costs.log.rows / costs.log.rounds
    row = Row(
        tokens=round(costs.pilot.tokens / costs.pilot.count / config.pilot.batch_size),
        targets=max(1, round(costs.copilot.tokens / costs.copilot.count / config.copilot.batch_size)),
        width=meta.rationale_dim * meta.rationale_layers,
        top_k=meta.top_k,
        positions=meta.positions,
    )
    return Setup(
        row,
        rows=max(1, config.pilot.batch_size // config.resources.pilot_workers),
        round_seconds=costs.pilot.each,
        step_seconds=costs.copilot.each * config.resources.copilot_workers,
        steps_per_round=config.copilot.steps_per_round,
        flush_rounds=config.log.flush_rounds,
        file_bytes=config.log.file_bytes,
        buffer_rounds=config.copilot.buffer_rounds,
        scale=costs.log.bytes / costs.log.rounds / rows / row.bytes,
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Machine, then each cluster: its commits, its loads, and what to change."""
    setup = setup_of(arguments)
    clusters = []
    with tempfile.TemporaryDirectory(prefix="tc-ray-benchmark-", dir=arguments.folder) as folder:
        at = measure_machine(Path(folder), setup.row, arguments)
        for gpus in arguments.gpus:
            place = Path(folder) / str(gpus)
            writers = gpus - setup.learners(gpus)
            commits = run_commits(place, setup, writers, arguments.commits)
            advice = advise(setup, at, commits, gpus)
            found = loads(setup, at, commits, gpus)
            one = {"gpus": gpus, "learners": setup.learners(gpus), "commits": asdict(commits), "loads": found}
            clusters.append(one | {"advice": asdict(advice)})
    return {"machine": machine(), "setup": asdict(setup), "measured": asdict(at), "clusters": clusters} | {
        "writer_bytes": setup.writer_bytes,
        "tick_seconds": setup.file_rounds * setup.round_seconds,
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="run", type=Path, help="a run's folder: its costs instead of those assumed")
    parser.add_argument("--gpus", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--commits", type=int, default=1000, help="real commits for each cluster: 1000")
    for name, value, what in (
        ("--rows", 4, "examples per Pilot GPU and round (assumed)"),
        ("--round-seconds", 1.0, "of the Pilot (assumed)"),
        ("--step-seconds", 0.25, "of a Copilot step with one learner (assumed)"),
        ("--steps-per-round", CopilotSection().steps_per_round, "of the Copilot (default of the configuration)"),
        ("--tokens", 256, "of an example (assumed)"),
        ("--targets", 64, "of them, completion (assumed)"),
        ("--width", 4096, "of the Pilot's hidden states (8B)"),
        ("--top-k", LogSection().top_k, "errors kept per target token (default of the configuration)"),
        ("--learner-gigabytes", 64.0, "of memory for a learner's buffer"),
    ):
        parser.add_argument(name, type=type(value), default=value, help=f"{what}: {value}")
    parser.add_argument("--store-megabytes", type=float, help="MB/s that the store takes (default: measured here)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    if min(arguments.gpus) < 2:
        parser.error("--gpus: at least 2, one for the Pilot and one for a learner")
    show(result := measure(arguments))
    write_json(arguments.json, result)


def show(result: dict[str, Any]) -> None:
    """The tables: unit costs, what each cluster does, loads, changes."""
    setup, at, clusters = result["setup"], result["measured"], result["clusters"]
    print(result["machine"])
    units = [
        ["a Pilot GPU logs per round", f"{result['writer_bytes'] / 1e6:.2f} MB"],
        ["a round, a Copilot step", f"{setup['round_seconds']:.3g} s, {setup['step_seconds']:.3g} s"],
        ["rounds between commits", f"{result['tick_seconds'] / setup['round_seconds']:.0f}"],
        ["store takes", f"{at['store']:.0f} MB/s"],
        ["a learner reads", f"{at['read']:.0f} MB/s"],
        ["bytes in its buffer per byte of the log", f"{at['memory']:.2f}"],
    ]
    print_table("Costs of a unit", ["", ""], units)
    head = ["", *(f"{one['gpus']} GPUs" for one in clusters)]
    megabytes = result["writer_bytes"] / 1e6 / setup["round_seconds"]
    tick = result["tick_seconds"]
    lines = {
        "writers, learners": lambda one, c: f"{c['writers']}, {one['learners']}",
        "a commit, ms; processor": lambda _, c: f"{1e3 * c['seconds']:.1f}; {1e3 * c['processor']:.1f}",
        "more per 1000 versions, ms": lambda _, c: f"{1e3 * c['more_per_thousand']:.1f}",
        "commits/s wanted; possible": lambda _, c: f"{c['writers'] / tick:.1f}; {1 / c['seconds']:.1f}",
        "wait for a commit, s: median; 99%": lambda _, c: "{:.2f}; {:.2f}".format(*c["waits"]),
        "versions per hour": lambda _, c: f"{3600 * min(1 / c['seconds'], c['writers'] / tick):,.0f}",
        "log, MB/s": lambda _, c: f"{c['writers'] * megabytes:,.0f}",
        "begin_attempt, s": lambda _, c: f"{c['begin_attempt']:.2f}",
        "a look at the table, ms": lambda _, c: f"{1e3 * c['look']:.0f}",
    }
    rows = [[name, *(of(one, one["commits"]) for one in clusters)] for name, of in lines.items()]
    print_table(f"Clusters (waits of {TICKS} ticks; above the Ledger's load of 1 they grow without end)", head, rows)
    parts = list(clusters[0]["loads"])
    rows = [[part, *(f"{one['loads'][part]:.3g}" for one in clusters)] for part in parts]
    worst = [max(one["loads"], key=one["loads"].get) for one in clusters]
    slow = [part if one["loads"][part] > 1 else "none" for part, one in zip(worst, clusters, strict=True)]
    rows.append(["first bottleneck", *slow])
    print_table("Load of each part: 1 is all that it can do", head, rows)
    names = list(dict.fromkeys(name for one in clusters for name in one["advice"]["settings"]))
    rows = [[name, *(one["advice"]["settings"].get(name, "-") for one in clusters)] for name in names]
    rows += [[f"load then: {part}", *(f"{one['advice']['loads'][part]:.2g}" for one in clusters)] for part in parts]
    rows.append(["no setting is left for", *(one["advice"]["stuck"] or "-" for one in clusters)])
    print_table(f"What to change until no load is above {SAFE}", head, rows)


if __name__ == "__main__":
    main()
