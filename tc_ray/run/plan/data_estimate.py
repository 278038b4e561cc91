"""Rows and mean lengths of training data, from a sample of its files; for plans, without Ray.

The files are read once to count their records. A seeded sample is checked and tokenised exactly as `prepare` does it. Embedded
data is generated into a temporary folder, so nothing is left on disk. Called by `run.plan.plan`.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tc_ray.config.data import EMBEDDED, DataSection
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.encode.split import row_count
from tc_ray.data.source.embedded import for_fallback, write_generated_set
from tc_ray.data.source.errors import DataError
from tc_ray.data.source.find import find_sources, is_absent
from tc_ray.data.source.records import Record, iter_records
from tc_ray.data.source.sequences import SequenceReader, label_items, scan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DataEstimate:
    """rows: training rows after the cuts. Means are tokens per row over `sampled` rows.

    target_ids: different token ids in the completions of the sampled rows; all rows may hold more. notes: which files are
    read as what, and which are left out.
    """

    rows: int
    mean_tokens: float
    mean_target_tokens: float
    target_ids: int
    sampled: int
    bad: int = 0
    """Records of the sample that the run would leave out as bad."""
    records: int = 0
    """Size of the sample, bad ones included."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Sample:
    """`records` drawn from `total`, and the settings to read them with. held_out: sizes that are still cut from them."""

    records: list[Record]
    total: int
    config: DataSection
    held_out: list[float]
    notes: tuple[str, ...] = ()


def is_embedded(config: DataSection) -> bool:
    """Whether the run will use the embedded data set: by its config, or as the fallback for absent files."""
    return config.train == EMBEDDED or (config.fallback == EMBEDDED and is_absent(config))


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
        DataError: the files are absent, cannot be read or hold no usable row, their part is not clear, the embedded task is
            unknown, or a row of the sample has a token that a model of `vocab_size` tokens does not embed.
    """
    encoder = Encoder(config, tokenizer, seed, encoder_decoder, vocab_size)
    encoder.check()
    draw = _draw_sequences if config.format == "sequences" else _draw_examples
    with tempfile.TemporaryDirectory() as folder:
        sample = draw(config, Path(folder), sample_rows, seed)
    lengths, targets, ids, bad = [], [], set(), 0
    first_bad = ""
    encoder = replace(encoder, config=sample.config)
    for record in sample.records:
        row = encoder.row(record, held_out=False)
        if row["kind"] == "row":
            encoder.check_id(max([*row["input_ids"], row["named_id"] or -1]))
            lengths.append(len(row["input_ids"]))
            targets.append(len(row["input_ids"]) - row["target_start"])
            ids.update(row["input_ids"][row["target_start"] :])
        if row["kind"] == "bad":
            bad += 1
            field = f", field {row['field']}" if row["field"] else ""
            first_bad = (
                first_bad or f"; the first bad one: {row['unit']} {row['place']}{field}: {row['problem']}; {row['fix']}"
            )
    if not lengths:
        long = len(sample.records) - bad
        raise DataError(
            f"of {len(sample.records)} records {bad} are bad, {long} have a prompt longer than data.cutoff_tokens{first_bad}"
        )
    readable = round(sample.total * len(lengths) / len(sample.records))
    rows = readable - sum(max(1, row_count(size, readable)) for size in sample.held_out)
    if config.max_train_rows is not None:
        rows = min(rows, config.max_train_rows)
    count = len(lengths)
    means = sum(lengths) / count, sum(targets) / count
    return DataEstimate(max(0, rows), *means, len(ids), count, bad=bad, records=len(sample.records), notes=sample.notes)


def _draw_examples(config: DataSection, folder: Path, size: int, seed: int) -> _Sample:
    if is_embedded(config):
        # the length of a generated set is known, and a part of it has the same mean
        part = config.model_copy(update={"embedded_rows": min(config.embedded_rows, size)})
        records = list(iter_records(write_generated_set(part, folder, seed)))
        cuts = [config.validation_size, config.test_size]
        return _Sample(records, config.embedded_rows, for_fallback(config), [cut for cut in cuts if cut])
    found = find_sources(config)
    records, total = _sample((record for file in found.files["train"] for record in iter_records(file)), size, seed)
    own = ((config.validation_size, "validation"), (config.test_size, "test"))
    cuts = [cut for cut, part in own if cut and not found.files[part]]
    return _Sample(records, total, config, cuts, tuple(found.notes))


def _draw_sequences(config: DataSection, folder: Path, size: int, seed: int) -> _Sample:
    notes: tuple[str, ...] = ()
    if is_embedded(config):
        files = [write_generated_set(config, folder, seed)]
    else:
        sources = find_sources(config)
        files, notes = sources.files["train"], tuple(sources.notes)
    found = scan(files)
    read = SequenceReader("train", label_items(found.items, seed), found.left_out, config.sequences)
    records, total = _sample((record for file in files for record in read(file)), size, seed)
    return _Sample(records, total, config, [], notes)  # training rows only: nothing is cut from them


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
