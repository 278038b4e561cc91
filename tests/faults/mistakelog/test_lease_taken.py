"""A run whose log another process has taken over, as when its driver was frozen: it stops, with one line, and changes nothing.

Fast, of the same fault: tests/unit/mistakelog/test_fenced.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tc_ray.mistakelog.table.lease import STALE_SECONDS, RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LEASE_NUMBER, LogStore
from tc_ray.tracking.statusfile import read_status
from tests.support.tiny_run import tiny_config

ROUNDS = 2000
REPOSITORY = Path(__file__).resolve().parents[3]
DRIVER = """
import sys
from pathlib import Path
from tc_ray.cli.command import run_command
from tc_ray.run.job import run_job
from tests.support.tiny_run import tiny_config
run_command(lambda: run_job(tiny_config(Path(sys.argv[1]), pilot__max_rounds=int(sys.argv[2]), pilot__epochs=500)))
"""


def take_over(place: Location) -> RunLease:
    """As another machine does that has seen no sign of life of the run."""
    assert place.local is not None
    name = f"_tc_ray/lease-{LogStore(place).number(LEASE_NUMBER)}.json"
    holder = json.loads(place.read(name))
    holder["process"] |= {"host": "other", "boot": "elsewhere"}
    place.write(name, json.dumps(holder).encode())
    os.utime(place.local / name, (time.time() - 2 * STALE_SECONDS,) * 2)
    return RunLease.take(place, "run of another machine")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_whose_log_was_taken_over_stops(tmp_path: Path) -> None:
    """Fault 1: the run went on with the lease it had lost, under the number of the other."""
    config = tiny_config(tmp_path, pilot__max_rounds=ROUNDS)
    place = Location(config.log_location)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), str(ROUNDS)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stderr is not None
    try:
        end = time.monotonic() + 150
        while not list((config.run.path / "log").glob("rounds-*.parquet")):
            assert driver.poll() is None, driver.stderr.read()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.05)
        lease = take_over(place)
        version = LogStore(place).version
        said = driver.communicate(timeout=90)[1]
    finally:
        driver.kill()
    assert driver.returncode == 2, said[-3000:]
    line = said.strip().splitlines()[-1]
    assert line.startswith(f"tc-ray: {place}: another process has taken this log over"), said[-3000:]
    assert "Traceback" not in said, said[-3000:]
    store = LogStore(place)
    assert (store.version, store.number(LEASE_NUMBER)) == (version, lease.number)
    status = read_status(config.run.path)
    assert status["state"] == "failed"
    assert not [event for event in status["events"] if event["kind"] == "restart"]
    lease.release()
