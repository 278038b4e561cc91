"""The parts of a run's data: which reader gives the rows of train, validation and test, and what is left out of them.

Invariant: every bad record of a source is in the quarantine file once, and a source with too many of them stops the run
before its rows are used. Called by `prepare`; Ray must be running.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tc_ray.config.data import DataSection
from tc_ray.data.encode.encode import Encoded, encode_files
from tc_ray.data.source.errors import DataError
from tc_ray.data.source.find import PARTS
from tc_ray.data.source.records import Record, iter_records
from tc_ray.data.source.sequences import SequenceReader, Sequences, label_items, scan, write_items
from tc_ray.text import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN_BAD_ROWS = 5


class PartEncoder:
    """Reads, checks and tokenises the sources of a run; what is left out goes to the quarantine file.

    bad_rows: bad records, once `examples`, `sequences` or `labelled` has run.
    """

    def __init__(
        self,
        config: DataSection,
        tokenizer: PreTrainedTokenizerBase,
        quarantine: Path,
        seed: int,
        encoder_decoder: bool,
    ) -> None:
        self._config, self._tokenizer, self._quarantine = config, tokenizer, quarantine
        self._seed, self._encoder_decoder = seed, encoder_decoder
        self.bad_rows = 0

    def examples(self, sources: Mapping[str, Sequence[Path]]) -> dict[str, Encoded]:
        """Rows of the parts that have files of their own; every other part is cut from train later."""
        encoded = {part: self._encode(part, files, iter_records) for part, files in sources.items() if files}
        self._leave_out({part: (rows.bad, rows.records) for part, rows in encoded.items()})
        return encoded

    def sequences(self, files: Sequence[Path], items: Path, notes: list[str]) -> dict[str, Encoded]:
        """Rows of all parts, leave-one-out; the items get their labels, which are kept in `items`."""
        found = scan(files)
        self._leave_out({"train": (found.bad, found.records)})
        labels = label_items(found.items, self._seed)
        write_items(labels, items)
        notes.append(
            f"{found.users} users, {len(labels)} items with random numbers of {len(next(iter(labels.values()), ''))} "
            f"digits (in {items.name}); of each user the last item is a test row, the one before it a validation row"
        )
        return self._rows(files, found, labels, PARTS)

    def labelled(self, files: Sequence[Path], labels: Mapping[str, str], parts: Sequence[str]) -> dict[str, Encoded]:
        """Rows of some parts, with the labels of an earlier run."""
        found = scan(files, known=labels)
        self._leave_out({part: (found.bad, found.records) for part in parts})
        return self._rows(files, found, labels, parts)

    def _rows(
        self, files: Sequence[Path], found: Sequences, labels: Mapping[str, str], parts: Sequence[str]
    ) -> dict[str, Encoded]:
        config = self._config.sequences
        encoded = {
            part: self._encode(part, files, SequenceReader(part, labels, found.left_out, config)) for part in parts
        }
        for part in encoded.keys() & {"validation", "test"}:
            encoded[part].bad = found.bad  # a user is one row of them
        return encoded

    def _encode(self, part: str, files: Sequence[Path], read: Callable[[Path], Iterator[Record]]) -> Encoded:
        return encode_files(
            files,
            self._config,
            self._tokenizer,
            seed=self._seed,
            held_out=part != "train",
            encoder_decoder=self._encoder_decoder,
            read=read,
        )

    def _leave_out(self, bad: Mapping[str, tuple[list[dict[str, Any]], int]]) -> None:
        """Write the bad rows of all sources; raise DataError for a source where they are too many of its records."""
        with self._quarantine.open("w", encoding="utf-8") as file:
            for rows, _ in bad.values():
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        allowed = self._config.max_bad_fraction
        for name, (rows, records) in bad.items():
            # in whole rows: a single one among a few does not stop a run
            if len(rows) > math.ceil(allowed * records) or (rows and len(rows) == records):
                first = "\n".join(
                    f"  {row['file']}, {row['unit']} {row['place']}{', field ' + row['field'] if row['field'] else ''}: "
                    f"{row['problem']}; {row['fix']}"
                    for row in rows[:_SHOWN_BAD_ROWS]
                )
                raise DataError(
                    f"data.{name}: {len(rows)} of {records} rows are bad, more than data.max_bad_fraction "
                    f"{allowed:g} allows, or none is left. The first:\n{visible(first)}\nAll of them: {self._quarantine}"
                )
        self.bad_rows = sum(len(rows) for rows, _ in bad.values())
