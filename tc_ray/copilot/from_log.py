"""A Copilot trained from a stored log alone: the learner of the live run, no Pilot running, no Ray.

Invariant: folder, checkpoints and exported model have the forms of a run's `copilot/`, so `tc-ray fuse` takes the result; the
same command on the same folder resumes from the last checkpoint. Given the same draws the result is the live one's, bit for bit.
Called by `tc-ray train-copilot`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch

from tc_ray.config.load import load_saved_config, save_config
from tc_ray.config.schema import RunConfig
from tc_ray.copilot import checkpoint
from tc_ray.copilot.batch import batch_from_records
from tc_ray.copilot.checkpoint import Position
from tc_ray.copilot.learner import Learner, StepResult, make_learner
from tc_ray.copilot.stored import Replay
from tc_ray.files import DamagedFileError, read_json_as, write_file, write_json
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.models.hub import resolve_model
from tc_ray.models.identity import tokenizer_hash, weights_hash

SOURCE_FILE = "source.json"


class StoredLogError(ValueError):
    """The log cannot train the configured Copilot, or the folder holds another training."""


@dataclass(frozen=True)
class Progress:
    """Shown after every step."""

    step: int
    total_steps: int
    round: int
    result: StepResult | None
    """None: nothing to learn from at this step."""


@dataclass(frozen=True)
class TrainedCopilot:
    """The outcome. loss: of `copilot.loss`; uncorrected: the same loss of f = 0, None where it is not known (kl,
    cross_entropy). Both are means over the last tenth of the steps taken in this start."""

    folder: Path
    steps: int
    loss: float | None
    uncorrected: float | None
    bad_files: int
    left_out_steps: int

    def lines(self) -> list[str]:
        """For a terminal."""
        lines = [f"copilot   {self.folder} ({self.steps} steps)"]
        if self.loss is not None:
            beside = "" if self.uncorrected is None else f"; {self.uncorrected:.4f} without a correction"
            lines.append(f"loss      {self.loss:.4f} over the last tenth{beside}")
        if self.bad_files:
            lines.append(f"damaged   {self.bad_files} file(s) of the log were not read: tc-ray log verify names them")
        if self.left_out_steps:
            lines.append(f"left out  {self.left_out_steps} steps: loss or gradient was not finite")
        return [*lines, f"fuse      tc-ray fuse --pilot PILOT --copilot {self.folder} --out FOLDER"]


def train_from_log(
    mistakes: MistakeLog,
    config: RunConfig,
    out: Path,
    *,
    show: Callable[[Progress], None] = lambda progress: None,
) -> TrainedCopilot:
    """Train a Copilot on one version of a log: `steps_per_round` steps a round, as the live Copilot of a lock-step run.

    Args:
        mistakes: the log; rows of damaged files are left out.
        config: sections `copilot`, `model`, `run.seed` and `resources` count; what the log holds is taken from its metadata.
        out: folder of checkpoints, metrics.jsonl and `final`; an existing one of the same training is resumed.
        show: called after every step.

    Raises:
        StoredLogError: an empty log, another tokenizer, Pilot or base weights than the run's, or a folder of another
            training.
    """
    if not mistakes.files:
        raise StoredLogError(f"{mistakes.location}: the log holds no records (version {mistakes.version})")
    config = fitted(config, mistakes.metadata, str(mistakes.location))
    pilot = resolve_model(config.model.pilot, config.model.cache)
    base = resolve_model(config.model.copilot, config.model.cache) if config.model.copilot else pilot
    _check_tokenizer(pilot, mistakes)
    weights = _check_weights(config, pilot, base, mistakes)
    _open_folder(out, config, mistakes, weights)
    source = Replay(mistakes, config)
    torch.set_num_threads(config.resources.copilot_threads)
    learner = make_learner(config, pilot, base, _output_ids(config, mistakes), total_steps=source.total_steps)
    at = checkpoint.restore(learner, out / "checkpoints") or Position(0, 0, mistakes.version)
    taken = _train(learner, source, config, out, at, mistakes.version, show)
    learner.export(out / "final")
    last = taken[-max(1, len(taken) // 10) :]
    return TrainedCopilot(
        out / "final",
        source.total_steps,
        float(np.mean([result.loss for result in last])) if last else None,
        # the root mean square of the logged errors is what the RMSE of f = 0 is; of the other losses it is no value at all
        float(np.mean([result.error_size for result in last])) if last and config.copilot.loss == "rmse" else None,
        len(mistakes.bad_files),
        learner.left_out.count,
    )


def _train(
    learner: Learner,
    source: Replay,
    config: RunConfig,
    out: Path,
    at: Position,
    version: int,
    show: Callable[[Progress], None],
) -> list[StepResult]:
    taken: list[StepResult] = []
    metrics = out / "metrics.jsonl"
    _cut_metrics(metrics, at.step)
    with metrics.open("a") as points:
        for step in range(at.step, source.total_steps):
            records = source.batch(step)
            result = learner.step(batch_from_records(records)) if records is not None else None
            if result is not None and result.taken:
                taken.append(result)
                point = {"step": step + 1, "round": source.round(step), "time": time.time()}
                points.write(json.dumps(point | {"loss": result.loss, "error_size": result.error_size}) + "\n")
            if (step + 1) % config.copilot.checkpoint_every_steps == 0 or step + 1 == source.total_steps:
                points.flush()
                checkpoint.save(learner, out / "checkpoints", Position(step + 1, source.round(step), version))
            show(Progress(step + 1, source.total_steps, source.round(step), result))
    return taken


def _cut_metrics(path: Path, step: int) -> None:
    """Forget points after the checkpoint, whose steps are taken again, and lines that are no points (a power cut)."""
    if path.is_file():
        lines = path.read_bytes().splitlines(keepends=True)
        write_file(path, b"".join(line for line in lines if line.endswith(b"\n") and 0 < _step_of(line) <= step))


def _step_of(line: bytes) -> int:
    """Step of a line of metrics.jsonl; 0 where it holds no point."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0


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
    config.log.positions = metadata.positions
    if metadata.layers != "all":
        config.log.rationale = [int(layer) for layer in metadata.layers.split(",")]
    elif metadata.pooling == "none":
        config.log.rationale = "all"
    else:
        config.log.rationale = "pooled"
    return config


