"""Prepare a run's data folder: read, quarantine, split, tokenise, write Parquet.

Invariant: a folder that `prepare` was stopped in counts as none (see `folder`). Called by the driver; Ray must be running.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tc_ray.config.data import DataSection
from tc_ray.data.encode.encode import Encoded, Encoder
from tc_ray.data.encode.prompts import check_template
from tc_ray.data.encode.split import cut
from tc_ray.data.encode.vocabulary import check_largest_id, check_special_ids
from tc_ray.data.prepared import folder as data_folder
from tc_ray.data.prepared.folder import RECORD, SCHEMA, PreparedData
from tc_ray.data.prepared.left_out import LeftOut, with_left_out
from tc_ray.data.prepared.parts import examples, sequences
from tc_ray.data.source.embedded import for_fallback, generated_set, write_generated_set
from tc_ray.data.source.errors import DataError
from tc_ray.data.source.find import PARTS, find_sources, part_files
from tc_ray.data.source.sequences import ITEMS_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare(
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    seed: int,
    encoder_decoder: bool = False,
    vocab_size: int | None = None,
) -> PreparedData:
    """Make `folder` hold train, validation and test.parquet (columns: SCHEMA), data.json and quarantine.jsonl.

    Item sequences leave items.parquet too.

    Args:
        encoder_decoder: the model has an encoder: prompts are its source and end with the end token.
        vocab_size: rows of the model's embedding; None: not checked.

    Raises:
        DataError: files are absent or unreadable, too many rows are bad, no row is left to train on, or a row has a token
            that the model does not embed.
    """
    check_template(config, tokenizer)
    check_special_ids(tokenizer, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    found = find_sources(config)
    sources, notes = found.files, found.notes
    embedded = not sources["train"]
    of = data_folder.fingerprint(Encoder(config, tokenizer, seed, encoder_decoder), sources)
    if embedded:
        sources["train"] = [write_generated_set(config, folder, seed)]
        if config.format == "examples" and for_fallback(config) != config:
            notes.append("data.completion_pattern is meant for the absent files and left out")
            config = for_fallback(config)
    encoder, quarantine = Encoder(config, tokenizer, seed, encoder_decoder), folder / "quarantine.jsonl"
    if config.format == "sequences":
        items = folder / ITEMS_FILE
        encoded, bad = sequences(sources["train"], encoder, quarantine, items, test_only=False, notes=notes)
    else:
        encoded, bad = examples(sources, encoder, quarantine)
    _check_ids(encoded, tokenizer, vocab_size)
    for part, rows in encoded.items():
        notes += [f"data.{part}: {note}" for note in rows.notes]
    parts = _parts(config, encoded, notes)
    source = generated_set(config) if embedded else ", ".join(str(path) for path in sources["train"])
    prepared = _write(folder, source, parts, encoded, bad, notes)
    data_folder.save(prepared, of)
    return prepared


def prepared_before(
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    seed: int,
    encoder_decoder: bool = False,
    vocab_size: int | None = None,
) -> PreparedData | None:
    """What the folder holds, if `prepare` has made it from the same inputs; None: prepare it. Raises as `prepare` does."""
    check_template(config, tokenizer)
    check_special_ids(tokenizer, vocab_size)
    encoder = Encoder(config, tokenizer, seed, encoder_decoder)
    earlier = data_folder.load(folder, data_folder.fingerprint(encoder, find_sources(config).files))
    if earlier:
        check_largest_id(earlier.largest_id, tokenizer, vocab_size)
    return earlier


def prepare_test_file(
    source: str,
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    *,
    seed: int,
    encoder_decoder: bool = False,
    items: Path | None = None,
    vocab_size: int | None = None,
) -> PreparedData:
    """Tokenise another test file (or folder) into `target`/test.parquet, for the evaluation of a finished run.

    Args:
        items: the run's items.parquet, whose labels other sequences are read with; needed with format: sequences.

    Raises:
        DataError: as `prepare` does.
    """
    check_template(config, tokenizer)
    check_special_ids(tokenizer, vocab_size)
    target.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    files = part_files(source, "test", config, notes)
    encoder, quarantine = Encoder(config, tokenizer, seed, encoder_decoder), target / "quarantine.jsonl"
    if config.format == "sequences":
        if items is None:
            raise DataError("item sequences can only be measured with the items.parquet of the run")
        encoded, bad = sequences(files, encoder, quarantine, items, test_only=True, notes=notes)
    else:
        encoded, bad = examples({"test": files}, encoder, quarantine)
    _check_ids(encoded, tokenizer, vocab_size)
    notes += encoded["test"].notes
    table = _finish(encoded["test"].rows)
    if not table.num_rows:
        raise DataError(f"{source}: no test row is left: {_arithmetic(encoded['test'])}")
    return _write(target, source, {"test": table}, encoded, bad, notes)


def _check_ids(encoded: Mapping[str, Encoded], tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    check_largest_id(max(rows.largest_id for rows in encoded.values()), tokenizer, vocab_size)


def _arithmetic(rows: Encoded) -> str:
    """How many of the records of a source are left, and why."""
    if not rows.records:
        return "its files hold no record; correct the path or fill them"
    return (
        f"of {rows.records} records {len(rows.bad)} are bad, {rows.too_long} have a prompt longer than "
        f"data.cutoff_tokens, {rows.rows.num_rows} are left"
    )


def _parts(config: DataSection, encoded: dict[str, Encoded], notes: list[str]) -> dict[str, pa.Table]:
    """The tables as they are written: each part its own rows, or cut from the training rows."""
    if not encoded["train"].rows.num_rows:
        raise DataError(f"data.train {config.train}: no row is left: {_arithmetic(encoded['train'])}")
    if config.format == "sequences":
        tables = {part: encoded[part].rows for part in PARTS}
    else:
        tables = _cut(config, encoded, notes)
    if config.max_train_rows:
        tables["train"] = tables["train"].slice(0, config.max_train_rows)
    for part in ("validation", "test"):
        if part in encoded and not tables[part].num_rows:
            raise DataError(f"no {part} row is left: {_arithmetic(encoded[part])}")
    return {part: _finish(table) for part, table in tables.items()}


def _cut(config: DataSection, encoded: dict[str, Encoded], notes: list[str]) -> dict[str, pa.Table]:
    rows = encoded["train"].rows
    try:
        part_of = cut(
            rows["key"].to_pylist(),
            validation=0 if "validation" in encoded else config.validation_size,
            test=0 if "test" in encoded else config.test_size,
        )
    except DataError as error:
        raise DataError(f"{error} ({_arithmetic(encoded['train'])})") from None
    tables = {part: rows.filter(pa.array([found == part for found in part_of], pa.bool_())) for part in PARTS}
    for part in ("validation", "test"):
        if part in encoded:
            tables[part] = encoded[part].rows
            shared = pc.sum(pc.is_in(tables["train"]["key"], value_set=tables[part]["key"].combine_chunks())).as_py()
            if shared:
                notes.append(f"warning: {shared} training rows have a prompt that also stands in data.{part}")
    return tables


def _finish(rows: pa.Table) -> pa.Table:
    return rows.append_column("sample_id", pa.array(range(rows.num_rows), pa.int64())).select(SCHEMA.names).cast(SCHEMA)


def _write(
    folder: Path,
    source: str,
    parts: Mapping[str, pa.Table],
    encoded: Mapping[str, Encoded],
    bad: int,
    notes: list[str],
) -> PreparedData:
    """Write the Parquet files, each with what is left out of it, and describe them."""
    lengths: dict[str, list[int]] = {part: [] for part in PARTS}
    starts = dict.fromkeys(PARTS, 0)
    for part, table in parts.items():
        of = encoded[part if part in encoded else "train"]
        left_out = LeftOut(of.too_long, len(of.bad), before_split=part not in encoded)
        pq.write_table(with_left_out(table, left_out), folder / f"{part}.parquet")
        lengths[part] = pc.list_value_length(table["input_ids"]).to_pylist()
        starts[part] = sum(table["target_start"].to_pylist())
    return PreparedData(
        folder=folder,
        source=source,
        rows={part: len(found) for part, found in lengths.items()},
        tokens={part: sum(found) for part, found in lengths.items()},
        target_tokens={part: sum(found) - starts[part] for part, found in lengths.items()},
        longest={part: max(found, default=0) for part, found in lengths.items()},
        quarantined=bad,
        too_long=sum(rows.too_long for rows in encoded.values()),
        cut_completions=sum(rows.cut_completions for rows in encoded.values()),
        records={part: rows.records for part, rows in encoded.items()},
        largest_id=max(rows.largest_id for rows in encoded.values()),
        notes=notes,
    )
