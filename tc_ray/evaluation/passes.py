"""A pass: one model over the rows of one set, and the parts in which its results are kept.

Invariant: a part appears by a rename and holds every row of its batch, so parts of a killed evaluation count as they are. The
folder of a pass is named by a hash of all that decides its results, so a changed evaluation finds none. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tc_ray
from tc_ray.evaluation.rows import HeldOut, RowSet, rows_hash
from tc_ray.evaluation.sources import ModelSource
from tc_ray.evaluation.statistics import Choice
from tc_ray.files import write_file

Numbered = tuple[int, HeldOut]
"""A row and its place in its set."""


@dataclass(frozen=True)
class Pass:
    """What to compute for rows of one set with one model and each of `choices`.

    kind: `forced`: measures of the gold completion; `options`: of each option; `said`: completions; `ranked`: places of the
    answer among `labels`. A part's line is {"row": place in the set, "found": ...}, `found` as the function of the kind gives it.
    """

    kind: Literal["forced", "options", "said", "ranked"]
    source: ModelSource
    rows: RowSet
    choices: tuple[Choice, ...]
    feedback: str
    batch_size: int
    max_new_tokens: int = 0
    num_beams: int = 1
    beams: int = 0
    labels: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """20 hex digits over everything that decides the results; how rows are batched does not."""
        decides: list[Any] = [
            tc_ray.__version__,
            self.kind,
            self.source.weights,
            self.source.dtype,
            rows_hash(self.rows.rows),
        ]
        decides += [self.choices, self.max_new_tokens, self.num_beams, self.beams, self.labels]
        decides += [self.feedback if self.kind in ("said", "ranked") else ""]  # the others read true errors
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:20]

    @property
    def shown(self) -> str:
        """What is computed, for a line of progress."""
        lams = ", ".join(f"{lam:g} in {space} space" if lam else "0" for space, lam in self.choices)
        how = f", {len(self.choices)} lambdas" if len(self.choices) > 3 else f", lambda {lams}"
        work = {"said": "decoded", "ranked": "ranked"}.get(self.kind, "scored")
        return f"{self.source.name} on {self.rows.name}{how if self.source.copilot else ''} ({work})"


def read_parts(folder: Path) -> dict[int, Any]:
    """What the parts of a pass hold, by row. A part that cannot be read is removed and computed again."""
    found: dict[int, Any] = {}
    for part in sorted(folder.glob("*.jsonl")) if folder.is_dir() else ():
        try:
            lines = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
            found |= {line["row"]: line["found"] for line in lines}
        except (ValueError, KeyError, TypeError, RecursionError):
            part.unlink(missing_ok=True)
    return found


def write_part(folder: Path, found: Mapping[int, Any]) -> None:
    """Write what a batch gave, by row."""
    lines = "".join(json.dumps({"row": number, "found": one}) + "\n" for number, one in found.items())
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(repr(list(found)).encode()).hexdigest()[:16]
    write_file(folder / f"{name}.jsonl", lines.encode("utf-8", "backslashreplace"))
