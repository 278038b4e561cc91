"""A node of the cluster is lost in mid-run with all that runs on it: another takes its place, the log stays exact."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from tc_ray.run.job import run_job
from tc_ray.tracking.statusfile import read_status
from tests.support.tiny_run import assert_log_is_exact, tiny_config

ROUNDS = 80
NODE = {"num_cpus": 3, "include_dashboard": False}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that has no CPUs, so that everything heavy runs elsewhere, and one more node (of this machine)."""
    # its hooks at exit are signal handlers, which only the main thread may set
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class PowerCut(threading.Thread):
    """Kills a node's raylet and every process under it at once, as soon as the run has come to `round`; then adds a node."""

    def __init__(self, cluster: Cluster, run: Path, round: int) -> None:
        super().__init__(daemon=True)
        self._cluster, self._run, self._round = cluster, run, round
        self._over = threading.Event()
        self.killed: list[str] = []

    def __enter__(self) -> PowerCut:  # noqa: PYI034 - Self needs Python 3.11
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Wait, kill, replace."""
        while not self._over.wait(0.02):
            try:
                status = read_status(self._run)
            except FileNotFoundError:
                continue
            if status["pilot"].get("round", 0) >= self._round:
                break
        else:
            return
        [node] = self._cluster.worker_nodes
        [raylet] = node.all_processes["raylet"]
        processes = [psutil.Process(raylet.process.pid)]
        processes += processes[0].children(recursive=True)
        for process in processes:
            process.suspend()  # none sees another one die
        self.killed = [" ".join(process.cmdline()[:1]) for process in processes]
        for process in processes:
            process.kill()
        self._cluster.remove_node(node, allow_graceful=False)
        time.sleep(1)
        self._cluster.add_node(**NODE)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lost_node_loses_nothing(cluster: Cluster, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, pilot__max_rounds=ROUNDS)
    run = config.run.path
    with PowerCut(cluster, run, 8) as cut:
        result = run_job(config)
    print(cut.killed)
    assert any("RayTrainWorker" in name for name in cut.killed), "the Pilot did not run there"
    assert any("CopilotWorker" in name for name in cut.killed), "the Copilot did not run there"
    assert result.export is not None
    status = read_status(run)
    assert status["state"] == "done" and status["restarts"] >= 1
    assert (status["pilot"]["round"], status["copilot"]["step"]) == (ROUNDS, 2 * ROUNDS)
    assert_log_is_exact(config, ROUNDS, json.loads((run / "data" / "data.json").read_text())["rows"]["train"])
