"""What an evaluation worker does: one batch of rows of a pass, computed and written whole, then named as done.

Invariant: a part appears by a rename and holds every row of its batch, so parts of a killed evaluation count as they are. The
folder of a pass is named by a hash of all that decides its results, so a changed evaluation finds none. Called by `pool`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
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
    answer among `labels`. A part's line is {"row": place in the set, "found": ...}, `found` as the methods of `_Work` give it.
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
        lams = ", ".join(f"{lam:g}" if not lam else f"{lam:g} in {space} space" for space, lam in self.choices)
        if self.source.copilot is None:
            how = ""
        elif len(self.choices) > 3:
            how = f", {len(self.choices)} lambdas"
        else:
            how = f", lambda {lams}"
        work = {"forced": "scored", "options": "scored", "said": "decoded", "ranked": "ranked"}[self.kind]
        return f"{self.source.name} on {self.rows.name}{how} ({work})"


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


class EvaluationWorker:
    """The actor. It keeps the model that it used last.

    threads: of torch. device: "cpu" or "cuda".
    """

    def __init__(self, threads: int, device: str) -> None:
        import torch

        torch.set_num_threads(threads)
        self._device = device
        self._held: tuple[str, Any, Any] | None = None

    def ready(self) -> int:
        """Its process."""
        return os.getpid()

    def compute(self, job: Pass, rows: Sequence[Numbered], folder: Path) -> dict[int, Any]:
        """Write the part of these rows into `folder`; returns what it holds."""
        work = _Work(job, *self._model(job), [row for _, row in rows])
        made = {"forced": work.forced, "options": work.options, "said": work.said, "ranked": work.ranked}[job.kind]()
        found = {number: one for (number, _), one in zip(rows, made, strict=True)}
        lines = "".join(json.dumps({"row": number, "found": one}) + "\n" for number, one in found.items())
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(repr(list(found)).encode()).hexdigest()[:16]
        write_file(folder / f"{name}.jsonl", lines.encode("utf-8", "backslashreplace"))
        return found

    def _model(self, job: Pass) -> tuple[Any, Any]:
        from tc_ray.evaluation.sources import load_source

        key = f"{job.source.pilot} {job.source.copilot} {job.source.weights} {job.feedback}"
        if self._held is None or self._held[0] != key:
            self._held = None  # before the next one is loaded
            self._held = (key, *load_source(job.source, job.feedback, self._device))
        return self._held[1], self._held[2]


class _Work:
    """One batch. The methods give one entry per row."""

    def __init__(self, job: Pass, model: Any, tokenizer: Any, rows: Sequence[HeldOut]) -> None:
        self._job, self._model, self._tokenizer, self._rows = job, model, tokenizer, rows

    def forced(self) -> list[Any]:
        """[tokens, [[squared error, nats, tokens ranked first] of each choice]] of the gold completion."""
        from tc_ray.evaluation.teacher_forced import Text, text_measures

        texts = [Text(row.input_ids, row.target_start) for row in self._rows]
        measured = text_measures(self._model, texts, self._job.choices, batch_size=self._job.batch_size)
        return [[len(text.ids) - text.start, one.tolist()] for text, one in zip(texts, measured, strict=True)]

    def options(self) -> list[Any]:
        """The same of each option."""
        from tc_ray.data.encode.tokenize import completion_ids
        from tc_ray.evaluation.teacher_forced import TINY, Text, text_measures

        texts = [
            Text(row.prompt_ids + completion_ids(option, self._tokenizer), row.target_start)
            for row in self._rows
            for option in row.options
        ]
        # options are compared with each other: of unlikely ones too, one is the likelier
        measured = text_measures(self._model, texts, self._job.choices, batch_size=self._job.batch_size, floor=TINY)
        pairs = iter(zip(texts, measured.tolist(), strict=True))
        return [
            [[len(text.ids) - text.start, one] for text, one in (next(pairs) for _ in row.options)]
            for row in self._rows
        ]

    def said(self) -> list[Any]:
        """The text of each choice."""
        from tc_ray.evaluation.decode import completions

        job = self._job
        return completions(
            self._model,
            self._tokenizer,
            self._rows,
            job.choices,
            max_new_tokens=job.max_new_tokens,
            num_beams=job.num_beams,
        )

    def ranked(self) -> list[Any]:
        """[place of the answer from 1 (None: not ranked), the first labels] of each choice."""
        from tc_ray.data.encode.tokenize import completion_ids
        from tc_ray.evaluation.decode import rankings
        from tc_ray.evaluation.item_trie import ItemTrie

        job, labels = self._job, self._job.labels
        trie = ItemTrie([completion_ids(label, self._tokenizer) for label in labels])
        number_of = {label: number for number, label in enumerate(labels)}
        found: list[list[Any]] = [[] for _ in self._rows]
        for ranked in rankings(self._model, self._tokenizer, self._rows, job.choices, trie, beams=job.beams):
            for row, items, of_row in zip(self._rows, ranked, found, strict=True):
                wanted = number_of[row.answer]
                place = items.index(wanted) + 1 if wanted in items else None
                of_row.append([place, " ".join(labels[item] for item in items[:SHOWN_ITEMS])])
        return found


SHOWN_ITEMS = 5
