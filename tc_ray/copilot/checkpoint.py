"""Copilot checkpoints: weights, optimizer and the consumed position of the log, together in one atomic folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tc_ray.copilot.learner import Learner
from tc_ray.files import sync, sync_tree

_POSITION = "position.json"


@dataclass(frozen=True)
class Position:
    """Where the learner stands: steps taken, the log round they answer, and the table version read last."""

    step: int
    round: int
    version: int


def save(
    learner: Learner, root: Path, position: Position, *, keep: int = 2, inputs: Mapping[str, str] | None = None
) -> Path:
    """Write `root/step-NNNNNN` by a rename, then remove all but the newest `keep`.

    Args:
        inputs: hashes of what the run started from, see `latest_inputs`.
    """
    folder = root / f"step-{position.step:06d}"
    temporary = root / f"{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    learner.save(temporary)
    (temporary / _POSITION).write_text(json.dumps(asdict(position) | {"inputs": dict(inputs or {})}))
    sync_tree(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
    sync(root)
    for old in _complete(root)[:-keep]:
        shutil.rmtree(old)
    return folder


def restore(learner: Learner, root: Path) -> Position | None:
    """Load the newest checkpoint into the learner; None when there is none."""
    complete = _complete(root)
    if not complete:
        return None
    learner.load(complete[-1])
    return _read(complete[-1])[0]


def latest_inputs(root: Path) -> tuple[Position, dict[str, str]] | None:
    """Position and inputs of the newest checkpoint, or None."""
    complete = _complete(root)
    return _read(complete[-1]) if complete else None


def _read(folder: Path) -> tuple[Position, dict[str, str]]:
    fields = json.loads((folder / _POSITION).read_text())
    inputs = fields.pop("inputs", {})
    return Position(**fields), inputs


def _complete(root: Path) -> list[Path]:
    found = (p.parent for p in root.glob(f"step-*/{_POSITION}") if not p.parent.name.endswith(".tmp"))
    return sorted(
        found, key=lambda folder: int(folder.name.split("-")[1])
    )  # by number: a seventh digit sorts before six
