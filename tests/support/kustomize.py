"""What `kubectl kustomize` makes of cluster/kuberay: as much of Kustomize as its overlays use, all else refused.

The tests run where no kubectl is; where one is, tests/unit/cluster/test_manifests.py compares the two.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
KEYS = {"apiVersion", "kind", "resources", "components", "images", "patches"}
VERSIONS = {
    "Kustomization": "kustomize.config.k8s.io/v1beta1",
    "Component": "kustomize.config.k8s.io/v1alpha1",
}


def documents_in(path: Path) -> list[Document]:
    """Of a YAML file. An alias is a copy of its own, as in Kustomize: a change of one place leaves the others."""
    return [_unshared(one) for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one is not None]


def render(folder: Path) -> list[Document]:
    """The manifests of a folder with a kustomization.yaml. Raises ValueError where it holds what is not supported here."""
    return _build(folder, "Kustomization", [])


def _build(folder: Path, kind: str, below: list[Document]) -> list[Document]:
    [head] = documents_in(folder / "kustomization.yaml")
    if head.get("kind") != kind or head.get("apiVersion") != VERSIONS[kind] or set(head) - KEYS:
        raise ValueError(f"{folder}: not a {kind} with the keys {sorted(KEYS)} alone: {head}")
    found = list(below)
    for name in head.get("resources", []):
        path = (folder / name).resolve()
        if path.is_file() and path.parent != folder.resolve():
            raise ValueError(f"{folder}: Kustomize reads no file outside of its folder: {name}")
        found += documents_in(path) if path.is_file() else render(path)
    for name in head.get("components", []):
        found = _build(folder / name, "Component", found)
    for patch in head.get("patches", []):
        _patch(found, patch)
    for image in head.get("images", []):
        _rename(found, image["name"], f"{image['newName']}:{image['newTag']}")
    return found


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(one) for key, one in value.items()}
    return [_unshared(one) for one in value] if isinstance(value, list) else value


def _patch(documents: list[Document], patch: Document) -> None:
    """A JSON patch (RFC 6902) on every document of the target's kind; none is no error, as in Kustomize."""
    if set(patch) != {"target", "patch"} or set(patch["target"]) != {"kind"}:
        raise ValueError(f"a patch has a target, which has a kind alone, and a patch: {patch}")
    for document in documents:
        if document["kind"] == patch["target"]["kind"]:
            for operation in yaml.safe_load(patch["patch"]):
                _operate(document, **operation)


def _operate(document: Document, op: str, path: str, value: Any) -> None:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    place: Any = document
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    if not isinstance(place, dict) or op not in ("add", "replace"):
        raise ValueError(f"only add and replace of a field are supported here, not {op} {path}")
    if op == "replace" and last not in place:
        raise ValueError(f"{path} is not there to be replaced")
    place[last] = copy.deepcopy(value)


def _rename(value: Any, name: str, image: str) -> None:
    """Images of the containers, wherever they stand."""
    if isinstance(value, dict):
        for key, one in value.items():
            for container in one if key in ("containers", "initContainers") else []:
                if container.get("image", "").split(":")[0] == name:
                    container["image"] = image
            _rename(one, name, image)
    elif isinstance(value, list):
        for one in value:
            _rename(one, name, image)
