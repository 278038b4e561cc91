"""The one place where the study meets the evaluation: a run folder is measured, and its row files are read as results.

Invariant: what the study counts with are the files that the evaluation leaves: `evaluation/rows/<model>/<set>.jsonl`, a line for
each row, and `evaluation/report.csv`, a line for each model and set. Called by `work`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tc_ray.config.schema import RunConfig
from tc_ray.data.source.sequences import ITEMS_FILE, read_items
from tc_ray.evaluation.decode import HeldOut, read_counted
from tc_ray.evaluation.metric import ExactMatch, Metric, Outcome
from tc_ray.evaluation.procedure import evaluate
from tc_ray.evaluation.ranking import Ranking
from tc_ray.files import write_file
from tc_ray.models.copilot import Copilot
from tc_ray.models.fusion import FusedModel, fuse
from tc_ray.models.pilot.load import DTYPES, load_pilot
from tc_ray.study.gold import GoldMeasures, GoldTokens, gold_measures, gold_tokens
from tc_ray.study.results import Answers, Model

GOLD_BATCH = 8
"""Rows of a teacher-forced pass: their log-probabilities over the whole vocabulary are held at once."""
_COLUMNS = ("model", "set", "metric", "rows", "left_out", "value", "nll", "error_ratio", "lam", "space")


@dataclass(frozen=True)
class Held:
    """A Pilot of a run folder with the rows that it is measured with, and how."""

    pilot: Any
    metric: Metric
    rows: list[HeldOut]
    left_out: int
    validation: list[HeldOut]

    @property
    def rows_id(self) -> str:
        """Hash of the rows' texts."""
        texts = json.dumps([[row.prompt, row.answer] for row in self.rows])
        return hashlib.sha256(texts.encode()).hexdigest()[:16]

    def answers(self, name: str, outcome: Outcome, gold: GoldMeasures) -> Answers:
        """Of a model without row files."""
        return Answers.of(name, self.rows_id, self.left_out, outcome.right, outcome.score, gold.nll, gold.tokens)


def held(config: RunConfig, part: str) -> Held:
    """Load `pilot/final` of a run folder, and its rows. part: test or validation."""
    from transformers import AutoTokenizer

    torch.set_num_threads(max(1, int(max(config.resources.pilot_cpus, config.resources.copilot_cpus))))
    folder, fusion = config.run.path, config.fusion
    pilot = load_pilot(folder / "pilot" / "final", dtype=DTYPES[config.pilot.dtype])
    tokenizer = AutoTokenizer.from_pretrained(folder / "pilot" / "final", trust_remote_code=False)
    limits = {"test": fusion.max_test_rows, "validation": fusion.max_validation_rows}
    read = {name: read_counted(folder / "data" / f"{name}.parquet", limit) for name, limit in limits.items()}
    rows, left_out = read[part]
    ranking = fusion.metric == "ranking"
    metric: Metric = (
        Ranking(tokenizer, fusion, read_items(folder / "data" / ITEMS_FILE))
        if ranking
        else ExactMatch(tokenizer, fusion)
    )
    device = "cuda" if config.resources.gpus else "cpu"
    return Held(pilot.to(device), metric, rows, left_out.given(len(rows)) - len(rows), read["validation"][0])


def measure(config: RunConfig, part: str) -> dict[str, Model]:
    """Measure a run folder on its test or validation rows: its Pilot, and the fused model if it has a Copilot.

    Returns models by name, `pilot` and `fused`.
    """
    found = held(config, part)
    evaluate_folder(config, found, part)
    models = read_models(config.run.path / "evaluation", part, found.rows_id)
    fused = models.get("fused")
    return models | ({"fused": replace(fused, correction=moved(config, found, fused))} if fused else {})


def read_models(folder: Path, part: str, rows_id: str) -> dict[str, Model]:
    """The models of a run folder's evaluation: `pilot`, and `fused` if there are two.

    Raises ValueError: several sets; a place of a study's report shows one.
    """
    lines = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text(encoding="utf-8"))))
    if len({line["set"] for line in lines}) > 1:
        raise ValueError(f"{folder}: data.{part} names several sets; give each a task of its own in the study")
    models = {}
    for line in lines:
        file = folder / "rows" / line["model"].replace("/", "--") / f"{line['set']}.jsonl"
        rows = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
        columns = ([row[name] for row in rows] for name in ("right", "score", "nll", "tokens"))
        sets = {part: Answers.of(line["metric"], rows_id, int(line["left_out"]), *columns)}
        if len(lines) == 1 or line["model"].endswith("/pilot"):
            models["pilot"] = Model(sets)
        else:
            ratio = float(line["error_ratio"]) if line["error_ratio"] else None
            models["fused"] = Model(sets, lam=float(line["lam"]), space=line["space"], error_ratio=ratio)
    return models


