"""A Pilot that fails more often than `pilot.max_failures` ends the run with one error; the folder stays resumable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tc_ray.pilot.checkpoint import latest_checkpoint
from tc_ray.pilot.trainer import PilotError
from tc_ray.run.job import run_job
from tc_ray.tracking.statusfile import read_status
from tests.support.local_ray import local_ray
from tests.support.tiny_run import Killer, assert_log_is_exact, tiny_config

ROUNDS = 60

cluster = local_ray(cpus=2)


@pytest.mark.slow
def test_the_run_fails_and_can_be_resumed(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, pilot__max_rounds=ROUNDS, pilot__max_failures=0)
    run = config.run.path
    with (
        Killer(run, "pilot-0", lambda status: status["pilot"].get("round", 0) >= 8) as killer,
        pytest.raises(PilotError, match="the Pilot stopped: "),
    ):
        run_job(config)
    assert killer.killed_at is not None
    status = read_status(run)
    assert status["state"] == "failed" and not any("attempt 2" in event["text"] for event in status["events"])
    checkpoint = latest_checkpoint(run / "pilot" / "checkpoints")
    assert checkpoint is not None and checkpoint.round < ROUNDS

    result = run_job(config)
    assert result.export is not None and read_status(run)["state"] == "done"
    assert_log_is_exact(config, ROUNDS, json.loads((run / "data" / "data.json").read_text())["rows"]["train"])
