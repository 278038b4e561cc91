"""Prepare a run's data folder: read, quarantine, split, tokenise, write Parquet.

Invariant: every bad record of a source is in the quarantine file once, and a source with too many of them stops the run
before its rows are used. Called by the driver; Ray must
be running.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tc_ray.config.data import DataSection
from tc_ray.data.encode.conversations import EARLIER, first_rows, joined_turns, last_rows
from tc_ray.data.encode.encode import Encoded, Encoder, cut, encode_files, joined, named
from tc_ray.data.encode.sizes import check_sizes
from tc_ray.data.prepared.folder import LEFT_OUT, QUARANTINE, SCHEMA, LeftOut, PreparedData, save
from tc_ray.data.source.embedded import for_fallback, generated_set, write_generated_set
from tc_ray.data.source.files import DataFile
from tc_ray.data.source.find import PARTS, find_sources, part_files
from tc_ray.data.source.readers import doubled_key, iter_records, shares
from tc_ray.data.source.records import DataError, bad_row_text
from tc_ray.data.source.sequences import ITEMS_FILE, SequenceReader, label_items, scan, write_items

_SHOWN_BAD_ROWS = 5
_LOOKED_AT = 20
"""Training files whose first records are searched for keys that stand twice."""


def prepare(encoder: Encoder, folder: Path) -> PreparedData:
    """Make `folder` hold train, validation and test.parquet (columns: SCHEMA), data.json and quarantine.jsonl.

    Item sequences leave items.parquet too.

    Raises:
        DataError: files are absent or unreadable, too many rows are bad, no row is left to train on, or a row has a token
            that the model does not embed.
    """
    encoder.check()
    config = encoder.config
    found = find_sources(config)
    folder.mkdir(parents=True, exist_ok=True)
    sources, notes = found.files, found.notes
    source = ", ".join(map(str, sources["train"])) or generated_set(config)
    if not sources["train"]:
        sources["train"] = [DataFile(str(write_generated_set(config, folder, encoder.seed)))]
        if config.format == "examples" and for_fallback(config) != config:
            notes.append(
                "data.completion_pattern, data.task, data.convert and templates are meant for the absent files and left out"
            )
            encoder = replace(encoder, config=for_fallback(config))
    train = shares(sources["train"], cpus())
    encoded, bad = _encode(train, found.sets, encoder, folder, notes)
    mixture = [(found.entries.get(file.place, 0), found.weights.get(file.place, 1.0)) for file in train]
    prepared = _write(folder, source, _parts(encoder, encoded, mixture, notes), encoded, bad, notes)
    save(prepared)
    return prepared


def prepare_test_file(encoder: Encoder, source: str, target: Path, name: str = "test") -> PreparedData:
    """Tokenise another test file (or folder) into `target`/test.parquet as the set `name`, for a later evaluation.

    Raises DataError: as `prepare` does, or the run is one of item sequences.
    """
    if encoder.config.format == "sequences":
        raise DataError("a run of item sequences is measured on its own users only: leave out --data")
    encoder.check()
    # the config's own sets of that name have tasks of their own
    encoder = replace(encoder, config=encoder.config.model_copy(update={"validation": None, "test": None}))
    target.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    files = part_files(source, "test", encoder.config, notes)
    encoded, bad = _encode([], {"test": {name: files}}, encoder, target, notes)
    table = _finish(encoded["test"].rows)
    if not table.num_rows:
        raise DataError(f"{source}: no test row is left: {_arithmetic(encoded['test'])}")
    return _write(target, source, {"test": table}, encoded, bad, notes)


def cpus() -> int:
    """Tasks that Ray runs at once."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def _encode(
    train: Sequence[DataFile],
    sets: Mapping[str, Mapping[str, Sequence[DataFile]]],
    encoder: Encoder,
    folder: Path,
    notes: list[str],
) -> tuple[dict[str, Encoded], int]:
    """Rows of the parts that have files of their own (the others are cut from train later), and the number of bad records.

    sets: of validation and test, the files of each named set.
    """
    config = encoder.config
    if config.format == "sequences":
        encoded, bad = _encode_sequences(train, encoder, folder, notes)
    else:
        known = encoder if encoder.task is not None else encoder.for_task(config.task)
        firsts = [file for file in train if file.first][:_LOOKED_AT]
        notes += [note for file in firsts if (note := doubled_key(file))]
        encoded = {"train": encode_files(train, known, iter_records, held_out=False)} if train else {}
        for part in ("validation", "test"):
            own = config.held_out_sets(part)
            found = {}
            for name, files in sets.get(part, {}).items():
                form = known.for_task(own[name].task if name in own else None)
                found[name] = encode_files(shares(files, cpus()), form, iter_records, held_out=True)
            for name, rows in found.items():
                if not rows.rows.num_rows and len(found) > 1:
                    raise DataError(f"data.{part}.{name}: no row is left: {_arithmetic(rows)}")
            if found:
                encoded[part] = joined(found)
        bad = _quarantine({part: (rows.bad, rows.records) for part, rows in encoded.items()}, encoder, folder, notes)
    encoder.check_id(max(rows.largest_id for rows in encoded.values()))
    return encoded, bad


