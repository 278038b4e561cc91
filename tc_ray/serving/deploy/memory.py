"""Memory and CPUs of this machine, and whether the models fit: estimated before anything is loaded.

Invariant: the estimate is a lower bound of what the server holds when its caches are full, and a refusal shows the numbers
it adds up. Used by launch.py where the replicas run on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from tc_ray.config.serving import ServingSection
from tc_ray.export.check import weight_bytes
from tc_ray.serving.errors import ServingError

PROCESS_BYTES = 400 * 2**20
"""A replica's process without models: torch, transformers, Ray."""
_CGROUP = Path("/sys/fs/cgroup")


def check_memory(exports: Collection[Path], serving: ServingSection, available_bytes: int | None) -> None:
    """Raise ServingError where weights, caches and processes exceed `available_bytes`. None is unknown: nothing is checked."""
    if available_bytes is None:
        return
    replicas = serving.most_replicas
    weights = sum(map(weight_bytes, exports))
    caches = serving.cache_bytes + serving.prefix_bytes
    needed = replicas * (weights + len(exports) * caches + PROCESS_BYTES)
    if needed > available_bytes:
        raise ServingError(
            f"not enough memory: {replicas} replica{'s' if replicas > 1 else ''} with {_gb(weights)} of weights (fp32) and "
            f"{len(exports)} x {_gb(caches)} of caches need {_gb(needed)}, {_gb(available_bytes)} are available; "
            "use fewer replicas or models, or a smaller serving.cache_bytes"
        )


def available_memory_bytes() -> int | None:
    """Memory that new processes can take: of the machine, or of the control group where that has less. None: unknown."""
    found = [bytes_ for bytes_ in (_machine_bytes(), _group_bytes()) if bytes_ is not None]
    return min(found) if found else None


def available_cpus() -> int:
    """CPUs that this process may use: of those it is bound to, as many as the control group's quota makes up."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return bound if quota == "max" else max(1, min(bound, int(quota) // int(period)))
    except (OSError, ValueError):
        return bound


def _machine_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _group_bytes() -> int | None:
    """What the control group has left; its file cache counts as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
