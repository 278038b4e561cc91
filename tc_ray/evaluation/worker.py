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
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

import tc_ray
from tc_ray.data.encode.tokenize import completion_ids
from tc_ray.evaluation.decode import completions, rankings
from tc_ray.evaluation.item_trie import ItemTrie
from tc_ray.evaluation.rows import HeldOut, RowSet, rows_hash
from tc_ray.evaluation.sources import ModelSource, load_source
from tc_ray.evaluation.statistics import Choice
from tc_ray.evaluation.teacher_forced import TINY, Text, text_measures
from tc_ray.files import write_file

SHOWN_ITEMS = 5
"""Of a ranking, in the answer's text."""
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


class EvaluationWorker:
    """The actor. It keeps the model that it used last.

    threads: of torch. device: "cpu" or "cuda".
    """

    def __init__(self, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self._device = device
        self._held: tuple[str, Any, Any] | None = None

    def ready(self) -> int:
        """Its process."""
        return os.getpid()

    def compute(self, job: Pass, rows: Sequence[Numbered], folder: Path) -> dict[int, Any]:
        """Write the part of these rows into `folder`; returns what it holds."""
        made = _KINDS[job.kind](job, *self._model(job), [row for _, row in rows])
        found = {number: one for (number, _), one in zip(rows, made, strict=True)}
        lines = "".join(json.dumps({"row": number, "found": one}) + "\n" for number, one in found.items())
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(repr(list(found)).encode()).hexdigest()[:16]
        write_file(folder / f"{name}.jsonl", lines.encode("utf-8", "backslashreplace"))
        return found

    def _model(self, job: Pass) -> tuple[Any, Any]:
        key = f"{job.source.pilot} {job.source.copilot} {job.source.weights} {job.feedback}"
        if self._held is None or self._held[0] != key:
            self._held = None  # before the next one is loaded
            self._held = (key, *load_source(job.source, job.feedback, self._device))
        return self._held[1], self._held[2]


def _forced(job: Pass, model: Any, tokenizer: Any, rows: Sequence[HeldOut]) -> list[Any]:
    """[tokens, [[squared error, nats, tokens ranked first] of each choice]] of each row's gold completion."""
    texts = [Text(row.input_ids, row.target_start) for row in rows]
    measured = text_measures(model, texts, job.choices, batch_size=job.batch_size).tolist()
    return [[len(text.ids) - text.start, one] for text, one in zip(texts, measured, strict=True)]


def _options(job: Pass, model: Any, tokenizer: Any, rows: Sequence[HeldOut]) -> list[Any]:
    """The same of each option of each row."""
    ids = [(row.prompt_ids, completion_ids(option, tokenizer)) for row in rows for option in row.options]
    texts = [Text(prompt + option, len(prompt)) for prompt, option in ids]
    # options are compared with each other: of unlikely ones too, one is the likelier
    measured = text_measures(model, texts, job.choices, batch_size=job.batch_size, floor=TINY).tolist()
    found = iter([len(option), one] for (_, option), one in zip(ids, measured, strict=True))
    return [list(islice(found, len(row.options))) for row in rows]


def _said(job: Pass, model: Any, tokenizer: Any, rows: Sequence[HeldOut]) -> list[Any]:
    """The text of each choice for each row."""
    limits = {"max_new_tokens": job.max_new_tokens, "num_beams": job.num_beams}
    return completions(model, tokenizer, rows, job.choices, **limits)


def _ranked(job: Pass, model: Any, tokenizer: Any, rows: Sequence[HeldOut]) -> list[Any]:
    """[place of the answer from 1 (None: not ranked), the first labels] of each choice for each row."""
    labels = job.labels
    trie = ItemTrie([completion_ids(label, tokenizer) for label in labels])
    found: list[list[Any]] = [[] for _ in rows]
    for ranked in rankings(model, tokenizer, rows, job.choices, trie, beams=job.beams):
        for row, items, of_row in zip(rows, ranked, found, strict=True):
            said = [labels[item] for item in items]
            place = said.index(row.answer) + 1 if row.answer in said else None
            of_row.append([place, " ".join(said[:SHOWN_ITEMS])])
    return found


_KINDS = {"forced": _forced, "options": _options, "said": _said, "ranked": _ranked}
