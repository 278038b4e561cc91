"""The Kubernetes manifests: valid to the last field as written and as overlays make them, and what a run finds in them."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.ray_constants import (
    DEFAULT_DASHBOARD_AGENT_LISTEN_PORT,
    DEFAULT_OBJECT_STORE_MEMORY_PROPORTION,
    REQUIRE_SHM_SIZE_THRESHOLD,
)
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

from tc_ray.cluster.capacity import fits
from tc_ray.cluster.session import training_needs
from tc_ray.config.load import load_config
from tc_ray.config.schema import RunConfig
from tests.support.kuberay_schemas import RAY_KINDS, VERSION, faults
from tests.support.kustomize import Document, documents_in, render

ROOT = Path(__file__).resolve().parents[3]
CLUSTER = ROOT / "cluster"
FOLDER = CLUSTER / "kuberay"
CLUSTER_SPEC = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
FILES = sorted(
    path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml"
)
OVERLAYS = sorted(path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.glob("overlays/*/*/kustomization.yaml"))
RENDERED = [*OVERLAYS, "shared"]


@cache
def read(name: str) -> list[Document]:
    """Manifests of a file, or of a folder as Kustomize makes them. Not to be changed."""
    return documents_in(FOLDER / name) if name.endswith(".yaml") else render(FOLDER / name)


def ray_manifests() -> Iterator[tuple[str, Document]]:
    for name in [*FILES, *OVERLAYS]:
        yield from ((name, one) for one in read(name) if one["kind"] in RAY_KINDS)


RAY = {f"{name}": one for name, one in ray_manifests()}


def cluster_of(manifest: Document) -> Document:
    spec = manifest["spec"]
    for key in CLUSTER_SPEC[manifest["kind"]]:
        spec = spec[key]
    return spec


def pods_of(manifest: Document) -> dict[str, Document]:
    cluster = cluster_of(manifest)
    pods = {"head": cluster["headGroupSpec"]["template"]}
    pods |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    if "submitterPodTemplate" in manifest["spec"]:
        pods["submitter"] = manifest["spec"]["submitterPodTemplate"]
    return pods


def run_of(manifest: Document) -> RunConfig:
    """The configuration that the entrypoint of a RayJob starts."""
    python, script, flag, recipe, *overrides = shlex.split(manifest["spec"]["entrypoint"])
    assert (python, script, flag) == ("python", "/home/ray/tc-ray/jobs/train.py", "--config")
    return load_config(recipe, overrides)


# -- the schemas --------------------------------------------------------------------------------------------------


def test_there_is_an_overlay_for_each_size_and_kind() -> None:
    kinds = ["cluster", "cluster-autoscaling", "job", "service"]
    assert [f"overlays/{size}/{kind}" for size in ("cpu", "gpu") for kind in kinds] == OVERLAYS
    assert len(FILES) == 6


@pytest.mark.parametrize("name", [*FILES, *RENDERED])
def test_every_manifest_is_valid_and_has_no_field_that_kuberay_does_not_know(name: str) -> None:
    assert read(name)
    assert [fault for manifest in read(name) for fault in faults(manifest)] == []


@pytest.mark.parametrize(
    ("name", "place", "value", "words"),
    [
        ("base/cluster/raycluster.yaml", ("spec", "authOption"), {"mode": "token"}, "'authOption' was unexpected"),
        ("base/cluster/raycluster.yaml", ("spec", "authOptions", "secret"), "x", "'secret' was unexpected"),
        ("base/cluster/raycluster.yaml", ("spec", "authOptions", "mode"), "tokens", "'tokens' is not one of"),
        ("base/job/rayjob.yaml", ("spec", "entryPoint"), "x", "'entryPoint' was unexpected"),
        ("base/job/rayjob.yaml", ("spec", "rayClusterSpec", "authOptions", "secretname"), "x", "'secretname' was"),
        ("base/job/rayjob.yaml", ("spec", "submitterPodTemplate", "spec", "restartpolicy"), "x", "'restartpolicy' was"),
        ("base/service/rayservice.yaml", ("spec", "serveConfig"), "x", "'serveConfig' was unexpected"),
        (
            "base/service/rayservice.yaml",
            ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "volumeMount"),
            [],
            "'volumeMount' was unexpected",
        ),
        (
            "base/service/rayservice.yaml",
            ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "livenessProbe",
             "httpGet", "port"),
            None,
            "None is not valid",
        ),
        ("shared/storage.yaml", ("spec", "accessMode"), [], "'accessMode' was unexpected"),
        ("shared/network.yaml", ("spec", "ingress", 0, "ports"), [{"Port": 8000}], "'Port' was unexpected"),
        ("shared/podmonitor.yaml", ("spec", "podMetricsEndpoint"), [], "'podMetricsEndpoint' was unexpected"),
        ("shared/podmonitor.yaml", ("meta",), {}, "'meta' was unexpected"),
    ],
)  # fmt: skip
def test_a_misspelt_field_or_a_wrong_value_is_found(
    name: str, place: tuple[str | int, ...], value: Any, words: str
) -> None:
    """The negative control: the check above can fail, at the top of a manifest and deep inside a pod."""
    [manifest] = copy.deepcopy(read(name))
    inside: Any = manifest
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    assert len(faults(manifest)) == 1 and words in faults(manifest)[0]


@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="no kubectl here: the overlays are rendered by the tests alone"
)
@pytest.mark.parametrize("name", RENDERED)
def test_kubectl_renders_what_the_tests_render(name: str) -> None:
    made = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / name)], capture_output=True, text=True, check=True, timeout=60
    )
    by_name = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(made.stdout)}
    assert by_name == {(one["kind"], one["metadata"]["name"]): one for one in read(name)}


# -- token, user, files, health -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RAY))
def test_kuberay_itself_gets_the_token(name: str) -> None:
    """Set as environment of the containers alone, the submitter and the operator's own calls are answered with 401."""
    assert cluster_of(RAY[name])["authOptions"] == {"mode": "token", "secretName": "tc-ray-token"}
    for pod in pods_of(RAY[name]).values():
        [container] = pod["spec"]["containers"]
        assert not [one["name"] for one in container.get("env", []) if one["name"].startswith("RAY_AUTH")]
    readme = (CLUSTER / "README.md").read_text(encoding="utf-8")
    assert "kubectl create secret generic tc-ray-token --from-literal=auth_token=" in readme
    assert "KubeRay 1.6" in readme and VERSION.removeprefix("v") in readme


