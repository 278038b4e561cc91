"""The plan of a run: topology, batch arithmetic, sizes and predicted log bytes, computed without starting anything.

Invariant: no Ray, no weights, no download of a builtin model, nothing written. What cannot be known that way is None
("unknown") and a note says why; what the run would refuse, here and now, stands in `refusals`, or raises where nothing can be
planned. Called by `tc-ray train --plan`.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tc_ray.cluster.session import cpus_needed, training_needs
from tc_ray.config.load import load_saved_config, require_secrets
from tc_ray.config.redact import redact
from tc_ray.config.schema import RunConfig
from tc_ray.run.plan.data_estimate import DataEstimate, NoRowsError, estimate, is_embedded
from tc_ray.run.plan.model_sizes import ModelConfig, ModelSizes, find_models, model_sizes
from tc_ray.run.refusals import JobError, check_resume
from tc_ray.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_ROWS = 400
_ROW_BYTES = 64
"""Key columns, lengths and null maps of one record in Parquet."""
_FILE_BYTES = 2500
"""Parquet header, footer and metadata of one data file."""
AUTO_TOP_K = 64
"""Errors a token that a plan counts with where the run chooses them (`log.top_k: auto`), if `log.top_k_limit` allows so many."""


@dataclass(frozen=True)
class Plan:
    """What a run would do. None is 'cannot be known here', explained in `notes`."""

    config: RunConfig
    sizes: ModelSizes | None
    data: DataEstimate | None
    rounds: int | None
    copilot_steps: int | None
    log_bytes_per_round: int | None
    log_bytes: int | None
    free_bytes: int
    notes: list[str]
    refusals: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "config": self.config.public_dump()}

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The plan as lines for a terminal."""
        told = [*self._pilot_lines(), *self._copilot_lines(), *self._work_lines(), *self._log_lines()]
        told += [("note" if index == 0 else "", note) for index, note in enumerate(self.notes)]
        told += [("refused" if index == 0 else "", reason) for index, reason in enumerate(self.refusals)]
        return [redact(f"{name:<10} {text}".rstrip()) for name, text in told]

    def _pilot_lines(self) -> list[tuple[str, str]]:
        config, pilot, resources = self.config, self.config.pilot, self.config.resources
        address = os.environ.get("RAY_ADDRESS")
        where = (
            f"joins the cluster at {address}" if address else f"a local one is started ({os.cpu_count()} cores here)"
        )
        method = f"LoRA rank {pilot.lora.rank}" if pilot.method == "lora" else "all weights"
        sizes = self.sizes
        trained = _count(sizes.pilot_trainable if sizes else None)
        begin = ", random weights" if config.model.random_weights else ""
        return [
            ("run", f"{config.run.name} in {config.run.path}"),
            ("ray", f"{where}; the run asks for {cpus_needed(config):g} CPUs{self._gpus()}"),
            ("pilot", f"{config.model.pilot}: {_count(sizes.pilot if sizes else None)} parameters{begin}"),
            ("", f"{method}, {trained} trained; ZeRO stage {pilot.zero_stage}, {pilot.dtype}"),
            ("", _workers(resources.pilot_workers, resources.pilot_cpus, resources.pilot_threads, resources.gpus)),
        ]

    def _gpus(self) -> str:
        resources = self.config.resources
        copilots = resources.copilot_workers if self.config.log.enabled else 0
        return f" and {resources.pilot_workers + copilots} GPUs" if resources.gpus else ""

    def _copilot_lines(self) -> list[tuple[str, str]]:
        config, copilot, resources = self.config, self.config.copilot, self.config.resources
        if not config.log.enabled:
            return [("copilot", "none: log.enabled is false")]
        every = "every layer" if copilot.every == 1 else f"one layer in {copilot.every}"
        layers = f"layers {', '.join(map(str, copilot.layers))}" if copilot.layers else every
        method = f"LoRA rank {copilot.lora.rank}" if copilot.method == "lora" else "full training"
        base, sizes = config.model.copilot or config.model.pilot, self.sizes
        trained = _count(sizes.copilot_trainable if sizes else None)
        return [
            ("copilot", f"{layers} of {base}: {_count(sizes.copilot if sizes else None)} parameters"),
            ("", self._copilot_shape()),
            ("", f"{method}, {trained} trained; loss {copilot.loss}; {copilot.schedule}, {copilot.dtype}"),
            (
                "",
                _workers(resources.copilot_workers, resources.copilot_cpus, resources.copilot_threads, resources.gpus),
            ),
        ]

    def _copilot_shape(self) -> str:
        pattern, sizes = f"attends to the Pilot by pattern {self.config.copilot.pattern}", self.sizes
        if sizes is None or sizes.copilot_hidden_size is None:
            return f"layers and width unknown; {pattern} (if it is decoder-only)"
        if sizes.encoder_decoder:  # its layers have both kinds of attention
            pattern = "each attends to earlier rows and to the Pilot"
        width = f"{sizes.copilot_hidden_size} (Pilot {sizes.hidden_size})"
        return f"{sizes.copilot_layers} layers, width {width}; {pattern}"

    def _work_lines(self) -> list[tuple[str, str]]:
        config, pilot, copilot, data = self.config, self.config.pilot, self.config.copilot, self.data
        source = "the embedded data set" if is_embedded(config.data) else config.data.train
        rows = f"{_count(data.rows if data else None)} training rows, mean {_number(data.mean_tokens if data else None)} tokens"
        split = f"{config.resources.pilot_workers} worker(s) x {pilot.micro_batch_size} x {config.accumulation_steps}"
        lines = [
            ("data", source),
            ("", f"{rows}, {_number(data.mean_target_tokens if data else None)} of them targets"),
            ("batch", f"{pilot.batch_size} examples a round = {split} accumulation step(s)"),
            (
                "rounds",
                f"{_count(self.rounds)} ({pilot.epochs} epoch(s)), a checkpoint every {pilot.checkpoint_every_rounds}",
            ),
        ]
        if config.log.enabled:
            steps = f"{_count(self.copilot_steps)} Copilot steps: {copilot.steps_per_round} a round"
            drawn = f"{copilot.batch_size} records each, drawn from the last {copilot.buffer_rounds} rounds"
            lines.append(("", f"{steps}, {drawn}"))
        return lines

    def _log_lines(self) -> list[tuple[str, str]]:
        if not self.config.log.enabled:
            return []
        compressed = " before compression" if self.config.log.compression != "none" else ""
        told = f"{_bytes(self.log_bytes_per_round)} a round, {_bytes(self.log_bytes)} for the run{compressed}"
        log = self.config.log
        layers = "all layers" if log.rationale == "all" else f"layers {', '.join(map(str, log.rationale))}"
        states = f"{log.pooling} over the Pilot's layers" if log.rationale == "pooled" else f"those of {layers}"
        states += f" at {log.positions} positions"
        if self.sizes is not None and self.sizes.encoder_decoder:
            states += ", and the encoder's output"
        errors = f"the {log.top_k} largest errors a token"
        if log.error == "dense":
            errors = "the errors of all tokens of the vocabulary"
        elif log.top_k == "auto":
            errors = f"the largest errors a token, as many as hold {100 * log.top_k_captured:g}% of |l|"
        lines = [("log", f"{told}; free disk {_bytes(self.free_bytes)}"), ("", f"states: {states}; {errors}")]
        if log.sampling == "fraction":
            lines.append(("", f"records: {100 * log.sampling_fraction:g}% of them"))
        elif log.sampling == "mistakes":
            bound = "" if log.mistake_loss is None else f" or with a loss above {log.mistake_loss:g}"
            lines.append(("", f"records: those with a target token that is not ranked first{bound}"))
        return lines


