"""Held-out rows as the evaluation reads them, and what each model made of them, row by row, as it writes it.

Invariant: the results of a set stand in the order of its rows, whatever order they were computed in. The report's numbers
follow from these files alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tc_ray.config.data import DataSection
from tc_ray.config.section import Metric
from tc_ray.data.encode.tokenize import completion_ids, prompt_ids, text_ids
from tc_ray.data.prepared.folder import LeftOut
from tc_ray.data.source.records import read_prepared
from tc_ray.data.source.shapes import Turn
from tc_ray.files import DamagedFileError, finite, typed, write_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLUMNS = ["sample_id", "input_ids", "target_start", "answer", "completion", "prompt", "options", "set"]


@dataclass(frozen=True)
class HeldOut:
    """One held-out row. input_ids[target_start:]: the gold tokens, none without a completion. answer: what a completion is
    compared with. prompt: its text, without the template; "" of a text alone. options: completions to choose from."""

    sample_id: int
    input_ids: list[int]
    target_start: int
    answer: str
    prompt: str
    completion: str | None = None
    options: tuple[str, ...] = ()

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt as the model gets it at inference."""
        return self.input_ids[: self.target_start]


@dataclass(frozen=True)
class RowSet:
    """Rows that are measured alike. source: what they are, for the report. option_by: what ranks options (metric choice)."""

    name: str
    metric: Metric
    rows: Sequence[HeldOut]
    source: str
    left_out: LeftOut = field(default_factory=LeftOut)
    option_by: str = "sum"


@dataclass(frozen=True)
class RowResult:
    """One model on one row.

    row: its place in the set, from 0. right: None where the metric knows no right and wrong. score: higher is better. said:
    what it answered. Teacher-forced, of the row's gold tokens (None and 0 without any): nll, nats per token; squared_error, the
    sum over tokens; first: tokens that were ranked first. measures: further measures by name.
    """

    row: int
    id: int
    right: bool | None
    score: float
    nll: float | None
    tokens: int
    said: str
    squared_error: float | None = None
    first: int = 0
    measures: dict[str, float] = field(default_factory=dict)


def read_sets(file: Path, limit: int | None = None) -> dict[str, list[HeldOut]]:
    """Rows of a prepared Parquet file by the name of their set, up to `limit` of each; one without answer has its completion.

    Raises ValueError: a row has neither. DamagedFileError: the file is no whole Parquet file of prepared rows.
    """
    found: dict[str, list[HeldOut]] = {}
    for number, row in enumerate(read_prepared(file, _COLUMNS).to_pylist()):
        answer = row["answer"] if row["answer"] is not None else row["completion"]
        if answer is None:
            raise ValueError(
                f"{file} row {number}: neither `answer` nor `completion`; there is nothing to score against"
            )
        rows = found.setdefault(row["set"], [])
        if limit is None or len(rows) < limit:
            ids, options = row["input_ids"], tuple(row["options"] or ())
            of_row = row["sample_id"], ids, row["target_start"], answer, row["prompt"], row["completion"], options
            rows.append(HeldOut(*of_row))
    return found


def encoded_for(
    rows: Sequence[HeldOut],
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    encoder_decoder: bool,
    read_by: PreTrainedTokenizerBase,
) -> list[HeldOut]:
    """The rows for another model, by its own tokenizer and prompt form. None is left out, so that models can be compared.

    read_by: the tokenizer that they have. Of a completion that was cut, the same text is measured.
    """
    made = []
    for row in rows:
        if row.prompt:
            ids = prompt_ids((Turn("user", row.prompt),), config, tokenizer, encoder_decoder)
            gold = [] if row.completion is None else completion_ids(row.completion, tokenizer)
        else:
            ids, gold = text_ids(row.completion or "", tokenizer)
        if gold and row.input_ids[-1] != read_by.eos_token_id:
            gold = completion_ids(read_by.decode(row.input_ids[row.target_start :]), tokenizer)[:-1]
        made.append(replace(row, input_ids=ids + gold, target_start=len(ids)))
    return made


def rows_hash(rows: Sequence[HeldOut]) -> str:
    """16 hex digits over everything of the rows that decides a result."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.input_ids, row.target_start, row.answer, row.options]).encode())
    return digest.hexdigest()[:16]


def results_file(folder: Path, model: str, name: str) -> Path:
    """Where the results of a model on a set stand in the folder of an evaluation."""
    return folder / "rows" / model.replace("/", "--") / f"{name}.jsonl"


def write_results(file: Path, results: Sequence[RowResult]) -> None:
    """Write or replace a file of results, a line per row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(finite(asdict(result)), allow_nan=False) + "\n" for result in results)
    write_file(file, "".join(lines))


def read_results(file: Path) -> list[RowResult]:
    """Results that `write_results` wrote. Raises DamagedFileError: a line holds none."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise DamagedFileError(f"{file} is damaged: {error}") from None
    return [typed(line, RowResult, file) for line in lines]
