"""Copilot checkpoints: weights, optimizer and the consumed position of the log, together in one atomic folder.

Invariant: a folder under its final name is whole, or damaged and then passed over for the one before. Called by `worker` and
`from_log`; the driver reads `latest` to compare inputs.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tc_ray.copilot.learner import Learner
from tc_ray.files import DamagedFileError, is_whole, publish_folder, read_json_as, write_json

_POSITION = "position.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where the learner stands: steps taken, the log round they answer, and the table version read last."""

    step: int
    round: int
    version: int
    inputs: dict[str, str] = field(default_factory=dict, compare=False)
    """Hashes of the rows and base weights that the run started from."""


def save(learner: Learner, root: Path, position: Position, *, keep: int = 2) -> Path:
    """Publish `root/step-NNNNNN` whole, then remove all but the newest `keep`. Raises NotFiniteError; those before stand."""
    folder = root / f"step-{position.step:06d}"
    temporary = root / f"{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    learner.save(temporary)
    write_json(temporary / _POSITION, asdict(position))
    publish_folder(temporary, folder)
    kept = _whole(root)[-keep:]
    for old in [other for other in _all(root) if kept and _number(other) < _number(kept[0][0])]:
        shutil.rmtree(old)
    return folder


def restore(learner: Learner, root: Path, report: Callable[[str], None] = log.warning) -> Position | None:
    """Load the newest whole checkpoint into the learner (errors: `Learner.load`); None when there is none.

    report: called with one line for each newer one that is damaged.
    """
    whole = _whole(root)
    for folder in _all(root):
        if not whole or _number(folder) > _number(whole[-1][0]):
            report(f"{folder} is damaged: the checkpoint before it is used, if there is one")
    if not whole:
        return None
    folder, position = whole[-1]
    learner.load(folder)
    return position


def latest(root: Path) -> Position | None:
    """The position of the newest whole checkpoint, or None."""
    whole = _whole(root)
    return whole[-1][1] if whole else None


def _whole(root: Path) -> list[tuple[Path, Position]]:
    """Folders that can be restored, oldest first, and their positions."""
    found = []
    for folder in filter(is_whole, _all(root)):
        with contextlib.suppress(DamagedFileError, OSError):
            found.append((folder, read_json_as(folder / _POSITION, Position)))
    return found


def _all(root: Path) -> list[Path]:
    """Folders under their final names, oldest first: by number, because a seventh digit sorts before six."""
    return sorted((folder for folder in root.glob("step-*") if folder.name[5:].isdecimal()), key=_number)


def _number(folder: Path) -> int:
    return int(folder.name[5:])
