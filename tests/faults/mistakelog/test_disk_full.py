"""A real file system of 64 MB that fills up and is freed again, under each policy.

The Pilot's loop runs in a process of its own, on a tmpfs mounted for the test (as root, or in a name space of its own); the
space is taken by a file beside the log. It must survive, show no partial file, count what it drops to the record, and go on
by itself. Readers in another process look at the log all the time and compare what they are given, row for row; so does the
test afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.commit.ledger_actor import LedgerActor
from tc_ray.mistakelog.maintain.vacuum import vacuum_log
from tc_ray.mistakelog.maintain.verify import verify_log
from tc_ray.mistakelog.read.reader import LogTail, MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.commits import dropped_records
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import assert_same, merge_all, metadata, random_records

REPOSITORY = Path(__file__).resolve().parents[3]
SIZE = 64 << 20
ROWS = 40
FILLED, FREED, END = 30, 60, 120
"""Rounds after which the disk is filled, freed, and the last one."""
ROUND_SECONDS = 0.02
LOOKS = 5
"""Of the readers, while the disk is full and again after it was freed; the space is taken until they have looked so often."""


def batch(round: int, part: int) -> Records:
    records = random_records(ROWS, round=round, first_sample=1000 * round + 100 * part, seed=part)
    return records


def pilot(root: Path, policy: str) -> None:
    """Runs in the process that owns the file system; prints what happened as one line of JSON."""
    folder = root / "log"
    LogStore.create(folder, metadata())
    ledger = Ledger(folder, writers=1, run="test")
    attempt = ledger.begin_attempt(0, 1)
    writer = RecordWriter(
        folder,
        ledger.commit,
        LogSection(flush_rounds=2, file_bytes=1 << 20, queue_rounds=16, full_policy=policy),
        run="test",
        rank=0,
        attempt=attempt,
    )
    watching = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.mistakelog.test_disk_full", str(root), "watch"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None and watching.stdout.readline() == "ready\n"
    ballast, looked = root / "ballast", Path(os.environ["COPY_TO"] + "-looked")  # on the other disk
    refused = postponed = 0
    started = time.monotonic()
    freeing: subprocess.Popen[bytes] | None = None
    for number in range(1, END + 1):
        if number == FILLED:
            fill(ballast)
            if policy == "block":  # nobody but another process can free it
                script = f"sleep 2; while [ ! -e {looked} ]; do sleep 0.05; done; rm {ballast}"
                freeing = subprocess.Popen(["/bin/sh", "-c", script])
        if number == FREED and freeing is None:
            began = time.monotonic()
            while not looked.exists():
                assert time.monotonic() < began + 60, "the readers do not look"
                time.sleep(0.05)
            ballast.unlink()
            # on a busy machine the rounds that are left could all be over before the writer looks
            while is_full(writer):
                assert time.monotonic() < began + 60, "recording does not go on by itself"
            started += time.monotonic() - began
        for part in range(2):
            refused += not writer.put(batch(number, part), number)
        writer.end_round(number)
        if number % 20 == 0 and not writer.flush(number):
            postponed += 1
        time.sleep(ROUND_SECONDS)
    seconds = time.monotonic() - started
    while not writer.flush(END):
        time.sleep(0.05)
    writer.close()
    ledger.finish_pilot(END)
    (root / "end").touch()
    watched = watching.communicate(timeout=60)[0]
    assert watching.returncode == 0, "a reader met what was never put; see above"
    reports = {
        "watched": json.loads(watched),
        "refused": refused,
        "postponed": postponed,
        "seconds": seconds,
        "stats": writer.stats(),
        "state": {"round": ledger.state().round, "rows": ledger.state().rows, "dropped": ledger.state().dropped},
        "drops": dropped_records(LogStore(folder).commits()).get(0, {}),
    }
    shutil.copytree(folder, os.environ["COPY_TO"])
    print(json.dumps(reports), flush=True)


def is_full(writer: RecordWriter) -> bool:
    """Whether the disk was full for the writer throughout a tenth of a second."""
    before = writer.stats()["full_seconds"]
    time.sleep(0.1)
    return writer.stats()["full_seconds"] > before


def waiting(root: Path) -> None:
    """As `pilot`: the disk is full of files that have left the log, and no commit comes that would have them removed."""
    folder, grace_seconds = root / "log", 60.0  # nothing is removed before the disk is full, however slow the machine
    LogStore.create(folder, metadata())
    ledger = LedgerActor(
        folder,
        writers=1,
        run="test",
        settings=LogSection(file_bytes=1 << 20, vacuum_grace_seconds=grace_seconds, orphan_seconds=3600),
    )
    attempt = ledger.begin_attempt(0, 1)
    writer = RecordWriter(
        folder,
        ledger.commit,
        LogSection(flush_rounds=1, file_bytes=1 << 20, queue_rounds=16),
        run="test",
        rank=0,
        attempt=attempt,
    )

    def train(number: int) -> None:
        writer.put(batch(number, 0), number)
        writer.end_round(number)

    for number in range(1, FILLED + 1):
        train(number)
        writer.flush(number)
        ledger.report_checkpoint(number)
    debris = len(list(folder.glob("*.parquet"))) - ledger.state().files
    with ledger._maintaining:  # else what earlier commits have woken may make room at this moment
        fill(root / "ballast")
        train(FILLED + 1)
        waited = not writer.flush(FILLED + 1, timeout=4)
        for commit in (folder / "_delta_log").glob("*.json"):  # the grace time passes
            os.utime(commit, (time.time() - 2 * grace_seconds,) * 2)
        assert ledger._maintenance is not None
        ledger._maintenance._vacuum_due = 0.0
    ledger.maintain()
    went_on = writer.flush(FILLED + 1, timeout=30)
    assert went_on, "no room was made"
    writer.close()
    # and once more, with nobody at work but the command; a merge needs room, and how much the Ledger has freed depends on
    # when its own merges came
    (root / "ballast").unlink()
    merge_all(folder)
    time.sleep(0.1)
    fill(root / "more")
    removed = len(vacuum_log(folder, orphan_seconds=3600, grace_seconds=0).removed)
    rows = len(MistakeLog(folder).records())
    print(json.dumps({"debris": debris, "waited": waited, "went_on": went_on, "removed": removed, "rows": rows}))


def watch(root: Path) -> None:
    """In a process of its own: a reader that follows the log and one that opens it anew, until `pilot` has ended.

    Prints how often each looked before the disk was full, while it was, and after it was freed; and the rows in all.
    """
    folder, ballast, parent = root / "log", root / "ballast", os.getppid()
    tail, seen, was_full = LogTail(folder), Seen(), False
    looks = {phase: [0, 0] for phase in ("before", "full", "freed")}
    looked = Path(os.environ["COPY_TO"] + "-looked")
    print("ready", flush=True)
    ended = False
    while not ended:
        # before the look, so that the last one sees the whole log; a `pilot` that failed has another parent take over
        ended = ((root / "end").exists() and looks["freed"][0] >= LOOKS) or os.getppid() != parent
        full = ballast.exists()
        was_full |= full
        counts = looks["full" if full else "freed" if was_full else "before"]
        update = tail.poll()
        assert not update.bad and not update.removed, update
        for _, records in update.new:
            seen.check(records)
        counts[0] += 1
        if counts[0] % 10 == 1 or ended:
            with MistakeLog(folder) as log:
                anew = Seen()
                anew.check(log.records())
                assert not log.bad_files, log.bad_files
                # the later look has all rows of the earlier one, and at the end no others
                assert anew.samples >= seen.samples if not ended else anew.samples == seen.samples
                counts[1] += 1
        if looks["full"][0] >= LOOKS and looks["full"][1]:
            looked.touch()
        time.sleep(0.005)
    print(json.dumps({**looks, "rows": len(seen.samples)}))


class Seen:
    """Rows that a reader was given: none twice, each as it was put."""

    def __init__(self) -> None:
        self.samples: set[int] = set()

    def check(self, records: Records) -> None:
        samples = records.sample_id.tolist()
        assert len(set(samples)) == len(samples) and not self.samples & set(samples), "a row came twice"
        self.samples |= set(samples)
        for number in np.unique(records.round).tolist():
            part = records.select(np.flatnonzero(records.round == number))
            for half in (0, 1):
                whole = batch(number, half)
                kept = part.select(np.flatnonzero(np.isin(part.sample_id, whole.sample_id)))
                if len(kept):
                    assert_same(kept, whole)


def fill(ballast: Path) -> None:
    """Take all space, to the last block."""
    with ballast.open("wb", buffering=0) as file:
        block = 1 << 20
        while block:
            try:
                file.write(bytes(block))
            except OSError:
                block //= 2


def mounted(command: list[str], root: Path) -> list[str]:
    """The command, on a file system of its own at `root`."""
    script = f'mount -t tmpfs -o size={SIZE} tmpfs "$0" && exec "$@"'
    space = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    return [*space, "/bin/sh", "-c", script, str(root), *command]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("unshare") is None or subprocess.run(mounted(["true"], folder), check=False).returncode:
        pytest.skip("no tmpfs can be mounted here, neither as root nor in a user name space")
    return folder


def report_of(what: str, root: Path, copy: Path) -> dict[str, Any]:
    """What a run on a small disk of its own has printed."""
    run = subprocess.run(
        mounted([sys.executable, "-m", "tests.faults.mistakelog.test_disk_full", str(root), what], root),
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COPY_TO": str(copy)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(json.loads(run.stdout.splitlines()[-1]))


def test_what_has_left_the_log_makes_room_though_no_commit_comes(tmp_path: Path, root: Path) -> None:
    reports = report_of("waiting", root, tmp_path / "copy")
    assert reports["debris"] > 5, "nothing was merged: the test shows nothing"
    assert reports["waited"], "the disk was not full"
    assert reports["went_on"] and reports["removed"] > 1
    assert reports["rows"] == (FILLED + 1) * ROWS


@pytest.mark.parametrize("policy", ["block", "drop"])
def test_a_full_disk(tmp_path: Path, root: Path, policy: str) -> None:
    reports = report_of(policy, root, tmp_path / "copy")
    stats, drops = reports["stats"], {int(round): count for round, count in reports["drops"].items()}
    assert stats["full_seconds"] > 0.4, "the disk was never full"
    assert reports["state"]["round"] == END
    # the follower, and the one that opens the log anew
    assert all(
        looks[0] >= LOOKS and looks[1] >= 1 for looks in (reports["watched"]["full"], reports["watched"]["freed"])
    ), reports
    assert reports["watched"]["rows"] == reports["state"]["rows"]
    put = END * 2 * ROWS
    assert reports["state"]["rows"] + sum(drops.values()) == put
    assert stats["dropped_records"] == reports["state"]["dropped"] == sum(drops.values())
    if policy == "block":
        assert drops == {} and reports["refused"] == 0 and stats["blocked_seconds"] > 0.3
    else:
        assert drops and reports["postponed"] > 0 and stats["blocked_seconds"] == 0
        assert reports["seconds"] < 3 * END * ROUND_SECONDS + 5, "the Pilot waited"
        assert min(drops) >= FILLED - 10
        assert reports["refused"] == sum(drops.values()) // ROWS

    records = MistakeLog(tmp_path / "copy").records()
    for number in range(1, END + 1):
        part = records.select(np.flatnonzero(records.round == number))
        assert len(part) + drops.get(number, 0) == 2 * ROWS
        for half in (0, 1):
            whole = batch(number, half)
            kept = part.select(np.flatnonzero(np.isin(part.sample_id, whole.sample_id)))
            assert len(kept) in (0, ROWS), "half of a micro-batch"
            if len(kept):
                assert_same(kept, whole)
    result = verify_log(tmp_path / "copy")
    assert result.good, result.lines()
    table = {file.name for file in LogStore(tmp_path / "copy").files()}
    assert {path.name for path in (tmp_path / "copy").iterdir() if path.is_file()} == table
    assert max(drops, default=0) < END - 5, "recording did not go on by itself"


if __name__ == "__main__":
    if sys.argv[2] == "waiting":
        waiting(Path(sys.argv[1]))
    elif sys.argv[2] == "watch":
        watch(Path(sys.argv[1]))
    else:
        pilot(Path(sys.argv[1]), sys.argv[2])
