"""kill -9 of a Pilot worker in mid-run: the run ends by itself, with each (round, sample) once in the log."""

from __future__ import annotations

import json
from pathlib import Path

from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.run.job import run_job
from tc_ray.tracking.points import read_points
from tc_ray.tracking.statusfile import read_status
from tests.support.local_ray import local_ray
from tests.support.tiny_run import Killer, assert_log_is_exact, tiny_config

ROUNDS = 80

cluster = local_ray(cpus=3)


def test_killed_worker_is_replaced_and_the_log_stays_exact(tmp_path: Path) -> None:
    """The second of two workers dies between two checkpoints; rank 0 is then waiting for it in a collective."""
    config = tiny_config(
        tmp_path, pilot__max_rounds=ROUNDS, resources__pilot_workers=2, pilot__zero_stage=1, pilot__micro_batch_size=2
    )
    run = config.run.path
    with Killer(run, "pilot-1", lambda status: status["pilot"].get("round", 0) >= 8) as killer:
        result = run_job(config)
    assert killer.killed_at is not None, "the run ended before the kill: raise ROUNDS"
    assert result.export is not None

    status = read_status(run)
    assert status["state"] == "done"
    assert status["restarts"] >= 1
    assert any("Pilot attempt 2 resumes after round" in event["text"] for event in status["events"])
    assert (status["pilot"]["round"], status["copilot"]["step"]) == (ROUNDS, 2 * ROUNDS)
    train = json.loads((run / "data" / "data.json").read_text())["rows"]["train"]
    assert_log_is_exact(config, ROUNDS, train)

    # the first attempt's rounds stand up to a checkpoint, the second's follow: nothing was trained from the start again
    table = MistakeLog(run / "log").arrow(columns=["round", "attempt"])
    by_attempt: dict[int, set[int]] = {}
    for number, attempt in zip(table["round"].to_pylist(), table["attempt"].to_pylist(), strict=True):
        by_attempt.setdefault(attempt, set()).add(number)
    first, second = by_attempt[1], by_attempt[max(by_attempt)]
    assert max(first) == min(second) - 1
    assert max(first) >= 5 and max(first) % config.pilot.checkpoint_every_rounds == 0
    # points of rounds trained twice are not doubled either
    rounds = [p["round"] for p in read_points(run / "metrics.jsonl") if p["kind"] == "pilot"]
    assert rounds == list(range(1, ROUNDS + 1))
