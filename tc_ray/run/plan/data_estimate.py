"""Rows and mean lengths of training data, from a sample of its files; for plans, without Ray.

The files are read once to count their records. A seeded sample is checked and tokenised exactly as `prepare` does it. Embedded
data is generated into a temporary folder, so nothing is left on disk. Called by `run.plan.plan`.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tc_ray.config.data import DataSection
from tc_ray.data.encode.conversations import chains
from tc_ray.data.encode.encode import Encoder, cut
from tc_ray.data.encode.sizes import check_sizes, cut_sizes
from tc_ray.data.source.embedded import for_fallback, write_generated_set
from tc_ray.data.source.files import DataFile
from tc_ray.data.source.find import PARTS, find_sources
from tc_ray.data.source.readers import iter_records
from tc_ray.data.source.records import DataError, Record, bad_row_text
from tc_ray.data.source.sequences import SequenceReader, label_items, scan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Placed = tuple[DataFile, Record]
_SHOWN_BAD_ROWS = 3


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
            files = [DataFile(str(write_generated_set(config, Path(folder), seed)))]
            encoder = replace(encoder, config=for_fallback(config), task=None)
        train = _examine(encoder, _records(config, files, seed), "train", sample_rows, seed, held_out=False)
    notes = [*found.notes, *train.notes]
    for part, own in found.sets.items() if config.format == "examples" else ():
        given = config.held_out_sets("validation" if part == "validation" else "test")
        for name, held_out in own.items():
            form = encoder.for_task(given[name].task if name in given else None)
            records = _records(config, held_out, seed)
            label = part if name == part else f"{part}.{name}"
            notes += _examine(form, records, label, sample_rows, seed, held_out=True).notes
    good = [row for rows in train.good for row in rows]
    encoder.check_id(max(max(row["input_ids"]) for row in good))
    readable = round(train.total * len(train.good) / train.sampled)
    parts = [part for part in PARTS[1:] if not found.files[part]] if config.format == "examples" else []
    check_sizes(config, readable, parts)
    sizes = cut_sizes(config, readable, parts)
    if train.sampled == train.total:  # all rows are known: copies of one prompt may leave nothing to train on
        asked = [getattr(config, f"{part}_size") if part in parts else 0 for part in PARTS[1:]]
        cut([rows[-1]["key"] for rows in train.good], *asked)
    records_left = readable - sum(sizes.values())
    weights = [found.weights.get(place, 1.0) for place in train.places]
    joined = [rows if encoder_decoder else _joined(rows) for rows in train.good]

    def total(counts: Iterable[int]) -> float:
        """Of counts by record, each as often as its file is read."""
        return sum(weight * count for weight, count in zip(weights, counts, strict=True))

    joined_rows, records_of_log = total(map(len, joined)), total(map(len, train.good))
    rows = round(records_left * joined_rows / len(train.good))
    return DataEstimate(
        rows=min(rows, config.max_train_rows or rows),
        mean_tokens=total(map(_tokens, joined)) / joined_rows,
        mean_target_tokens=total(map(_target_tokens, train.good)) / joined_rows,
        target_ids=len(set().union(*(row["input_ids"][row["target_start"] :] for row in good))),
        sampled=sum(map(len, joined)),
        records_per_row=records_of_log / joined_rows,
        mean_record_tokens=total(map(_tokens, train.good)) / records_of_log,
        notes=tuple(notes),
    )


def _tokens(rows: list[dict[str, Any]]) -> int:
    return sum(len(row["input_ids"]) for row in rows)


def _target_tokens(rows: list[dict[str, Any]]) -> int:
    return sum(len(row["input_ids"]) - row["target_start"] for row in rows)


def _joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one record that remain when the Pilot reads shared tokens once."""
    return [rows[place] for place, _ in chains([(row["input_ids"], row["target_start"]) for row in rows])]


@dataclass(frozen=True)
class _Examined:
    """A sample of a part's records. good: rows of each usable one; places: its file. notes: why others are not usable."""

    good: list[list[dict[str, Any]]]
    places: list[str]
    sampled: int
    total: int
    notes: list[str]


def _examine(
    encoder: Encoder, records: Iterable[_Placed], part: str, size: int, seed: int, *, held_out: bool
) -> _Examined:
    """Check and tokenise a sample of a part. Raises DataError: too many of its records are bad, or none is left."""
    kept, total = _sample(records, size, seed)
    found = [(file.place, encoder.rows(record, held_out=held_out)) for file, record in kept]
    bad = [{"file": place, **row} for place, rows in found for row in rows if row["kind"] == "bad"]
    usable = [(place, good) for place, rows in found if (good := [row for row in rows if row["kind"] == "row"])]
    long = len(found) - len(bad) - len(usable)
    sampled = f"of {len(found)} records" if total == len(found) else f"of {len(found)} sampled of {total} records"
    counted = f"data.{part}: {sampled} {len(bad)} are bad, {long} have a prompt longer than data.cutoff_tokens"
    shown = [f"bad: {bad_row_text(row)}" for row in bad[:_SHOWN_BAD_ROWS]]
    if not usable or len(bad) > math.ceil(encoder.config.max_bad_fraction * len(found)):
        raise DataError("; ".join([counted if found else f"data.{part}: its files hold no record", *shown]))
    notes = [counted, *shown] if bad or long else []
    return _Examined([rows for _, rows in usable], [place for place, _ in usable], len(found), total, notes)


def _records(config: DataSection, files: list[DataFile], seed: int) -> Iterable[_Placed]:
    read: Callable[[DataFile], Iterable[Record]]
    if config.format == "examples":
        read = iter_records
    else:
        found = scan(files)
        read = SequenceReader("train", label_items(found.items, seed), found.left_out, config.sequences)
    return ((file, record) for file in files for record in read(file))


def _sample(records: Iterable[_Placed], size: int, seed: int) -> tuple[list[_Placed], int]:
    """`size` records drawn uniformly (algorithm R), and how many there are."""
    draw = random.Random(seed)
    kept: list[_Placed] = []
    total = 0
    for record in records:
        total += 1
        if len(kept) < size:
            kept.append(record)
        elif (at := draw.randrange(total)) < size:
            kept[at] = record
    return kept, total