def _encode_sequences(
    files: Sequence[DataFile], encoder: Encoder, folder: Path, notes: list[str]
) -> tuple[dict[str, Encoded], int]:
    """Rows of all parts, leave-one-out, and the labels of the items, which are written to items.parquet."""
    found = scan(list(dict.fromkeys(replace(file, rows=None) for file in files)))
    bad = _quarantine({"train": (found.bad, found.records)}, encoder, folder, notes)
    labels = label_items(found.items, encoder.seed)
    write_items(labels, folder / ITEMS_FILE)
    notes.append(
        f"{found.users} users, {len(labels)} items with random numbers of {len(next(iter(labels.values()), ''))} digits (in "
        f"{ITEMS_FILE}); of each user the last item is a test row, the one before it a validation row"
    )
    encoded = {}
    for part in PARTS:
        read = SequenceReader(part, labels, found.left_out, encoder.config.sequences)
        encoded[part] = encode_files(files, encoder, read, held_out=part != "train")
        if part != "train":
            encoded[part].bad = found.bad  # each user is one row of this part
            encoded[part] = joined({part: encoded[part]})
    return encoded, bad


def _quarantine(
    bad: Mapping[str, tuple[list[dict[str, Any]], int]], encoder: Encoder, folder: Path, notes: list[str]
) -> int:
    """Write the bad rows of all sources, and note the first of them; returns their number.

    Raises DataError: a source has too many of them among its records.
    """
    target = folder / QUARANTINE
    with target.open("w", encoding="utf-8") as file:
        for rows, _ in bad.values():
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    allowed = encoder.config.max_bad_fraction
    for name, (rows, records) in bad.items():
        # rounded up to whole rows: a single bad row among few does not stop a run
        if len(rows) > math.ceil(allowed * records) or (rows and len(rows) == records):
            first = "\n".join(f"  {bad_row_text(row)}" for row in rows[:_SHOWN_BAD_ROWS])
            raise DataError(
                f"data.{name}: {len(rows)} of {records} rows are bad, more than data.max_bad_fraction "
                f"{allowed:g} allows, or none is left. The first:\n{first}\nAll of them: {target}"
            )
        notes += [f"bad: {bad_row_text(row)}" for row in rows[:_SHOWN_BAD_ROWS]]
    return sum(len(rows) for rows, _ in bad.values())


def _arithmetic(rows: Encoded) -> str:
    """How many of the records of a source are left, and why."""
    if not rows.records:
        return "its files hold no record; correct the path or fill them"
    return (
        f"of {rows.records} records {len(rows.bad)} are bad, {rows.too_long} have a prompt longer than "
        f"data.cutoff_tokens, {rows.records - len(rows.bad) - rows.too_long} are left"
    )


def _parts(
    encoder: Encoder, encoded: dict[str, Encoded], mixture: Sequence[tuple[int, float]], notes: list[str]
) -> dict[str, pa.Table]:
    """The tables as they are written: each part its own rows, or cut from the training rows. mixture: as `weighted` takes it."""
    config = encoder.config
    if not encoded["train"].rows.num_rows:
        raise DataError(f"data.train {config.train_text}: no row is left: {_arithmetic(encoded['train'])}")
    tables = {part: rows.rows for part, rows in encoded.items()}
    if config.format == "examples":
        tables = _cut(config, encoded, notes) | {part: tables[part] for part in encoded if part != "train"}
    tables["train"] = _joined(tables["train"], encoder, notes)
    if any(weight != 1 for _, weight in mixture):
        tables["train"] = weighted(tables["train"], mixture, encoder.seed)
        notes.append(f"{tables['train'].num_rows} training rows after the weights of data.train")
    if config.max_train_rows and config.max_train_rows < tables["train"].num_rows:
        notes.append(
            f"data.max_train_rows: the first {config.max_train_rows} of {tables['train'].num_rows} training rows, in the order "
            "of data.train: later files may have none"
        )
        tables["train"] = tables["train"].slice(0, config.max_train_rows)
    for part in ("validation", "test"):
        if part in encoded and not tables[part].num_rows:
            raise DataError(f"no {part} row is left: {_arithmetic(encoded[part])}")
    return {part: _finish(table) for part, table in tables.items()}


def _joined(rows: pa.Table, encoder: Encoder, notes: list[str]) -> pa.Table:
    """Training rows with the answers of a conversation in one row, where their tokens allow it."""
    made = joined_turns(rows, share=not encoder.encoder_decoder)
    conversations = int(first_rows(rows).sum())
    if conversations < rows.num_rows:
        notes.append(
            f"{rows.num_rows} assistant messages of {conversations} training records are trained on, in {made.num_rows} rows "
            "(data.train_on=last: the last ones alone)"
        )
    return made


