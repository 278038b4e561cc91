"""Copilot checkpoints: weights, optimizer and the consumed position of the log, together in one atomic folder."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Mapping
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


def save(
    learner: Learner, root: Path, position: Position, *, keep: int = 2, inputs: Mapping[str, str] | None = None
) -> Path:
    """Publish `root/step-NNNNNN` whole, then remove all but the newest `keep`.

    Args:
        inputs: hashes of what the run started from, see `latest_inputs`.

    Raises:
        NotFiniteError: a weight is not finite; the checkpoints before stand.
    """
    folder = root / f"step-{position.step:06d}"
    temporary = root / f"{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    learner.save(temporary)
    write_json(temporary / _POSITION, asdict(position) | {"inputs": dict(inputs or {})})
    publish_folder(temporary, folder)
    kept = _whole(root)[-keep:]
    for old in [other for other in _all(root) if kept and _number(other) < _number(kept[0])]:
        shutil.rmtree(old)
    return folder


def restore(learner: Learner, root: Path, report: Callable[[str], None] = log.warning) -> Position | None:
    """Load the newest whole checkpoint into the learner; None when there is none.

    Args:
        report: called with one line for each newer one that is damaged and passed over.

    Raises:
        ValueError, NotFiniteError: see `Learner.load`.
    """
    whole = _whole(root)
    for folder in _all(root):
        if not whole or _number(folder) > _number(whole[-1]):
            report(f"{folder} is damaged and passed over: the checkpoint before it, if any, is taken")
    if not whole:
        return None
    learner.load(whole[-1])
    return _read(whole[-1]).position


def latest_inputs(root: Path) -> tuple[Position, dict[str, str]] | None:
    """Position and inputs of the newest checkpoint, or None."""
    whole = _whole(root)
    if not whole:
        return None
    newest = _read(whole[-1])
    return newest.position, newest.inputs


@dataclass(frozen=True)
class _Content:
    """Content of position.json."""

    step: int
    round: int
    version: int
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def position(self) -> Position:
        return Position(self.step, self.round, self.version)


def _read(folder: Path) -> _Content:
    return read_json_as(folder / _POSITION, _Content)


def _whole(root: Path) -> list[Path]:
    """Folders that can be restored, oldest first; a damaged one counts as none, so that the one before it is taken."""
    found = []
    for folder in filter(is_whole, _all(root)):
        with contextlib.suppress(DamagedFileError, OSError):
            _read(folder)
            found.append(folder)
    return found


def _all(root: Path) -> list[Path]:
    """Folders under their final names, oldest first: by number, a seventh digit sorts before six."""
    return sorted((folder for folder in root.glob("step-*") if folder.name[5:].isdecimal()), key=_number)


def _number(folder: Path) -> int:
    return int(folder.name[5:])
