"""The one place where the study meets the evaluation: a run folder is measured, and its row files are read as results.

Invariant: what the study counts with are the files that the evaluation leaves, `rows/<model>/<set>.jsonl` and `report.csv`. Called
by `work`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tc_ray.config.schema import RunConfig
from tc_ray.evaluation.rows import RowResult, RowSet, read_results, results_file
from tc_ray.evaluation.teacher_forced import Text
from tc_ray.models.copilot import Copilot
from tc_ray.models.fusion import fuse
from tc_ray.models.pilot.load import DTYPES, load_pilot
from tc_ray.run.evaluate import evaluate_part, item_labels, run_rows
from tc_ray.study.gold import MOVED, gold_sums, gold_tokens
from tc_ray.study.results import Answers, Model

FOLDERS = {"test": "evaluation", "validation": "evaluation-validation"}
"""Where the evaluation of a part is kept in a run folder."""


@dataclass(frozen=True)
class Held:
    """A Pilot of a run folder, with the rows that it is measured with. labels: items to rank."""

    pilot: Any
    tokenizer: Any
    rows: RowSet
    validation: RowSet
    labels: list[str]


def held(config: RunConfig, part: str) -> Held:
    """Load `pilot/final` of a run folder and the rows of a part, test or validation."""
    from transformers import AutoTokenizer

    torch.set_num_threads(max(1, int(max(config.resources.pilot_cpus, config.resources.copilot_cpus))))
    folder, place = config.run.path, config.run.path / "pilot" / "final"
    pilot = load_pilot(place, dtype=DTYPES[config.pilot.dtype]).eval()
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    rows, validation = rows_of(config, part)
    return Held(pilot.to(_device(config)), tokenizer, rows, validation, item_labels(folder, config))


def rows_of(config: RunConfig, part: str) -> tuple[RowSet, RowSet]:
    """The one set of a part of a run folder, and its validation rows.

    Raises ValueError: several sets; a place of a study's report shows one.
    """
    sets, validation = run_rows(config.run.path, config)
    if part == "validation":
        return validation, validation
    if len(sets) != 1:
        names = ", ".join(rows.name for rows in sets)
        raise ValueError(f"data.test has the sets {names}: in a study give each a task of its own")
    return sets[0], validation


def measure(config: RunConfig, part: str) -> dict[str, Model]:
    """Measure a run folder on its test or validation rows: its Pilot, and the fused model if it has a Copilot.

    Needs no CPU of its own: the evaluation has workers. Returns models by name, `pilot` and `fused`.
    """
    rows, _ = rows_of(config, part)
    out = config.run.path / FOLDERS[part]
    evaluate_part(config.run.path, config, part, out)
    return read_models(out, part, rows)


def read_models(folder: Path, part: str, rows: RowSet) -> dict[str, Model]:
    """The models of a run folder's evaluation: `pilot`, and `fused` if there are two."""
    lines = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text(encoding="utf-8"))))
    models = {}
    for line in lines:
        answers = answers_of(rows, read_results(results_file(folder, line["model"], line["set"])))
        if len(lines) == 1 or line["model"].endswith("/pilot"):
            models["pilot"] = Model({part: answers})
        else:
            ratio = float(line["error_ratio"]) if line["error_ratio"] else None
            models["fused"] = Model({part: answers}, lam=float(line["lam"]), space=line["space"], error_ratio=ratio)
    return models


def answers_of(rows: RowSet, results: Sequence[RowResult]) -> Answers:
    """Results of rows as they are kept."""
    texts = json.dumps([[row.prompt, row.answer] for row in rows.rows])
    columns = ([getattr(one, name) for one in results] for name in ("right", "score", "nll", "tokens"))
    left_out = rows.left_out.given(len(results)) - len(results)
    return Answers.of(rows.metric, hashlib.sha256(texts.encode()).hexdigest()[:16], left_out, *columns)


def with_correction(config: RunConfig, part: str, model: Model) -> Model:
    """The fused model, with how much probability its correction moves at a gold token; teacher-forced."""
    if not model.lam:
        return replace(model, correction=0.0)
    found = held(config, part)
    copilot: Copilot = Copilot.from_pretrained(config.run.path / "copilot" / "final", dtype=DTYPES[config.pilot.dtype])
    copilot = copilot.to(_device(config)).eval()
    texts = [Text(row.input_ids, row.target_start) for row in found.rows.rows]
    sums = gold_sums(
        gold_tokens(found.pilot, texts, copilot=copilot), len(texts), fused_by(model.space or "", model.lam)
    )
    tokens = sum(len(text.ids) - text.start for text in texts)
    return replace(model, correction=float(sums[:, MOVED].sum() / tokens) if tokens else None)


def fused_by(space: str, lam: float) -> Any:
    """Log-probabilities of the fused model, for `gold_sums`."""

    def adjusted(piece: Any) -> torch.Tensor:
        weights = torch.full((len(piece.f),), lam, device=piece.f.device)
        return fuse(piece.log_probs, piece.f, weights, space).log_softmax(-1)

    return adjusted


def _device(config: RunConfig) -> str:
    return "cuda" if config.resources.pilot_gpus else "cpu"
