"""kill -9 of a Copilot learner: the Pilot does not notice, the Copilot goes on from its checkpoint, the run ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.run.job import run_job
from tc_ray.tracking.points import read_points
from tc_ray.tracking.statusfile import read_status
from tests.support.local_ray import local_ray
from tests.support.tiny_run import Killer, assert_log_is_exact, tiny_config

ROUNDS = 240

cluster = local_ray(cpus=2)


def test_pilot_goes_on_and_copilot_resumes(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, pilot__max_rounds=ROUNDS, copilot__steps_per_round=1, pilot__checkpoint_every_rounds=20
    )
    run = config.run.path
    with Killer(run, "copilot-0", lambda status: status["copilot"].get("step", 0) >= 15) as killer:
        result = run_job(config)
    assert killer.killed_at is not None, "the run ended before the kill: raise ROUNDS"
    assert killer.status["pilot"]["round"] < ROUNDS, "the Pilot had ended before the kill: raise ROUNDS"
    assert result.export is not None

    status = read_status(run)
    assert (status["state"], status["restarts"]) == ("done", 1)
    points = list(read_points(run / "metrics.jsonl"))
    events = [p for p in points if p["kind"] == "event"]
    assert [e["text"][:16] for e in events if e["event"] == "restart"] == ["Copilot learners"]
    (resumed,) = [e for e in events if e["event"] == "resume"]
    match = re.fullmatch(r"Copilot resumes after step (\d+)", resumed["text"])
    assert match, resumed["text"]
    # the last checkpoint before the kill (status.json may be a second old), not step 0
    assert int(match[1]) >= 10 and int(match[1]) % config.copilot.checkpoint_every_steps == 0
    steps = [p["step"] for p in points if p["kind"] == "copilot"]
    assert steps == list(range(1, ROUNDS + 1))

    # the Pilot: one attempt, and rounds at its usual pace while there was no Copilot
    assert set(MistakeLog(run / "log").arrow(columns=["attempt"])["attempt"].to_pylist()) == {1}
    times = np.array([p["time"] for p in points if p["kind"] == "pilot"])
    assert len(times) == ROUNDS
    alone = (times > killer.killed_at) & (times < resumed["time"])
    assert alone.sum() >= 5, "no round between the kill and the Copilot's return"
    assert np.diff(times[alone]).max() < 3.0
    train = json.loads((run / "data" / "data.json").read_text())["rows"]["train"]
    assert_log_is_exact(config, ROUNDS, train)
