"""A data file rots while a run trains: the Copilot goes on with the rest, the file leaves the log, the run ends as any other."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from typer.testing import CliRunner

from tc_ray.cli.main import app
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.maintain.quarantine import QUARANTINE_FOLDER, quarantined
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore, StoredFile
from tc_ray.run.job import run_job
from tc_ray.tracking.points import read_points
from tc_ray.tracking.statusfile import read_status
from tests.support.local_ray import local_ray
from tests.support.tiny_run import tiny_config

ROUNDS = 120
FIRST_STEPS = 5
HELD_SECONDS = 30.0
"""At most: a learner that is held for ever would keep the run from its end."""

T = TypeVar("T")

cluster = local_ray(cpus=2)


class Rot:
    """From a thread: flips bits of a committed file that the learner, held still meanwhile, cannot have read."""

    def __init__(self, run: Path) -> None:
        self._run, self._log = run, run / "log"
        self._thread = threading.Thread(target=self._damage, daemon=True)
        self._run_ended = threading.Event()
        self.file: StoredFile | None = None
        self.step = self.round = 0
        self.told: tuple[int, str] = (0, "")

    def __enter__(self) -> Rot:  # noqa: PYI034 - Self needs Python 3.11
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._run_ended.set()
        self._thread.join()

    def _damage(self) -> None:
        pid = self._wait_for(self._training_learner)
        if pid is None:
            return
        os.kill(pid, signal.SIGSTOP)
        try:
            read_by_now = {file.name for file in LogStore(self._log).files()}
            self.file = self._wait_for(
                lambda: next((f for f in LogStore(self._log).files() if f.name not in read_by_now), None), HELD_SECONDS
            )
            if self.file is None:
                return
            path = self._log / self.file.name
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0b101
            path.write_bytes(content)
            found = CliRunner().invoke(app, ["log", "verify", str(self._log)])
            self.told = (found.exit_code, found.output)
            status = read_status(self._run)
            self.step, self.round = status["copilot"]["step"], status["pilot"]["round"]
        finally:
            os.kill(pid, signal.SIGCONT)

    def _training_learner(self) -> int | None:
        """Its process, once it has made some steps."""
        try:
            status = read_status(self._run)
        except FileNotFoundError:
            return None
        trained = status["copilot"].get("step", 0) >= FIRST_STEPS
        return int(status["processes"]["copilot-0"]) if trained else None

    def _wait_for(self, look: Callable[[], T | None], seconds: float = math.inf) -> T | None:
        """What `look` finds; None: nothing in that time, or before the run's end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._run_ended.wait(0.02):
            if (found := look()) is not None:
                return found
        return None


@pytest.mark.slow
def test_training_goes_on_without_a_damaged_file(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        pilot__max_rounds=ROUNDS,
        pilot__checkpoint_every_rounds=20,
        copilot__steps_per_round=1,
        copilot__buffer_rounds=ROUNDS,  # every file is read, however long the learner is held
        log__compact=False,  # merging reads files too: here the learner is the one who finds it
    )
    run, log = config.run.path, config.run.path / "log"
    with Rot(run) as rot:
        result = run_job(config)
    bad = rot.file
    assert bad is not None, "nothing was damaged: raise ROUNDS"
    assert rot.round < ROUNDS and rot.step < ROUNDS - 20, "training was all but over: raise ROUNDS"
    # while it is part of the table, the command names it
    assert rot.told[0] == 1 and f"BAD {bad.name}" in rot.told[1], rot.told

    # training ended as it does without damage
    assert result.export is not None
    status = read_status(run)
    assert (status["state"], status["restarts"]) == ("done", 0)
    points = list(read_points(run / "metrics.jsonl"))
    for kind, number in (("pilot", "round"), ("copilot", "step")):
        assert [point[number] for point in points if point["kind"] == kind] == list(range(1, ROUNDS + 1))

    # named, taken out and counted, once
    (event,) = [point["text"] for point in points if point["kind"] == "event" and point["event"] == "damaged"]
    assert bad.name in event
    assert [(line.name, line.rows) for line in quarantined(Location(log))] == [(bad.name, bad.rows)]
    assert (log / QUARANTINE_FOLDER / bad.name).exists() and not (log / bad.name).exists()
    assert status["log"]["metrics"]["quarantined_files"] == 1
    assert Ledger(log, writers=1, run=config.run.name).state().quarantined == 1

    # all other rounds are there, and only its rows are not
    lost = range(bad.round_min, bad.round_max + 1)
    found = Counter(MistakeLog(log).arrow(columns=["round"])["round"].to_pylist())
    assert found == {number: config.pilot.batch_size for number in range(1, ROUNDS + 1) if number not in lost}
    after = CliRunner().invoke(app, ["log", "verify", str(log)])
    assert after.exit_code == 0 and f"quarantined earlier {bad.name}: " in after.output, after.output
