"""The process dies, or the machine does, between any two system calls that change the log: nothing acknowledged is lost,
nothing is there twice, and the log in the end is that of a run without a crash, row for row.

The session (crash_session.py) writes, merges, fences and vacuums. It is killed at a call, killed at the same call of the
restart, then left to finish. Fast: points drawn by a seeded die; slow: every call for a kill, and for the rest every call but
those in the middle of one file's stream of writes, which differ in nothing but a length.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.maintain.vacuum import vacuum_log
from tc_ray.mistakelog.maintain.verify import verify_log
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.repair import is_table, repair
from tc_ray.mistakelog.table.store import LogStore
from tests.support.crash_session import (
    COUNT,
    DATA,
    KILL,
    POWER,
    ROUNDS,
    ROWS,
    TORN,
    Checkpoint,
    Crashes,
    Outcome,
    batch,
)
from tests.support.mistakelog_samples import assert_same, in_order

NAMES = {KILL: "kill", TORN: "torn", POWER: "power", DATA: "data"}
FAST_POINTS = 4


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crashes]:
    folder = tmp_path_factory.mktemp("shim")
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None, "a C compiler is needed: crash_points.c is built for the test"
    source = Path(__file__).resolve().parents[3] / "tests" / "support" / "crash_points.c"
    subprocess.run(
        [compiler, "-Wall", "-O1", "-shared", "-fPIC", "-o", folder / "crash.so", source, "-pthread"], check=True
    )
    server = Crashes(folder / "crash.so", folder / "graveyard")
    yield server
    server.close()


@pytest.fixture(scope="module")
def calls(crashes: Crashes, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every counted call of a session without a crash, as "name path"."""
    folder = tmp_path_factory.mktemp("straight")
    outcome = crashes.run(folder, 0, COUNT)
    assert not outcome.killed
    check_finished(folder)
    return [line.split(" ", 1)[1] for line in outcome.calls]


def points(calls: list[str]) -> list[int]:
    """Numbers of the calls, without those in the middle of a stream of writes to one file."""

    def inside(at: int) -> bool:
        around = calls[at - 1 : at + 2]
        return len(set(around)) == 1 and around[0].startswith("write ") and len(around) == 3

    return [at + 1 for at in range(len(calls)) if at == 0 or not inside(at)]


def read(folder: Path) -> Records | None:
    """The log as it lies there, in order, or None before the table."""
    if not is_table(Location(folder / "log")):
        return None
    log = MistakeLog(folder / "log")
    try:
        records = log.records()
        assert not log.bad_files
    finally:
        log.close()
    assert len(np.unique(np.stack([records.round, records.sample_id]), axis=1).T) == len(records), "a row twice"
    return in_order(records)


def assert_rounds(records: Records, last: int) -> None:
    """The rows of rounds 1 to `last`, each as it was put, whatever its attempt."""
    assert records.round.tolist() == [number for number in range(1, last + 1) for _ in range(ROWS)]
    for number in range(1, last + 1):
        part = records.select(np.flatnonzero(records.round == number))
        assert_same(part, batch(number, int(part.attempt[0])))


def check_crashed(folder: Path, outcome: Outcome) -> None:
    """What a crash has left, looked at without going on."""
    repair(Location(folder / "log"))
    if not is_table(Location(folder / "log")):
        assert not [said for said in outcome.said if said[0] != "checkpoint"], "the table is gone"
        return
    state = Ledger(folder / "log", writers=1, run="test").state()
    checkpoint = Checkpoint.read(folder)
    assert state.round >= checkpoint.round, "the checkpoint is ahead of the log"
    reports = [said for said in outcome.said if said[0] in ("attempt", "acknowledged")]
    if reports:
        promised = reports[-1][-1]
        fenced = state.attempt > max((said[1] for said in reports if said[0] == "attempt"), default=0)
        assert state.round == checkpoint.round if fenced else state.round >= promised, "acknowledged rounds are lost"
    records = read(folder)
    assert records is not None
    assert_rounds(records, state.round)
    assert state.rows == len(records)


