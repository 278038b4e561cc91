"""Row schema and table metadata of the Mistake Log.

One row is one training example of one round. Invariant: what a row alone does not show (widths, k, which hidden states) is in the
table's configuration under `tc_ray.`; a reader refuses another schema version. Used by every other module of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

import pyarrow as pa

SCHEMA_VERSION = 3
PREFIX = "tc_ray."

ROW_SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("attempt", pa.int32()),
        ("round", pa.int64()),
        ("rank", pa.int32()),
        ("sample_id", pa.int64()),
        # how often the Pilot trained on this sample before this round
        ("seen", pa.int16()),
        ("input_ids", pa.list_(pa.int32())),
        # targets are input_ids[target_start:]
        ("target_start", pa.int32()),
        # bf16 bits [target_start, dim], the encoder's output; null where X~ follows from the ids (decoder-only)
        ("question", pa.binary()),
        # bf16 bits (or int8), C order [positions, layers, dim]; the last position is len(input_ids) - 2
        ("rationale", pa.binary()),
        # int8: a number is its int8 times the scale of its state [positions, layers]; null with bf16
        ("rationale_scale", pa.list_(pa.float32())),
        ("rationale_layers", pa.int16()),
        # top_k + 1 entries per target token, row after row; dense errors: no ids, and V values in vocabulary order
        ("error_ids", pa.list_(pa.int32())),
        ("error_values", pa.list_(pa.float32())),
        # one entry per target token
        ("error_rest", pa.list_(pa.float32())),
        ("token_loss", pa.list_(pa.float32())),
        ("token_correct", pa.list_(pa.bool_())),
    ]
)
"""Arrow schema of a row. Delta knows neither fixed-size lists nor half floats nor unsigned integers."""


class LogSchemaError(ValueError):
    """The table is not a Mistake Log, has another schema version, or differs from what this run would write."""


@dataclass(frozen=True)
class LogMetadata:
    """What holds for every row of a log."""

    run: str
    """The run that writes the log."""
    pilot: str
    """Model id or folder of the Pilot."""
    tokenizer_hash: str
    """Of the tokenizer that made `input_ids`."""
    vocab_size: int
    """Width V of the Pilot's logits."""
    rationale_dim: int
    """Width d of one stored hidden state."""
    rationale_layers: int
    """Hidden states stored per position: 1 if pooled."""
    pooling: Literal["mean", "max", "sum", "none"]
    """mean, max, sum: one state per position, pooled over layers; none: every stored layer by itself."""
    tap: str
    """Which hidden states, before or after the final norm, in words; compared verbatim."""
    positions: Literal["all", "target"]
    """Positions with stored states: all before the last, or those that predict a target token."""
    top_k: int
    """Errors listed per target token besides that of the true token; V - 1 if dense."""
    question: Literal["ids", "states"] = "ids"
    """Where X~ comes from. ids: input_ids and the Pilot's embedding; states: the column `question`."""
    layers: str = "all"
    """Decoder layers, from 0, whose states are stored or pooled: all, or numbers with commas."""
    error: Literal["top-k", "dense"] = "top-k"
    """top-k: the largest errors with their ids; dense: all V, in vocabulary order."""
    train_rows: str = ""
    """Hash of the prepared rows that `sample_id` numbers. This and the hashes below are empty in a log that no run has written."""
    validation_rows: str = ""
    """Hash of the rows on which lambda is chosen."""
    test_rows: str = ""
    """Hash of the rows on which the run is evaluated."""
    pilot_weights: str = ""
    """Hash of the weights that the Pilot starts from."""
    copilot_weights: str = ""
    """Hash of the weights that the Copilot's layers start from."""
    rationale_dtype: Literal["bf16", "int8"] = "bf16"
    """How the column `rationale` holds states: bf16 bits, or int8 with a scale for each state in `rationale_scale`."""
    schema_version: int = SCHEMA_VERSION

    def to_configuration(self) -> dict[str, str]:
        """Keys and values for the Delta table's configuration."""
        return {PREFIX + key: str(value) for key, value in asdict(self).items()}

    @classmethod
    def from_configuration(cls, configuration: Mapping[str, str | None], where: str) -> LogMetadata:
        """Inverse of `to_configuration`; keys of others are ignored.

        Args:
            where: path of the table, for messages.

        Raises LogSchemaError: not a Mistake Log, an unknown schema version, or a key is missing.
        """
        version = configuration.get(PREFIX + "schema_version")
        if version is None:
            raise LogSchemaError(f"{where}: no {PREFIX}schema_version in the table's configuration: not a Mistake Log")
        if version != str(SCHEMA_VERSION):
            raise LogSchemaError(
                f"{where}: Mistake Log schema version {version}, but this tc-ray reads version {SCHEMA_VERSION}; "
                "read it with the tc-ray that wrote it"
            )
        values: dict[str, str | int] = {}
        for field in fields(cls):
            raw = configuration.get(PREFIX + field.name)
            if raw is None:
                raise LogSchemaError(f"{where}: {PREFIX}{field.name} is missing in the table's configuration")
            values[field.name] = int(raw) if field.type == "int" else raw
        return cls(**values)  # type: ignore[arg-type]

    def differences(self, other: LogMetadata) -> list[str]:
        """Human-readable differences from another log's metadata; empty when rows of both may share a table."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{key}: {theirs[key]!r} in the table, {mine[key]!r} here" for key in mine if mine[key] != theirs[key]]