def moved(config: RunConfig, found: Held, model: Model) -> float | None:
    """Probability that the correction moves at a gold token, on average; teacher-forced."""
    if not model.lam:
        return 0.0
    copilot = _copilot(config)
    pieces = gold_tokens(found.pilot, found.rows, batch_size=GOLD_BATCH, copilot=copilot)
    return gold_measures(pieces, len(found.rows), fused_by(model.space or "", model.lam)).correction


def evaluate_folder(config: RunConfig, found: Held, part: str) -> None:
    """Evaluate a run folder and leave its row files. Lambda and space are chosen on validation rows."""
    name, kept = config.run.name, _Kept(found.metric)
    lines: list[dict[str, Any]] = []
    metric = config.fusion.metric

    def line(model: str, outcome: Outcome, gold: GoldMeasures, **more: Any) -> None:
        file = config.run.path / "evaluation" / "rows" / model.replace("/", "--") / f"{part}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        columns = (outcome.right, outcome.score, gold.nll, gold.tokens, outcome.said)
        rows = [
            {"row": i, "id": found.rows[i].sample_id}
            | dict(zip(("right", "score", "nll", "tokens", "said"), values, strict=True))
            for i, values in enumerate(zip(*columns, strict=True))
        ]
        write_file(file, "".join(json.dumps(row) + "\n" for row in rows))
        of_set = {"model": model, "set": part, "metric": metric, "rows": len(rows), "left_out": found.left_out}
        value = sum(outcome.score) / len(rows)
        lines.append(of_set | {"value": value, "error_ratio": gold.error_ratio} | more)

    def gold(adjusted: Any = None, copilot: Any = None) -> GoldMeasures:
        pieces = gold_tokens(found.pilot, found.rows, batch_size=GOLD_BATCH, copilot=copilot)
        return gold_measures(pieces, len(found.rows), adjusted)

    if not (config.run.path / "copilot" / "final").is_dir():
        line(name, found.metric.outcome(found.pilot, found.rows, None), gold())
    else:
        copilot = _copilot(config)
        fused = FusedModel.join(found.pilot, copilot, feedback=config.fusion.feedback).to(found.pilot.device)
        report = evaluate(fused, kept, config.fusion, test=found.rows, validation=found.validation, data=part)
        chosen = gold(fused_by(report.space, report.lam), copilot)
        line(name, kept.of(found.rows, report.lam, report.space), chosen, lam=report.lam, space=report.space)
        line(f"{name}/pilot", kept.of(found.rows, 0.0, report.space), gold())
    written = io.StringIO()
    table = csv.DictWriter(written, _COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    write_file(config.run.path / "evaluation" / "report.csv", written.getvalue())


def _copilot(config: RunConfig) -> Copilot:
    copilot: Copilot = Copilot.from_pretrained(config.run.path / "copilot" / "final", dtype=DTYPES[config.pilot.dtype])
    return copilot.to("cuda" if config.resources.gpus else "cpu").eval()


def fused_by(space: str, lam: float) -> Callable[[GoldTokens], torch.Tensor]:
    """Log-probabilities of the fused model, for `gold_measures`."""

    def adjusted(piece: GoldTokens) -> torch.Tensor:
        assert piece.f is not None
        weights = torch.full((len(piece.f),), lam, device=piece.f.device)
        return fuse(piece.log_probs, piece.f, weights, space).log_softmax(-1)

    return adjusted


class _Kept:
    """A metric that keeps what it found."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self.right_name, self.score_name, self.measures = metric.right_name, metric.score_name, metric.measures
        self._found: dict[tuple[int, float | None, str | None], Outcome] = {}

    def outcome(self, model: Any, examples: Sequence[HeldOut], lam: float | None) -> Outcome:
        self._found[id(examples), lam, model.space if lam else None] = found = self._metric.outcome(
            model, examples, lam
        )
        return found

    def of(self, examples: Sequence[HeldOut], lam: float, space: str) -> Outcome:
        """The outcome of these rows."""
        return self._found[id(examples), lam, space if lam else None]
