"""The whole job with its log in an object store, and a Pilot worker killed in the middle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tc_ray.mistakelog.maintain.verify import verify_log
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.run.job import run_job
from tests.support.local_ray import local_ray
from tests.support.object_store import new_log_uri, store_options
from tests.support.tiny_run import Killer, assert_log_is_exact, tiny_config

ROUNDS = 60


options, cluster = store_options(), local_ray(cpus=2)


@pytest.mark.slow
def test_the_job_ends_and_the_log_is_exact(tmp_path: Path, options: dict[str, str]) -> None:
    config = tiny_config(
        tmp_path, pilot__max_rounds=ROUNDS, log__path=new_log_uri(options), log__storage_options=options
    )
    run = config.run.path
    with Killer(run, "pilot-0", lambda status: status["pilot"].get("round", 0) >= 8) as killer:
        result = run_job(config)
    assert killer.killed_at is not None, "the run ended before the kill: raise ROUNDS"
    assert result.export is not None
    assert not (run / "log").exists()
    assert "aws_secret_access_key: '***'" in (run / "config.yaml").read_text()
    train = json.loads((run / "data" / "data.json").read_text())["rows"]["train"]
    assert_log_is_exact(config, ROUNDS, train)
    with MistakeLog(config.log_location, storage_options=options) as log:
        assert max(log.arrow(columns=["attempt"])["attempt"].to_pylist()) == 2
        found = verify_log(log.location)
    assert found.good and found.rows == ROUNDS * config.pilot.batch_size
