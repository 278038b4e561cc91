"""Read the Parquet files that a run has prepared. Used by `train_table`, `sequences` and `evaluation.heldout`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tc_ray.files import DamagedFileError
from tc_ray.text import first_line


def read_prepared(file: Path, columns: Sequence[str]) -> pa.Table:
    """These columns of a file.

    Raises:
        DamagedFileError: it is absent, not a whole Parquet file, or has other columns; the message says what to do.
    """
    try:
        return pq.read_table(file, columns=list(columns), partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise DamagedFileError(
            f"{file} is damaged or absent ({first_line(error)}): `tc-ray train` with the same recipe prepares it anew"
        ) from error
