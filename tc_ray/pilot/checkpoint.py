"""Pilot checkpoints: DeepSpeed's files plus one marker that makes a checkpoint count.

Invariant: `complete.json` is written last, atomically, after every rank's files are on disk and the log is committed
up to the same round. A folder without it is debris of a crash and is never loaded. The marker holds the watermark (the
round) from which the run goes on: data position, learning rate and random state all follow from it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tc_ray.files import sync, sync_tree

MARKER = "complete.json"
_TAG = "state"


@dataclass(frozen=True)
class PilotCheckpoint:
    """A complete checkpoint: its folder, the last round it holds, and what it was made with."""

    folder: Path
    round: int
    world_size: int
    zero_stage: int
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the rows and base weights that the run started from."""


def latest_checkpoint(root: Path) -> PilotCheckpoint | None:
    """The complete checkpoint of the highest round under `root`, or None."""
    found = []
    for marker in root.glob(f"round-*/{MARKER}"):
        fields = json.loads(marker.read_text())
        found.append(PilotCheckpoint(marker.parent, **fields))
    return max(found, key=lambda c: c.round, default=None)


def save_files(engine: Any, root: Path, round_number: int) -> Path:
    """Write this rank's part of a checkpoint (collective: every rank calls it); `mark_complete` makes it count."""
    folder = root / f"round-{round_number:06d}"
    engine.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=True)
    sync_tree(folder)  # a marker that survives a power cut must not stand over files that did not
    return folder


def mark_complete(
    folder: Path,
    *,
    round_number: int,
    world_size: int,
    zero_stage: int,
    keep: int,
    inputs: Mapping[str, str] | None = None,
) -> None:
    """Rank 0, after a barrier: write the marker, then remove all but the newest `keep` checkpoints."""
    checkpoint = PilotCheckpoint(folder, round_number, world_size, zero_stage, dict(inputs or {}))
    temporary = folder / (MARKER + ".tmp")
    fields = asdict(checkpoint)
    del fields["folder"]
    with open(temporary, "w") as file:
        json.dump(fields, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MARKER)
    sync(folder)
    sync(folder.parent)
    # by number: a seventh digit sorts before six
    complete = sorted(folder.parent.glob(f"round-*/{MARKER}"), key=lambda m: int(m.parent.name.split("-")[1]))
    for old in complete[:-keep]:
        old.unlink()  # first the marker, so that a half-removed checkpoint is not taken for one
        shutil.rmtree(old.parent)


def load_checkpoint(engine: Any, checkpoint: PilotCheckpoint, *, world_size: int, zero_stage: int) -> None:
    """Restore model, optimizer and scheduler (collective).

    Raises:
        ValueError: the checkpoint was made by another number of workers or another ZeRO stage.
    """
    if (checkpoint.world_size, checkpoint.zero_stage) != (world_size, zero_stage):
        raise ValueError(
            f"{checkpoint.folder} was made by {checkpoint.world_size} workers at ZeRO stage {checkpoint.zero_stage}; "
            f"this run has {world_size} at stage {zero_stage}. Set resources.pilot_workers and pilot.zero_stage back, "
            "or start in a new run.folder."
        )
    path, _ = engine.load_checkpoint(str(checkpoint.folder), tag=_TAG, load_module_strict=False)
    if path is None:
        raise RuntimeError(f"DeepSpeed found no state in {checkpoint.folder}")
