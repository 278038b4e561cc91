"""Copilot checkpoints: weights, optimizer and the position in the log, together in one atomic folder `step-NNNNNN`.

Invariant: a folder under its final name is whole, or damaged and then passed over for the one before. The position stands in its
marker. Called by `training`; the driver reads `latest` to compare inputs.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tc_ray.files import find_whole, publish_folder, remove_before

if TYPE_CHECKING:
    from tc_ray.copilot.learner import Learner

KEEP = 2


@dataclass(frozen=True)
class Position:
    """Where the learner stands: steps taken, the log round they answer, and the table version read last."""

    step: int
    round: int
    version: int
    inputs: dict[str, str] = field(default_factory=dict, compare=False)
    """Hashes of the rows and base weights that the run started from."""
    held_out: dict[str, Any] = field(default_factory=dict, compare=False)
    """`HeldOut.state` before the next step."""


def save(learner: Learner, root: Path, position: Position) -> Path:
    """Publish a whole checkpoint, then remove all but the newest KEEP. Raises NotFiniteError; those before stand."""
    folder = folder_of(root, position)
    temporary = root / f"{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    learner.save(temporary)
    publish_folder(temporary, folder, **asdict(position))
    remove_before(folder_of(root, find_whole(root, "step", Position)[0][-KEEP:][0]))
    return folder


def restore(learner: Learner, root: Path) -> tuple[Position | None, list[str]]:
    """Load the newest whole checkpoint into the learner, if there is one. Also the faults of newer ones that are damaged."""
    whole, damaged = find_whole(root, "step", Position)
    if not whole:
        return None, damaged
    learner.load(folder_of(root, whole[-1]))
    return whole[-1], damaged


def latest(root: Path) -> Position | None:
    """The position of the newest whole checkpoint, or None."""
    whole, _ = find_whole(root, "step", Position)
    return whole[-1] if whole else None


def folder_of(root: Path, position: Position) -> Path:
    """The checkpoint's folder."""
    return root / f"step-{position.step:06d}"
