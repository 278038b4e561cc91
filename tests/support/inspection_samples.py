"""Small logs whose statistics a test can compute again: softmax errors over a tiny vocabulary, several epochs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.mistakelog.table.data_file import DataFile, ParquetPart, file_name
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore

DIM = 2


@dataclass
class Example:
    """One row as the log should hold it: what tests compare with. p: float64 [n, V]."""

    round: int
    sample: int
    seen: int
    prompt: list[int]
    answer: list[int]
    p: np.ndarray

    @property
    def loss(self) -> np.ndarray:
        return -np.log(self.p[np.arange(len(self.answer)), self.answer])

    @property
    def correct(self) -> np.ndarray:
        return self.p.argmax(1) == self.answer


def make_examples(
    samples: int = 6, epochs: int = 3, batch: int = 2, vocab: int = 50, seed: int = 0, longest: int = 5
) -> list[Example]:
    """Every sample once an epoch in a new order, `batch` a round; errors shrink from epoch to epoch."""
    rng = np.random.default_rng(seed)
    texts = [
        (
            rng.integers(2, vocab, rng.integers(1, 6)).tolist(),
            rng.integers(2, vocab, rng.integers(1, longest + 1)).tolist(),
        )
        for _ in range(samples)
    ]
    examples, round_ = [], 0
    for epoch in range(epochs):
        for place, sample in enumerate(rng.permutation(samples)):
            round_ += place % batch == 0
            prompt, answer = texts[sample]
            logits = rng.normal(size=(len(answer), vocab)) * 2.0
            logits[np.arange(len(answer)), answer] += 1.5 + 1.5 * epoch
            p = np.exp(logits - logits.max(1, keepdims=True))
            examples.append(Example(round_, int(sample), epoch, prompt, answer, p / p.sum(1, keepdims=True)))
    return examples


def to_records(examples: list[Example], top_k: int, rank: int = 0) -> Records:
    """Records with the `top_k` largest errors of each token (V - 1: all, by id, as in a dense log)."""
    ids, values, rest = [], [], []
    for example in examples:
        for truth, p in zip(example.answer, example.p, strict=True):
            others = np.delete(np.arange(len(p)), truth)
            if top_k < len(p) - 1:
                others = others[np.argsort(-p[others], kind="stable")][:top_k]
            ids.append([truth, *others])
            values.append([1.0 - p[truth], *-p[others]])
            rest.append(max(0.0, 1.0 - p[truth] - p[others].sum()))
    lengths = np.array([len(e.prompt) + len(e.answer) for e in examples])
    targets = np.array([len(e.answer) for e in examples])

    def offsets(counts: np.ndarray) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    states = np.arange((lengths - 1).sum() * DIM) % 1000
    return Records(
        round=np.array([e.round for e in examples], np.int64),
        rank=np.full(len(examples), rank, np.int32),
        attempt=np.ones(len(examples), np.int32),
        sample_id=np.array([e.sample for e in examples], np.int64),
        seen=np.array([e.seen for e in examples], np.int16),
        input_ids=np.concatenate([e.prompt + e.answer for e in examples]).astype(np.int32),
        seq_offsets=offsets(lengths),
        target_start=np.array([len(e.prompt) for e in examples], np.int32),
        rationale=(states.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).reshape(-1, 1, DIM),
        rationale_offsets=offsets(lengths - 1),
        rationale_layers=1,
        rationale_dim=DIM,
        error_ids=np.array(ids, np.int32),
        error_values=np.array(values, np.float32),
        error_rest=np.array(rest, np.float32),
        token_loss=np.concatenate([e.loss for e in examples]).astype(np.float32),
        token_correct=np.concatenate([e.correct for e in examples]),
        target_offsets=offsets(targets),
    )


def make_log(
    folder: Path,
    examples: list[Example],
    *,
    location: Location | None = None,
    tokenizer_hash: str = "none",
    pilot: str = "no-such-model",
    dense: bool = False,
    rounds_a_file: int = 3,
    top_k: int = 4,
    dropped: int = 0,
    spoil: Callable[[Records], None] | None = None,
) -> Path:
    """A log of the examples, committed by a Ledger.

    Args:
        folder: of the table. location: of the table instead, if it is in an object store. dropped: records of the last
            rounds that the commit counts as dropped. spoil: changes the records of the second file.
    """
    vocab = examples[0].p.shape[1]
    top_k = vocab - 1 if dense else top_k
    metadata = LogMetadata(
        run="trial",
        pilot=pilot,
        tokenizer_hash=tokenizer_hash,
        vocab_size=vocab,
        rationale_dim=DIM,
        rationale_layers=1,
        pooling="mean",
        tap="mean over decoder layers",
        positions="all",
        top_k=top_k,
        error="dense" if dense else "top-k",
    )
    place = location or Location(folder)
    LogStore.create(place, metadata)
    ledger = Ledger(place, writers=1, run="trial")
    ledger.begin_attempt(0, 1)
    last_round = max(e.round for e in examples)
    for sequence, first in enumerate(range(1, last_round + 1, rounds_a_file)):
        last = min(first + rounds_a_file - 1, last_round)
        part = ParquetPart(place, file_name(first, 0, 1, sequence), "none", metadata.to_configuration())
        rows = to_records([e for e in examples if first <= e.round <= last], top_k)
        if spoil is not None and sequence == 1:
            spoil(rows)
        part.write(dataclasses.replace(rows, error=metadata.error).to_arrow("trial"))
        done = part.finish()
        dropped_now = {last: dropped} if dropped and last == last_round else {}
        file = DataFile(part.name, part.rows, done.size, first, last, 0, 1, sequence, done.crc32, dropped_now)
        ledger.commit(file)
    return folder
