"""What a run starts from, by content: prepared rows and base weights. A resume with other ones is refused by name.

Invariant: the hashes are in the log's metadata and in every checkpoint of Pilot and Copilot. They depend on content alone, not
on when or where it was written. A refused resume has changed nothing in the run folder, so restoring the old input is enough.
Called by `run.prepare` before any worker starts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tc_ray.config.schema import RunConfig
from tc_ray.copilot.checkpoint import latest
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.prepared.folder import PreparedData, rows_hashes
from tc_ray.data.prepared.prepare import prepare
from tc_ray.files import read_json
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.repair import is_table
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.models.hub import fetch_model
from tc_ray.models.identity import snapshot_of, weights_hash
from tc_ray.pilot.checkpoint import latest_checkpoint
from tc_ray.tracking.datasets import Context, UsedRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = ("train_rows", "validation_rows", "test_rows")
CONTEXTS: dict[str, Context] = {"train": "training", "validation": "validation", "test": "testing"}
"""Trackers' words for the parts."""
COMMITS_FILE = "models.json"
"""In the run folder: commit by hub id."""
WEIGHTS = ("pilot_weights", "copilot_weights")


class OtherInputsError(RuntimeError):
    """The run was started with other rows or base weights; the message names what differs."""


@dataclass(frozen=True)
class Recorded:
    """Hashes of inputs that an earlier start wrote to `where`. round: the last round that was written there."""

    where: str
    round: int
    inputs: Mapping[str, str]


def recorded_inputs(config: RunConfig, folder: Path, log: Location) -> list[Recorded]:
    """What the run in `folder` was started with, by its log and its newest checkpoints; empty if it has neither."""
    found = []
    if config.log.enabled and is_table(log):
        store = LogStore(log)
        rounds = max((file.round_max for file in store.files()), default=0)
        metadata = store.metadata
        found.append(Recorded(f"the log {log}", rounds, {name: getattr(metadata, name) for name in (*ROWS, *WEIGHTS)}))
    pilot = latest_checkpoint(folder / "pilot" / "checkpoints")
    if pilot is not None:
        found.append(Recorded(str(pilot.folder), pilot.round, pilot.inputs))
    copilot = latest(folder / "copilot" / "checkpoints")
    if copilot is not None:
        found.append(Recorded(str(folder / "copilot" / "checkpoints"), copilot.round, copilot.inputs))
    return found


def fetch_models(config: RunConfig, folder: Path) -> tuple[Path, Path, dict[str, str]]:
    """Folders of Pilot and Copilot's base, and the commits of those that are hub ids: those of an earlier start in `folder`.

    Raises ModelSourceError: a model cannot be had.
    """
    name = config.model.pilot
    try:
        commits: dict[str, str] = read_json(folder / COMMITS_FILE)
    except FileNotFoundError:
        commits = {}
    pilot = fetch_model(name, config.model.cache, commits.get(name))
    other = config.model.copilot
    base = fetch_model(other, config.model.cache, commits.get(other)) if other else pilot
    found = {known[0]: known[1] for known in (snapshot_of(pilot), snapshot_of(base)) if known is not None}
    return pilot, base, found


def base_weights(config: RunConfig, pilot: Path | str, copilot: Path | str) -> dict[str, str]:
    """Hashes of the weights that Pilot and Copilot start from. ModelSourceError: a weight file is damaged."""
    random = config.model.random_weights
    of_pilot = weights_hash(pilot, random_weights=random)
    of_copilot = of_pilot if copilot == pilot else weights_hash(copilot, random_weights=random)
    return {"pilot_weights": of_pilot, "copilot_weights": of_copilot}


def prepare_rows(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    recorded: list[Recorded],
    *,
    encoder_decoder: bool,
    vocab_size: int,
) -> tuple[PreparedData, dict[str, str]]:
    """The run's rows in `data/` and their hashes. They are made in `data.new/` and checked before they replace old ones.

    Raises OtherInputsError if the run was started with other rows, and DataError as `prepare` does.
    """
    folder, aside = config.run.path / "data", config.run.path / "data.new"
    shutil.rmtree(aside, ignore_errors=True)
    found = prepare(Encoder(config.data, tokenizer, config.data_seed, encoder_decoder, vocab_size), aside)
    hashes = {f"{part}_rows": value for part, value in rows_hashes(aside).items()}
    try:
        check_inputs(config, recorded, hashes, now=found.source)
    except OtherInputsError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    folder.mkdir(exist_ok=True)  # it may hold files of the user
    for file in aside.iterdir():
        os.replace(file, folder / file.name)
    aside.rmdir()
    return replace(found, folder=folder), hashes


def used_rows(config: RunConfig, data: PreparedData, inputs: Mapping[str, str]) -> list[UsedRows]:
    """The parts of the rows that hold any, for the trackers. inputs: the hashes of `prepare_rows`."""
    found = []
    for part, context in CONTEXTS.items():
        own = config.data.held_out_sets(part) if part != "train" else {}  # type: ignore[arg-type]
        source = next(iter(own.values())).file if len(own) == 1 else data.source
        if data.rows[part]:
            found.append(UsedRows(context, inputs[f"{part}_rows"], source, data.rows[part]))
    return found


def check_inputs(config: RunConfig, recorded: list[Recorded], inputs: Mapping[str, str], now: str = "") -> None:
    """Raise OtherInputsError that lists what differs from what is recorded. now: source of the rows, for the message."""
    for earlier in recorded:
        wrong = [
            f"{_what(name, config, now)} ({earlier.inputs.get(name) or 'unknown'} then, {value} now)"
            for name, value in inputs.items()
            if earlier.inputs.get(name) != value
        ]
        if wrong:
            done = f"rounds 1 to {earlier.round}" if earlier.round else "the run"
            raise OtherInputsError(
                f"{'; '.join(wrong)}: {done} started from others, which {earlier.where} records. Restore them to resume, "
                "or use another run.folder. Nothing was changed."
            )


def _what(name: str, config: RunConfig, now: str) -> str:
    data, model = config.data, config.model
    source = f", read from {now}" if now not in ("", data.train_text) else ""
    return {
        "train_rows": f"the training rows differ (data.train={data.train_text}{source}; tokenizer and template count too)",
        "validation_rows": f"the validation rows differ (data.validation={data.validation or 'cut from data.train'})",
        "test_rows": f"the test rows differ (data.test={data.test or 'cut from data.train'})",
        "pilot_weights": f"the base weights differ (model.pilot={model.pilot})",
        "copilot_weights": f"the Copilot's base weights differ (model.copilot={model.copilot or model.pilot})",
    }[name]
