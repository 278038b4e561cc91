"""Pilot checkpoints: DeepSpeed's files plus one marker that makes a checkpoint count.

Invariant: `complete.json` is written last, atomically, after every rank's files are on disk and the log is committed up to the same
round. A folder without it, or damaged, is never loaded. The marker holds the round from which the run resumes: data position,
learning rate and random state follow from it. Called by `pilot.loop`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tc_ray.files import find_whole, mark_whole, remove_before, sync, sync_tree
from tc_ray.pilot.validated import Validated

_TAG = "state"


@dataclass(frozen=True)
class PilotCheckpoint:
    """A complete checkpoint: its folder, the last round it holds, and what it was made with. Read from its marker."""

    folder: Path
    round: int
    world_size: int
    zero_stage: int
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the rows and base weights that the run started from."""
    validated: Validated = field(default_factory=Validated)
    """What validations had found up to its round."""


def latest_checkpoint(root: Path) -> PilotCheckpoint | None:
    """The complete checkpoint of the highest round under `root`, or None."""
    whole, _ = find_checkpoints(root)
    return whole[-1] if whole else None


def find_checkpoints(root: Path) -> tuple[list[PilotCheckpoint], list[str]]:
    """The complete checkpoints under `root`, oldest first, and the faults of damaged ones that are newer than all of them."""
    return find_whole(root, "round", PilotCheckpoint)


def folder_of(root: Path, round_number: int) -> Path:
    """The folder of a round's checkpoint."""
    return root / f"round-{round_number:06d}"


def save_files(engine: Any, root: Path, round_number: int) -> Path:
    """Write this rank's part of a checkpoint (collective: every rank calls it); `mark_complete` makes it count."""
    folder = folder_of(root, round_number)
    engine.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=True)
    sync_tree(folder)  # a marker that survives a power cut must not name files that did not
    return folder


def mark_complete(
    folder: Path,
    *,
    round_number: int,
    world_size: int,
    zero_stage: int,
    keep: int,
    inputs: Mapping[str, str] | None = None,
    validated: Validated | None = None,
    keep_best: bool = False,
) -> None:
    """Rank 0, after a barrier: write the marker, then remove everything older than the newest `keep` checkpoints.

    keep_best: the checkpoints of the rounds that these know as best stay too.
    """
    found = {"round": round_number, "world_size": world_size, "zero_stage": zero_stage, "inputs": dict(inputs or {})}
    mark_whole(folder, **found, validated=asdict(validated or Validated()))
    sync(folder.parent)
    kept = find_checkpoints(folder.parent)[0][-keep:]
    if kept:
        best = {folder_of(folder.parent, one.validated.best) for one in kept} if keep_best else set()
        remove_before(kept[0].folder, best)


def load_checkpoint(engine: Any, checkpoint: PilotCheckpoint, *, world_size: int, zero_stage: int) -> bool:
    """Restore model, optimizer and scheduler (collective): bit for bit for the workers and the ZeRO stage that made it.

    Returns whether these were others, so that it was divided anew. Raises ValueError: it holds other trained weights.
    """
    if (checkpoint.world_size, checkpoint.zero_stage) != (world_size, zero_stage):
        from tc_ray.pilot.reshard import load_resharded  # imports torch, which the driver does without

        made = {"workers": checkpoint.world_size, "zero_stage": checkpoint.zero_stage}
        load_resharded(engine, checkpoint.folder / _TAG, **made)
        return True
    path, _ = engine.load_checkpoint(str(checkpoint.folder), tag=_TAG, load_module_strict=False)
    if path is None:
        raise RuntimeError(f"DeepSpeed found no state in {checkpoint.folder}")
    return False
