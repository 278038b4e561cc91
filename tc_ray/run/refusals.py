"""What a run refuses before it touches anything, and its plan too.

Invariant: nothing is written and Ray is not needed. Called by `run.job` and `run.plan.plan`.
"""

from __future__ import annotations

from functools import reduce
from operator import getitem
from pathlib import Path

from tc_ray.config.fields import config_fields
from tc_ray.config.load import load_saved_config
from tc_ray.config.schema import RunConfig


class JobError(RuntimeError):
    """The run cannot start or resume; the message says why and what to do."""


def check_resume(config: RunConfig, folder: Path) -> None:
    """Refuse to resume a folder whose run had other settings. Raises JobError that lists the fields.

    Fields that may differ are marked in the schema (`config.section.MayChange`).
    """
    saved = folder / "config.yaml"
    if not saved.is_file():
        return
    earlier, now = load_saved_config(saved).public_dump(), config.public_dump()
    changed = []
    for path, field in config_fields().items():
        before, after = (reduce(getitem, path, dump) for dump in (earlier, now))
        if before != after and not field.may_change:
            changed.append(f"{field.path}: {before!r} -> {after!r}")
    if changed:
        raise JobError(
            f"{folder} holds a run with other settings ({'; '.join(changed[:5])}). "
            "Use another run.folder, or the same settings to resume it."
        )
