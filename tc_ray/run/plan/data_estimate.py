"""Rows and mean lengths of training data, from a sample of its files; for plans, without Ray.

The files are read once to count their records. A seeded sample is checked and tokenised exactly as `prepare` does it. Embedded
data is generated into a temporary folder, so nothing is left on disk. Called by `run.plan.plan`.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tc_ray.config.data import DataSection
from tc_ray.data.encode.conversations import chains
from tc_ray.data.encode.encode import Encoder, row_count
from tc_ray.data.source.embedded import for_fallback, write_generated_set
from tc_ray.data.source.find import find_sources
from tc_ray.data.source.records import DataError, Record, iter_records
from tc_ray.data.source.sequences import SequenceReader, label_items, scan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DataEstimate:
    """rows: training rows after the cuts. Means are tokens per row over `sampled` rows. records_per_row: targets of a row, each a
    record of `mean_record_tokens` in the log.

    target_ids: different token ids in the completions of the sampled rows; all rows may hold more. notes: which files are
    read as what, and which are left out.
    """

    rows: int
    mean_tokens: float
    mean_target_tokens: float
    target_ids: int
    sampled: int
    records_per_row: float
    mean_record_tokens: float
    notes: tuple[str, ...]


def estimate(
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sample_rows: int,
    seed: int,
    encoder_decoder: bool = False,
    vocab_size: int | None = None,
) -> DataEstimate:
    """Rows and mean lengths of the training data.

    Raises:
        DataError: the files are absent or cannot be read, too many records of the sample are bad, their part is not clear, the
            embedded task is unknown, or a row of the sample has a token that a model of `vocab_size` tokens does not embed.
    """
    encoder = Encoder(config, tokenizer, seed, encoder_decoder, vocab_size).for_task(config.task)
    encoder.check()
    with tempfile.TemporaryDirectory() as folder:
        found = find_sources(config)
        files = found.files["train"]
        if not files:
            files = [write_generated_set(config, Path(folder), seed)]
            encoder = replace(encoder, config=for_fallback(config), task=None)
        records, total = _sample(_records(config, files, seed), sample_rows, seed)
    sampled = [encoder.rows(record, held_out=False) for record in records]
    found_good = [[row for row in rows if row["kind"] == "row"] for rows in sampled]
    good = [row for rows in found_good for row in rows]
    bad = [row for rows in sampled for row in rows if row["kind"] == "bad"]
    usable = sum(map(bool, found_good))
    if not good or len(bad) > math.ceil(config.max_bad_fraction * len(sampled)):
        text = f"of {len(sampled)} records {len(bad)} are bad, {len(sampled) - len(bad) - usable} have a prompt longer than "
        first = "; the first bad one: {unit} {place}: {field} {problem}; {fix}".format(**bad[0]) if bad else ""
        raise DataError(f"{text}data.cutoff_tokens{first}")
    encoder.check_id(max(max(row["input_ids"]) for row in good))
    readable = round(total * usable / len(sampled))
    cuts = {"validation": config.validation_size, "test": config.test_size} if config.format == "examples" else {}
    held_out = [max(1, row_count(size, readable)) for part, size in cuts.items() if size and not found.files[part]]
    targets = [row["input_ids"][row["target_start"] :] for row in good]
    joined = good if encoder_decoder else [row for rows in found_good for row in _joined(rows)]
    rows = round(max(0, readable - sum(held_out)) * len(joined) / usable)
    return DataEstimate(
        rows=min(rows, config.max_train_rows or rows),
        mean_tokens=sum(len(row["input_ids"]) for row in joined) / len(joined),
        mean_target_tokens=sum(map(len, targets)) / len(joined),
        target_ids=len(set().union(*targets)),
        sampled=len(joined),
        records_per_row=len(good) / len(joined),
        mean_record_tokens=sum(len(row["input_ids"]) for row in good) / len(good),
        notes=tuple(found.notes),
    )


def _joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one record that remain when the Pilot reads shared tokens once."""
    return [rows[place] for place, _ in chains([(row["input_ids"], row["target_start"]) for row in rows])]


def _records(config: DataSection, files: list[Path], seed: int) -> Iterable[Record]:
    if config.format == "examples":
        return (record for file in files for record in iter_records(file))
    found = scan(files)
    read = SequenceReader("train", label_items(found.items, seed), found.left_out, config.sequences)
    return (record for file in files for record in read(file))


def _sample(records: Iterable[Record], size: int, seed: int) -> tuple[list[Record], int]:
    """`size` records drawn uniformly (algorithm R), and how many there are."""
    draw = random.Random(seed)
    kept: list[Record] = []
    total = 0
    for record in records:
        total += 1
        if len(kept) < size:
            kept.append(record)
        elif (at := draw.randrange(total)) < size:
            kept[at] = record
    return kept, total
