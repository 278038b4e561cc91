"""From the Pilot's forward pass to the Mistake Log, and the log's metadata: rows are chosen, copied to the host once, and queued for the writer.

Invariant: the records of a round are a pure function of the round, so a replayed round leaves the same ones. What the log does not
keep (rows left out by `log.sampling`, padding, prompt positions) is dropped on the device, before the copy. Nothing here waits for
the device, except `log.sampling: mistakes`. Called by `pilot.loop` between the forward and the backward pass;
the metadata by the job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from tc_ray.config.log import LogSection
from tc_ray.config.schema import RunConfig
from tc_ray.data.prepared.batches import targets_of
from tc_ray.mistakelog.rows.ragged import offsets_of
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.sampling import has_mistake, in_fraction
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.mistakelog.write.writer import RecordWriter
from tc_ray.models.families import family_of
from tc_ray.models.identity import tokenizer_hash
from tc_ray.models.pilot.step import StepRecord
from tc_ray.models.pilot.taps import UNPOOLED, log_pooling, tap_definition, tapped_layers


class Recorder:
    """Records of one rank in one attempt. writer: of this rank and attempt. seed: of the run. device: of the Pilot."""

    def __init__(self, writer: RecordWriter, log: LogSection, *, seed: int, device: torch.device) -> None:
        self.writer, self._log, self._seed = writer, log, seed
        self._copy = HostCopy(device)
        self.skipped = 0
        """Records of this rank that `log.sampling` left out in this attempt."""
        self._tokens = 0

    def record(self, step: StepRecord, batch: Mapping[str, np.ndarray], seen: np.ndarray, round: int) -> None:
        """Queue the records of one micro-batch of `round`, one for each target; batch as of `TrainTable.batch`, seen: int16 [B]."""
        self._tokens += int(batch["lengths"].sum())
        chosen = chosen_records(step, batch, self._log, seed=self._seed, round=round)
        if chosen is not None:
            self.skipped += len(targets_of(batch).row) - len(chosen)
            if not len(chosen):
                return
        records, wait = to_records(
            step,
            batch,
            seen,
            self._log,
            round=round,
            rank=self.writer.rank,
            attempt=self.writer.attempt,
            chosen=chosen,
            copy=self._copy,
        )
        self.writer.put(records, round, wait)

    def end_round(self, round: int, *, left_out: bool = False) -> None:
        """All micro-batches of the round were recorded. left_out: it took no step, see `RecordWriter.end_round`."""
        self.writer.end_round(round, left_out=left_out)

    def metrics(self) -> dict[str, float]:
        """The writer's counts, and `bytes_per_token`: bytes of this rank's files per token that it has recorded."""
        stats = {name: float(value) for name, value in self.writer.stats().items()}
        if stats["bytes"]:
            stats["bytes_per_token"] = stats["bytes"] / self._tokens
        return stats


def chosen_records(
    step: StepRecord, batch: Mapping[str, np.ndarray], log: LogSection, *, seed: int, round: int
) -> np.ndarray | None:
    """int64 targets of the batch (`targets_of`) that `log.sampling` keeps, ascending; None: all. `mistakes` waits for the pass."""
    targets = targets_of(batch)
    if log.sampling == "fraction":
        rounds = np.full(len(targets.row), round)
        return np.flatnonzero(in_fraction(log.sampling_fraction, seed, rounds, targets.sample_id))
    if log.sampling == "mistakes":
        offsets = offsets_of(targets.end - targets.start)
        correct, loss = step.token_correct.cpu().numpy(), step.token_loss.cpu().numpy()
        return np.flatnonzero(has_mistake(correct, loss, offsets, log.mistake_loss))
    return None


def to_records(
    step: StepRecord,
    batch: Mapping[str, np.ndarray],
    seen: np.ndarray,
    log: LogSection,
    *,
    round: int,
    rank: int,
    attempt: int,
    chosen: np.ndarray | None = None,
    copy: HostCopy | None = None,
) -> tuple[Records, Callable[[], object] | None]:
    """Records of one micro-batch, and on CUDA a call that waits until the arrays from the device have their values.

    A record is one target with all that stands before it: of a row with several targets each has its own, cut off at its end, as
    if it had been a row by itself. (A causal model's states do not depend on what follows.)

    batch: input_ids int [B, S] right padded; lengths, target_start, sample_id: int [B]; earlier_targets: see `collate`. seen: int
    [B]. log: as the step had it. chosen: int64, targets to keep, ascending; None: all. copy: of the step's device; None: a new one.
    """
    copy = copy or HostCopy(step.rationale.device)
    targets = targets_of(batch)
    start, end = targets.start, targets.end
    count, position = len(targets.row), np.arange(batch["input_ids"].shape[1])
    taken = np.ones(count, bool) if chosen is None else np.isin(np.arange(count), chosen)
    first = np.zeros(count, np.int64) if log.positions == "all" else start - 1
    kept = taken[:, None] & (position >= first[:, None]) & (position < (end - 1)[:, None])
    tensors = {
        "error_ids": step.errors.ids.to(torch.int32),
        "error_values": step.errors.values,
        "error_rest": step.errors.rest,
        "token_loss": step.token_loss,
        "token_correct": step.token_correct,
    }
    if not taken.all():
        tokens = copy.to_device(np.flatnonzero(np.repeat(taken, end - start)))
        tensors = {name: values.index_select(0, tokens) for name, values in tensors.items()}
    tensors["rationale"] = _at(step.rationale, kept, targets.row, copy)
    if step.question is not None:
        asked = taken[:, None] & (position[: step.question.shape[1]] < start[:, None])
        tensors["question"] = _at(step.question, asked, targets.row, copy)
    arrays, wait = copy.arrays(tensors)
    number = int(taken.sum())
    records = Records(
        round=np.full(number, round, np.int64),
        rank=np.full(number, rank, np.int32),
        attempt=np.full(number, attempt, np.int32),
        sample_id=targets.sample_id[taken],
        seen=seen[targets.row][taken].astype(np.int16),
        input_ids=batch["input_ids"][targets.row][taken[:, None] & (position < end[:, None])].astype(np.int32),
        seq_offsets=offsets_of(end[taken]),
        target_start=start[taken].astype(np.int32),
        rationale_offsets=offsets_of(kept.sum(1)[taken]),
        rationale_layers=step.rationale.shape[2] if step.rationale.ndim == 4 else 1,
        rationale_dim=step.rationale.shape[-1],
        target_offsets=offsets_of((end - start)[taken]),
        error=log.error,
        rationale_dtype=log.states,
        **arrays,
    )
    return records, wait


def _at(states: torch.Tensor, mask: np.ndarray, row: np.ndarray, copy: HostCopy) -> torch.Tensor:
    """bf16 [positions, ..] of states [B, S, ..] where the host's mask [M, S] is set, line m in row[m]; does not wait for the device."""
    width = mask.shape[1]
    index = np.flatnonzero(mask)
    line = index // width
    index += (row[line] - line) * width
    return states.flatten(0, 1).index_select(0, copy.to_device(index)).to(torch.bfloat16)


class HostCopy:
    """Copies tensors to the host without stopping the device: on CUDA into pinned memory, beside the backward pass."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_device(self, index: np.ndarray) -> torch.Tensor:
        """An index made on the host, on the device; does not wait for the device."""
        tensor = torch.from_numpy(index)
        return tensor if self._stream is None else tensor.pin_memory().to(self._device, non_blocking=True)

    def arrays(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, np.ndarray], Callable[[], object] | None]:
        """Host arrays (bfloat16 as its bits, uint16), and a call that waits until they have their values; None: they have them."""
        if self._stream is None:
            return {name: _numpy(tensor) for name, tensor in tensors.items()}, None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            arrays: dict[str, Any] = {}
            for name, tensor in tensors.items():
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                # the allocator must not give the memory to the next step before the copy has read it
                tensor.record_stream(self._stream)
                arrays[name] = _numpy(host)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return arrays, copied.synchronize


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def log_metadata(
    config: RunConfig, pilot_config: Any, tokenizer: Any, inputs: Mapping[str, str] | None = None
) -> LogMetadata:
    """Metadata of the log that a run of `config` writes; ValueError: see `check_log`. inputs: hashes of what it starts from."""
    log, family = config.log, family_of(pilot_config)
    layers, count = check_log(config, pilot_config), family.layer_count(pilot_config)
    pooling = log_pooling(log.rationale, log.pooling)
    most = pilot_config.vocab_size - 1
    top_k = most if log.error == "dense" else min(log.top_k, most)
    hashes: dict[str, Any] = dict(inputs or {})
    return LogMetadata(
        run=config.run.name,
        pilot=config.model.pilot,
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=pilot_config.vocab_size,
        rationale_dim=pilot_config.hidden_size,
        rationale_layers=1 if pooling != UNPOOLED else count if layers is None else len(layers),
        pooling=pooling,
        tap=tap_definition(pooling, layers),
        positions=log.positions,
        top_k=top_k,
        question="states" if family.encoder_decoder else log.question,
        layers="all" if layers is None else ",".join(map(str, layers)),
        error=log.error,
        rationale_dtype=log.states,
        **hashes,
    )


def check_log(config: RunConfig, pilot_config: Any) -> list[int] | None:
    """The Pilot's decoder layers that `log` taps, from 0; None: all. ValueError: it has no such layers or positions."""
    log, family = config.log, family_of(pilot_config)
    if family.encoder_decoder and log.positions != "target":
        raise ValueError(
            f"log.positions is {log.positions!r}, but {config.model.pilot} is an encoder-decoder: its decoder has states of "
            "target positions only; set log.positions=target"
        )
    return tapped_layers(log.rationale, family.layer_count(pilot_config))
