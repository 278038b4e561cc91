"""What an evaluation worker does: one batch of rows of a pass, computed and written whole, then named as done. Started by `pool`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tc_ray.cluster.measure import peak_memory
from tc_ray.data.encode.tokenize import completion_ids
from tc_ray.evaluation.decode import completions, rankings
from tc_ray.evaluation.item_trie import ItemTrie
from tc_ray.evaluation.passes import Numbered, Pass, write_part
from tc_ray.evaluation.rows import HeldOut
from tc_ray.evaluation.sources import load_source
from tc_ray.evaluation.teacher_forced import TINY, Text, text_measures

SHOWN_ITEMS = 5
"""Of a ranking, in the answer's text."""


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

    def peak_memory(self, name: str) -> dict[str, float]:
        """Of its process, as `name`."""
        return peak_memory(name)

    def compute(self, job: Pass, rows: Sequence[Numbered], folder: Path) -> dict[int, Any]:
        """Write the part of these rows into `folder`; returns what it holds."""
        made = _KINDS[job.kind](job, *self._model(job), [row for _, row in rows])
        found = {number: one for (number, _), one in zip(rows, made, strict=True)}
        write_part(folder, found)
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
