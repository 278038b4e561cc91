"""Strict checks of Kubernetes manifests: KubeRay's own schemas (tests/support/kuberay), unknown fields refused."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

VERSION = "v1.7.0"
FOLDER = Path(__file__).parent / "kuberay"
RAY_KINDS = ("RayCluster", "RayJob", "RayService")
TEXT = {"type": "string"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
METADATA = {
    "type": "object",
    "properties": {"name": TEXT, "namespace": TEXT, "labels": TEXTS, "annotations": TEXTS},
    "required": ["name"],
}


@cache
def crd(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress((FOLDER / f"{kind}.{VERSION}.schema.json.gz").read_bytes()))
    return found


def strict(schema: Any) -> Any:
    """The schema, with every object that lists its properties closed to others."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    listed = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if listed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def _manifest(api_version: str, kind: str, spec: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "apiVersion": {"const": api_version},
            "kind": {"const": kind},
            "metadata": METADATA,
            "spec": spec,
        },
        "required": ["apiVersion", "kind", "metadata", "spec"],
    }


def _claim() -> Any:
    """Spec of a PersistentVolumeClaim, which a pod's ephemeral volume has inside RayCluster's schema."""
    pod = crd("RayCluster")["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]["template"]
    volume = pod["properties"]["spec"]["properties"]["volumes"]["items"]["properties"]
    return volume["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"]


def _network_policy() -> Any:
    """Spec of a NetworkPolicy, whose rules RayCluster's schema has; the rest is written down here."""
    rules = crd("RayCluster")["properties"]["spec"]["properties"]["networkPolicy"]["properties"]["head"]["properties"]
    selector = rules["ingressRules"]["items"]["properties"]["from"]["items"]["properties"]["podSelector"]
    return {
        "type": "object",
        "properties": {
            "podSelector": selector,
            "policyTypes": {"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
            "ingress": rules["ingressRules"],
            "egress": rules["egressRules"],
        },
        "required": ["podSelector", "policyTypes"],
    }


def _pod_monitor() -> Any:
    """Of the Prometheus operator's PodMonitor, the fields that are used here: its own schema is not at hand."""
    endpoint = {"type": "object", "properties": {"port": TEXT, "interval": TEXT}, "required": ["port"]}
    return {
        "type": "object",
        "properties": {
            "selector": {"type": "object", "properties": {"matchLabels": TEXTS}},
            "podMetricsEndpoints": {"type": "array", "items": endpoint},
        },
        "required": ["selector", "podMetricsEndpoints"],
    }


@cache
def _validator(kind: str) -> Draft202012Validator:
    if kind in RAY_KINDS:
        schema = _manifest("ray.io/v1", kind, crd(kind)["properties"]["spec"])
    elif kind == "PersistentVolumeClaim":
        schema = _manifest("v1", kind, _claim())
    elif kind == "NetworkPolicy":
        schema = _manifest("networking.k8s.io/v1", kind, _network_policy())
    elif kind == "PodMonitor":
        schema = _manifest("monitoring.coreos.com/v1", kind, _pod_monitor())
    else:
        raise ValueError(f"no schema for the kind {kind}")
    return Draft202012Validator(strict(schema))


def faults(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest, with the place; empty if nothing is."""
    return [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message}"
        for error in _validator(manifest["kind"]).iter_errors(manifest)
    ]
