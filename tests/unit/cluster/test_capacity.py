"""Whether a cluster can hold a run: nodes and needs in, an answer or an error out."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import ray

from tc_ray.cluster import capacity
from tc_ray.cluster.capacity import CapacityError, Need, check_capacity, fits, ray_options, starts_nodes
from tc_ray.cluster.session import evaluation_need, training_needs
from tc_ray.config.schema import RunConfig


def need(count: int, cpus: float, gpus: float = 0, **custom: float) -> Need:
    bundle = {"CPU": cpus} | ({"GPU": float(gpus)} if gpus else {}) | custom
    return Need("worker", count, bundle, ("resources.pilot_cpus",))


def placed(nodes: list[dict[str, float]], needs: list[Need]) -> bool:
    """By trial of every placement, on every GPU of every node."""
    bundles = [each.bundle for each in needs for _ in range(each.count)]
    devices = [[1.0] * int(node.get("GPU", 0)) for node in nodes]
    left = [{name: amount for name, amount in node.items() if name != "GPU"} for node in nodes]

    def place(index: int) -> bool:
        if index == len(bundles):
            return True
        bundle = dict(bundles[index])
        gpus = bundle.pop("GPU", 0.0)
        for node, own in zip(left, devices, strict=True):
            if any(node.get(name, 0.0) < amount - 1e-9 for name, amount in bundle.items()):
                continue
            node |= {name: node[name] - amount for name, amount in bundle.items()}
            for device in range(len(own)) if gpus else [None]:
                if device is not None and own[device] < gpus - 1e-9:
                    continue
                if device is not None:
                    own[device] -= gpus
                if place(index + 1):
                    return True
                if device is not None:
                    own[device] += gpus
            node |= {name: node[name] + amount for name, amount in bundle.items()}
        return False

    return place(0)


def test_fits_is_exact() -> None:
    """Fault 12: no run is refused that has room, and none is started that has none. Custom resources and parts of GPUs count."""
    draw = random.Random(0)
    answers, told_by_devices = set(), 0
    for _ in range(1000):
        nodes: list[dict[str, float]] = [
            {"CPU": float(draw.randint(0, 6)), "GPU": float(draw.randint(0, 2)), "rack": draw.choice([0.0, 1.0, 2.0])}
            for _ in range(draw.randint(1, 3))
        ]
        needs = [
            need(
                draw.randint(1, 3),
                draw.choice([0.5, 1, 2, 3]),
                draw.choice([0, 0, 0.3, 0.4, 0.5, 0.6, 1]),
                **draw.choice([{}, {}, {"rack": 1.0}]),
            )
            for _ in range(draw.randint(1, 2))
        ]
        answer = fits(nodes, needs)
        assert answer == placed(nodes, needs), (nodes, needs)
        answers.add(answer)
        gpus = sum(each.count * each.bundle.get("GPU", 0.0) for each in needs)
        told_by_devices += not answer and 1 < gpus <= sum(node["GPU"] for node in nodes)
    assert answers == {True, False} and told_by_devices > 10


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


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learners pinned to a rack that no node is in, and a GPU more than there are."""
    resources = {"pilot_workers": 2, "pilot_gpus": 1, "copilot_resources": {"rack_b": 0.5}, "placement": "spread"}
    needs = training_needs(RunConfig.model_validate({"resources": resources}))
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0, "memory": 1e9, "rack_a": 1.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(capacity, "can_grow", lambda: False)
    with pytest.raises(CapacityError) as refused:
        check_capacity(needs)
    for words in (
        "asks for 3 CPUs and 2 GPUs and 0.5 rack_b (2 Pilot workers with 1 CPU and 1 GPU each; 1 Copilot learner with",
        "1 Copilot learner with 1 CPU and 0.5 rack_b), and this Ray",
        "1 node (4 CPUs and 1 GPU), no autoscaler. Missing: 1 GPU, 0.5 rack_b. ",
        "Lower resources.pilot_workers, resources.pilot_cpus, resources.pilot_gpus, resources.copilot_workers, resources.",
        "resources.copilot_cpus, resources.copilot_resources, or add nodes",
    ):
        assert words in str(refused.value)
    nodes.append({"Alive": True, "Resources": {"CPU": 1.0, "GPU": 1.0, "rack_b": 0.5}})
    with pytest.raises(CapacityError, match=r"1 CPU and 1 GPU and 0.5 rack_b\), no autoscaler\. Lower"):
        check_capacity(needs)  # of CPUs one too few is where the GPU and the rack are
    nodes[1]["Resources"] = {"CPU": 2.0, "GPU": 1.0, "rack_b": 0.5}
    check_capacity(needs)


def test_a_bundle_as_options_of_an_actor() -> None:
    bundle = {"CPU": 2.0, "GPU": 0.5, "accelerator_type:H100": 0.01}
    assert ray_options(bundle) == {"num_cpus": 2.0, "num_gpus": 0.5, "resources": {"accelerator_type:H100": 0.01}}


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
