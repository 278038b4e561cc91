"""A run over three Ray nodes: each model's workers on the nodes that have its resources, and there on as many as can be."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from tc_ray.cluster.capacity import CapacityError
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.run.job import run_job
from tc_ray.tracking.statusfile import read_status
from tests.support.tiny_run import assert_log_is_exact, tiny_config

ROUNDS = 12
NODES = {
    "a": {"num_cpus": 2, "resources": {"trains": 2}},
    "both": {"num_cpus": 4, "resources": {"trains": 2, "learns": 2}},
    "c": {"num_cpus": 2, "resources": {"learns": 2}},
}
"""Every process is of this machine, but to Ray they are three."""


@pytest.fixture
def nodes() -> Iterator[dict[int, str]]:
    """Names of the nodes by the process id of their raylets."""
    # its hooks at exit are signal handlers, which only the main thread may set
    cluster = Cluster(shutdown_at_exit=False)
    made = {name: cluster.add_node(include_dashboard=False, **node) for name, node in NODES.items()}
    ray.init(address=cluster.address, log_to_driver=False)
    yield {node.all_processes["raylet"][0].process.pid: name for name, node in made.items()}
    ray.shutdown()
    cluster.shutdown()


class Watch(threading.Thread):
    """Notes on which node each process of a run is, as its status names them."""

    def __init__(self, run: Path, nodes: dict[int, str]) -> None:
        super().__init__(daemon=True)
        self._run, self._nodes = run, nodes
        self._over = threading.Event()
        self.found: dict[str, str] = {}

    def __enter__(self) -> Watch:  # noqa: PYI034 - Self needs Python 3.11
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Look at the status until the run is over."""
        while not self._over.wait(0.05):
            try:
                status = read_status(self._run)
            except FileNotFoundError:
                continue
            for name, pid in status["processes"].items():
                if name not in self.found and psutil.pid_exists(pid):
                    above = {process.pid for process in psutil.Process(pid).parents()}
                    [self.found[name]] = [node for raylet, node in self._nodes.items() if raylet in above]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_and_two_learners_over_three_nodes(nodes: dict[int, str], tmp_path: Path) -> None:
    """Seven rows a round and a batch: four and three. Packed, both workers of a model would fit on one node."""
    config = tiny_config(
        tmp_path,
        resources__pilot_workers=2,
        resources__pilot_resources={"trains": 1},
        resources__copilot_workers=2,
        resources__copilot_resources={"learns": 1},
        resources__placement="spread",
        pilot__max_rounds=ROUNDS,
        pilot__batch_size=7,
        pilot__micro_batch_size=3,
        copilot__batch_size=7,
    )
    with Watch(config.run.path, nodes) as watch:
        result = run_job(config)
    assert sorted((watch.found["pilot-0"], watch.found["pilot-1"])) == ["a", "both"]
    assert sorted((watch.found["copilot-0"], watch.found["copilot-1"])) == ["both", "c"]
    assert result.export is not None
    status = read_status(config.run.path)
    assert (status["state"], status["restarts"]) == ("done", 0)
    assert (status["pilot"]["round"], status["copilot"]["step"]) == (ROUNDS, 2 * ROUNDS)
    rows = json.loads((config.run.path / "data" / "data.json").read_text())["rows"]["train"]
    assert_log_is_exact(config, ROUNDS, rows)
    with MistakeLog(config.log_location) as mistakes:
        records = mistakes.records()
    assert [int((records.rank == rank).sum()) for rank in (0, 1)] == [4 * ROUNDS, 3 * ROUNDS]

    elsewhere = tiny_config(tmp_path / "other", resources__copilot_resources={"rack_b": 1})
    with pytest.raises(CapacityError, match=r"Missing: 1 rack_b\. Lower .*resources\.copilot_resources, or add nodes"):
        run_job(elsewhere)