@pytest.mark.parametrize("name", sorted(RAY))
def test_pods_run_as_a_user_over_a_read_only_root(name: str) -> None:
    for role, pod in pods_of(RAY[name]).items():
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        [container] = pod["spec"]["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        volumes = {one["name"]: one for one in pod["spec"]["volumes"]}
        mounted = {one["mountPath"]: volumes[one["name"]] for one in container["volumeMounts"]}
        assert "emptyDir" in mounted["/tmp"], "Ray's sessions"
        if role != "submitter":
            assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
            # where the object store does not fit, Ray puts it on the disk: 30% of the memory, 10 GB at most
            memory = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
            shared = int(mounted["/dev/shm"]["emptyDir"]["sizeLimit"].removesuffix("Gi")) << 30
            assert shared > min(DEFAULT_OBJECT_STORE_MEMORY_PROPORTION * memory, REQUIRE_SHM_SIZE_THRESHOLD)
            assert mounted["/mnt/tc-ray"]["persistentVolumeClaim"]["claimName"] == claim()["metadata"]["name"]
        assert {one["name"] for one in container["volumeMounts"]} == set(volumes), "no volume for nothing"


def claim() -> Document:
    [found] = read("shared/storage.yaml")
    return found


@pytest.mark.parametrize("name", sorted(RAY))
def test_probes_ask_what_ray_answers_without_a_token(name: str) -> None:
    for role, pod in pods_of(RAY[name]).items():
        [container] = pod["spec"]["containers"]
        if role == "submitter":
            continue
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[probe]["httpGet"]
            if (RAY[name]["kind"], role, probe) == ("RayService", "workers", "readinessProbe"):
                assert asked == {"path": "/-/healthz", "port": http_options(RAY[name])["port"]}
            else:
                assert asked["path"] in PUBLIC_EXACT_PATHS and asked["port"] == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
        patience = container["livenessProbe"]["periodSeconds"] * container["livenessProbe"]["failureThreshold"]
        assert patience >= 300, "a round keeps every CPU busy"


# -- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in sorted(RAY) if RAY[name]["kind"] == "RayJob"])
def test_the_workers_of_a_job_hold_its_run(name: str) -> None:
    config = run_of(RAY[name])
    nodes = []
    for group in cluster_of(RAY[name])["workerGroupSpecs"]:
        [container] = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        node = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        nodes += [node] * group["replicas"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert (config.resources.pilot_gpus, config.resources.copilot_gpus) == ((1, 1) if "/gpu/" in name else (0, 0))
    assert fits(nodes, training_needs(config))
    assert not fits(nodes[1:], training_needs(config)), "a pod more than the run can use"
    assert str(config.run.path).startswith("/mnt/tc-ray/") and str(config.model.cache).startswith("/mnt/tc-ray/")


@pytest.mark.parametrize("name", OVERLAYS)
def test_workers_of_the_gpu_overlays_alone_ask_for_gpus(name: str) -> None:
    [manifest] = [one for one in read(name) if one["kind"] in RAY_KINDS]
    gpu = "/gpu/" in name
    for role, pod in pods_of(manifest).items():
        [container] = pod["spec"]["containers"]
        tolerated = [one["key"] for one in pod["spec"].get("tolerations", [])]
        assert container["image"] == ("tc-ray:0.1.0-gpu" if gpu else "tc-ray:0.1.0")
        asked = container["resources"]["limits"].get("nvidia.com/gpu")
        assert (asked, tolerated) == (("1", ["nvidia.com/gpu"]) if gpu and role == "workers" else (None, []))
    if manifest["kind"] == "RayService":
        [application] = serve_config(manifest)["applications"]
        assert application["args"].get("gpu", False) is gpu


def serve_config(manifest: Document) -> Document:
    found: Document = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    return found


def http_options(manifest: Document) -> Document:
    found: Document = serve_config(manifest)["http_options"]
    return found


def test_the_gpu_service_serves_what_the_cpu_service_does() -> None:
    cpu, gpu = (serve_config(read(f"overlays/{size}/service")[0]) for size in ("cpu", "gpu"))
    del gpu["applications"][0]["args"]["gpu"]
    assert cpu == gpu


def test_the_gpu_job_trains_what_the_cpu_job_does() -> None:
    cpu, gpu = (read(f"overlays/{size}/job")[0]["spec"]["entrypoint"].split() for size in ("cpu", "gpu"))
    assert sorted(gpu) == sorted([*cpu, "resources.copilot_gpus=1", "resources.pilot_gpus=1"])


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name.endswith("-autoscaling")])
def test_an_autoscaling_group_begins_empty_and_its_autoscaler_is_as_closed_as_the_pods(name: str) -> None:
    [manifest] = read(name)
    assert manifest["spec"]["enableInTreeAutoscaling"]
    [group] = manifest["spec"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"]) == (0, 0) and group["maxReplicas"] > 2
    head = pods_of(manifest)["head"]
    options = manifest["spec"]["autoscalerOptions"]
    [container] = head["spec"]["containers"]
    assert options["securityContext"] == container["securityContext"]
    assert [one for one in container["volumeMounts"] if one["mountPath"] == "/tmp"] == options["volumeMounts"]


# -- network and metrics ------------------------------------------------------------------------------------------


def test_network_policy_and_monitor_go_by_a_label_of_every_pod() -> None:
    [policy], [monitor] = read("shared/network.yaml"), read("shared/podmonitor.yaml")
    label = policy["spec"]["podSelector"]["matchLabels"]
    assert label.items() <= monitor["spec"]["selector"]["matchLabels"].items()
    for name, manifest in RAY.items():
        for role, pod in pods_of(manifest).items():
            assert pod["metadata"]["labels"] == label, f"{name}, {role}"
    own = {"podSelector": {"matchLabels": label}}
    assert {"from": [own]} in policy["spec"]["ingress"] and {"to": [own]} in policy["spec"]["egress"]
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == "metrics", "KubeRay's name of the port"


def test_others_reach_the_dashboard_serve_and_the_metrics_and_no_more() -> None:
    [policy] = read("shared/network.yaml")
    opened = [
        ([sorted(peer) for peer in rule["from"]], [one["port"] for one in rule["ports"]])
        for rule in policy["spec"]["ingress"]
        if "ports" in rule
    ]
    port = http_options(RAY["base/service/rayservice.yaml"])["port"]
    both = ["namespaceSelector", "podSelector"]
    assert opened == [([both], [8265, port]), ([both], [port]), ([["namespaceSelector"]], [8080])]


# -- the page -----------------------------------------------------------------------------------------------------


def test_the_page_names_every_manifest_and_overlay_and_none_besides() -> None:
    page = (CLUSTER / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/])cluster/[\w./{},-]*[\w}]", page)
    expanded = {path for one in named for path in expand(one)}
    assert not [one for one in sorted(expanded) if not (ROOT / one).exists()]
    wanted = {f"cluster/kuberay/{one}" for one in [*FILES, *OVERLAYS, "shared"]}
    assert wanted <= expanded


def expand(path: str) -> list[str]:
    """`a/{b,c}` as a shell reads it."""
    found = re.search(r"\{([^}]*)\}", path)
    if found is None:
        return [path]
    return [one for part in found[1].split(",") for one in expand(path[: found.start()] + part + path[found.end() :])]
