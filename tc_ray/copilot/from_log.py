"""A Copilot trained from a stored log alone: the learner of the live run, no Pilot running, no Ray.

Invariant: folder, checkpoints and exported model have the forms of a run's `copilot/`, so `tc-ray fuse` takes the result; the
same command on the same folder resumes from the last checkpoint. Given the same draws the result is the live one's, bit for bit.
Called by `tc-ray train-copilot`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from tc_ray.config.load import save_config
from tc_ray.config.schema import RunConfig
from tc_ray.copilot.buffer import RoundBuffer
from tc_ray.copilot.checkpoint import Position
from tc_ray.copilot.held_out import ErrorRatio
from tc_ray.copilot.learner import StepResult, make_learner
from tc_ray.copilot.training import train
from tc_ray.files import read_json, write_file, write_json
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.mistakelog.table.store import StoredFile
from tc_ray.models.hub import resolve_model
from tc_ray.models.identity import tokenizer_hash, weights_hash


class StoredLogError(ValueError):
    """The log cannot train the configured Copilot, or the folder holds another training."""


@dataclass(frozen=True)
class TrainedCopilot:
    """The outcome. loss: of `copilot.loss`; uncorrected: the same loss of f = 0, None where it is not known (kl,
    cross_entropy). Both are means over the last tenth of the steps.
    ratios: the error ratios that were measured, in order."""

    folder: Path
    steps: int
    loss: float | None
    uncorrected: float | None
    ratios: list[ErrorRatio]
    bad_files: int
    left_out_steps: int

    def lines(self) -> list[str]:
        """For a terminal."""
        lines = [f"copilot   {self.folder} ({self.steps} steps)"]
        if self.loss is not None:
            beside = "" if self.uncorrected is None else f"; {self.uncorrected:.4f} without a correction"
            lines.append(f"loss      {self.loss:.4f} over the last tenth{beside}")
        if self.ratios:
            lines.append(f"held out  error ratio {self.ratios[-1].text()}")
            lines += [f"memorised {ratio.event()}" for ratio in self.ratios if ratio.memorised]
        if self.bad_files:
            lines.append(f"damaged   {self.bad_files} file(s) of the log were not read: tc-ray log verify names them")
        if self.left_out_steps:
            lines.append(f"left out  {self.left_out_steps} steps: loss or gradient was not finite")
        return [*lines, f"fuse      tc-ray fuse --pilot PILOT --copilot {self.folder} --out FOLDER"]


class Replay:
    """The feed (`training.Feed`) of a stored log: at each step the newest `buffer_rounds` rounds up to that of the step.

    What a step draws from follows from the log's version, the settings and the step's number. In memory: these rounds and a file.
    """

    def __init__(self, mistakes: MistakeLog, config: RunConfig) -> None:
        self._mistakes, self._settings = mistakes, config.copilot
        self.buffer = RoundBuffer(config.copilot.buffer_rounds, config.log.pooling)
        self.version = mistakes.version
        self.rounds = max(file.round_max for file in mistakes.files)
        self._pieces: Iterator[tuple[StoredFile, Records]] | None = None
        self._next: tuple[StoredFile, Records] | None = None
        self._ahead: dict[int, list[Records]] = {}
        """Records that were read before their round came, by round: each data file is read once."""
        self._at = 0
        """Last round in the buffer."""

    def rounds_for(self, step: int) -> int:
        """Fill the buffer up to the round of a step, and return it. Steps are asked for in order."""
        wanted = step // self._settings.steps_per_round + 1
        if self._pieces is None:
            self._at = max(0, wanted - self._settings.buffer_rounds)
            self._pieces = self._mistakes.pieces((self._at + 1, self.rounds))
            self._next = next(self._pieces, None)
        while self._at < wanted:
            self._at += 1
            while self._next is not None and self._next[0].round_min <= self._at:
                self._sort_in(self._next[1])
                self._next = next(self._pieces, None)
            for number, records in enumerate(self._ahead.pop(self._at, [])):
                self.buffer.add(f"{self._at}-{number}", records)
        return wanted

    def _sort_in(self, records: Records) -> None:
        for found in np.unique(records.round[records.round >= self._at]).tolist():
            self._ahead.setdefault(found, []).append(records.select(np.flatnonzero(records.round == found)))


def train_from_log(
    mistakes: MistakeLog,
    config: RunConfig,
    out: Path,
    *,
    show: Callable[[Position, int, StepResult | None, ErrorRatio | None], None] = lambda *_: None,
) -> TrainedCopilot:
    """Train a Copilot on one version of a log: `steps_per_round` steps a round, as the live Copilot of a lock-step run.

    config: sections `copilot`, `model`, `run.seed` and `resources` count; what the log holds is taken from its metadata.
    out: folder of checkpoints, metrics.jsonl and `final`; an existing one of the same training is resumed.
    show: called after every step with the position, all steps, the result (None: nothing to learn from) and the newest error ratio.
    Raises StoredLogError: an empty log, another tokenizer, Pilot or base weights than the run's, or a folder of another
        training. DamagedFileError: what the folder was trained from cannot be read.
    """
    if not mistakes.files:
        raise StoredLogError(f"{mistakes.location}: the log holds no records (version {mistakes.version})")
    config = fitted(config, mistakes.metadata, str(mistakes.location))
    pilot = resolve_model(config.model.pilot, config.model.cache)
    base = resolve_model(config.model.copilot, config.model.cache) if config.model.copilot else pilot
    _open_folder(out, config, mistakes, _check_models(config, pilot, base, mistakes))
    source = Replay(mistakes, config)
    total, every = source.rounds * config.copilot.steps_per_round, config.copilot.checkpoint_every_steps
    torch.set_num_threads(config.resources.copilot_threads)
    learner = make_learner(config, pilot, base, _output_ids(config, mistakes), total_steps=total)
    metrics = out / "metrics.jsonl"
    points: list[dict[str, Any]] = []
    ratios: list[ErrorRatio] = []

    def restored(at: Position, damaged: list[str]) -> None:
        # steps after the checkpoint are taken again
        lines = metrics.read_text().splitlines() if at.step and metrics.is_file() else []
        points.extend(point for point in map(json.loads, lines) if point["step"] <= at.step)
        ratios.extend(ErrorRatio.read(point["error_ratio"]) for point in points if "error_ratio" in point)

    def report(at: Position, result: StepResult | None) -> None:
        if result is not None and result.taken:
            point: dict[str, Any] = {"step": at.step, "round": at.round, "time": time.time()}
            point |= {"loss": result.loss, "error_size": result.error_size, "compute_seconds": result.seconds}
            if ratios and ratios[-1].step == at.step - 1:
                point["error_ratio"] = asdict(ratios[-1])
            points.append(point)
        if at.step % every == 0 or at.step == total:  # whole, before each checkpoint
            write_file(metrics, "".join(json.dumps(point) + "\n" for point in points))
        show(at, total, result, ratios[-1] if ratios else None)

    train(
        learner,
        source,
        config,
        out,
        report=report,
        restored=restored,
        measured=ratios.append,
    )
    last = points[-max(1, len(points) // 10) :]
    return TrainedCopilot(
        out / "final",
        total,
        float(np.mean([point["loss"] for point in last])) if last else None,
        # the root mean square of the logged errors is what the RMSE of f = 0 is; of the other losses it is no value at all
        float(np.mean([point["error_size"] for point in last])) if last and config.copilot.loss == "rmse" else None,
        ratios,
        len(mistakes.bad_files),
        learner.left_out.count,
    )


def fitted(config: RunConfig, metadata: LogMetadata, where: str) -> RunConfig:
    """The config with what the log says about its states; StoredLogError for another Pilot or pooling than the log's."""
    config = config.model_copy(deep=True)
    if metadata.pooling not in ("none", config.log.pooling):
        raise StoredLogError(
            f"{where} holds states pooled by {metadata.pooling!r}, log.pooling is {config.log.pooling!r}: set it so"
        )
    if metadata.pilot != config.model.pilot and Path(metadata.pilot).name != Path(config.model.pilot).name:
        raise StoredLogError(
            f"{where} is the log of the Pilot {metadata.pilot}, model.pilot is {config.model.pilot}: set model.pilot to the "
            "same model, or to where it is on this machine"
        )
    config.log.positions, config.log.question = metadata.positions, metadata.question
    if metadata.layers != "all":
        config.log.rationale = [int(layer) for layer in metadata.layers.split(",")]
    elif metadata.pooling == "none":
        config.log.rationale = "all"
    else:
        config.log.rationale = "pooled"
    return config