def _cut(config: DataSection, encoded: dict[str, Encoded], notes: list[str]) -> dict[str, pa.Table]:
    """All parts cut from the training rows; a part that has files of its own gets none of them.

    The records are cut, by what is said before their last answers, so all rows of a conversation fall into one part. Held out, its
    last row stands for it, and no training conversation keeps a target that answers the same.
    """
    rows = encoded["train"].rows
    first, last = first_rows(rows), last_rows(rows)
    try:
        check_sizes(config, int(first.sum()), [part for part in PARTS[1:] if part not in encoded])
        of_record = cut(
            rows["key"].filter(pa.array(last)).to_pylist(),
            validation=0 if "validation" in encoded else config.validation_size,
            test=0 if "test" in encoded else config.test_size,
        )
    except DataError as error:
        raise DataError(f"{error} ({_arithmetic(encoded['train'])})") from None
    part_of = np.array(of_record, object)[np.cumsum(first) - 1]
    tables = {"train": rows.filter(pa.array(part_of == "train", pa.bool_()))}
    tables |= {part: named(rows.filter(pa.array((part_of == part) & last, pa.bool_())), part) for part in PARTS[1:]}
    held_out = pa.concat_tables([tables[part].select(["key"]) for part in PARTS[1:]])["key"].combine_chunks()
    answered = pc.is_in(tables["train"]["key"], value_set=held_out)
    if dropped := pc.sum(answered).as_py():  # of one prompt in two conversations: the last ones went by it
        notes.append(f"{dropped} earlier assistant messages answer what a held-out row asks, and are not trained on")
        tables["train"] = tables["train"].filter(pc.invert(answered))
    for part in [part for part in encoded if part != "train"]:
        own = encoded[part].rows["key"].combine_chunks()
        shared = pc.sum(pc.is_in(tables["train"]["key"], value_set=own)).as_py()
        if shared:
            notes.append(f"warning: {shared} training rows have a prompt that also stands in data.{part}")
    return tables


def weighted(rows: pa.Table, mixture: Sequence[tuple[int, float]], seed: int) -> pa.Table:
    """Each row as often as its weight says, in order; of a fraction a seeded choice of that share of its entry's rows.

    mixture: by the column `file`, the index of the entry of data.train and its weight. The choice is among the rows of an entry,
    not of a file or its share, so it does not depend on how many tasks read them. Each copy is a training row, and a record of
    the log, of its own.
    """
    entry = np.array([index for index, _ in mixture])[rows["file"].to_numpy()]
    times = np.zeros(len(entry), np.int64)
    for index, weight in dict(mixture).items():
        own = np.flatnonzero(entry == index)
        times[own] = int(weight)
        extra = round((weight - int(weight)) * len(own))
        times[np.random.default_rng([seed, index]).permutation(own)[:extra]] += 1
    return rows.take(pa.array(np.repeat(np.arange(len(entry)), times)))


def _finish(rows: pa.Table) -> pa.Table:
    """The columns of SCHEMA. sample_id numbers targets: a row with earlier ones has as many numbers."""
    if "set" not in rows.column_names:
        rows = rows.append_column("set", pa.nulls(rows.num_rows, pa.string()))
    if EARLIER not in rows.column_names:
        rows = rows.append_column(EARLIER, pa.nulls(rows.num_rows, pa.list_(pa.int32())))
    targets = 1 + pc.fill_null(pc.list_value_length(rows[EARLIER]), 0).to_numpy().astype(np.int64) // 2
    ids = pa.array(np.cumsum(targets) - targets, pa.int64())
    return rows.append_column("sample_id", ids).select(SCHEMA.names).cast(SCHEMA)


def _write(
    folder: Path,
    source: str,
    parts: Mapping[str, pa.Table],
    encoded: Mapping[str, Encoded],
    bad: int,
    notes: list[str],
) -> PreparedData:
    """Write the Parquet files, each with what is left out of it, and describe them."""
    for part, table in parts.items():
        own = encoded[part].sets if part in encoded else {}
        left_out = {name: asdict(LeftOut(too_long, bad)) for name, (too_long, bad) in own.items()}
        pq.write_table(
            table.replace_schema_metadata({LEFT_OUT: json.dumps(left_out).encode()}), folder / f"{part}.parquet"
        )
    return PreparedData(
        folder=folder,
        source=source,
        rows={part: parts[part].num_rows if part in parts else 0 for part in PARTS},
        quarantined=bad,
        too_long=sum(rows.too_long for rows in encoded.values()),
        long_turns=sum(rows.long_turns for rows in encoded.values()),
        cut_completions=sum(rows.cut_completions for rows in encoded.values()),
        records={part: rows.records for part, rows in encoded.items()},
        notes=notes,
    )
