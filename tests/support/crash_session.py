"""A Pilot in miniature that can be killed at any of its system calls; `Crashes` starts it, `python -m` it is the server.

Importing takes a second and a session a tenth of that, so one server process imports everything and forks a child for each
session. The shim (crash_points.c) is preloaded into the server and armed in the child. What was acknowledged to the child
goes through a pipe, which the shim does not look at.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.maintain import maintenance
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table import store
from tc_ray.mistakelog.table.data_file import DataFile
from tc_ray.mistakelog.table.lease import RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import metadata, random_records

COUNT, KILL, TORN, POWER, DATA = range(5)
ROUNDS = 8
ROWS = 4
REPOSITORY = Path(__file__).parents[2]
SETTINGS = LogSection(
    file_bytes=24_000,
    vacuum_grace_seconds=1e-6,
    orphan_seconds=3600,
)


def batch(round: int, attempt: int) -> Records:
    """What the Pilot logs in `round`: the same in every attempt."""
    return random_records(ROWS, round=round, attempt=attempt, first_sample=10 * round)


@dataclass(frozen=True)
class Checkpoint:
    """The Pilot's, as small as it can be: the phase of the session, and the last round of the weights."""

    phase: int = 1
    round: int = 0

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        path = folder / "checkpoint"
        return cls(*map(int, path.read_text().split())) if path.exists() else cls()

    def write(self, folder: Path) -> None:
        Location(folder).write("checkpoint", f"{self.phase} {self.round}".encode())


def session(folder: Path, say: Callable[[list[object]], None]) -> None:
    """Phase 1: rounds 1 to 4, checkpoint at 3. Phase 2 goes back to round 2, which cuts a file, and on to the end."""
    place = Location(folder / "log")
    maintenance._VACUUM_SECONDS = (0.0, 60.0)
    store._CHECKPOINT_COMMITS = 6
    LogStore.create(place, metadata())
    with RunLease.take(place, "session") as lease:
        ledger = Ledger(place, writers=1, run="test", lease=lease.number, settings=SETTINGS)
        if Checkpoint.read(folder).phase == 1:
            train(folder, ledger, say, last=4, checkpoints={3})
            Checkpoint(2, 2).write(folder)
        train(folder, ledger, say, last=ROUNDS, checkpoints={5, ROUNDS})
        ledger.finish_pilot(ROUNDS)


def train(
    folder: Path, ledger: Ledger, say: Callable[[list[object]], None], *, last: int, checkpoints: set[int]
) -> None:
    """One attempt from the checkpoint on."""
    start = Checkpoint.read(folder)
    attempt = ledger.begin_attempt(start.round, 1)
    say(["attempt", attempt, start.round])

    def submit(file: DataFile) -> int:
        version = ledger.commit(file)
        say(["acknowledged", file.round_max])
        ledger.maintain()  # here and not in a thread, so that each session makes the same calls
        return version

    writer = RecordWriter(
        folder / "log",
        submit,
        LogSection(flush_rounds=4 if start.phase == 1 else 1, file_bytes=2**30, queue_rounds=4),
        run="test",
        rank=0,
        attempt=attempt,
        start_round=start.round,
    )
    for number in range(start.round + 1, last + 1):
        writer.put(batch(number, attempt), number)
        writer.end_round(number)
        if number in checkpoints:
            assert writer.flush(number)
            Checkpoint(start.phase, number).write(folder)
            ledger.report_checkpoint(number)
            say(["checkpoint", number])
    writer.close()


@dataclass(frozen=True)
class Outcome:
    """How a session ended."""

    killed: bool
    said: list[list[object]]
    calls: list[str]
    """Counted calls, as "number name path"."""


class Crashes:
    """The server, started once.

    Args:
        shim: the compiled crash_points.c.
        graveyard: folder on the same file system, for names that a power cut brings back.
    """

    def __init__(self, shim: Path, graveyard: Path) -> None:
        self._graveyard = graveyard
        self._sessions = 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.crash_session"],
            cwd=REPOSITORY,
            env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, at: int, mode: int) -> Outcome:
        """A session in `folder`, killed at call `at` (0: never)."""
        self._sessions += 1
        graveyard = self._graveyard / str(self._sessions)
        graveyard.mkdir(parents=True)
        assert self._server.stdin is not None and self._server.stdout is not None
        order = {"folder": str(folder), "graveyard": str(graveyard), "at": at, "mode": mode}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        assert answer["status"] in (0, 9), f"the session failed by itself: {answer}"
        return Outcome(answer["status"] == 9, answer["said"], (graveyard / "calls").read_text().splitlines())

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)


def serve() -> None:
    """Orders from stdin, one session each."""
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            _child(order, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = [json.loads(text) for text in pipe.read().splitlines()]
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": status, "said": said}), flush=True)


def _child(order: dict[str, str | int], writing: int) -> None:
    try:
        trace = os.open(f"{order['graveyard']}/calls", os.O_CREAT | os.O_WRONLY)
        arm = ctypes.CDLL(None).crash_arm
        arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
        arm(str(order["folder"]).encode(), str(order["graveyard"]).encode(), order["at"], order["mode"], trace)
        session(
            Path(str(order["folder"])), lambda reports: os.write(writing, json.dumps(reports).encode() + b"\n") and None
        )
    except BaseException:  # noqa: BLE001 - the child ends here, whatever it is
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    serve()
