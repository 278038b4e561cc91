"""Copilot checkpoints: weights, optimizer and the consumed position of the log, together in one atomic folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from tc_ray.copilot.learner import Learner
from tc_ray.files import is_whole, publish_folder, write_json

_POSITION = "position.json"


@dataclass(frozen=True)
class Position:
    """Where the learner stands: steps taken, the log round they answer, and the table version read last."""

    step: int
    round: int
    version: int


def save(learner: Learner, root: Path, position: Position, *, keep: int = 2) -> Path:
    """Publish `root/step-NNNNNN` whole, then remove all but the newest `keep`.

    Raises:
        NotFiniteError: a weight is not finite; the checkpoints before stand.
    """
    folder = root / f"step-{position.step:06d}"
    temporary = root / f"{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    learner.save(temporary)
    write_json(temporary / _POSITION, asdict(position))
    publish_folder(temporary, folder)
    for old in _whole(root)[:-keep]:
        shutil.rmtree(old)
    return folder


def restore(learner: Learner, root: Path) -> Position | None:
    """Load the newest whole checkpoint into the learner; None when there is none.

    Raises:
        ValueError, NotFiniteError: see `Learner.load`.
    """
    whole = _whole(root)
    if not whole:
        return None
    learner.load(whole[-1])
    return Position(**json.loads((whole[-1] / _POSITION).read_text()))


def _whole(root: Path) -> list[Path]:
    found = (folder for folder in root.glob("step-*") if not folder.name.endswith(".tmp") and is_whole(folder))
    return sorted(
        found, key=lambda folder: int(folder.name.split("-")[1])
    )  # by number: a seventh digit sorts before six
