"""The plan of a run: batch arithmetic, sizes and predicted log bytes, computed without starting anything, and its lines.

Invariant: no Ray, no weights, no download of a builtin model, nothing written. What cannot be known that way is None and a
note says why. What the run would refuse, here and now, is in `refusals`, or raises where nothing can be planned. Called by
`tc-ray train --plan`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tc_ray.cluster.capacity import Need, amounts, fits, total
from tc_ray.cluster.session import training_needs
from tc_ray.config.load import require_secrets
from tc_ray.config.named import check_named
from tc_ray.config.redact import redact
from tc_ray.config.schema import RunConfig
from tc_ray.data.source.records import DataError
from tc_ray.run.plan.data_estimate import DataEstimate, estimate
from tc_ray.run.plan.model_sizes import ModelConfig, ModelSizes, find_models, model_sizes
from tc_ray.run.state import JobError, check_resume
from tc_ray.text import byte_size, first_line

SAMPLE_ROWS = 400
_ROW_BYTES = 64
"""Key columns, lengths and null maps of one record in Parquet."""
_FILE_BYTES = 2500
"""Parquet header, footer and metadata of one data file."""


@dataclass(frozen=True)
class Plan:
    """What a run would do. None is unknown, which `notes` explains."""

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

    def __str__(self) -> str:
        config, data, run, resources = self.config, self.data, self.config.run, self.config.resources
        address = os.environ.get("RAY_ADDRESS")
        where = (
            f"joins the cluster at {address}" if address else f"a local one is started ({os.cpu_count()} cores here)"
        )
        asked = total(training_needs(config))
        rows = f"{_known(data, 'rows')} training rows, mean {_known(data, 'mean_tokens', '.0f')} tokens"
        micro_batches = resources.pilot_workers * config.accumulation_steps
        largest = -(-config.pilot.batch_size // micro_batches)
        split = f"{resources.pilot_workers} worker(s) x {config.accumulation_steps} pass(es) of up to {largest}"
        lines = [
            ("run", f"{run.name} in {run.path}"),
            ("ray", f"{where}; the run asks for {amounts(asked, asked)}"),
            ("pilot", f"{config.model.pilot}: {_known(self.sizes, 'pilot')} parameters"),
            ("", f"{_method(config.pilot)}, {_known(self.sizes, 'pilot_trainable')} trained"),
            *self._copilot(),
            ("data", config.data.train_text),
            ("", f"{rows}, {_known(data, 'mean_target_tokens', '.0f')} of them targets"),
            ("batch", f"{config.pilot.batch_size} examples per round, {split}"),
            ("rounds", f"{_known(self, 'rounds')} ({config.pilot.epochs} epoch(s))"),
        ]
        if config.log.enabled:
            steps = f"{_known(self, 'copilot_steps')} Copilot steps of {config.copilot.batch_size} records"
            sizes = (self.log_bytes_per_round, self.log_bytes, self.free_bytes)
            per_round, whole, free = ("unknown" if size is None else byte_size(size) for size in sizes)
            compressed = " before compression" if config.log.compression != "none" else ""
            lines += [
                ("", f"{steps}, {config.copilot.steps_per_round} per round"),
                ("log", f"{per_round} per round, {whole} for the run{compressed}; free disk {free}"),
            ]
        for label, texts in (("note", self.notes), ("refused", self.refusals)):
            lines += zip([label, *[""] * len(texts)], texts, strict=False)
        return "\n".join(redact(f"{label:<10} {text}".rstrip()) for label, text in lines)

    def _copilot(self) -> list[tuple[str, str]]:
        config, copilot, sizes = self.config, self.config.copilot, self.sizes
        if not config.log.enabled:
            return [("copilot", "none: log.enabled is false")]
        every = "every layer" if copilot.every == 1 else f"one layer in {copilot.every}"
        layers = f"layers {', '.join(map(str, copilot.layers))}" if copilot.layers else every
        shape = "layers and width unknown"
        if sizes is not None and sizes.copilot_hidden_size is not None:
            shape = f"{sizes.copilot_layers} layers, width {sizes.copilot_hidden_size} (Pilot {sizes.hidden_size})"
        base = config.model.copilot or config.model.pilot
        return [
            ("copilot", f"{layers} of {base}: {_known(sizes, 'copilot')} parameters"),
            ("", f"{shape}; {_method(copilot)}, {_known(sizes, 'copilot_trainable')} trained"),
        ]


def make_plan(config: RunConfig) -> Plan:
    """Plan of a run.

    Raises:
        ConfigError: a secret is struck out, or a function that the config names is not there. ModelSourceError: a model folder
            is not there. UnknownFamilyError: a family without an adapter. ValueError: layers that the model does not have, a base of the other architecture. WeightsError:
            weights that are missing. JobError: positions it has no states of, adapters on a matrix that is shared.
    """
    require_secrets(config)
    check_named(config)
    notes: list[str] = []
    refusals = _refusals(config)
    pilot, base = find_models(config, notes, refusals)
    if pilot is not None:
        _check_models(config, pilot, base, refusals)
    data = _data(config, pilot, notes, refusals)
    sizes = None
    if pilot is not None:
        sizes = model_sizes(config, pilot, base if config.log.enabled else None, data)
    rounds = _rounds(config, data, notes, refusals)
    per_round = None
    if sizes is not None and data is not None and config.log.enabled:
        per_round = log_bytes_per_round(
            config,
            sizes,
            mean_tokens=data.mean_record_tokens,
            mean_targets=data.mean_target_tokens / data.records_per_row,
            records_per_row=data.records_per_row,
        )
        if config.log.sampling == "mistakes":
            notes.append("the log's bytes are predicted with every record")
    total = per_round * rounds if per_round is not None and rounds is not None else None
    free = shutil.disk_usage(next(p for p in (config.run.path, *config.run.path.parents) if p.exists())).free
    if total is not None and min(total, config.log.max_bytes or total) > free:
        notes.append(
            "the predicted log does not fit on the disk: free space, set log.states=int8, log.positions=target or a smaller "
            "log.top_k, or let old rounds go with log.max_bytes"
        )
    steps = rounds * config.copilot.steps_per_round if rounds is not None and config.log.enabled else None
    return Plan(config, sizes, data, rounds, steps, per_round, total, free, notes, refusals)


def _refusals(config: RunConfig) -> list[str]:
    import torch

    found = []
    try:
        check_resume(config, config.run.path)
    except JobError as error:
        found.append(str(error))
    if config.log.enabled and config.data.format == "examples" and not config.data.test and not config.data.test_size:
        found.append("no test rows to measure with: set data.test or a data.test_size above 0")
    if not os.environ.get("RAY_ADDRESS"):
        found += _missing_here(training_needs(config), torch.cuda.device_count())
    return found


def _missing_here(needs: Sequence[Need], gpus: int) -> Iterator[str]:
    """What a Ray of this machine alone cannot hold, with so many GPUs; it gets as many CPUs as are asked for."""
    asked = total(needs)
    # Ray itself gives a node these
    custom = [
        name for name in asked if name not in ("CPU", "GPU") and not name.startswith(("accelerator_type:", "node:"))
    ]
    if not fits([{**dict.fromkeys(asked, 1e9), "GPU": gpus}], needs):
        yield (
            f"the run asks for {asked['GPU']:g} GPU{'' if asked['GPU'] == 1 else 's'}, this machine has {gpus}: lower "
            "resources.pilot_gpus, resources.copilot_gpus, resources.pilot_workers or resources.copilot_workers, or join a "
            "cluster by RAY_ADDRESS"
        )
    if custom:
        yield (
            f"no node of a local Ray has {', '.join(custom)}: join a cluster by RAY_ADDRESS whose nodes have it, or leave it out "
            "of resources.pilot_resources and resources.copilot_resources"
        )


def _check_models(config: RunConfig, pilot: ModelConfig, base: ModelConfig | None, refusals: list[str]) -> None:
    """As the job does. A folder on this machine that has a config alone can be planned with."""
    from tc_ray.models.pilot.load import check_folders
    from tc_ray.pilot.record import check_log

    try:
        check_folders(config, pilot.place, pilot.place if base is None else base.place)
        if config.log.enabled:
            check_log(config, pilot.config)
    except OSError as error:
        refusals.append(f"{first_line(error, 160)}; take a whole copy of the model")
    except ValueError as error:
        if type(error) is not ValueError:  # an error of this package has its own words
            raise
        raise JobError(str(error)) from None


def log_bytes_per_round(
    config: RunConfig, sizes: ModelSizes, *, mean_tokens: float, mean_targets: float, records_per_row: float = 1.0
) -> int:
    """Bytes that one round of all workers adds to the log's data files, uncompressed.

    A record is states (bf16, or int8 with an fp32 scale), one or several a position (of an encoder-decoder or with
    log.question: states also one in bf16 for each source position: the question), int32 token ids, and a target token's
    k + 1 errors (int32 + fp32; dense: V fp32), rest, loss and a bit; the share of a file's own bytes follows from how
    often files are cut.
    """
    log = config.log
    layers = {"pooled": 1, "all": sizes.layers}[log.rationale] if isinstance(log.rationale, str) else len(log.rationale)
    states = layers * (mean_tokens - 1 if log.positions == "all" else mean_targets)
    state_bytes = states * (sizes.hidden_size + 4 if log.states == "int8" else 2 * sizes.hidden_size)
    if sizes.encoder_decoder or log.question == "states":
        state_bytes += (mean_tokens - mean_targets) * 2 * sizes.hidden_size
    errors = 4 * sizes.vocab_size if log.error == "dense" else 8 * (min(log.top_k, sizes.vocab_size - 1) + 1)
    record = state_bytes + mean_tokens * 4 + mean_targets * (errors + 4 + 4 + 1 / 8) + _ROW_BYTES
    rows = config.pilot.batch_size * records_per_row
    records = record * rows * (log.sampling_fraction if log.sampling == "fraction" else 1.0)
    workers = config.resources.pilot_workers
    flush_rounds = 1 if config.copilot.schedule == "lockstep" else log.flush_rounds
    rounds_a_file = min(flush_rounds, max(1.0, log.file_bytes / (records / workers)))
    return int(records + workers * _FILE_BYTES / rounds_a_file)


def _data(config: RunConfig, pilot: ModelConfig | None, notes: list[str], refusals: list[str]) -> DataEstimate | None:
    if pilot is None:  # a note says why the model cannot be read
        return None
    from transformers import AutoTokenizer

    from tc_ray.models.families import family_of

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            pilot.place, local_files_only=pilot.local_only, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        refusals.append(f"the tokenizer of {config.model.pilot} cannot be read here ({first_line(error, 160)})")
        return None
    try:
        found = estimate(
            config.data,
            tokenizer,
            sample_rows=SAMPLE_ROWS,
            seed=config.data_seed,
            encoder_decoder=family_of(pilot.config).encoder_decoder,
            vocab_size=pilot.config.vocab_size,
        )
    except DataError as error:
        refusals.append(f"data.train {config.data.train_text} on this machine: {error}")
    else:
        notes += [*found.notes, f"rows and lengths are estimated from {found.sampled} rows; the run measures them"]
        return found
    notes.append("data size unknown")
    return None


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


def _method(section: Any) -> str:
    return f"LoRA rank {section.lora.rank}" if section.method == "lora" else "full training"


def _known(of: object | None, name: str, pattern: str = ",") -> str:
    value = getattr(of, name, None)
    return "unknown" if value is None else format(value, pattern)
