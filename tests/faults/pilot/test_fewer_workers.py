"""A node is lost and no other comes: the Pilot goes on with the workers that have room, and with all once a node is added."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.run.job import run_job
from tc_ray.tracking.statusfile import read_status
from tests.support.tiny_run import assert_log_is_exact, tiny_config

ROUNDS = 300
NODE = {"num_cpus": 2, "include_dashboard": False}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes, which hold two Pilot workers and a learner; one node holds one of each."""
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    cluster.add_node(**NODE)
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class ComeAndGo(threading.Thread):
    """Kills the node of the Pilot's first worker; adds one when the Pilot has gone on without it."""

    def __init__(self, cluster: Cluster, run: Path) -> None:
        super().__init__(daemon=True)
        self._cluster, self._run = cluster, run
        self._over = threading.Event()
        self.done: list[str] = []

    def __enter__(self) -> ComeAndGo:  # noqa: PYI034 - Self needs Python 3.11
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def _until(self, ready: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        while not self._over.wait(0.05):
            try:
                status = read_status(self._run)
            except FileNotFoundError:
                continue
            if ready(status):
                return status
        return None

    def run(self) -> None:
        """Kill, wait, add."""
        status = self._until(lambda status: status["pilot"].get("round", 0) >= 8)
        if status is None:
            return
        for node in self._cluster.worker_nodes:
            [raylet] = node.all_processes["raylet"]
            processes = [psutil.Process(raylet.process.pid)]
            processes += processes[0].children(recursive=True)
            if status["processes"]["pilot-0"] in [process.pid for process in processes]:
                break
        for process in processes:
            process.suspend()  # none sees another one die
        for process in processes:
            process.kill()
        self._cluster.remove_node(node, allow_graceful=False)
        self.done.append("lost")
        resumed = self._until(lambda status: resizes(status) and status["pilot"]["round"] >= resumed_at(status) + 12)
        if resumed is not None:
            self._cluster.add_node(**NODE)
            self.done.append("added")


def resizes(status: dict[str, Any]) -> list[str]:
    return [event["text"] for event in status["events"] if event["kind"] == "resize"]


def resumed_at(status: dict[str, Any]) -> int:
    """The round that the newest Pilot attempt began after."""
    texts = [event["text"] for event in status["events"] if event["text"].startswith("Pilot attempt")]
    return int(texts[-1].rsplit(" ", 1)[1]) if texts else ROUNDS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pilot_goes_on_with_fewer_workers_and_grows_again(cluster: Cluster, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        pilot__max_rounds=ROUNDS,
        pilot__epochs=50,
        pilot__micro_batch_size=2,
        pilot__zero_stage=1,
        resources__pilot_workers=2,
        resources__pilot_min_workers=1,
        copilot__steps_per_round=1,
        callbacks__on_round="tests.support.round_callbacks:slowly",
    )
    run = config.run.path
    with ComeAndGo(cluster, run) as nodes:
        result = run_job(config)
    assert nodes.done == ["lost", "added"], "the run ended before: raise ROUNDS"
    assert result.export is not None
    status = read_status(run)
    assert (status["state"], status["pilot"]["round"], status["copilot"]["step"]) == ("done", ROUNDS, ROUNDS)
    assert resizes(status) == ["there is room for 1 of 2 Pilot workers", "there is room for 2 of 2 Pilot workers"]
    assert_log_is_exact(config, ROUNDS, json.loads((run / "data" / "data.json").read_text())["rows"]["train"])
    table = MistakeLog(run / "log").arrow(columns=["round", "rank"])
    ranks: dict[int, set[int]] = {}
    for number, rank in zip(table["round"].to_pylist(), table["rank"].to_pylist(), strict=True):
        ranks.setdefault(number, set()).add(rank)
    counts = [len(ranks[number]) for number in sorted(ranks)]
    fewer = counts.index(1), len(counts) - counts[::-1].index(1)
    assert counts == [2] * fewer[0] + [1] * (fewer[1] - fewer[0]) + [2] * (ROUNDS - fewer[1]), "not 2, 1, 2"
