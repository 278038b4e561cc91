"""Results of cells as small JSON files, which a repository can hold: answers as bits in hex, NLL of each row rounded.

Invariant: a file appears whole, under its cell's key. What is read back is what the report counts with, so a cell that was
measured here and one whose file came from elsewhere give the same report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tc_ray.files import DamagedFileError, finite, read_json, typed, write_json

NLL_DIGITS = 4
"""Of the NLL of a row: 0.0001 nats are far below what two seeds differ by."""


@dataclass(frozen=True)
class Answers:
    """One model on the rows of one set.

    rows_id: hash of the rows' texts, equal where two models answered the same rows in the same order. right: hex of bits.
    score: None where it is `right` as a number. nll: nats per gold token of each row; tokens: gold tokens of each row.
    """

    metric: str
    rows: int
    rows_id: str
    left_out: int
    right: str
    score: list[float] | None
    nll: list[float | None]
    tokens: list[int]

    @staticmethod
    def of(
        metric: str,
        rows_id: str,
        left_out: int,
        right: Sequence[bool | None],
        score: Sequence[float],
        nll: Sequence[float | None],
        tokens: Sequence[int],
    ) -> Answers:
        """From rows. A row without an answer that could be judged is not right."""
        bits = np.packbits(np.array([bool(one) for one in right])).tobytes().hex()
        plain = all(float(bool(one)) == value for one, value in zip(right, score, strict=True))
        scores = None if plain else [round(value, NLL_DIGITS) for value in score]
        return Answers(metric, len(right), rows_id, left_out, bits, scores, rounded(nll), list(tokens))

    @property
    def correct(self) -> list[bool]:
        """Row by row."""
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(self.right), np.uint8), count=self.rows)
        return [bool(bit) for bit in bits]

    @property
    def scores(self) -> list[float]:
        """What counts, row by row."""
        return [float(right) for right in self.correct] if self.score is None else self.score

    @property
    def value(self) -> float:
        """Mean score."""
        return sum(self.scores) / self.rows

    @property
    def mean_nll(self) -> float | None:
        """Nats per gold token over all rows; None: no row has gold tokens."""
        known = [(nll * n, n) for nll, n in zip(self.nll, self.tokens, strict=True) if nll is not None and n]
        return sum(total for total, _ in known) / sum(n for _, n in known) if known else None


def rounded(nll: Sequence[float | None]) -> list[float | None]:
    """NLL of rows as it is kept."""
    return [None if value is None else round(value, NLL_DIGITS) for value in nll]


@dataclass(frozen=True)
class Model:
    """A model of a cell. lam, space: of the fusion, None for a Pilot. temperature: of the control of that name.

    error_ratio, correction: teacher-forced, over gold tokens: E||p - p~||^2 / E||p - p^||^2, and how much probability the
    correction moves on average.
    """

    sets: dict[str, Answers]
    lam: float | None = None
    space: str | None = None
    temperature: float | None = None
    error_ratio: float | None = None
    correction: float | None = None


@dataclass(frozen=True)
class Result:
    """What a finished cell leaves.

    settings: fields that differ from the defaults. pilot_seconds, copilot_seconds: of the processors (on GPUs: of time), over
    all workers, that the training of what it shows took, whichever cell did it. made: versions, machine, time, command.
    """

    key: str
    kind: str
    name: str
    settings: dict[str, Any]
    models: dict[str, Model]
    pilot_seconds: float
    copilot_seconds: float
    rounds: int
    pilot_parameters: int
    copilot_parameters: int
    wall_seconds: float
    made: dict[str, str] = field(default_factory=dict)

    @property
    def compute_share(self) -> float:
        """Compute of the Copilot as a share of the Pilot's."""
        return self.copilot_seconds / self.pilot_seconds if self.pilot_seconds else 0.0

    def save(self, folder: Path) -> None:
        """Write `<key>.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{self.key}.json", finite(asdict(self)), indent=None)


def find_result(key: str, folders: Sequence[Path]) -> Result | None:
    """The result of a cell from the first folder that has it. Raises DamagedFileError."""
    for folder in folders:
        file = folder / f"{key}.json"
        try:
            return typed(read_json(file), Result, file)
        except FileNotFoundError:
            continue
        except DamagedFileError as error:
            raise DamagedFileError(f"{error}. Remove it, and the cell is run again") from None
    return None


def without_folders(value: Any) -> Any:
    """Of an absolute path its name: a result may be published, and where a file lay is nobody's business."""
    if isinstance(value, dict):
        return {name: without_folders(inner) for name, inner in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
