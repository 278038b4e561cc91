"""Whether a cluster can hold a run: nodes and needs in, an answer or an error out."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
import ray

from tc_ray.cluster import capacity
from tc_ray.cluster.capacity import CapacityError, Need, check_capacity, fits, starts_nodes
from tc_ray.cluster.session import evaluation_need, training_needs
from tc_ray.config.schema import RunConfig


def need(count: int, cpus: float, gpus: int = 0) -> Need:
    return Need("worker", count, {"CPU": cpus} | ({"GPU": float(gpus)} if gpus else {}), ("resources.pilot_cpus",))


def placed(nodes: list[dict[str, float]], needs: list[Need]) -> bool:
    """By trial of every placement."""
    bundles = [each.bundle for each in needs for _ in range(each.count)]
    for where in itertools.product(range(len(nodes)), repeat=len(bundles)):
        left = [dict(node) for node in nodes]
        for node, bundle in zip(where, bundles, strict=True):
            for name, amount in bundle.items():
                left[node][name] = left[node].get(name, 0.0) - amount
        if all(amount > -1e-9 for node in left for amount in node.values()):
            return True
    return False


def test_fits_is_exact() -> None:
    """Fault 12: no run is refused that has room, and none is started that has none."""
    draw = random.Random(0)
    answers = set()
    for _ in range(300):
        nodes: list[dict[str, float]] = [
            {"CPU": float(draw.randint(0, 6)), "GPU": float(draw.randint(0, 2))} for _ in range(draw.randint(1, 3))
        ]
        needs = [
            need(draw.randint(1, 3), draw.choice([0.5, 1, 2, 3]), draw.randint(0, 1)) for _ in range(draw.randint(1, 2))
        ]
        answer = fits(nodes, needs)
        assert answer == placed(nodes, needs), (nodes, needs)
        answers.add(answer)
    assert answers == {True, False}


def with_nodes(monkeypatch: pytest.MonkeyPatch, *cpus: float, grows: bool = False) -> None:
    nodes: list[dict[str, Any]] = [{"Alive": True, "Resources": {"CPU": count}} for count in cpus]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 99.0}}])
    monkeypatch.setattr(capacity, "can_grow", lambda: grows)


def test_a_cluster_that_is_too_small_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 12: what is asked, what is there, what lowers it; nodes that are gone do not count."""
    resources = {"pilot_workers": 2, "pilot_cpus": 3, "copilot_workers": 2}
    config = RunConfig.model_validate({"resources": resources, "pilot": {"micro_batch_size": 8}})
    with_nodes(monkeypatch, 4.0)
    with pytest.raises(CapacityError) as refused:
        check_capacity(training_needs(config))
    for words in (
        "asks for 8 CPUs (2 Pilot workers with 3 CPUs each; 2 Copilot learners with 1 CPU each)",
        "1 node (4 CPUs)",
        "resources.pilot_workers, resources.pilot_cpus, resources.copilot_workers, resources.copilot_cpus, or add nodes",
    ):
        assert words in str(refused.value)
    with_nodes(monkeypatch, 4.0, 4.0)
    check_capacity(training_needs(config), [evaluation_need(config)])


def test_no_bundle_lies_over_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 12: the sum is not enough."""
    with_nodes(monkeypatch, 2.0, 2.0)
    with pytest.raises(CapacityError, match=r"asks for 3 CPUs .* 2 nodes \(2 CPUs, 2 CPUs\)"):
        check_capacity([need(1, 3)])
    with pytest.raises(CapacityError, match="this Ray cannot hold that"):
        check_capacity([], [need(1, 1, gpus=1)])


def test_a_cluster_that_grows_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 12: with an autoscaler the nodes are still to come."""
    with_nodes(monkeypatch, 1.0, grows=True)
    check_capacity([need(8, 4)])


def test_an_autoscaler_is_known_by_what_it_leaves() -> None:
    """As read from Ray 2.60: a local Ray, `ray up` or KubeRay with v1, v2 with and without a provider."""

    def report(*types: str) -> bytes:
        return json.dumps({"autoscaler_report": {"active_nodes": dict.fromkeys(types, 1)}}).encode()

    assert not starts_nodes(report("node_f93e79ab0520312176a7a5353e88b9af4d15b4bc2ca8ca2e0764d188"), [])
    assert not starts_nodes(report(), [])
    assert starts_nodes(report("ray.head.default"), [])
    assert not starts_nodes(None, ["", ""])
    assert starts_nodes(None, ["headgroup", "cpu-workers"])
