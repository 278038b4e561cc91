"""Data files to tokenised rows, through Ray Data: one task a file, rows come back in file order.

Invariant: every record of every file comes out exactly once, as an encoded row, as a row that is too long, or as a bad
row with its place; the order does not depend on which task ended first. Called by `prepare`; Ray must be running.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from tc_ray.config.schema import DataSection
from tc_ray.data.errors import DataError
from tc_ray.data.prompts import readable_prompt
from tc_ray.data.shapes import to_example
from tc_ray.data.sources import BadRow, Record
from tc_ray.data.split import prompt_key
from tc_ray.data.tokenize import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_ROWS = 1024
_RAW_CHARS = 500

# kind: row (encoded), long (prompt over the cut-off), bad (quarantined), fatal (the file cannot be read)
_SCHEMA = pa.schema(
    [
        ("file", pa.int32()),
        ("place", pa.int64()),
        ("kind", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("target_start", pa.int32()),
        ("was_cut", pa.bool_()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("answer", pa.string()),
        ("key", pa.string()),
        ("unit", pa.string()),
        ("field", pa.string()),
        ("problem", pa.string()),
        ("fix", pa.string()),
        ("raw", pa.string()),
    ]
)


@dataclass
class Encoded:
    """Rows of one source: `rows` as in _SCHEMA with kind `row`, in file order; counts and bad rows of the rest."""

    rows: pa.Table
    too_long: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)

    @property
    def cut_completions(self) -> int:
        """Rows whose completion was cut at the cut-off."""
        return sum(value.as_py() for value in self.rows["was_cut"])

    @property
    def records(self) -> int:
        """Records read, bad ones included."""
        return self.rows.num_rows + self.too_long + len(self.bad)


def encode_files(
    files: Sequence[Path],
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    held_out: bool,
    encoder_decoder: bool,
    read: Callable[[Path], Iterator[Record]],
) -> Encoded:
    """Read, check and tokenise `files` in Ray Data tasks. Raises DataError for a file that cannot be read at all.

    Args:
        read: yields the records of one file in order, its bad ones included.
    """
    import ray.data

    def encode_one(batch: dict[str, Any]) -> Iterator[pa.Table]:
        def as_row(record: Record) -> dict[str, Any]:
            return encode_record(record, config, tokenizer, seed, held_out, encoder_decoder)

        return _encode_file(read(Path(str(batch["path"][0]))), int(batch["file"][0]), as_row)

    items = [{"file": index, "path": str(path)} for index, path in enumerate(files)]
    with _quiet_ray_data():
        encoded = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(encode_one, batch_size=1)
        blocks = ray.get(encoded.to_arrow_refs())
    tables = [block.select(_SCHEMA.names).cast(_SCHEMA) for block in blocks if block.num_rows]
    table = pa.concat_tables(tables) if tables else _SCHEMA.empty_table()
    table = table.sort_by([("file", "ascending"), ("place", "ascending")])
    of_kind = {kind: table.filter(pc.equal(table["kind"], kind)) for kind in ("row", "long", "bad", "fatal")}
    for row in of_kind["fatal"].to_pylist():
        raise DataError(row["problem"])
    told = ("unit", "place", "field", "problem", "fix", "raw")
    bad = [
        {"file": str(files[row["file"]]), **{name: row[name] for name in told}} for row in of_kind["bad"].to_pylist()
    ]
    return Encoded(of_kind["row"].combine_chunks(), of_kind["long"].num_rows, bad)


def _encode_file(
    records: Iterator[Record], file: int, as_row: Callable[[Record], dict[str, Any]]
) -> Iterator[pa.Table]:
    place = 0
    try:
        while chunk := list(islice(records, _CHUNK_ROWS)):
            place = chunk[-1].place
            rows = [as_row(record) | {"file": file} for record in chunk]
            yield pa.Table.from_pylist(rows, schema=_SCHEMA)
    except DataError as error:  # as a row: Ray would wrap the exception in its own traceback
        rows = [{"file": file, "place": place + 1, "kind": "fatal", "problem": str(error)}]
        yield pa.Table.from_pylist(rows, schema=_SCHEMA)


def encode_record(
    record: Record,
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    held_out: bool,
    encoder_decoder: bool = False,
) -> dict[str, Any]:
    """One record as a row of _SCHEMA (without `file`); Ray is not needed."""
    example = record.value if isinstance(record.value, BadRow) else to_example(record.value, held_out=held_out)
    row: dict[str, Any] = {"place": record.place, "unit": record.unit}
    if isinstance(example, BadRow):
        row |= {"field": example.field, "problem": example.problem, "fix": example.fix}
        return row | {"kind": "bad", "raw": record.raw[:_RAW_CHARS]}
    if config.completion_pattern and example.completion is not None:
        found = re.search(config.completion_pattern, example.completion)
        if found is None:
            row |= {
                "field": "completion",
                "problem": f"does not match data.completion_pattern {config.completion_pattern!r}",
            }
            return row | {"fix": "correct the pattern or the row", "kind": "bad", "raw": record.raw[:_RAW_CHARS]}
        example = replace(example, completion=found.group(found.re.groups))
    tokens = encode(example, config, tokenizer, encoder_decoder)
    if tokens is None:
        return row | {"kind": "long"}
    prompt = readable_prompt(example.turns)
    row |= {"prompt": prompt, "completion": example.completion, "answer": example.answer}
    row |= {"input_ids": tokens.input_ids, "target_start": tokens.target_start, "was_cut": tokens.was_cut}
    return row | {"kind": "row", "key": prompt_key(prompt, seed)}


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """No progress bars, plans and hints of Ray Data on the user's terminal; errors are raised."""
    from ray.data import DataContext

    context = DataContext.get_current()
    logger = logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)
