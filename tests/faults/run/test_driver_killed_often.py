"""kill -9 of the driver at 20 random moments of one run: nothing acknowledged is lost, nothing is twice, and in the end the log is
row for row that of a run that nobody killed."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from tc_ray.config.schema import RunConfig
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.pilot.checkpoint import latest_checkpoint
from tc_ray.run.job import run_job
from tc_ray.tracking.points import read_points
from tc_ray.tracking.statusfile import read_status
from tests.support.driver import alive, start_driver
from tests.support.mistakelog_samples import in_order
from tests.support.tiny_run import assert_log_is_exact, tiny_config

# on a fast machine some forty pass between two looks at the figures
ROUNDS = 1200
SETTINGS = {"pilot__epochs": 150, "pilot__max_rounds": ROUNDS, "copilot__steps_per_round": 1}
FIELDS = (
    "round",
    "sample_id",
    "seen",
    "input_ids",
    "rationale",
    "error_ids",
    "error_values",
    "error_rest",
    "token_loss",
)


def config_of(folder: Path) -> RunConfig:
    return tiny_config(folder, **SETTINGS)


def rounds_done(run: Path) -> int:
    points = run / "metrics.jsonl"
    return max((p["round"] for p in read_points(points) if p["kind"] == "pilot"), default=0) if points.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kills", "same_place"), [(20, False), (2, True)], ids=["20 places", "the same place twice"])
def test_the_log_is_that_of_a_run_without_kills(tmp_path: Path, kills: int, same_place: bool) -> None:
    dice = random.Random(3)
    for name in ("killed", "straight"):
        (tmp_path / name).mkdir()
    config = config_of(tmp_path / "killed")
    run = config.run.path
    for kill in range(kills):
        before = rounds_done(run)
        checkpoint = latest_checkpoint(run / "pilot" / "checkpoints")
        watermark = checkpoint.round if checkpoint else 0
        # in start-up, in training, at a checkpoint: wherever that moment falls
        target = 33 if same_place else watermark + dice.randint(1, 9)
        delay = 0.0 if same_place else dice.uniform(0.0, 0.3)
        driver = start_driver(tmp_path / "killed", **SETTINGS)
        began = time.monotonic()
        try:
            while rounds_done(run) < target or (same_place and before >= target and _attempts(run) <= kill):
                assert driver.poll() is None, (tmp_path / "killed" / "driver.log").read_text()[-3000:]
                assert time.monotonic() - began < 300, (tmp_path / "killed" / "driver.log").read_text()[-3000:]
                time.sleep(0.01)
            time.sleep(delay)
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
        processes = read_status(run)["processes"]
        while any(alive(pid) for pid in processes.values()):
            assert time.monotonic() - began < 350, f"workers outlive their driver: {processes}"
            time.sleep(0.05)
        checkpoint = latest_checkpoint(run / "pilot" / "checkpoints")
        with MistakeLog(config.log_location) as log:
            keys = log.arrow(columns=["round", "sample_id"])
            assert not log.bad_files
        pairs = list(zip(keys["round"].to_pylist(), keys["sample_id"].to_pylist(), strict=True))
        assert len(set(pairs)) == len(pairs), "a record twice"
        print(f"kill {kill + 1}: at round {rounds_done(run)}, {len(pairs)} records in the log", flush=True)
        if checkpoint is not None:
            assert set(range(1, checkpoint.round + 1)) <= {number for number, _ in pairs}, (
                "an acknowledged round is lost"
            )
    assert rounds_done(run) < ROUNDS, "the run ended before the last kill: raise ROUNDS"

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for name in ("killed", "straight"):
            run_job(config_of(tmp_path / name))
    finally:
        ray.shutdown()
    train = json.loads((run / "data" / "data.json").read_text())["rows"]["train"]
    assert_log_is_exact(config, ROUNDS, train)
    # a driver that is killed before its Pilot begins leaves no attempt
    attempts = _attempts(run)
    print(f"{attempts} attempts of the Pilot, {kills} kills", flush=True)
    assert attempts == kills + 1 if same_place else kills // 2 < attempts <= kills + 1
    killed, straight = (
        in_order(MistakeLog(config_of(tmp_path / n).log_location).records()) for n in ("killed", "straight")
    )
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(killed, field), getattr(straight, field), err_msg=field)


def _attempts(run: Path) -> int:
    with MistakeLog(run / "log") as log:
        return max(log.arrow(columns=["attempt"])["attempt"].to_pylist(), default=0)