def make_plan(config: RunConfig) -> Plan:
    """Plan of a run.

    Raises:
        ConfigError: a secret is struck out. ModelSourceError: a model folder is not there. UnknownFamilyError: a family without an adapter.
        ValueError: layers that the model does not have, a base of the other architecture. WeightsError: weights that are
            missing. JobError: positions it has no states of, adapters on a matrix that is shared.
        DataError: data that cannot be read.
    """
    require_secrets(config)
    notes: list[str] = []
    refusals = _refusals(config)
    pilot, base = find_models(config, notes, refusals)
    if pilot is not None:
        _check_weights(config, pilot, base, refusals)
        if config.log.enabled:
            _check_log(config, pilot)
    data = _data(config, pilot, notes, refusals)
    sizes = None
    if pilot is not None:
        sizes = model_sizes(config, pilot, base if config.log.enabled else None, data)
    rounds = _rounds(config, data, notes, refusals)
    per_round = None
    if sizes is not None and data is not None and config.log.enabled:
        per_round = log_bytes_per_round(
            config, sizes, mean_tokens=data.mean_tokens, mean_targets=data.mean_target_tokens
        )
        notes += _log_notes(config)
    total = per_round * rounds if per_round is not None and rounds is not None else None
    free = shutil.disk_usage(next(p for p in (config.run.path, *config.run.path.parents) if p.exists())).free
    if total is not None and total > free:
        notes.append(
            "the predicted log does not fit on the disk: free space, lower pilot.epochs or log.top_k, or set log.positions=target"
        )
    steps = rounds * config.copilot.steps_per_round if rounds is not None and config.log.enabled else None
    if os.environ.get("RAY_ADDRESS"):
        notes.append(
            "whether the cluster can hold the run shows when it is joined: one that is too small is refused there"
        )
    return Plan(config, sizes, data, rounds, steps, per_round, total, free, notes, refusals)


