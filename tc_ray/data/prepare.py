"""Prepare a run's data folder: read, quarantine, split, tokenise, write Parquet; reuse what is already right.

Invariant: data.json is written last and removed first, so a folder with a data.json is whole; its fingerprint covers
the data section, the seed, the tokenizer and the size and time of every file read. Called by the driver; Ray must run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tc_ray.config.schema import EMBEDDED, DataSection
from tc_ray.data.embedded import embedded_name, for_fallback, write_embedded
from tc_ray.data.embedded_sequences import generated_name, write_generated
from tc_ray.data.encode import Encoded
from tc_ray.data.errors import DataError
from tc_ray.data.parts import PARTS, PartEncoder
from tc_ray.data.prompts import check_template
from tc_ray.data.sequences import ITEMS_FILE, read_items
from tc_ray.data.sources import source_files
from tc_ray.data.split import cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
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
    """What a data folder holds. Counts are by part: train, validation, test."""

    folder: Path
    source: str
    rows: dict[str, int]
    tokens: dict[str, int]
    target_tokens: dict[str, int]
    longest: dict[str, int]
    quarantined: int
    too_long: int
    cut_completions: int
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
            lines.append(f"left out because the prompt fills data.cutoff_tokens: {self.too_long} rows")
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
) -> PreparedData:
    """Make `folder` hold train, validation and test.parquet (columns: SCHEMA), data.json and quarantine.jsonl.

    sample_id is the row's index in its file. Item sequences leave items.parquet too. Rows prepared earlier from the same
    inputs are kept. Raises DataError when files are absent or unreadable, too many rows are bad, or no row is left to
    train on.

    Args:
        encoder_decoder: the model has an encoder: prompts are its source and end with the end token.
    """
    check_template(config, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    sources, notes = _sources(config)
    embedded = not sources["train"]
    fingerprint = _fingerprint(config, tokenizer, sources, seed, encoder_decoder)
    earlier = _earlier(folder, fingerprint)
    if earlier:
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
    parts = _parts(config, encoded, notes)
    for part, table in parts.items():
        pq.write_table(table, folder / f"{part}.parquet")
    source = _generated_set(config) if embedded else ", ".join(str(path) for path in sources["train"])
    prepared = _described(folder, source, parts, encode.bad_rows, encoded, notes)
    _write_json(record, {"fingerprint": fingerprint, "format": FORMAT, **_without_folder(prepared)})
    return prepared


def prepared_before(
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    seed: int,
    encoder_decoder: bool = False,
) -> PreparedData | None:
    """What `prepare` would keep of the folder as it is; None: it would make it anew. Nothing is written."""
    sources, _ = _sources(config)
    return _earlier(folder, _fingerprint(config, tokenizer, sources, seed, encoder_decoder))


def prepare_test_file(
    source: str,
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    *,
    seed: int,
    encoder_decoder: bool = False,
    items: Path | None = None,
) -> PreparedData:
    """Tokenise another test file (or folder) into `target`/test.parquet, for the evaluation of a finished run.

    Args:
        items: the run's items.parquet, whose labels other sequences are read with; needed with format: sequences.
    """
    check_template(config, tokenizer)
    target.mkdir(parents=True, exist_ok=True)
    files = _present(source, "test", config.format)
    encode = PartEncoder(config, tokenizer, target / "quarantine.jsonl", seed, encoder_decoder)
    if config.format == "sequences":
        if items is None:
            raise DataError("item sequences can only be measured with the items.parquet of the run")
        encoded = encode.labelled(files, read_items(items), ("test",))
    else:
        encoded = encode.examples({"test": files})
    table = _finish(encoded["test"].rows)
    pq.write_table(table, target / "test.parquet")
    return _described(target, source, {"test": table}, encode.bad_rows, encoded, [])


def _sources(config: DataSection) -> tuple[dict[str, list[Path]], list[str]]:
    """Files of each part; none for train means the embedded data set. With it, notes on what was chosen and why."""
    sources: dict[str, list[Path]] = {part: [] for part in PARTS}
    if config.train != EMBEDDED:
        sources["train"] = source_files(config.train, config.format)
        if not sources["train"] and config.fallback == EMBEDDED:
            note = f"data.train {Path(config.train).expanduser().absolute()} is absent: using the embedded data set"
            if config.validation or config.test:
                note += ", and cutting validation and test from it too"
            return sources, [note]
        sources["train"] = _present(config.train, "train", config.format)
    for part, source in (("validation", config.validation), ("test", config.test)):
        if source:
            sources[part] = _present(source, part, config.format)
    return sources, []


def _present(source: str, part: str, format: str) -> list[Path]:
    files = source_files(source, format)
    if not files:
        hint = "; or set data.train=embedded, or data.fallback=embedded" if part == "train" else ""
        kinds = ".txt" if format == "sequences" else ".json, .jsonl or .parquet"
        raise DataError(
            f"data.{part}: no {kinds} file at {Path(source).expanduser().absolute()}; "
            f"correct the path (relative paths start at the current folder){hint}"
        )
    return files


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
        raise DataError("no training row is left: every record was bad or its prompt fills data.cutoff_tokens")
    if config.format == "sequences":
        tables = {part: encoded[part].rows for part in PARTS}
    else:
        tables = _cut(config, encoded, notes)
    if config.max_train_rows:
        tables["train"] = tables["train"].slice(0, config.max_train_rows)
    if not tables["validation"].num_rows:
        raise DataError("no validation row is left: every record for validation was bad or too long")
    return {part: _finish(table) for part, table in tables.items()}


def _cut(config: DataSection, encoded: dict[str, Encoded], notes: list[str]) -> dict[str, pa.Table]:
    rows = encoded["train"].rows
    part_of = cut(
        rows["key"].to_pylist(),
        validation=0 if "validation" in encoded else config.validation_size,
        test=0 if "test" in encoded else config.test_size,
    )
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
    from tc_ray.models.source import tokenizer_hash

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
    try:
        kept: dict[str, Any] = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if kept.pop("fingerprint", None) != fingerprint or kept.pop("format", None) != FORMAT:
        return None
    if not all((folder / f"{part}.parquet").is_file() for part in PARTS):
        return None
    return PreparedData(folder=folder, **kept, reused=True)


def _without_folder(prepared: PreparedData) -> dict[str, Any]:
    return {key: value for key, value in asdict(prepared).items() if key not in ("folder", "reused")}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
