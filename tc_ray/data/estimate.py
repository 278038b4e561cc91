"""Rows and mean lengths of training data, from a sample of its files; for plans, without Ray.

The files are read once to count their records; a seeded sample of them is checked and tokenised exactly as `prepare`
would do it. Embedded data is generated into a temporary folder. Called by `tc_ray.plan`; nothing is left on disk.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tc_ray.config.schema import EMBEDDED, DataSection
from tc_ray.data.embedded import for_fallback, write_embedded
from tc_ray.data.encode import encode_record
from tc_ray.data.sources import Record, find_files, iter_records
from tc_ray.data.split import row_count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DataEstimate:
    """rows: training rows after the cuts. Means are tokens a row over `sampled` rows; `exact`: counted, not estimated.

    target_ids: different token ids in the completions of the sampled rows; all rows may hold more.
    """

    rows: int
    mean_tokens: float
    mean_target_tokens: float
    target_ids: int
    sampled: int
    exact: bool = False


def is_embedded(config: DataSection) -> bool:
    """The run will use the embedded data set: it says so, or its files are absent and it may fall back."""
    return config.train == EMBEDDED or (config.fallback == EMBEDDED and not find_files(config.train))


def estimate(
    config: DataSection, tokenizer: PreTrainedTokenizerBase, *, sample_rows: int, seed: int
) -> DataEstimate | None:
    """Estimate; None where the files are absent or hold no usable row.

    Raises:
        DataError: a file cannot be read at all, or the embedded task is unknown.
    """
    if is_embedded(config):
        # the mean over part of a generated set is as good as over all of it, and its length is known
        part = config.model_copy(update={"embedded_rows": min(config.embedded_rows, sample_rows)})
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "embedded.jsonl"
            write_embedded(part, file, seed)
            records = list(iter_records(file))
        own_files, total, config = False, config.embedded_rows, for_fallback(config)
    else:
        own_files = True
        files = find_files(config.train)
        records, total = _sample((r for file in files for r in iter_records(file)), sample_rows, seed)
    lengths, targets, ids = [], [], set()
    for record in records:
        row = encode_record(record, config, tokenizer, seed, held_out=False)
        if row["kind"] == "row":
            lengths.append(len(row["input_ids"]))
            targets.append(len(row["input_ids"]) - row["target_start"])
            ids.update(row["input_ids"][row["target_start"] :])
    if not lengths:
        return None
    readable = round(total * len(lengths) / len(records))
    rows = readable - _held_out(config, readable, own_files)
    if config.max_train_rows is not None:
        rows = min(rows, config.max_train_rows)
    count = len(lengths)
    return DataEstimate(max(0, rows), sum(lengths) / count, sum(targets) / count, len(ids), count)


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


def _held_out(config: DataSection, rows: int, own_files: bool) -> int:
    """Rows cut from the training data; `own_files`: data.validation and data.test are used where they are named."""
    cuts = ((config.validation_size, config.validation), (config.test_size, config.test))
    return sum(max(1, row_count(size, rows)) for size, file in cuts if size and not (own_files and file))
