"""Records: the rows of the Mistake Log in memory, as flat ragged arrays.

One record is one training example of one round. Variable lengths are kept as one flat array and offsets, so that states, most
of the bytes, go to Arrow and Parquet without a copy and come back as views. Invariant (`validate`): offsets, lengths and widths agree, each
of `input_ids[target_start:]` is a target token, and the stored hidden states belong to consecutive positions that end at S-2, the
position that predicts the last token. Made by the Pilot's step, read by the Copilot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa

from tc_ray.mistakelog.rows.ragged import (
    Array,
    binary_array,
    flat_column,
    flat_index,
    lengths_of,
    list_arrays,
    listed_errors,
    offsets_of,
    plain_column,
    vocabulary_order,
)
from tc_ray.mistakelog.rows.schema import PREFIX, ROW_SCHEMA, SCHEMA_VERSION, LogSchemaError
from tc_ray.mistakelog.rows.states import StateType, state_columns, states_of

_DTYPES: dict[str, type[np.generic]] = {
    "round": np.int64,
    "rank": np.int32,
    "attempt": np.int32,
    "sample_id": np.int64,
    "seen": np.int16,
    "input_ids": np.int32,
    "seq_offsets": np.int64,
    "target_start": np.int32,
    "rationale": np.uint16,
    "rationale_offsets": np.int64,
    "error_ids": np.int32,
    "error_values": np.float32,
    "error_rest": np.float32,
    "token_loss": np.float32,
    "token_correct": np.bool_,
    "target_offsets": np.int64,
}
_PER_RECORD = ("round", "rank", "attempt", "sample_id", "seen", "target_start")
_RAGGED = {
    "seq_offsets": ("input_ids",),
    "rationale_offsets": ("rationale",),
    "target_offsets": ("error_ids", "error_values", "error_rest", "token_loss", "token_correct"),
}
_LISTS = tuple(f.name for f in ROW_SCHEMA if pa.types.is_list(f.type) and f.name != "rationale_scale")
# Arrow's plain list and binary arrays, the only ones that Delta knows, have 32-bit offsets: longer columns become chunks
_CHUNK_LIMIT = 2**31 - 1


@dataclass
class Records:
    """N records. `sum S`, `positions` and `sum n` are totals over the records; record i owns `offsets[i]:offsets[i+1]`."""

    round: Array
    """int64 [N], 1-based Pilot optimizer step."""
    rank: Array
    """int32 [N], Pilot worker."""
    attempt: Array
    """int32 [N]."""
    sample_id: Array
    """int64 [N]."""
    seen: Array
    """int16 [N], how often the Pilot trained on this sample before."""
    input_ids: Array
    """int32 [sum S], prompt and completion."""
    seq_offsets: Array
    """int64 [N+1] into `input_ids`."""
    target_start: Array
    """int32 [N]; targets of a record are its `input_ids[target_start:]`."""
    rationale: Array
    """uint16 [positions, layers, dim], bf16 bits, C order (a flat array of that size is accepted and reshaped)."""
    rationale_offsets: Array
    """int64 [N+1] in positions. The P states of a record belong to its positions S-1-P .. S-2."""
    rationale_layers: int
    rationale_dim: int
    error_ids: Array
    """int32 [sum n, k+1], true token first."""
    error_values: Array
    """float32 [sum n, k+1], `onehot(truth) - p` at `error_ids`."""
    error_rest: Array
    """float32 [sum n], predicted mass of the tokens not listed."""
    token_loss: Array
    """float32 [sum n], negative log-likelihood in nats."""
    token_correct: Array
    """bool [sum n], the true token was ranked first."""
    target_offsets: Array
    """int64 [N+1] into the arrays of target tokens."""
    question: Array | None = None
    """uint16 [sum of target_start, dim], bf16 bits: one encoder state per source position. None if X~ follows from the ids
    (decoder-only)."""
    error: Literal["top-k", "dense"] = "top-k"
    """dense: k + 1 = V, the others by id, error_rest is 0; in the table the V values are in vocabulary order."""
    rationale_dtype: StateType = "bf16"
    """As the table holds `rationale`; in memory it is bf16 in each case."""

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            if array.dtype != dtype:
                raise ValueError(f"records.{name}: expected a numpy array of {np.dtype(dtype)}, got {array.dtype}")
            setattr(self, name, np.ascontiguousarray(array))
        width = self.rationale_layers * self.rationale_dim
        if width <= 0 or self.rationale.size % width:
            raise ValueError(
                f"records.rationale: {self.rationale.size} values are not a whole number of positions of "
                f"{self.rationale_layers} layers x {self.rationale_dim}"
            )
        self.rationale = self.rationale.reshape(-1, self.rationale_layers, self.rationale_dim)
        if self.question is not None:
            if self.question.dtype != np.uint16 or self.question.size % self.rationale_dim:
                raise ValueError(f"records.question: expected uint16 states of width {self.rationale_dim}")
            self.question = np.ascontiguousarray(self.question).reshape(-1, self.rationale_dim)

    def __len__(self) -> int:
        return len(self.round)

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(getattr(self, name).nbytes for name in _DTYPES) + (
            self.question.nbytes if self.question is not None else 0
        )

    @property
    def question_offsets(self) -> Array:
        """int64 [N+1] into `question`: one state per source position, and a record has target_start of these."""
        return offsets_of(self.target_start.astype(np.int64))

    @property
    def top_k(self) -> int:
        """Errors listed per target token besides that of the true token."""
        return int(self.error_ids.shape[1]) - 1

    def validate(self) -> None:
        """Check the invariant of this module. Raises ValueError, which names the field, and the record if one is wrong."""
        count = len(self)
        for name in _PER_RECORD:
            if getattr(self, name).shape != (count,):
                raise ValueError(f"records.{name}: shape {getattr(self, name).shape}, expected ({count},)")
        if self.error_ids.ndim != 2 or self.error_ids.shape[1] < 1 or self.error_ids.shape != self.error_values.shape:
            raise ValueError(
                f"records.error_ids {self.error_ids.shape} and error_values {self.error_values.shape}: "
                "expected the same shape [target tokens, k+1]"
            )
        for offsets_name, arrays in _RAGGED.items():
            offsets = getattr(self, offsets_name)
            if offsets.shape != (count + 1,):
                raise ValueError(f"records.{offsets_name}: shape {offsets.shape}, expected ({count + 1},)")
            if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
                raise ValueError(f"records.{offsets_name}: must start at 0 and never fall")
            for name in arrays:
                if len(array := getattr(self, name)) != offsets[-1]:
                    raise ValueError(f"records.{name}: length {len(array)}, but {offsets_name} ends at {offsets[-1]}")
        sequence, positions, targets = (lengths_of(getattr(self, name)) for name in _RAGGED)
        _check(sequence >= 1, "input_ids: empty sequence", self)
        start = self.target_start.astype(np.int64)
        _check((start >= 1) & (start <= sequence), "target_start: outside 1..len(input_ids)", self)
        _check(
            targets == sequence - start, "target_offsets: target tokens differ from len(input_ids) - target_start", self
        )
        if self.error == "dense" and not np.array_equal(self.error_ids[:, 0], self._true_ids()):
            raise ValueError("records.error_ids: dense errors must list the true token first")
        _check(
            (positions <= sequence - 1) & (positions >= targets),
            "rationale_offsets: states must end at position len(input_ids) - 2 and reach every target token",
            self,
        )
        if self.question is not None and len(self.question) != start.sum():
            raise ValueError(
                f"records.question: {len(self.question)} states for {start.sum()} source positions (sum of target_start)"
            )

    def select(self, indices: Array | Sequence[int]) -> Records:
        """A copy of the records at `indices`, in that order, repeats allowed."""
        chosen = np.asarray(indices, dtype=np.int64)
        parts: dict[str, Array] = {name: getattr(self, name)[chosen] for name in _PER_RECORD}
        for offsets_name, arrays in _RAGGED.items():
            offsets = getattr(self, offsets_name)
            starts, lengths = offsets[chosen], lengths_of(offsets)[chosen]
            parts[offsets_name] = offsets_of(lengths)
            flat = flat_index(starts, lengths)
            parts.update({name: getattr(self, name)[flat] for name in arrays})
        if self.question is not None:
            offsets = self.question_offsets
            parts["question"] = self.question[flat_index(offsets[chosen], lengths_of(offsets)[chosen])]
        return replace(self, **parts)  # type: ignore[arg-type]

    @classmethod
    def concat(cls, parts: Sequence[Records], *, states: bool = True) -> Records:
        """One Records with the records of all parts, in order (a copy, except of a single part).

        Args:
            states: False: without rationale and question, which are most of the bytes.

        Raises ValueError if parts differ in layers, width, k, kind of error, or in having a question.
        """
        if len(parts) == 1 and states:
            return parts[0]
        names = ("rationale_layers", "rationale_dim", "rationale_dtype", "top_k", "error")
        shapes = {(*(getattr(part, name) for name in names), part.question is not None) for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"records differ in ({', '.join(names)}, question): {sorted(shapes)}")
        joined = {
            name: offsets_of(np.concatenate([lengths_of(getattr(part, name)) for part in parts]))
            if name in _RAGGED
            else np.concatenate([getattr(part, name) for part in parts])
            for name in _DTYPES
            if states or not name.startswith("rationale")
        }
        if not states:
            count = sum(len(part) for part in parts)
            nothing = {"rationale": np.zeros(0, np.uint16), "rationale_offsets": np.zeros(count + 1, np.int64)}
            return replace(parts[0], **joined, **nothing, question=None)  # type: ignore[arg-type]
        questions = [part.question for part in parts if part.question is not None]
        question = np.concatenate(questions) if questions else None
        return replace(parts[0], **joined, question=question)  # type: ignore[arg-type]

    def to_arrow(self, run: str) -> pa.Table:
        """Rows of `ROW_SCHEMA`. Large columns are views: do not change the arrays while the table lives.

        The table has several chunks if a column would pass 2 GiB. Its schema metadata holds what `from_arrow` needs.
        """
        self.validate()
        batches = [self._batch(run, first, last) for first, last in self._chunks()]
        return pa.Table.from_batches(batches, schema=ROW_SCHEMA).replace_schema_metadata(self.arrow_metadata())

    @classmethod
    def join_to_arrow(cls, parts: Sequence[Records], run: str) -> pa.Table:
        """As `to_arrow` of `concat(parts)`, but no state is copied: their columns have a chunk for each part.

        For a few megabytes of small parts, which were validated: Arrow takes 0.3 ms for the columns of each table.
        """
        if len(parts) == 1:
            return parts[0].to_arrow(run)
        whole = cls.concat(parts, states=False)
        columns = whole._columns(run, 0, len(whole))
        states = [part._state_columns(0, len(part)) for part in parts]
        columns |= {name: pa.chunked_array([column[name] for column in states]) for name in states[0]}
        table = pa.Table.from_arrays([columns[name] for name in ROW_SCHEMA.names], schema=ROW_SCHEMA)
        return table.replace_schema_metadata(parts[0].arrow_metadata())

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """First record and the one after the last of parts that one Arrow array can hold."""
        limits = [
            self.rationale_offsets * (self.rationale_layers * self.rationale_dim * 2),
            self.target_offsets * (self.top_k + 1),
        ]
        if self.question is not None:
            limits.append(self.question_offsets * (self.rationale_dim * 2))
        first, count = 0, len(self)
        while first < count:
            ends = [int(np.searchsorted(limit, limit[first] + _CHUNK_LIMIT, side="right")) - 1 for limit in limits]
            last = min(*ends, count)
            if last <= first:
                raise ValueError(f"record {first} (sample_id {self.sample_id[first]}) alone passes 2 GiB in one column")
            yield first, last
            first = last

    def arrow_metadata(self) -> dict[str, str]:
        """The widths that rows alone do not show, keyed as in the table's configuration."""
        names = ("rationale_layers", "rationale_dim", "rationale_dtype", "top_k", "error")
        question = "ids" if self.question is None else "states"
        stored = {name: getattr(self, name) for name in names} | {
            "question": question,
            "schema_version": SCHEMA_VERSION,
        }
        return {PREFIX + name: str(value) for name, value in stored.items()}

    def _true_ids(self) -> Array:
        """int32 [sum n]: `input_ids[target_start:]` of record after record."""
        starts = self.seq_offsets[:-1] + self.target_start
        return self.input_ids[flat_index(starts, self.seq_offsets[1:] - starts)]

    def _batch(self, run: str, first: int, last: int) -> pa.RecordBatch:
        columns = self._columns(run, first, last) | self._state_columns(first, last)
        return pa.RecordBatch.from_arrays([columns[name] for name in ROW_SCHEMA.names], schema=ROW_SCHEMA)

    def _state_columns(self, first: int, last: int) -> dict[str, pa.Array]:
        """The columns that hold states, over the memory of the arrays (int8: made of them)."""
        question = pa.nulls(last - first, pa.binary())
        if self.question is not None:
            asked = self.question_offsets[first : last + 1]
            asked_bytes = ((asked - asked[0]) * (self.rationale_dim * 2)).astype(np.int32)
            question = binary_array(asked_bytes, self.question[asked[0] : asked[-1]].reshape(-1))
        columns = state_columns(self.rationale, self.rationale_offsets[first : last + 1], self.rationale_dtype)
        return columns | {"question": question}

    def _columns(self, run: str, first: int, last: int) -> dict[str, pa.Array]:
        """All other columns."""
        rows = last - first
        width = self.top_k + 1
        seq, target = self.seq_offsets[first : last + 1], self.target_offsets[first : last + 1]
        columns = {name: pa.array(getattr(self, name)[first:last]) for name in _PER_RECORD}
        columns["run"] = pa.repeat(run, rows)
        columns["input_ids"] = list_arrays([self.input_ids], seq)[0]
        columns["rationale_layers"] = pa.array(np.full(rows, self.rationale_layers, np.int16))
        if self.error == "dense":
            part = slice(target[0], target[-1])
            values = vocabulary_order(self.error_ids[part], self.error_values[part])
            columns["error_ids"] = list_arrays([self.error_ids[:0].reshape(-1)], np.zeros(rows + 1, np.int64))[0]
            columns["error_values"] = list_arrays([values.reshape(-1)], (target - target[0]) * width)[0]
        else:
            listed = ("error_ids", "error_values")
            flat = [getattr(self, name).reshape(-1) for name in listed]
            columns |= zip(listed, list_arrays(flat, target * width), strict=True)
        single = ("error_rest", "token_loss", "token_correct")
        columns |= zip(single, list_arrays([getattr(self, name) for name in single], target), strict=True)
        return columns

    @classmethod
    def from_arrow(cls, table: pa.Table, metadata: Mapping[str, str] | None = None) -> Records:
        """Inverse of `to_arrow`; views of the table if it has one chunk.

        Args:
            table: rows of `ROW_SCHEMA`, in any column order.
            metadata: the table's configuration; default: the schema metadata that `to_arrow` set.

        Raises LogSchemaError: a width is unknown, a column is missing, or a cell does not fit the widths.
        """
        if metadata is None:
            metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        widths = [metadata.get(PREFIX + key) for key in ("rationale_layers", "rationale_dim", "top_k")]
        present = set(table.column_names)
        absent = [name for name in ROW_SCHEMA.names if name not in present]
        if None in widths or absent:
            raise LogSchemaError(
                f"these rows lack {absent}: read all columns"
                if absent
                else "these rows came without tc_ray.* widths: read them with MistakeLog.records, or pass metadata="
            )
        layers, dim, top_k = (int(width) for width in widths if width is not None)
        dense = metadata.get(PREFIX + "error") == "dense"
        if not table.schema.equals(
            ROW_SCHEMA
        ):  # of a small piece of a file the cast would cost as much as all the rest
            table = table.select(ROW_SCHEMA.names).cast(ROW_SCHEMA)
        ragged = {name: flat_column(table.column(name)) for name in _LISTS}
        question = None
        if metadata.get(PREFIX + "question") == "states":
            values, offsets = flat_column(table.column("question"))
            starts = np.asarray(table.column("target_start").to_numpy(), np.int64)
            if not np.array_equal(lengths_of(offsets), starts * dim * 2):
                raise LogSchemaError(f"column question: a cell is not target_start x {dim} bf16 values")
            question = values.view(np.uint16)
        # an error list of another length than (k+1) times its targets would shift every later record
        for name in ("error_ids", "error_values", "token_loss", "token_correct"):
            per_target = top_k + 1 if name.startswith("error_") else 1
            if dense and name == "error_ids":
                per_target = 0
            if not np.array_equal(ragged[name][1], ragged["error_rest"][1] * per_target):
                raise LogSchemaError(f"column {name}: list lengths do not fit error_rest and top_k={top_k}")
        kind: StateType = "int8" if metadata.get(PREFIX + "rationale_dtype") == "int8" else "bf16"
        rationale, rationale_offsets = states_of(table, layers, dim, kind)
        scalars = {name: plain_column(table, name, _DTYPES[name]) for name in _PER_RECORD}
        made = cls(
            **scalars,
            input_ids=ragged["input_ids"][0],
            seq_offsets=ragged["input_ids"][1],
            rationale=rationale,
            rationale_offsets=rationale_offsets,
            rationale_layers=layers,
            rationale_dim=dim,
            error_ids=ragged["error_ids"][0].reshape(-1, 1 if dense else top_k + 1),
            error_values=ragged["error_values"][0].reshape(-1, top_k + 1),
            error_rest=ragged["error_rest"][0],
            token_loss=ragged["token_loss"][0],
            token_correct=ragged["token_correct"][0],
            target_offsets=ragged["error_rest"][1],
            question=question,
            error="dense" if dense else "top-k",
            rationale_dtype=kind,
        )
        if dense:
            true = made._true_ids()
            if len(true) != len(made.error_rest) or (len(true) and int(true.max()) > top_k):
                raise LogSchemaError(f"column error_values: not {top_k + 1} values for each token after target_start")
            made.error_ids, made.error_values = listed_errors(made.error_values, true)
        return made


def _check(good: Array, message: str, records: Records) -> None:
    if not good.all():
        bad = np.flatnonzero(~good)
        raise ValueError(
            f"records.{message} (record {bad[0]}, sample_id {records.sample_id[bad[0]]}, {len(bad)} in all)"
        )