def _refusals(config: RunConfig) -> list[str]:
    """What the settings and this machine alone say."""
    import torch

    found = []
    try:
        check_resume(config, config.run.path)
    except JobError as error:
        found.append(str(error))
    if config.log.enabled and config.data.format == "examples" and not config.data.test and not config.data.test_size:
        found.append("no test rows to measure with: set data.test or a data.test_size above 0")
    gpus = sum(need.count for need in training_needs(config) if need.bundle.get("GPU"))
    if gpus and not os.environ.get("RAY_ADDRESS") and torch.cuda.device_count() < gpus:
        found.append(
            f"the run asks for {gpus} GPUs, this machine has {torch.cuda.device_count()}: set resources.gpus=false, lower "
            "resources.pilot_workers or resources.copilot_workers, or join a cluster by RAY_ADDRESS"
        )
    return found


def _check_weights(config: RunConfig, pilot: ModelConfig, base: ModelConfig | None, refusals: list[str]) -> None:
    """As the job does, of folders that are on this machine; one with a config alone can be planned with."""
    from tc_ray.models.pilot.load import check_folders

    try:
        check_folders(config, pilot.place, pilot.place if base is None else base.place)
    except OSError as error:
        refusals.append(f"{first_line(error, 160)}; take a whole copy of the model")
    except ValueError as error:
        if type(error) is not ValueError:  # an error of this package speaks for itself
            raise
        raise JobError(str(error)) from None


def _check_log(config: RunConfig, pilot: ModelConfig) -> None:
    """As the job does."""
    from tc_ray.pilot.log_metadata import check_log

    try:
        check_log(config, pilot.config)
    except ValueError as error:
        raise JobError(str(error)) from None


def _log_notes(config: RunConfig) -> list[str]:
    """What the predicted bytes stand on."""
    log, notes = config.log, []
    if log.top_k == "auto" and log.error == "top-k":
        notes.append(
            f"log.top_k is chosen in the run's first rounds: the bytes are predicted with {min(AUTO_TOP_K, log.top_k_limit)} "
            f"errors a token; it can be {log.top_k_limit} (log.top_k_limit) at most"
        )
    if log.sampling == "mistakes":
        notes.append("how many records have a mistake shows in the run: the bytes are predicted with every record")
    return notes


def log_bytes_per_round(config: RunConfig, sizes: ModelSizes, *, mean_tokens: float, mean_targets: float) -> int:
    """Bytes that one round of all workers adds to the log's data files, uncompressed.

    A record is bf16 states, one or several a position (of an encoder-decoder also one for each source position: the
    question), int32 token ids, and a target token's k + 1 errors (int32 + fp32; dense: V fp32), rest, loss and a bit; the
    share of a file's own bytes follows from how often files are cut.
    """
    log = config.log
    layers = {"pooled": 1, "all": sizes.layers}[log.rationale] if isinstance(log.rationale, str) else len(log.rationale)
    states = layers * (mean_tokens - 1 if log.positions == "all" else mean_targets)
    if sizes.encoder_decoder:
        states += mean_tokens - mean_targets
    top_k = min(AUTO_TOP_K, log.top_k_limit) if log.top_k == "auto" else log.top_k
    errors = 4 * sizes.vocab_size if log.error == "dense" else 8 * (min(top_k, sizes.vocab_size - 1) + 1)
    record = states * sizes.hidden_size * 2 + mean_tokens * 4 + mean_targets * (errors + 4 + 4 + 1 / 8) + _ROW_BYTES
    records = record * config.pilot.batch_size * (log.sampling_fraction if log.sampling == "fraction" else 1.0)
    workers = config.resources.pilot_workers
    flush_rounds = 1 if config.copilot.schedule == "lockstep" else log.flush_rounds
    rounds_a_file = min(flush_rounds, max(1.0, log.file_bytes / (records / workers)))
    return int(records + workers * _FILE_BYTES / rounds_a_file)


