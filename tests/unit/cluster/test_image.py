"""The image: what gets into it, in which order, in the versions tested together. ray-up.yaml: what `ray up` makes of it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "cluster/Dockerfile").read_text(encoding="utf-8")


def steps() -> list[tuple[str, str]]:
    """(instruction, rest) of each step; continued lines joined, comments left out."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def arguments() -> dict[str, str]:
    return dict(rest.split("=", 1) for word, rest in steps() if word == "ARG")


def copied() -> list[str]:
    """Names in the context, of the COPY steps that take from it."""
    taken = [rest.split() for word, rest in steps() if word == "COPY" and "--from" not in rest]
    return [name for words in taken for name in words[:-1] if not name.startswith("--")]


def pinned(package: str) -> str:
    return re.findall(rf"^{package}==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]


def test_the_context_is_what_the_image_copies_and_no_more() -> None:
    rules = [one for one in (ROOT / ".dockerignore").read_text().splitlines() if not one.startswith("#")]
    assert rules[0] == "*", "all is left out but what is named"
    assert {one[1:] for one in rules if one.startswith("!")} == set(copied())
    assert {one for one in rules[1:] if not one.startswith("!")} == {"**/__pycache__", "**/*.pyc"}
    assert all((ROOT / name).exists() for name in copied())


def test_dependencies_come_before_code() -> None:
    last = max(at for at, step in enumerate(steps()) if step[0] == "FROM")
    order = [(word, rest) for word, rest in steps()[last:] if word in ("COPY", "RUN")]
    torch = order.index(next(step for step in order if "${TORCH}" in step[1]))
    rest = order.index(next(step for step in order if step[0] == "RUN" and step[1].startswith("mkdir tc_ray")))
    code = order.index(next(step for step in order if step[0] == "COPY" and "tc_ray" in step[1].split()))
    assert torch < rest < code
    assert order[-1][0] == "RUN" and "--no-deps ." in order[-1][1], "nothing is fetched behind the code"
    assert all("-c constraints.txt" in command for _, command in order[:code] if "pip install" in command)


def test_versions_are_those_tested_together() -> None:
    given = arguments()
    assert given["TORCH"] == f"torch=={pinned('torch')}+cpu" and given["TORCH_INDEX"].endswith("/whl/cpu")
    assert f"--build-arg TORCH=torch=={pinned('torch')} " in TEXT, "the build for GPUs"
    assert re.findall(r"rayproject/ray:([\d.]+)-py311-(?:cpu|gpu)", TEXT) == [pinned("ray")] * 2
    kinds = [yaml.safe_load(path.read_text()) for path in (ROOT / "cluster/kuberay/base").glob("*/ray*.yaml")]
    found = {version for one in kinds for version in re.findall(r"'rayVersion': '([\d.]+)'", str(one))}
    assert found == {pinned("ray")}


def test_ray_up_takes_its_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster/ray-up.yaml").read_text()))
    validate_config(config)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])
