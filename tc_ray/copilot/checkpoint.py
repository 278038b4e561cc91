"""Copilot checkpoints: weights, optimizer and the consumed position of the log, together in one atomic folder."""

from __future__ import annotations

import json
import os
import shutil
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


def save(learner: Learner, root: Path, position: Position, *, keep: int = 2) -> Path:
    """Write `root/step-NNNNNN` by a rename, then remove all but the newest `keep`."""
    folder = root / f"step-{position.step:06d}"
    temporary = root / f"{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    learner.save(temporary)
    (temporary / _POSITION).write_text(json.dumps(asdict(position)))
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
    return Position(**json.loads((complete[-1] / _POSITION).read_text()))


def _complete(root: Path) -> list[Path]:
    found = (p.parent for p in root.glob(f"step-*/{_POSITION}") if not p.parent.name.endswith(".tmp"))
    return sorted(
        found, key=lambda folder: int(folder.name.split("-")[1])
    )  # by number: a seventh digit sorts before six
