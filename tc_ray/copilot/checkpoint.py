"""Copilot checkpoints: weights, optimizer and the consumed position of the log, together in one atomic folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tc_ray.copilot.learner import Learner
from tc_ray.files import DamagedFileError, is_whole, publish_folder, read_json_as, write_json

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
    for folder in root.glob("step-*"):
        if folder.name.endswith(".tmp") or not is_whole(folder):
            continue
        with contextlib.suppress(DamagedFileError, OSError):
            _read(folder)
            found.append(folder)
    return sorted(
        found, key=lambda folder: int(folder.name.split("-")[1])
    )  # by number: a seventh digit sorts before six