def check_finished(folder: Path) -> None:
    """The log of a whole session, with nothing left over."""
    records = read(folder)
    assert records is not None
    assert_rounds(records, ROUNDS)
    state = Ledger(folder / "log", writers=1, run="test").state()
    assert (state.pilot_done, state.last_round, state.round) == (True, ROUNDS, ROUNDS)
    result = verify_log(folder / "log")
    assert result.good, result.lines()
    vacuum_log(folder / "log", orphan_seconds=0, grace_seconds=0)
    table = {file.name for file in LogStore(folder / "log").files()}
    assert {path.name for path in (folder / "log").iterdir() if path.is_file()} == table
    assert not list((folder / "log" / "_tc_ray").glob("lease-*")), "a lease of a dead process is left"


def crash_twice(crashes: Crashes, folder: Path, at: int, mode: int) -> None:
    """Killed at the same place of the first start and of the restart, then left alone."""
    for _ in range(2):
        outcome = crashes.run(folder, at, mode)
        if outcome.killed:
            # on a copy: looking repairs, and the restart must find what the crash has left
            shutil.copytree(folder, folder.with_name("copy"))
            check_crashed(folder.with_name("copy"), outcome)
            shutil.rmtree(folder.with_name("copy"))
    outcome = crashes.run(folder, 0, COUNT)
    assert not outcome.killed
    check_finished(folder)
    shutil.rmtree(folder)


def test_the_shim_sees_every_kind_of_call(calls: list[str]) -> None:
    """An unseen call would make the tests below pass for nothing."""
    kinds = {line.split()[0] for line in calls}
    assert {"open", "write", "fsync", "rename", "link", "unlink", "mkdir"} <= kinds
    written = [line for line in calls if line.startswith("write ")]
    assert any(".json" in line for line in written) and any(".parquet.tmp" in line for line in written)
    for line in calls:
        # each data file, merged or not, is synced, renamed, and its folder is synced
        if line.startswith("rename ") and line.endswith(".parquet") and "checkpoint" not in line:
            at = calls.index(line)
            assert calls[at - 1] == f"fsync {line.split()[1]}.tmp" and calls[at + 1] == "fsync /log"
    assert any("-merged-" in line for line in calls) and any("-cut2-" in line for line in calls)
    checkpoint = re.compile(r"rename /log/_delta_log/\d+\.checkpoint\.parquet")
    named = [at for at, line in enumerate(calls) if checkpoint.fullmatch(line)]
    assert named, "no checkpoint of the table is made"
    for at in named:
        assert (
            calls[at - 1].startswith("fsync /log/_tc_ray/checkpoint.writing/")
            and calls[at + 1] == "fsync /log/_delta_log"
        )


def test_a_power_cut_takes_what_was_not_synced(crashes: Crashes, calls: list[str], tmp_path: Path) -> None:
    """Guards the simulation itself: right before the folder is synced the new file's name is lost, and after it stays."""
    renamed = next(at for at, line in enumerate(calls, 1) if line.startswith("rename ") and line.endswith(".parquet"))
    name = calls[renamed - 1].split()[1].lstrip("/")
    for at, there in ((renamed + 1, False), (renamed + 2, True)):
        folder = tmp_path / str(at)
        folder.mkdir()
        assert crashes.run(folder, at, POWER).killed
        assert (folder / name).exists() is there
    commit = next(at for at, line in enumerate(calls, 1) if line.startswith("write ") and ".json" in line)
    folder = tmp_path / "torn"
    folder.mkdir()
    assert crashes.run(folder, commit, TORN).killed
    assert len(list((folder / "log/_delta_log").glob("*.json#1"))) == 1


@pytest.mark.parametrize("mode", NAMES, ids=NAMES.get)
def test_a_crash_between_any_two_calls(crashes: Crashes, calls: list[str], tmp_path: Path, mode: int) -> None:
    for at in sorted(random.Random(40 + mode).sample(candidates(calls, mode), FAST_POINTS)):
        (tmp_path / str(at)).mkdir()
        crash_twice(crashes, tmp_path / str(at), at, mode)


def candidates(calls: list[str], mode: int) -> list[int]:
    few = points(calls)
    if mode == TORN:
        return [at for at in few if calls[at - 1].startswith("write ")]
    return few


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mode", NAMES, ids=NAMES.get)
def test_a_crash_at_every_call(crashes: Crashes, calls: list[str], tmp_path: Path, mode: int) -> None:
    for at in range(1, len(calls) + 1) if mode == KILL else candidates(calls, mode):
        (tmp_path / str(at)).mkdir()
        try:
            crash_twice(crashes, tmp_path / str(at), at, mode)
        except BaseException as error:
            error.add_note(f"{NAMES[mode]} at call {at}: {calls[at - 1]}")
            raise
