"""The first phases of a run: check its models, prepare its rows, then open its log and its tracking.

Invariant: a run that is refused for its models, data or inputs has written nothing but its run folder, so its settings may be
corrected. `config.yaml` is saved only after that. Called by `run.job`.
"""

from __future__ import annotations

from typing import Any

from tc_ray.config.load import save_config
from tc_ray.files import write_json
from tc_ray.mistakelog.table.lease import RunLease
from tc_ray.run.evaluate import check_measurable
from tc_ray.run.inputs import (
    COMMITS_FILE,
    base_weights,
    check_inputs,
    fetch_models,
    prepare_rows,
    recorded_inputs,
    used_rows,
)
from tc_ray.run.state import JobError, Prepared, Run
from tc_ray.text import first_line, visible


def prepare(run: Run) -> None:
    """Leaves `run.prepared` and the rows in `data/`, which are those of earlier starts.

    Raises:
        JobError: a model cannot be used, or nothing would be measured. DataError: see `prepare_rows`. OtherInputsError: the
            run was started with other rows or weights.
    """
    from tc_ray.data.prepared.batches import RoundOrder, TrainTable
    from tc_ray.models.families import family_of

    config, pilot = run.config, run.config.pilot
    pilot_path, base_path, commits = fetch_models(config, run.folder)
    tokenizer, model_config = _read_model(config.model.pilot, pilot_path)
    encoder_decoder = family_of(model_config).encoder_decoder
    _check_models(run, model_config, pilot_path, base_path)
    recorded = recorded_inputs(config, run.folder, run.log)
    weights = base_weights(config, pilot_path, base_path)
    check_inputs(config, recorded, weights)
    if commits:
        write_json(run.folder / COMMITS_FILE, commits)
    with run.timed("data"):
        data, rows = prepare_rows(
            config, tokenizer, recorded, encoder_decoder=encoder_decoder, vocab_size=model_config.vocab_size
        )
    _print(*data.describe())
    data.check_rounds(pilot.batch_size)
    if config.log.enabled and not data.rows["test"]:
        raise JobError("no test rows to measure with: set data.test or a data.test_size above 0")
    if pilot.validate_every is not None and not len(TrainTable(data.file("validation"), held_out=True).with_target()):
        raise JobError(
            "pilot.validate_every: no validation row has a completion; set data.validation or data.validation_size, or leave "
            "validate_every out"
        )
    order = RoundOrder(data.rows["train"], pilot.batch_size, pilot.epochs, config.run.seed)
    rounds = min(order.rounds, pilot.max_rounds or order.rounds)
    if config.log.enabled:
        check_measurable(config)
    run.prepared = Prepared(pilot_path, base_path, tokenizer, model_config, data, rows | weights, rounds)
    _print(
        f"run {config.run.name} in {run.folder}: {rounds} rounds of {pilot.batch_size} examples, "
        f"{config.copilot.steps_per_round} Copilot steps per round"
    )


def open_run(run: Run) -> None:
    """Leaves `run.ledger` (None without a log), `run.lease`, `run.tracker` and config.yaml."""
    from tc_ray.tracking.tracker import start_tracker

    if run.config.log.enabled:
        _open_log(run)
    save_config(run.config, run.folder / "config.yaml")
    plan = {"rounds_total": run.prepared.rounds, "copilot_steps_total": run.copilot_steps}
    used = used_rows(run.config, run.prepared.data, run.prepared.inputs)
    run.tracker = start_tracker(run.config, run.folder, plan, used, run.began)


def _read_model(name: str, path: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        return (
            AutoTokenizer.from_pretrained(path, trust_remote_code=False),
            AutoConfig.from_pretrained(path, trust_remote_code=False),
        )
    except ValueError as error:
        reason = first_line(error)
        raise JobError(f"model.pilot {name} cannot be read (code in a model folder is never run): {reason}") from error


def _check_models(run: Run, model_config: Any, pilot_path: Any, base_path: Any) -> None:
    from tc_ray.models.pilot.load import check_folders, check_packing
    from tc_ray.pilot.record import check_log

    try:
        check_folders(run.config, pilot_path, base_path)
        check_packing(run.config, model_config)
        if run.config.log.enabled:
            check_log(run.config, model_config)
    except (ValueError, OSError) as error:
        raise JobError(str(error)) from None


def _open_log(run: Run) -> None:
    """Make or open the table, take its lease if it is new, and start its Ledger."""
    from tc_ray.mistakelog.commit.ledger_actor import start_ledger
    from tc_ray.mistakelog.table.store import LogStore
    from tc_ray.pilot.record import log_metadata

    config, prepared = run.config, run.prepared
    metadata = log_metadata(config, prepared.model_config, prepared.tokenizer, prepared.inputs)
    LogStore.create(run.log, metadata)
    if run.lease is None:
        run.lease = RunLease.take(run.log, f"run {config.run.name}")
    run.ledger = start_ledger(
        run.log,
        metadata,
        writers=config.resources.pilot_workers,
        run=config.run.name,
        lease=run.lease.number,
        settings=config.log,
        buffer_rounds=config.copilot.buffer_rounds,
    )


def _print(*lines: str) -> None:
    for line in lines:
        print(visible(line), flush=True)
