"""The log's disk fills up in mid-run and has space again later: the Pilot survives, and the log says what it lacks.

The log alone is on a small tmpfs, so that it is the log that is full and nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tc_ray.config.schema import RunConfig
from tc_ray.data.prepared.batches import RoundOrder
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.table.commits import dropped_records
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.pilot.checkpoint import latest_checkpoint
from tc_ray.run.job import run_job
from tc_ray.tracking.statusfile import read_status
from tests.support.local_ray import local_ray
from tests.support.tiny_run import tiny_config

ROUNDS = 60
FULL_FROM = 6
DISK_BYTES = 16 << 20

cluster = local_ray(cpus=2)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, DISK_BYTES large."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"a small disk cannot be made here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Ballast:
    """Fills the disk at round FULL_FROM; makes space again when the run has had to do with it for some time."""

    def __init__(self, disk: Path, run: Path, policy: str) -> None:
        self._file, self._run, self._policy = disk / "ballast", run, policy
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.filled_at = self.freed_at = 0

    def __enter__(self) -> Ballast:  # noqa: PYI034 - Self needs Python 3.11
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _round(self) -> int:
        try:
            return int(read_status(self._run)["pilot"].get("round", 0))
        except FileNotFoundError:
            return 0

    def _until(self, ready: Any) -> bool:
        while not ready():
            if self._stop.wait(0.02):
                return False
        return True

    def _watch(self) -> None:
        if not self._until(lambda: self._round() >= FULL_FROM):
            return
        self._fill()
        self.filled_at = self._round()
        if self._policy == "block":  # until it stands still
            self._until(self._stands_still)
        elif self._until(self._is_postponed):
            self._until(lambda: self._round() >= min(self.filled_at + 15, ROUNDS))
        self.freed_at = self._round()
        self._file.unlink()

    def _fill(self) -> None:
        with self._file.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while True:
                        file.write(os.urandom(size))
                except OSError:
                    continue

    def _is_postponed(self) -> bool:
        return any(event["kind"] == "postponed" for event in read_status(self._run)["events"])

    def _stands_still(self) -> bool:
        before = self._round()
        time.sleep(3.0)
        return self._round() == before


def trained_on(config: RunConfig) -> Counter[tuple[int, int]]:
    rows = json.loads((config.run.path / "data" / "data.json").read_text())["rows"]["train"]
    order = RoundOrder(rows, config.pilot.batch_size, config.pilot.epochs, config.run.seed)
    return Counter((number, int(row)) for number in range(1, ROUNDS + 1) for row in order.sample_rows(number))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["drop", "block"])
def test_the_pilot_survives_a_full_disk(tmp_path: Path, disk: Path, policy: str) -> None:
    config = tiny_config(
        tmp_path,
        pilot__max_rounds=ROUNDS,
        pilot__checkpoint_every_rounds=2,
        pilot__max_failures=0,
        log__path=str(disk / "log"),
        log__full_policy=policy,
        log__queue_rounds=3,
        log__flush_rounds=1,
        log__compact=False,
    )
    with Ballast(disk, config.run.path, policy) as ballast:
        result = run_job(config)
    assert FULL_FROM <= ballast.filled_at < ballast.freed_at if policy != "block" else ballast.filled_at, "raise ROUNDS"
    assert result.export is not None
    status = read_status(config.run.path)
    assert (status["state"], status["pilot"]["round"]) == ("done", ROUNDS)
    checkpoint = latest_checkpoint(config.run.path / "pilot" / "checkpoints")
    assert checkpoint is not None and checkpoint.round == ROUNDS

    wanted = trained_on(config)
    table = MistakeLog(disk / "log").arrow(columns=["round", "sample_id"])
    found = Counter(zip(table["round"].to_pylist(), table["sample_id"].to_pylist(), strict=True))
    assert not found - wanted, "too much, or twice"
    lacking = Counter(number for number, _ in (wanted - found).elements())
    counted = dropped_records(LogStore(disk / "log").commits())
    assert sum((Counter(rounds) for rounds in counted.values()), Counter()) == lacking
    postponed = [event["text"] for event in status["events"] if event["kind"] == "postponed"]
    if policy == "block":
        assert not lacking and not postponed
        return
    assert lacking and min(lacking) >= FULL_FROM - 2
    assert any("the checkpoint of round" in text and "cannot be written now" in text for text in postponed)
    assert not list(disk.glob("log/*.tmp"))
