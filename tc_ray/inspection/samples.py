"""Single samples as the Pilot saw them: every visit to a sample, which samples show what training does, and JSON lines of all.

Invariant: a visit is one row of the log. An exported file is complete: it is written beside its name and renamed at the end,
and nothing that exists is replaced. Used by `tc-ray log show` and `export`, and by the report.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tc_ray.files import sync
from tc_ray.inspection.charts import level
from tc_ray.inspection.rows import UNKNOWN, Rows, stream
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.ragged import Array

_T = TypeVar("_T")
OTHERS = 3
"""Tokens besides the true one that are shown for each target token."""


class SampleNotFoundError(LookupError):
    """The log has no row of the sample; the message says what it has."""


class ExportError(ValueError):
    """The export cannot be made as asked; the message says what to change."""


@dataclass(frozen=True)
class Visit:
    """One sample in one round. prompt: int32, the ids before the first target token. Arrays over its n target tokens: see `Rows`."""

    sample_id: int
    round: int
    seen: int
    prompt: Array
    truth: Array
    error: Array
    others: Array
    p_others: Array
    loss: Array
    correct: Array

    @property
    def result(self) -> str:
        """How often the Pilot had trained on the sample before; mean loss and mistakes."""
        when = f"trained on {self.seen} time{'s' * (self.seen > 1)} before" if self.seen else "first visit"
        return f"{when}: loss {self.mean_loss:.3f}, {self.wrong} of {len(self.truth)} tokens missed"

    @property
    def mean_loss(self) -> float:
        """Nats per target token; 0 without any."""
        return float(self.loss.mean(dtype=np.float64)) if len(self.loss) else 0.0

    @property
    def wrong(self) -> int:
        """Target tokens not ranked first."""
        return int((~self.correct).sum())

    def p_true(self, place: int) -> float:
        """Probability of the true token; from the loss, which keeps the digits of small ones."""
        return math.exp(-float(self.loss[place]))

    def likely(self, place: int) -> list[tuple[int, float]]:
        """Id and probability of the likeliest tokens besides the true one."""
        listed = zip(self.others[place].tolist(), self.p_others[place].tolist(), strict=True)
        return [(token, p) for token, p in listed if token != UNKNOWN]

    def tokens(self, texts: TokenTexts, most: int | None = None) -> Iterator[tuple[str, int, str | None, str]]:
        """The answer token by token, at most `most` of them: its text (bare ids are set apart by blanks), the level of its
        error, what was ranked first instead (None: it was), and its numbers in words.
        """
        for place, token in enumerate(self.truth[:most].tolist()):
            others = " | ".join(f"{texts.quoted(other)} {percent(p)}" for other, p in self.likely(place))
            title = (
                f"token {place + 1}: true {texts.quoted(token)} {percent(self.p_true(place))}, "
                f"loss {float(self.loss[place]):.2f} nats; others: {others or 'none in the log'}"
            )
            instead = None if self.correct[place] else texts.quoted(int(self.others[place, 0]))
            text = texts.flowing(token) + ("" if texts.known else " ")
            yield text, level(float(self.error[place])), instead, title


def percent(share: float) -> str:
    """A share as a percentage of three digits, or four near 100%: 0.03%, 42.1%, 99.98%."""
    return f"{100.0 * float(share):.{4 if share > 0.99 else 3}g}%"


def find_visits(
    log: MistakeLog, samples: Sequence[int], rounds: tuple[int, int] | None = None
) -> dict[int, list[Visit]]:
    """All visits to some samples, by round.

    Args:
        rounds: first and last round, both included; None: all.
    """
    found: dict[int, list[Visit]] = {int(sample): [] for sample in samples}
    if found:
        for rows in stream(log, rounds, others=OTHERS, samples=list(found)):
            for visit in visits_in(rows):
                found[visit.sample_id].append(visit)
    for visits in found.values():
        visits.sort(key=lambda visit: visit.round)
    return found


def visits_of(log: MistakeLog, sample: int, round: int | None = None) -> list[Visit]:
    """The visits to one sample.

    Raises SampleNotFoundError: there is none (in that round).
    """
    visits = find_visits(log, [sample])[sample]
    if not visits:
        ids = np.asarray(log.arrow(columns=["sample_id"])["sample_id"])
        has = f"its samples are {ids.min()} to {ids.max()}, {len(np.unique(ids))} in all" if len(ids) else "it is empty"
        spoilt = sum(log.not_finite.values())
        left_out = f"; rows with numbers that are not finite are not shown: {spoilt}" if spoilt else ""
        raise SampleNotFoundError(f"the log has no row of sample {sample}; {has}{left_out}")
    chosen = [visit for visit in visits if round is None or visit.round == round]
    if not chosen:
        rounds = ", ".join(str(visit.round) for visit in visits)
        raise SampleNotFoundError(f"sample {sample} was not trained on in round {round}, but in {rounds}")
    return chosen


def visits_in(rows: Rows) -> Iterator[Visit]:
    """Each row as a visit. Its arrays are copies: views would keep the whole file in memory."""
    for i in range(len(rows)):
        part = slice(int(rows.target_offsets[i]), int(rows.target_offsets[i + 1]))
        start = int(rows.seq_offsets[i])
        prompt = rows.input_ids[start : start + int(rows.target_start[i])].copy()
        arrays = {n: getattr(rows, n)[part].copy() for n in ("truth", "error", "others", "p_others", "loss", "correct")}
        yield Visit(int(rows.sample_id[i]), int(rows.round[i]), int(rows.seen[i]), prompt, **arrays)


def thinned(many: Sequence[_T], most: int) -> list[_T]:
    """At most `most` of them, evenly spread, the first and the last among them."""
    if len(many) <= most:
        return list(many)
    return [many[round(i * (len(many) - 1) / (most - 1))] for i in range(most)]


def across_epochs(samples: Any, each: int) -> list[tuple[str, int]]:
    """(what it shows, sample id) of `each` samples whose loss fell most over repeated visits, and of those where it rose most."""
    repeated = samples[samples.visits > 1]
    fell = repeated.first_loss - repeated.last_loss
    order = np.argsort(-fell, kind="stable")
    learned, worse = order[:each], order[::-1][:each]
    shown = [("learned", i) for i in learned if fell[i] > 0] + [("got worse", i) for i in worse if fell[i] < 0]
    return [(label, int(repeated.sample_id[i])) for label, i in shown]


def export_jsonl(log: MistakeLog, out: Path, texts: TokenTexts, rounds: tuple[int, int] | None = None) -> int:
    """One JSON object per row, see `as_line`; returns their number. Rows with a NaN or an infinity are left out, and counted in
    `log.not_finite`.

    Args:
        rounds: first and last round, both included; None: all.

    Raises ExportError: `out` exists, or a file of the log is damaged: an export that lacks rows would look whole.
    """
    if out.exists():
        raise ExportError(f"{out} exists already: choose another name, or remove it")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    written = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for rows in stream(log, rounds, others=OTHERS):
                written += len(rows)
                for visit in visits_in(rows):
                    line = {"run": log.metadata.run, **as_line(visit, texts)}
                    file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        if log.bad_files:
            names = ", ".join(str(bad) for bad in log.bad_files[:3])
            raise ExportError(
                f"{len(log.bad_files)} files of the log are damaged ({names}): nothing was exported; "
                "tc-ray log verify --quarantine takes them out of the log"
            )
        sync(temporary)
        temporary.rename(out)
        sync(out.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def as_line(visit: Visit, texts: TokenTexts) -> dict[str, Any]:
    """A visit as JSON values. tokens: one object per target token; `instead`: the likeliest others."""
    return {
        "round": visit.round,
        "sample_id": visit.sample_id,
        "seen": visit.seen,
        "loss": visit.mean_loss,
        "wrong": visit.wrong,
        "prompt": texts.sequence(visit.prompt.tolist()),
        "answer": texts.sequence(visit.truth.tolist()),
        "input_ids": [*visit.prompt.tolist(), *visit.truth.tolist()],
        "target_start": len(visit.prompt),
        "tokens": [
            {
                "id": token,
                "text": texts.raw(token),
                "p": visit.p_true(place),
                "error": float(visit.error[place]),
                "loss": float(visit.loss[place]),
                "correct": bool(visit.correct[place]),
                "instead": [{"id": other, "text": texts.raw(other), "p": p} for other, p in visit.likely(place)],
            }
            for place, token in enumerate(visit.truth.tolist())
        ],
    }
