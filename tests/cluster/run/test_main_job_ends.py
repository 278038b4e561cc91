"""How a run ends that does not go well: a Copilot that fails for good, a Pilot that cannot pass, too small a Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tc_ray.cluster.capacity import CapacityError
from tc_ray.copilot.worker import CopilotWorker
from tc_ray.export.check import ExportError
from tc_ray.models.fusion import FusedModel
from tc_ray.pilot import loop
from tc_ray.pilot.trainer import PilotError
from tc_ray.run.job import NoCopilotError, run_job
from tc_ray.serving.deploy.settings import find_export
from tc_ray.tracking.points import read_points
from tc_ray.tracking.statusfile import read_status
from tests.support.local_ray import local_ray
from tests.support.tiny_run import tiny_config

ROUNDS = 4

cluster = local_ray(cpus=2)


@pytest.mark.slow
def test_a_copilot_that_fails_for_good_leaves_the_pilots_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 10: the Pilot is trained, measured and exported with lambda 0; the end says why; the same command tries again."""

    class Broken(CopilotWorker):
        def run(self) -> Any:
            raise OSError(5, "Input/output error")

    config = tiny_config(
        tmp_path, pilot__max_rounds=ROUNDS, copilot__max_restarts=0, copilot__checkpoint_every_steps=4,
        copilot__schedule="lockstep",
    )  # fmt: skip
    run = config.run.path
    with monkeypatch.context() as patched:
        patched.setattr("tc_ray.copilot.group.CopilotWorker", Broken)
        with pytest.raises(NoCopilotError, match=r"the Copilot failed with OSError.*same command") as ended:
            run_job(config)
    report, export = ended.value.result.report, ended.value.result.export
    assert report.first.no_copilot and report.first.exported_lam == 0.0
    (line,) = report.measured
    assert (line.model, line.rows) == ("run", config.fusion.max_test_rows)
    assert "There is no Copilot: the Copilot failed with" in (run / "evaluation" / "report.md").read_text()
    assert "lambda" not in "\n".join(report.tables())
    status = read_status(run)
    assert (status["state"], status["restarts"], status["pilot"]["round"]) == ("failed", 0, ROUNDS)
    assert status["evaluation"]["sources"]["run"]["no_copilot"] == report.first.no_copilot
    assert any(e["kind"] == "failed" and "continues without it" in e["text"] for e in status["events"])
    assert (export / "pilot" / "model.safetensors").is_file() and not (export / "copilot").exists()
    with pytest.raises(ExportError, match=r"a Pilot alone, copilot/config\.json is missing"):
        find_export(run)
    with pytest.raises(FileNotFoundError, match="a Pilot alone"):
        FusedModel.from_pretrained(export)

    trained = (run / "pilot" / "final" / "model.safetensors").stat().st_mtime_ns
    again = run_job(config)
    assert again.report.first.no_copilot is None and again.export == export
    assert find_export(run) == export
    assert (run / "pilot" / "final" / "model.safetensors").stat().st_mtime_ns == trained
    assert read_status(run)["state"] == "done"


@pytest.mark.slow
def test_the_pilot_is_started_again_only_for_what_can_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 20: an IndexError is not tried again; a death is, and is counted with the log off too.

    Without a cluster: tests/unit/cluster/test_failures.py.
    """
    config = tiny_config(tmp_path, pilot__max_rounds=ROUNDS, log__enabled=False)
    run, marks = config.run.path, tmp_path / "starts"
    train = loop.train_worker

    def fails(settings: dict[str, Any]) -> None:
        with marks.open("a") as file:
            file.write("x")
        raise IndexError("index out of range in self")

    def dies_once(settings: dict[str, Any]) -> None:
        with marks.open("a") as file:
            file.write("x")
        if marks.stat().st_size == 2:
            os._exit(1)
        train(settings)

    monkeypatch.setattr("tc_ray.pilot.trainer.train_worker", fails)
    with pytest.raises(PilotError, match="worker 0: IndexError: index out of range in self"):
        run_job(config)
    assert marks.read_text() == "x"
    status = read_status(run)
    assert (status["state"], status["restarts"], status["waiting"]) == ("failed", 0, {})

    monkeypatch.setattr("tc_ray.pilot.trainer.train_worker", dies_once)
    assert run_job(config).export is None
    assert marks.read_text() == "xxx"
    assert read_status(run)["restarts"] == 1
    events = [p for p in read_points(run / "metrics.jsonl") if p["kind"] == "event"]
    assert [e["text"].startswith("Pilot workers, after ") for e in events if e["event"] == "restart"] == [True]


def test_a_ray_that_is_too_small_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """Fault 12: 8 CPUs asked on a smaller Ray showed "train" without end."""
    config = tiny_config(tmp_path, resources__pilot_cpus=7)
    with pytest.raises(
        CapacityError,
        match=r"asks for 8 CPUs .*1 node \(2 CPUs\), no autoscaler\. Missing: 6 CPU\. Lower resources\.pilot",
    ):
        run_job(config)
    assert {path.name for path in config.run.path.iterdir()} == {"run.lock", "status.json"}
    status = read_status(config.run.path)
    assert status["state"] == "failed" and "asks for 8 CPUs" in status["failure"]
