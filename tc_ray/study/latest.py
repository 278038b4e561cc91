"""The log that a run would have left had its Pilot been the final one from the first round on (table 16).

Invariant: rows, rounds and their order are those of the run, and so is what is kept of each token; only the Pilot differs. No
weight changes. Called by `work` for the control `latest`.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch

from tc_ray.config.schema import RunConfig
from tc_ray.data.prepared.batches import TrainTable
from tc_ray.files import publish_folder, read_json, write_json
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tc_ray.models.pilot.load import DTYPES, load_pilot
from tc_ray.pilot.engine import pilot_step, step_inputs
from tc_ray.pilot.record import Recorder


def write_latest_log(config: RunConfig, run: Path, target: Path, rounds: int) -> float:
    """Write the log of `pilot/final` over the rounds of a finished run to `target`, unless it is there.

    config: of the run. It appears whole, by a rename. Returns the compute that it took, in seconds as those of a round.
    """
    cost = target.with_name("latest.json")
    if target.exists():
        return float(read_json(cost)["compute_seconds"])
    clock = time.monotonic if config.resources.pilot_gpus else time.process_time
    began = clock()
    made = target.with_name(f"{target.name}.new")
    shutil.rmtree(made, ignore_errors=True)
    metadata = LogStore(Location(run / "log")).metadata
    LogStore.create(Location(made), metadata)
    ledger = Ledger(made, writers=1, run=metadata.run)
    attempt = ledger.begin_attempt(0, 1)
    writer = RecordWriter(Location(made), ledger.commit, config.log, run=metadata.run, rank=0, attempt=attempt)
    try:
        _record(config, run, writer, rounds)
        writer.flush(rounds)
    finally:
        writer.close()
    ledger.finish_pilot(rounds)
    seconds = clock() - began
    write_json(cost, {"compute_seconds": seconds})
    publish_folder(made, target)
    return seconds


@torch.no_grad()
def _record(config: RunConfig, run: Path, writer: RecordWriter, rounds: int) -> None:
    device = torch.device("cuda" if config.resources.pilot_gpus else "cpu")
    pilot = load_pilot(run / "pilot" / "final", dtype=DTYPES[config.pilot.dtype]).to(device)
    step = pilot_step(pilot, config).eval()
    table, micro = TrainTable(run / "data" / "train.parquet"), config.pilot.micro_batch_size
    order = table.order(config)
    recorder = Recorder(writer, config.log, seed=config.run.seed, device=device)
    for number in range(1, rounds + 1):
        rows, seen = order.sample_rows(number), order.seen(number)
        for at in range(0, len(rows), micro):
            batch = table.batch(rows[at : at + micro])
            _, record = step(loss_scale=1.0, **step_inputs(batch, device))
            recorder.record(record, batch, seen[at : at + micro], number)
        recorder.end_round(number)
    step.close()
