"""The Ray of a run: one of its own is ended with it, one that was there before is left as it was; and a run without a log."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from transformers import AutoModelForCausalLM

from tc_ray.cluster.session import ray_session
from tc_ray.config.schema import RunConfig
from tc_ray.run.job import run_job
from tc_ray.tracking.statusfile import read_status
from tests.support.serving_cluster import processes_under, runs, soon
from tests.support.tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[3]
JOIN = """
import ray
from tc_ray.config.schema import RunConfig
from tc_ray.cluster.session import ray_session
try:
    with ray_session(RunConfig()):
        print("node", ray.get_runtime_context().get_node_id())
        print("kept", ray.get(ray.get_actor("kept", namespace="before").read.remote()))
        raise RuntimeError("the run fails")
except RuntimeError as error:
    print("ended by", error, ray.is_initialized())
"""


@pytest.fixture(autouse=True)
def no_ray() -> Iterator[None]:
    assert not ray.is_initialized()
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_run_without_a_log_ends_with_the_ray_that_it_started(tmp_path: Path) -> None:
    """`log.enabled: false`: plain fine-tuning, no log and no Copilot; nothing of its Ray is left."""
    config = tiny_config(tmp_path, log__enabled=False, pilot__max_rounds=4, pilot__checkpoint_every_rounds=2)
    before = processes_under(os.getpid())
    result = run_job(config)
    assert not ray.is_initialized()
    begun = {pid: at for pid, at in processes_under(os.getpid()).items() if before.get(pid) != at}
    assert soon(lambda: not any(runs(pid, at) for pid, at in begun.items()), 30), begun

    assert (result.export, result.report) == (None, None)
    folder = config.run.path
    assert not any((folder / name).exists() for name in ("log", "copilot", "export", "evaluation"))
    status = read_status(folder)
    assert (status["state"], status["pilot"]["round"], status["copilot"]) == ("done", 4, {})
    trained = AutoModelForCausalLM.from_pretrained(folder / "pilot" / "final").state_dict()
    untrained = AutoModelForCausalLM.from_pretrained(config.model.pilot).state_dict()
    assert any(not trained[name].equal(untrained[name]) for name in trained)


@ray.remote(num_cpus=0)
class Kept:
    """Something of the cluster's own users."""

    def read(self) -> int:
        return 41


def test_a_cluster_that_was_there_is_joined_and_left_running() -> None:
    """By RAY_ADDRESS, and also where the run fails."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, namespace="before")
    kept = Kept.options(name="kept").remote()  # type: ignore[attr-defined]
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-c", JOIN],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    node = ray.get_runtime_context().get_node_id()
    assert done.stdout.splitlines()[-3:] == [f"node {node}", "kept 41", "ended by the run fails False"]
    assert ray.get(kept.read.remote()) == 41
    # a process that is connected already, as a notebook: it stays connected
    with ray_session(RunConfig()):
        assert ray.get_runtime_context().get_node_id() == node
    assert ray.get(kept.read.remote()) == 41


def test_a_ray_of_its_own_has_the_cpus_that_the_run_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    """More than the machine has, if need be, and says so; it is ended also where the run fails."""
    cores = os.cpu_count() or 1
    config = RunConfig.model_validate({"resources": {"pilot_cpus": cores, "copilot_cpus": 2}})
    with pytest.raises(RuntimeError, match="the run fails"), ray_session(config):
        assert ray.cluster_resources()["CPU"] == cores + 2
        raise RuntimeError("the run fails")
    assert not ray.is_initialized()
    assert f"asks for {cores + 2} CPUs, this machine has {cores}: processes will share cores" in capsys.readouterr().out
