"""A plan, and its lines for a terminal. Made by `run.plan.plan`; secrets are struck out of the lines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from tc_ray.cluster.session import cpus_needed
from tc_ray.config.redact import redact
from tc_ray.config.schema import RunConfig
from tc_ray.run.plan.data_estimate import DataEstimate, is_embedded
from tc_ray.run.plan.model_sizes import ModelSizes
from tc_ray.text import byte_size

Lines = list[tuple[str, str]]
"""Label and text; a line without a label continues the one above."""


@dataclass(frozen=True)
class Plan:
    """What a run would do. None is unknown, which `notes` explains."""

    config: RunConfig
    sizes: ModelSizes | None
    data: DataEstimate | None
    rounds: int | None
    copilot_steps: int | None
    log_bytes_per_round: int | None
    log_bytes: int | None
    free_bytes: int
    notes: list[str]
    refusals: list[str]

    def __str__(self) -> str:
        return "\n".join(redact(f"{label:<10} {text}".rstrip()) for label, text in _lines(self))


def _lines(plan: Plan) -> Lines:
    lines = [*_pilot(plan), *_copilot(plan), *_work(plan), *_log(plan)]
    for label, texts in (("note", plan.notes), ("refused", plan.refusals)):
        lines += zip([label, *[""] * len(texts)], texts, strict=False)
    return lines


def _pilot(plan: Plan) -> Lines:
    config, pilot, resources = plan.config, plan.config.pilot, plan.config.resources
    address = os.environ.get("RAY_ADDRESS")
    where = f"joins the cluster at {address}" if address else f"a local one is started ({os.cpu_count()} cores here)"
    workers = resources.pilot_workers + (resources.copilot_workers if config.log.enabled else 0)
    gpus = f" and {workers} GPUs" if resources.gpus else ""
    begin = ", random weights" if config.model.random_weights else ""
    trained = f"{_method(pilot, 'all weights')}, {_known(plan.sizes, 'pilot_trainable')} trained"
    return [
        ("run", f"{config.run.name} in {config.run.path}"),
        ("ray", f"{where}; the run asks for {cpus_needed(config):g} CPUs{gpus}"),
        ("pilot", f"{config.model.pilot}: {_known(plan.sizes, 'pilot')} parameters{begin}"),
        ("", f"{trained}; ZeRO stage {pilot.zero_stage}, {pilot.dtype}"),
        ("", _workers(plan, "pilot")),
    ]


def _copilot(plan: Plan) -> Lines:
    config, copilot = plan.config, plan.config.copilot
    if not config.log.enabled:
        return [("copilot", "none: log.enabled is false")]
    every = "every layer" if copilot.every == 1 else f"one layer in {copilot.every}"
    layers = f"layers {', '.join(map(str, copilot.layers))}" if copilot.layers else every
    base = config.model.copilot or config.model.pilot
    trained = f"{_method(copilot, 'full training')}, {_known(plan.sizes, 'copilot_trainable')} trained"
    return [
        ("copilot", f"{layers} of {base}: {_known(plan.sizes, 'copilot')} parameters"),
        ("", _copilot_shape(plan)),
        ("", f"{trained}; loss {copilot.loss}; {copilot.schedule}, {copilot.dtype}"),
        ("", _workers(plan, "copilot")),
    ]


def _copilot_shape(plan: Plan) -> str:
    pattern, sizes = f"attends to the Pilot by pattern {plan.config.copilot.pattern}", plan.sizes
    if sizes is None or sizes.copilot_hidden_size is None:
        return f"layers and width unknown; {pattern} (if it is decoder-only)"
    if sizes.encoder_decoder:  # its layers have both kinds of attention
        pattern = "each attends to earlier rows and to the Pilot"
    width = f"{sizes.copilot_hidden_size} (Pilot {sizes.hidden_size})"
    return f"{sizes.copilot_layers} layers, width {width}; {pattern}"


def _work(plan: Plan) -> Lines:
    config, pilot, copilot, data = plan.config, plan.config.pilot, plan.config.copilot, plan.data
    source = "the embedded data set" if is_embedded(config.data) else config.data.train
    rows = f"{_known(data, 'rows')} training rows, mean {_known(data, 'mean_tokens', '.0f')} tokens"
    split = f"{config.resources.pilot_workers} worker(s) x {pilot.micro_batch_size} x {config.accumulation_steps}"
    every = f"a checkpoint every {pilot.checkpoint_every_rounds}"
    lines = [
        ("data", source),
        ("", f"{rows}, {_known(data, 'mean_target_tokens', '.0f')} of them targets"),
        ("batch", f"{pilot.batch_size} examples per round = {split} accumulation step(s)"),
        ("rounds", f"{_known(plan, 'rounds')} ({pilot.epochs} epoch(s)), {every}"),
    ]
    if config.log.enabled:
        steps = f"{_known(plan, 'copilot_steps')} Copilot steps: {copilot.steps_per_round} per round"
        drawn = f"{copilot.batch_size} records each, drawn from the last {copilot.buffer_rounds} rounds"
        lines.append(("", f"{steps}, {drawn}"))
    return lines


def _log(plan: Plan) -> Lines:
    log = plan.config.log
    if not log.enabled:
        return []
    per_round, whole, free = map(_bytes, (plan.log_bytes_per_round, plan.log_bytes, plan.free_bytes))
    compressed = " before compression" if log.compression != "none" else ""
    layers = "all layers" if log.rationale == "all" else f"layers {', '.join(map(str, log.rationale))}"
    states = f"{log.pooling} over the Pilot's layers" if log.rationale == "pooled" else f"those of {layers}"
    question = ", and the encoder's output" if plan.sizes is not None and plan.sizes.encoder_decoder else ""
    dense = "the errors of all tokens of the vocabulary"
    errors = dense if log.error == "dense" else f"the {log.top_k} largest errors per token"
    lines = [
        ("log", f"{per_round} per round, {whole} for the run{compressed}; free disk {free}"),
        ("", f"states: {states} at {log.positions} positions{question}; {errors}"),
    ]
    if log.sampling == "fraction":
        lines.append(("", f"records: {100 * log.sampling_fraction:g}% of them"))
    elif log.sampling == "mistakes":
        bound = "" if log.mistake_loss is None else f" or with a loss above {log.mistake_loss:g}"
        lines.append(("", f"records: those with a target token that is not ranked first{bound}"))
    return lines


def _method(section: Any, full: str) -> str:
    return f"LoRA rank {section.lora.rank}" if section.method == "lora" else full


def _workers(plan: Plan, who: str) -> str:
    count, cpus, threads = (getattr(plan.config.resources, f"{who}_{of}") for of in ("workers", "cpus", "threads"))
    gpu = " and 1 GPU" if plan.config.resources.gpus else ""
    return f"{count} worker(s) x {cpus:g} CPU(s){gpu}, {threads} torch thread(s) each"


def _known(of: object | None, name: str, pattern: str = ",") -> str:
    """A number of the plan, or "unknown"."""
    value = getattr(of, name, None)
    return "unknown" if value is None else format(value, pattern)


def _bytes(value: int | None) -> str:
    return "unknown" if value is None else byte_size(value)