def _check_tokenizer(pilot: Path | str, mistakes: MistakeLog) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pilot, trust_remote_code=False)
    if tokenizer_hash(tokenizer) != mistakes.metadata.tokenizer_hash:
        raise StoredLogError(
            f"{mistakes.location} was written with another tokenizer than that of model.pilot {pilot}: token ids would mean "
            "other tokens"
        )


@dataclass(frozen=True)
class _Source:
    """Content of SOURCE_FILE: what was trained from."""

    log: str
    run: str
    version: int
    pilot_weights: str
    copilot_weights: str


def _check_weights(config: RunConfig, pilot: Path | str, base: Path | str, mistakes: MistakeLog) -> dict[str, str]:
    """Hashes of the base weights; the Pilot's must be those that the log's run started from."""
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
    """Make the folder, or compare one that exists with this training."""
    source = _Source(str(mistakes.location), mistakes.metadata.run, mistakes.version, **weights)
    source_file, saved = out / SOURCE_FILE, out / "config.yaml"
    if source_file.exists():
        try:
            earlier = read_json_as(source_file, _Source)
        except DamagedFileError as error:
            raise StoredLogError(f"{error}: what {out} was trained from is not known; name another --out") from None
        now = asdict(source)
        changed = [f"{key}: {was!r} -> {now[key]!r}" for key, was in asdict(earlier).items() if was != now[key]]
        before = load_saved_config(saved)
        if before.run.seed != config.run.seed:
            changed.append(f"run.seed: {before.run.seed} -> {config.run.seed}")
        if before.copilot.model_dump() != config.copilot.model_dump() or before.model != config.model:
            changed.append("the sections copilot or model of the config")
        if changed:
            raise StoredLogError(
                f"{out} holds another training ({'; '.join(changed)}). Use another --out, or the same log, version and "
                "settings to resume it."
            )
        return
    # the config is written first: alone, it is what a start that ended between the two has left
    if out.exists() and any(file.name != saved.name and not file.name.startswith(".") for file in out.iterdir()):
        raise StoredLogError(f"--out {out} is not empty and holds no training from a log; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)
    write_json(source_file, asdict(source))


def _output_ids(config: RunConfig, mistakes: MistakeLog) -> torch.Tensor | None:
    """Tokens that the Copilot can correct: those that occur in the log's completions."""
    if config.copilot.output_tokens == "all":
        return None
    found: set[int] = set()
    for _, rows in mistakes.tables(columns=["input_ids", "target_start"]):
        for ids, start in zip(rows["input_ids"], rows["target_start"], strict=True):
            found.update(pc.unique(ids.values[start.as_py() :]).to_pylist())
    return torch.tensor(sorted(found), dtype=torch.int64)
