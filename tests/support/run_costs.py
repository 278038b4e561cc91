"""A run folder as a Tracker leaves one, with times chosen by the test: for `tc-ray report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tc_ray.config.load import save_config
from tc_ray.config.log import LogSection
from tc_ray.config.schema import RunConfig
from tc_ray.files import write_json
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import metadata, random_records

Line = dict[str, Any]


def measured(kind: str, time: float, round: int = 0, step: int | None = None, **metrics: float) -> Line:
    """A line of metrics.jsonl."""
    return {"kind": kind, "time": time, "round": round, **({} if step is None else {"step": step}), "metrics": metrics}


def make_run(folder: Path, lines: Sequence[Line], *, name: str = "trial", state: str = "done", **sections: Any) -> Path:
    """A folder with config.yaml, status.json and metrics.jsonl; sections: of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = RunConfig.model_validate({"run": {"name": name, "folder": folder}, **sections})
    save_config(config, folder / "config.yaml")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = max(line["time"] for line in lines)
    parts: dict[str, Any] = {part: {} for part in ("plan", "pilot", "copilot", "error_ratio", "log")}
    status = {"run": name, "state": state, "phase": state, "started": lines[0]["time"], "updated": last}
    write_json(folder / "status.json", {**status, **parts, "events": [], "restarts": 0})
    return folder


def usual_lines(*, rounds: int = 6, log: bool = True, round_seconds: float = 2.0) -> list[Line]:
    """One start from 1000 on: 10 s until the Tracker; each round 2 s with a Copilot that takes 3 steps of 1 s for it."""
    lines: list[Line] = [{"kind": "start", "time": 1010.0, "round": 0, "began": 1000.0}]
    lines += [measured("time", 1010.0, ray=4.0, prepare=5.0, data=3.0), measured("time", 1010.5, open_run=0.5)]
    lines += [measured("time", 1018.0, **{"pilot load": 6.0}), measured("memory", 1018.0, driver=5e8)]
    for number in range(1, rounds + 1):
        more = {"log_blocked_seconds": 0.25 * number} if log else {}
        lines.append(
            measured(
                "pilot",
                1018 + round_seconds * number,
                number,
                round_seconds=round_seconds,
                tokens=100,
                loss=1 / number,
                **more,
            )
        )
    end = 1018 + round_seconds * rounds
    for step in range(1, 3 * rounds + 1) if log else ():
        at = {"step_seconds": 1.0, "tokens": 40.0, "loss": 1 / step}
        lines.append(measured("copilot", 1020.0 + step, step // 3, step, **at))
    lines += [
        measured("time", end + 1, rounds, **{"pilot checkpoints": 1.0}),
        measured("time", end + 2, rounds, train_pilot=24.0),
    ]
    lines += [measured("memory", end + 2, rounds, **{"pilot-0": 2e9}), measured("time", 1050.0, rounds, evaluate=7.5)]
    return lines


def write_log(folder: Path, rounds: int, rows: int = 4) -> int:
    """A real log of so many rounds in `folder`/log; its bytes."""
    store = LogStore.create(folder / "log", metadata())
    ledger = Ledger(store.location, writers=1, run="test")
    settings = LogSection(flush_rounds=2)
    attempt = ledger.begin_attempt(0, 1)
    writer = RecordWriter(store.location, ledger.commit, settings, run="test", rank=0, attempt=attempt)
    for number in range(1, rounds + 1):
        writer.put(random_records(rows, round=number, attempt=attempt), number)
        writer.end_round(number)
    writer.flush(rounds)
    writer.close()
    return ledger.state().bytes
