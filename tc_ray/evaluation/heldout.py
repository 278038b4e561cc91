"""Held-out examples: the prepared validation or test file as token ids, prompts and gold answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tc_ray.data.prepared.folder import LeftOut
from tc_ray.data.source.records import read_prepared

_COLUMNS = ["sample_id", "input_ids", "target_start", "answer", "completion", "prompt"]


@dataclass(frozen=True)
class HeldOut:
    """One held-out example. answer: a completion is compared with it. input_ids[target_start:]: the gold tokens. prompt: the
    prompt's text, without the template."""

    sample_id: int
    input_ids: list[int]
    target_start: int
    answer: str
    prompt: str

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt as the model gets it at inference."""
        return self.input_ids[: self.target_start]


def read_counted(file: Path, limit: int | None = None) -> tuple[list[HeldOut], LeftOut]:
    """`read_held_out`, and how many of the given rows are missing from it."""
    return read_held_out(file, limit), LeftOut.read(file, limit)


def read_held_out(file: Path, limit: int | None = None) -> list[HeldOut]:
    """Rows of a prepared Parquet file; a row without `answer` is scored against its completion.

    Raises:
        ValueError: a row has neither. DamagedFileError: the file is no whole Parquet file of prepared rows.
    """
    rows = read_prepared(file, _COLUMNS).slice(0, limit).to_pylist()
    examples = []
    for number, row in enumerate(rows):
        answer = row["answer"] if row["answer"] is not None else row["completion"]
        if answer is None:
            raise ValueError(
                f"{file} row {number}: neither `answer` nor `completion`; there is nothing to score against"
            )
        examples.append(HeldOut(row["sample_id"], row["input_ids"], row["target_start"], answer, row["prompt"]))
    return examples