def _check_models(config: RunConfig, pilot: Path | str, base: Path | str, mistakes: MistakeLog) -> dict[str, str]:
    """Hashes of the base weights; tokenizer and Pilot must be those that the log's run started from."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pilot, trust_remote_code=False)
    if tokenizer_hash(tokenizer) != mistakes.metadata.tokenizer_hash:
        raise StoredLogError(
            f"{mistakes.location} was written with another tokenizer than that of model.pilot {pilot}: token ids would mean "
            "other tokens"
        )
    random, wanted = config.model.random_weights, mistakes.metadata.pilot_weights
    own = weights_hash(pilot, random_weights=random)
    if wanted and own != wanted:
        raise StoredLogError(
            f"{mistakes.location} was written by a Pilot that started from other weights than those of model.pilot {pilot} "
            f"({wanted} then, {own} now): set model.pilot to the model that the run had"
        )
    return {
        "pilot_weights": own,
        "copilot_weights": own if base == pilot else weights_hash(base, random_weights=random),
    }


def _open_folder(out: Path, config: RunConfig, mistakes: MistakeLog, weights: dict[str, str]) -> None:
    now: dict[str, Any] = {
        "log": str(mistakes.location),
        "run": mistakes.metadata.run,
        "version": mistakes.version,
        **weights,
        "run.seed": config.run.seed,
        **{f"copilot.{name}": value for name, value in config.copilot.model_dump(mode="json").items()},
        **{f"model.{name}": value for name, value in config.model.model_dump(mode="json").items()},
    }
    source = out / "source.json"
    if source.exists():
        was = read_json(source)
        changed = [f"{name}: {was.get(name)!r} -> {value!r}" for name, value in now.items() if was.get(name) != value]
        if changed:
            raise StoredLogError(
                f"{out} holds another training, as its {source.name} says ({'; '.join(changed)}). Use another --out, or the same log, version and "
                "settings to resume it."
            )
    elif out.exists() and any(not file.name.startswith(".") for file in out.iterdir()):
        raise StoredLogError(f"--out {out} is not empty and holds no training from a log; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(source, now)
    save_config(config, out / "config.yaml")


def _output_ids(config: RunConfig, mistakes: MistakeLog) -> torch.Tensor | None:
    """Tokens that the Copilot can correct: those that occur in the log's completions."""
    if config.copilot.output_tokens == "all":
        return None
    found: set[int] = set()
    for _, rows in mistakes.tables(columns=["input_ids", "target_start"]):
        for ids, start in zip(rows["input_ids"], rows["target_start"], strict=True):
            found.update(pc.unique(ids.values[start.as_py() :]).to_pylist())
    return torch.tensor(sorted(found), dtype=torch.int64)
