"""Prepare a run's data folder: read, quarantine, split, tokenise, write Parquet; reuse what is already right.

Invariant: data.json is written last and removed first, so a folder with a data.json is whole; its fingerprint covers
the data section, the seed, the tokenizer and the size and time of every file read. Called by the driver; Ray must run.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tc_ray.config.schema import EMBEDDED, DataSection
from tc_ray.data.embedded import embedded_name, for_fallback, write_embedded
from tc_ray.data.encode import Encoded, encode_files
from tc_ray.data.errors import DataError
from tc_ray.data.prompts import check_template
from tc_ray.data.sources import find_files
from tc_ray.data.split import cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
PARTS = ("train", "validation", "test")
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
_SHOWN_BAD_ROWS = 5


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


def prepare(config: DataSection, tokenizer: PreTrainedTokenizerBase, folder: Path, *, seed: int) -> PreparedData:
    """Make `folder` hold train, validation and test.parquet (columns: SCHEMA), data.json and quarantine.jsonl.

    sample_id is the row's index in its file. Rows prepared earlier from the same inputs are kept. Raises DataError
    when files are absent or unreadable, too many rows are bad, or no row is left to train on.
    """
    check_template(config, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    sources, notes = _sources(config)
    embedded = config.train == EMBEDDED or not sources["train"]
    fingerprint = _fingerprint(config, tokenizer, sources, seed)
    earlier = _earlier(folder, fingerprint)
    if earlier:
        return earlier

    record = folder / "data.json"
    record.unlink(missing_ok=True)
    if embedded:
        sources["train"] = [folder / "embedded.jsonl"]
        write_embedded(config, sources["train"][0], seed)
        if for_fallback(config) != config:
            notes.append("data.completion_pattern is meant for the absent files and left out")
            config = for_fallback(config)
    encoded = {
        part: encode_files(files, config, tokenizer, seed=seed, held_out=part != "train")
        for part, files in sources.items()
        if files
    }
    _quarantine(folder / "quarantine.jsonl", encoded, config.max_bad_fraction)
    parts = _parts(config, encoded, notes)
    for part, table in parts.items():
        pq.write_table(table, folder / f"{part}.parquet")
    prepared = PreparedData(
        folder=folder,
        source=embedded_name(config) if embedded else ", ".join(str(path) for path in sources["train"]),
        rows={part: table.num_rows for part, table in parts.items()},
        tokens={part: sum(_lengths(table)) for part, table in parts.items()},
        target_tokens={
            part: sum(_lengths(table)) - sum(table["target_start"].to_pylist()) for part, table in parts.items()
        },
        longest={part: max(_lengths(table), default=0) for part, table in parts.items()},
        quarantined=sum(len(part.bad) for part in encoded.values()),
        too_long=sum(part.too_long for part in encoded.values()),
        cut_completions=sum(part.cut_completions for part in encoded.values()),
        notes=notes,
    )
    _write_json(record, {"fingerprint": fingerprint, "format": FORMAT, **_without_folder(prepared)})
    return prepared


def prepare_test_file(
    source: str, config: DataSection, tokenizer: PreTrainedTokenizerBase, target: Path, *, seed: int
) -> PreparedData:
    """Tokenise another test file (or folder) into `target`/test.parquet, for the evaluation of a finished run."""
    check_template(config, tokenizer)
    target.mkdir(parents=True, exist_ok=True)
    encoded = {"test": encode_files(_present(source, "test"), config, tokenizer, seed=seed, held_out=True)}
    _quarantine(target / "quarantine.jsonl", encoded, config.max_bad_fraction)
    table = _finish(encoded["test"].rows)
    pq.write_table(table, target / "test.parquet")
    lengths = _lengths(table)
    none = {part: 0 for part in PARTS}
    return PreparedData(
        folder=target,
        source=source,
        rows={**none, "test": table.num_rows},
        tokens={**none, "test": sum(lengths)},
        target_tokens={**none, "test": sum(lengths) - sum(table["target_start"].to_pylist())},
        longest={**none, "test": max(lengths, default=0)},
        quarantined=len(encoded["test"].bad),
        too_long=encoded["test"].too_long,
        cut_completions=encoded["test"].cut_completions,
    )


def _sources(config: DataSection) -> tuple[dict[str, list[Path]], list[str]]:
    """Files of each part; none for train means the embedded data set. With it, notes on what was chosen and why."""
    sources: dict[str, list[Path]] = {part: [] for part in PARTS}
    if config.train != EMBEDDED:
        sources["train"] = find_files(config.train)
        if not sources["train"] and config.fallback == EMBEDDED:
            note = f"data.train {Path(config.train).expanduser().absolute()} is absent: using the embedded data set"
            if config.validation or config.test:
                note += ", and cutting validation and test from it too"
            return sources, [note]
        sources["train"] = _present(config.train, "train")
    for part, source in (("validation", config.validation), ("test", config.test)):
        if source:
            sources[part] = _present(source, part)
    return sources, []


def _present(source: str, part: str) -> list[Path]:
    files = find_files(source)
    if not files:
        hint = "; or set data.train=embedded, or data.fallback=embedded" if part == "train" else ""
        raise DataError(
            f"data.{part}: no .json, .jsonl or .parquet file at {Path(source).expanduser().absolute()}; "
            f"correct the path (relative paths start at the current folder){hint}"
        )
    return files


def _parts(config: DataSection, encoded: dict[str, Encoded], notes: list[str]) -> dict[str, pa.Table]:
    rows = encoded["train"].rows
    if not rows.num_rows:
        raise DataError("no training row is left: every record was bad or its prompt fills data.cutoff_tokens")
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
    if config.max_train_rows:
        tables["train"] = tables["train"].slice(0, config.max_train_rows)
    if not tables["validation"].num_rows:
        raise DataError("no validation row is left: every record of data.validation was bad or too long")
    return {part: _finish(table) for part, table in tables.items()}


def _finish(rows: pa.Table) -> pa.Table:
    return rows.append_column("sample_id", pa.array(range(rows.num_rows), pa.int64())).select(SCHEMA.names).cast(SCHEMA)


def _lengths(table: pa.Table) -> list[int]:
    return [int(length) for length in pc.list_value_length(table["input_ids"]).to_pylist()]


def _quarantine(path: Path, encoded: dict[str, Encoded], max_bad_fraction: float) -> None:
    """Write the bad rows of all sources; raise DataError for a source where they are too many."""
    with path.open("w", encoding="utf-8") as file:
        for part in encoded.values():
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part.bad)
    for name, part in encoded.items():
        if len(part.bad) > max_bad_fraction * part.records:
            first = "\n".join(
                f"  {row['file']}, {row['unit']} {row['place']}{', field ' + row['field'] if row['field'] else ''}: "
                f"{row['problem']}; {row['fix']}"
                for row in part.bad[:_SHOWN_BAD_ROWS]
            )
            raise DataError(
                f"data.{name}: {len(part.bad)} of {part.records} rows are bad, more than data.max_bad_fraction "
                f"{max_bad_fraction:g} allows. The first:\n{first}\nAll of them: {path}"
            )


def _fingerprint(
    config: DataSection, tokenizer: PreTrainedTokenizerBase, sources: dict[str, list[Path]], seed: int
) -> str:
    from tc_ray.models.source import tokenizer_hash

    files = [
        [part, str(path), path.stat().st_size, path.stat().st_mtime_ns]
        for part, paths in sources.items()
        for path in paths
    ]
    parts = [FORMAT, config.model_dump(mode="json"), seed, files, tokenizer_hash(tokenizer), embedded_name(config)]
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