def _data(config: RunConfig, pilot: ModelConfig | None, notes: list[str], refusals: list[str]) -> DataEstimate | None:
    """As prepared in the run folder by the same settings, else estimated."""
    prepared = _prepared(config)
    if prepared is not None:
        return prepared
    if pilot is None:  # a note has told why the model cannot be read
        return None
    from tc_ray.models.families import family_of
    from tc_ray.models.hub import embedding_rows

    tokenizer = _tokenizer(config, pilot, notes, refusals)
    if tokenizer is None:
        return None
    try:
        found = estimate(
            config.data,
            tokenizer,
            sample_rows=SAMPLE_ROWS,
            seed=config.run.seed,
            encoder_decoder=family_of(pilot.config).encoder_decoder,
            vocab_size=embedding_rows(pilot.place, pilot.config),
        )
    except NoRowsError as error:
        notes.append("data size unknown")
        refusals.append(f"no usable rows at data.train {config.data.train} on this machine: {error}")
        return None
    notes += found.notes
    whole = found.records < SAMPLE_ROWS  # then the sample is all there is
    if found.bad > math.ceil(config.data.max_bad_fraction * found.records):
        text = f"{found.bad} of {found.records} records {'' if whole else 'in the sample '}of data.train are bad, more than "
        (refusals if whole else notes).append(f"{text}data.max_bad_fraction {config.data.max_bad_fraction:g} allows")
    notes.append(f"rows and lengths are estimated from {found.sampled} rows; the run measures them")
    return found


def _prepared(config: RunConfig) -> DataEstimate | None:
    folder = config.run.path
    if not (folder / "data" / "data.json").is_file() or not (folder / "config.yaml").is_file():
        return None
    earlier = load_saved_config(folder / "config.yaml")
    if (earlier.data, earlier.model.pilot, earlier.run.seed) != (config.data, config.model.pilot, config.run.seed):
        return None
    import numpy as np

    from tc_ray.data.prepared.train_table import TrainTable

    table = TrainTable(folder / "data" / "train.parquet")
    count, rows = len(table), np.arange(len(table))
    tokens, targets = table.tokens(rows) / count, table.target_tokens(rows) / count
    return DataEstimate(count, tokens, targets, len(table.target_ids()), count, exact=True)


def _tokenizer(
    config: RunConfig, pilot: ModelConfig, notes: list[str], refusals: list[str]
) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    from tc_ray.data.encode.prompts import check_template

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            pilot.place, local_files_only=pilot.local_only, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        notes.append("data size unknown")
        refusals.append(f"the tokenizer of {config.model.pilot} cannot be read here ({first_line(error, 160)})")
        return None
    check_template(config.data, tokenizer)
    return tokenizer


def _rounds(config: RunConfig, data: DataEstimate | None, notes: list[str], refusals: list[str]) -> int | None:
    limit = config.pilot.max_rounds
    if data is None:
        if limit is not None:
            notes.append("rounds are pilot.max_rounds; the data may hold fewer")
        return limit
    if data.rows < config.pilot.batch_size:
        refusals.append(
            f"{data.rows} training rows cannot fill a round of pilot.batch_size {config.pilot.batch_size}; lower it or give "
            "more data"
        )
    rounds = config.pilot.epochs * data.rows // config.pilot.batch_size
    return rounds if limit is None else min(rounds, limit)


def _workers(workers: int, cpus: float, threads: int, gpus: bool) -> str:
    return f"{workers} worker(s) x {cpus:g} CPU(s){' and 1 GPU' if gpus else ''}, {threads} torch thread(s) each"


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f}"


def _bytes(value: int | None) -> str:
    if value is None:
        return "unknown"
    size = float(value)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
