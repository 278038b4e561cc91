"""Prepare a run's data folder: read, quarantine, split, tokenise, write Parquet; reuse what is already right.

Invariant: data.json is written last, over files that are on the disk, and removed first, so a folder with a data.json is
whole; its fingerprint covers the data section, the seed, the tokenizer and the size and time of every file read. What is torn
all the same is prepared anew. Called by the driver; Ray must run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tc_ray.config.schema import DataSection
from tc_ray.data.encode.encode import Encoded
from tc_ray.data.encode.prompts import check_template
from tc_ray.data.encode.split import cut
from tc_ray.data.encode.vocabulary import check_largest_id, check_special_ids
from tc_ray.data.prepared.left_out import LeftOut, with_left_out
from tc_ray.data.prepared.parts import PartEncoder
from tc_ray.data.source.embedded import embedded_name, for_fallback, write_embedded
from tc_ray.data.source.embedded_sequences import generated_name, write_generated
from tc_ray.data.source.errors import DataError
from tc_ray.data.source.find import PARTS, find_sources, part_files
from tc_ray.data.source.sequences import ITEMS_FILE, read_items
from tc_ray.files import DamagedFileError, read_json, sync_tree, typed, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 3
SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("target_start", pa.int32()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("answer", pa.string()),
    ]
)


@dataclass
class PreparedData:
    """What a data folder holds. Counts are by part: train, validation, test.

    records: read from each source, bad ones included; left_out: fields of `LeftOut` of each part, 0 where it is cut from
    train. largest_id: the largest token id of all rows.
    """

    folder: Path
    source: str
    rows: dict[str, int]
    tokens: dict[str, int]
    target_tokens: dict[str, int]
    longest: dict[str, int]
    quarantined: int
    too_long: int
    cut_completions: int
    records: dict[str, int]
    largest_id: int
    notes: list[str] = field(default_factory=list)
    reused: bool = False

    @property
    def train(self) -> Path:
        """Parquet file of the training rows."""
        return self.folder / "train.parquet"

    @property
    def validation(self) -> Path:
        """Parquet file of the validation rows."""
        return self.folder / "validation.parquet"

    @property
    def test(self) -> Path:
        """Parquet file of the test rows; it has no rows when there is no test data."""
        return self.folder / "test.parquet"

    @property
    def quarantine(self) -> Path:
        """JSONL file of the rows left out, each with file, place, field, problem and remedy."""
        return self.folder / "quarantine.jsonl"

    def check_rounds(self, batch_size: int) -> None:
        """Raise DataError, with the arithmetic of the parts, when the training rows do not fill one round."""
        if self.rows["train"] < batch_size:
            raise DataError(
                f"{self.rows['train']} training rows cannot fill a round of pilot.batch_size {batch_size}: of "
                f"{sum(self.records.values())} records {self.quarantined} are bad, {self.too_long} have a prompt longer "
                f"than data.cutoff_tokens, {self.rows['validation']} are validation and {self.rows['test']} test rows; "
                "lower pilot.batch_size or give more data"
            )

    def describe(self) -> list[str]:
        """Lines for people: source, counts, and everything that was left out."""
        lines = [f"data: {self.source}" + (" (as prepared before)" if self.reused else ""), *self.notes]
        lines += [
            f"{part}: {self.rows[part]} rows, {self.tokens[part]} tokens, {self.target_tokens[part]} of them targets, "
            f"longest {self.longest[part]}"
            for part in PARTS
        ]
        if self.quarantined:
            lines.append(f"left out as bad: {self.quarantined} rows, listed in {self.quarantine}")
        if self.too_long:
            lines.append(f"left out because the prompt is longer than data.cutoff_tokens: {self.too_long} rows")
        if self.cut_completions:
            lines.append(f"completions cut at data.cutoff_tokens: {self.cut_completions}")
        return lines


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

    sample_id is the row's index in its file. Item sequences leave items.parquet too. Rows prepared earlier from the same
    inputs are kept. Raises DataError when files are absent or unreadable, too many rows are bad, no row is left to
    train on, or a row has a token that the model does not embed.

    Args:
        encoder_decoder: the model has an encoder: prompts are its source and end with the end token.
        vocab_size: rows of the model's embedding; None: not checked.
    """
    check_template(config, tokenizer)
    check_special_ids(tokenizer, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    found = find_sources(config)
    sources, notes = found.files, found.notes
    embedded = not sources["train"]
    fingerprint = _fingerprint(config, tokenizer, sources, seed, encoder_decoder)
    earlier = _earlier(folder, fingerprint)
    if earlier:
        check_largest_id(earlier.largest_id, tokenizer, vocab_size)
        return earlier

    record = folder / "data.json"
    record.unlink(missing_ok=True)
    if embedded:
        sources["train"] = [_write_generated_set(config, folder, seed)]
        if config.format == "examples" and for_fallback(config) != config:
            notes.append("data.completion_pattern is meant for the absent files and left out")
            config = for_fallback(config)
    encode = PartEncoder(config, tokenizer, folder / "quarantine.jsonl", seed, encoder_decoder)
    if config.format == "sequences":
        encoded = encode.sequences(sources["train"], folder / ITEMS_FILE, notes)
    else:
        encoded = encode.examples(sources)
    _check_rows(encoded, tokenizer, vocab_size)
    for part, rows in encoded.items():
        notes += [f"data.{part}: {note}" for note in rows.notes]
    parts = _parts(config, encoded, notes)
    for part, table in parts.items():
        pq.write_table(with_left_out(table, _left_out(part, encoded)), folder / f"{part}.parquet")
    source = _generated_set(config) if embedded else ", ".join(str(path) for path in sources["train"])
    prepared = _described(folder, source, parts, encode.bad_rows, encoded, notes)
    sync_tree(folder)
    write_json(record, {"fingerprint": fingerprint, "format": FORMAT, **_without_folder(prepared)})
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
    """What `prepare` would keep of the folder as it is; None: it would make it anew. Nothing is written; raises as it does."""
    check_template(config, tokenizer)
    check_special_ids(tokenizer, vocab_size)
    earlier = _earlier(folder, _fingerprint(config, tokenizer, find_sources(config).files, seed, encoder_decoder))
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

    Raises DataError as `prepare` does.

    Args:
        items: the run's items.parquet, whose labels other sequences are read with; needed with format: sequences.
    """
    check_template(config, tokenizer)
    check_special_ids(tokenizer, vocab_size)
    target.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    files = part_files(source, "test", config, notes)
    encode = PartEncoder(config, tokenizer, target / "quarantine.jsonl", seed, encoder_decoder)
    if config.format == "sequences":
        if items is None:
            raise DataError("item sequences can only be measured with the items.parquet of the run")
        encoded = encode.labelled(files, read_items(items), ("test",))
    else:
        encoded = encode.examples({"test": files})
    _check_rows(encoded, tokenizer, vocab_size)
    notes += encoded["test"].notes
    table = _finish(encoded["test"].rows)
    if not table.num_rows:
        raise DataError(f"{source}: no test row is left: {_arithmetic(encoded['test'])}")
    pq.write_table(with_left_out(table, _left_out("test", encoded)), target / "test.parquet")
    return _described(target, source, {"test": table}, encode.bad_rows, encoded, notes)


def _check_rows(encoded: Mapping[str, Encoded], tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    check_largest_id(max(rows.largest_id for rows in encoded.values()), tokenizer, vocab_size)


def _left_out(part: str, encoded: Mapping[str, Encoded]) -> LeftOut:
    rows = encoded.get(part, encoded.get("train"))
    assert rows is not None  # a run has training rows, an evaluation its own
    return LeftOut(rows.too_long, len(rows.bad), before_split=part not in encoded)


def _arithmetic(rows: Encoded) -> str:
    """How many of the records of a source are left, and why."""
    if not rows.records:
        return "its files hold no record; correct the path or fill them"
    return (
        f"of {rows.records} records {len(rows.bad)} are bad, {rows.too_long} have a prompt longer than "
        f"data.cutoff_tokens, {rows.rows.num_rows} are left"
    )


def _generated_set(config: DataSection) -> str:
    return generated_name(config.sequences) if config.format == "sequences" else embedded_name(config)


def _write_generated_set(config: DataSection, folder: Path, seed: int) -> Path:
    if config.format == "sequences":
        write_generated(config.sequences, folder / "embedded.txt", seed)
        return folder / "embedded.txt"
    write_embedded(config, folder / "embedded.jsonl", seed)
    return folder / "embedded.jsonl"


def _parts(config: DataSection, encoded: dict[str, Encoded], notes: list[str]) -> dict[str, pa.Table]:
    """The tables as they are written: each part its own rows, or cut from the training rows."""
    rows = encoded["train"].rows
    if not rows.num_rows:
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


def _described(
    folder: Path,
    source: str,
    parts: Mapping[str, pa.Table],
    quarantined: int,
    encoded: Mapping[str, Encoded],
    notes: list[str],
) -> PreparedData:
    lengths = {part: _lengths(parts[part]) if part in parts else [] for part in PARTS}
    starts = {part: sum(parts[part]["target_start"].to_pylist()) if part in parts else 0 for part in PARTS}
    return PreparedData(
        folder=folder,
        source=source,
        rows={part: len(lengths[part]) for part in PARTS},
        tokens={part: sum(lengths[part]) for part in PARTS},
        target_tokens={part: sum(lengths[part]) - starts[part] for part in PARTS},
        longest={part: max(lengths[part], default=0) for part in PARTS},
        quarantined=quarantined,
        too_long=sum(rows.too_long for rows in encoded.values()),
        cut_completions=sum(rows.cut_completions for rows in encoded.values()),
        records={part: rows.records for part, rows in encoded.items()},
        largest_id=max(rows.largest_id for rows in encoded.values()),
        notes=notes,
    )


def _finish(rows: pa.Table) -> pa.Table:
    return rows.append_column("sample_id", pa.array(range(rows.num_rows), pa.int64())).select(SCHEMA.names).cast(SCHEMA)


def _lengths(table: pa.Table) -> list[int]:
    return [int(length) for length in pc.list_value_length(table["input_ids"]).to_pylist()]


def _fingerprint(
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    sources: dict[str, list[Path]],
    seed: int,
    encoder_decoder: bool,
) -> str:
    from tc_ray.models.identity import tokenizer_hash

    files = [
        [part, str(path), path.stat().st_size, path.stat().st_mtime_ns]
        for part, paths in sources.items()
        for path in paths
    ]
    settings = [config.model_dump(mode="json"), seed, encoder_decoder]
    parts = [FORMAT, settings, files, tokenizer_hash(tokenizer), _generated_set(config)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _earlier(folder: Path, fingerprint: str) -> PreparedData | None:
    """What `folder` already holds, if it was made from the same inputs and is whole."""
    record = folder / "data.json"
    try:
        kept = read_json(record)
        if kept.pop("fingerprint", None) != fingerprint or kept.pop("format", None) != FORMAT:
            return None
        prepared = typed({**kept, "folder": str(folder), "reused": True}, PreparedData, record)
        whole = all(pq.read_metadata(folder / f"{part}.parquet").num_rows == prepared.rows[part] for part in PARTS)
    except (OSError, DamagedFileError, KeyError, pa.ArrowException):
        return None
    return prepared if whole else None


def _without_folder(prepared: PreparedData) -> dict[str, Any]:
    return {key: value for key, value in asdict(prepared).items() if key not in ("folder", "reused")}
