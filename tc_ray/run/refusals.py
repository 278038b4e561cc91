"""What a run refuses before it touches anything, and its plan with it.

Invariant: nothing is written and Ray is not needed. Called by `tc_ray.run.job` and `tc_ray.run.plan.plan`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tc_ray.config.load import load_saved_config
from tc_ray.config.schema import RunConfig

FREE_TO_CHANGE = (
    "resources.copilot_threads",
    "resources.pilot_threads",
    "resources.pilot_cpus",
    "resources.copilot_cpus",
    "tracking",
    "fusion",
    "run.folder",
    "run.trust_folder",
    "model.cache",
    "pilot.max_failures",
    "copilot.max_restarts",
    "pilot.keep_checkpoints",
    "pilot.checkpoint_every_rounds",
    "copilot.checkpoint_every_steps",
    "log.storage_options",
    "log.flush_rounds",
    "log.file_bytes",
    "log.queue_rounds",
    "log.full_policy",
    "log.compression",
    "log.compact",
    "log.keep_rounds",
    "log.max_bytes",
    "log.vacuum_grace_seconds",
    "log.orphan_seconds",
)
"""Settings that may differ when a run is resumed: they change nothing that was already written."""


class JobError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do."""


def check_resume(config: RunConfig, folder: Path) -> None:
    """Refuse to go on in a folder whose run was another one. Raises JobError."""
    earlier_file = folder / "config.yaml"
    if not earlier_file.is_file():
        return
    earlier, now = _flat(load_saved_config(earlier_file).public_dump()), _flat(config.public_dump())
    changed = [
        f"{key}: {earlier.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(earlier.keys() | now.keys())
        if earlier.get(key) != now.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    if changed:
        raise JobError(
            f"{folder} holds a run with other settings ({'; '.join(changed[:5])}). "
            "Use another run.folder, or the same settings to resume it."
        )


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return out
